// x as the algorithms read it: each row as 32-bit units, one float32 or (P::kPairs) two bfloat16 of eight neighbouring columns,
// in the order in which one of them meets the codes.
#pragma once

#include "kernel.h"

namespace w4a16_cpu {
namespace {

enum class Form {
  direct,  // [steps, P::kUnits, P::L]: a step is P::L words of codes, and lanes are words. Zeros past the end of the row
  panel,   // [words, P::kUnits]
};

// Some rows of x and the weight that they meet. Of several tasks at a time the weights differ in their place only.
struct Task {
  Weight weight;
  const uint32_t* const* x;  // each row in units of this form
  Form form;
  int64_t count;
  int64_t first;   // what the op calls the first row,
  int64_t expert;  // and the weight
};

template <class P>
Form form_of(int64_t rows) {
  return rows < P::kPanelFrom ? Form::direct : Form::panel;
}

// The units of a row of K values.
template <class P>
int64_t row_units(Form form, int64_t K) {
  return (form == Form::panel ? K / 8 : div_up(K, 8 * P::L) * P::L) * P::kUnits;
}

// Unit u of a word of codes. It faces what P::decode makes of step u: nibble u, or nibbles u and u + 4.
template <class P>
uint32_t unit_of(const void* values, int64_t word, int u) {
  if constexpr (P::kPairs) {
    const uint16_t* x = static_cast<const uint16_t*>(values) + word * 8;
    return x[u] | static_cast<uint32_t>(x[u + 4]) << 16;
  } else {
    uint32_t bits;
    memcpy(&bits, static_cast<const float*>(values) + word * 8 + u, 4);
    return bits;
  }
}

// Puts words first..first+count of a row in their places. values: float32, or bfloat16 if P::kPairs.
template <class P>
void put_words(Form form, const void* values, int64_t first, int64_t count, uint32_t* row) {
  const int64_t step = form == Form::direct ? P::L : 1;  // between the units of a word
  for (int64_t i = 0; i < count; ++i) {
    const int64_t word = first + i;
    uint32_t* dst = form == Form::direct ? row + word / P::L * P::L * P::kUnits + word % P::L : row + word * P::kUnits;
    for (int u = 0; u < P::kUnits; ++u) dst[u * step] = unit_of<P>(values, i, u);
  }
}

// The zeros past the end of a row.
template <class P>
void put_padding(Form form, int64_t K, uint32_t* row) {
  const int64_t words = K / 8, last = words / P::L * P::L;
  if (form == Form::panel || last == words) return;
  for (int u = 0; u < P::kUnits; ++u)
    for (int64_t lane = words - last; lane < P::L; ++lane) row[last * P::kUnits + u * P::L + lane] = 0;
}

// Row m of x [.., K]. scratch: K + P::L floats.
template <class P>
void lay_out_row(const void* x, Dtype dtype, int64_t m, int64_t K, Form form, float* scratch, uint32_t* row) {
  const void* values = at(x, dtype, m * K);
  if (!P::kPairs && dtype != Dtype::f32) {
    widen<P>(values, dtype, 0, K, scratch);
    values = scratch;
  }
  put_words<P>(form, values, 0, K / 8, row);
  put_padding<P>(form, K, row);
}

}  // namespace
}  // namespace w4a16_cpu
