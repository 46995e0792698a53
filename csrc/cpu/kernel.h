// The two algorithms, written once over a policy P: the vector operations of one instruction set (see portable.cpp for the list).
//
// direct.h   a few rows of x: the weight is read once, decoded in registers, lanes run along K.
// panel.h    many rows of x: a block of the weight is decoded into an L2-sized panel, lanes run along N, x is broadcast.
//
// Both multiply x by the exact code - zero and apply the scale to float32 sums that never span two groups, so that nothing is
// rounded before the sum. Every output is summed by one thread in an order that depends on the shapes only.
//
// These files are included after a `#pragma GCC target`. So everything here is in an anonymous namespace and no template of the
// standard library is instantiated: the linker merges inline functions of the same name, and a copy that was compiled for
// AVX-512 must not end up in code that runs without it.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "linear.h"

namespace w4a16_cpu {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into L2: past its end a stream of words is not worth a place in L1.
inline void prefetch(const int32_t* p) { __builtin_prefetch(p, 0, 2); }

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(aligned_alloc(64, div_up(count * sizeof(T) + 1, 64) * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

template <class F>
void run_parallel(int64_t count, int64_t grain, const F& body) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::u8 ? 1 : 2; }

inline const void* at(const void* base, Dtype dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

template <class P>
typename P::F load_as_float(const void* p, Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return P::load_bf16(static_cast<const uint16_t*>(p));
    case Dtype::f16: return P::load_f16(static_cast<const uint16_t*>(p));
    case Dtype::u8: return P::load_u8(static_cast<const uint8_t*>(p));
    default: return P::load(static_cast<const float*>(p));
  }
}

// dst[0..count) in float32, and zeros up to the next multiple of P::L.
template <class P>
void widen(const void* base, Dtype dtype, int64_t begin, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + P::L <= count; i += P::L) P::store(dst + i, load_as_float<P>(at(base, dtype, begin + i), dtype));
  if (i == count) return;
  alignas(64) char tail[P::L * 4] = {};
  memcpy(tail, at(base, dtype, begin + i), (count - i) * size_of(dtype));
  P::store(dst + i, load_as_float<P>(tail, dtype));
}

// Scales and zeros of groups first..first+count of one row, in float32 and in P's own form, padded as by widen.
template <class P>
void load_groups(const Call& call, int64_t row, int64_t first, int64_t count, float* scale, float* zero) {
  const int64_t begin = row * (call.K / call.group) + first;
  widen<P>(call.scales, call.scale_dtype, begin, count, scale);
  if (call.zeros == nullptr) {
    for (int64_t i = 0; i < count; i += P::L) P::store(zero + i, P::encode_zeros(P::set1(8.0f)));
    return;
  }
  widen<P>(call.zeros, call.zero_dtype, begin, count, zero);
  for (int64_t i = 0; i < count; i += P::L) P::store(zero + i, P::encode_zeros(P::load(zero + i)));
  if (call.zero_dtype != Dtype::u8) return;
  const uint8_t* stored = static_cast<const uint8_t*>(call.zeros) + begin;
  uint8_t highest = 0;
  for (int64_t i = 0; i < count; ++i) highest = stored[i] > highest ? stored[i] : highest;
  if (highest > 16) __atomic_store_n(call.bad_zero, static_cast<int>(highest), __ATOMIC_RELAXED);
}

// One row of x as P::Unit words are made of it: float32, or the bfloat16 values as they are.
template <class P>
const void* x_row(const Call& call, int64_t m, float* scratch) {
  const void* row = at(call.x, call.x_dtype, m * call.K);
  if (P::kPairs || call.x_dtype == Dtype::f32) return row;
  widen<P>(row, call.x_dtype, 0, call.K, scratch);
  return scratch;
}

// The u-th 32-bit unit of x for a word of codes. It faces what P::decode makes of step u: one float32 (nibble u), or a pair of
// bfloat16 (nibbles u and u + 4).
template <class P>
uint32_t x_unit(const void* row, int64_t word, int u) {
  if constexpr (P::kPairs) {
    const uint16_t* x = static_cast<const uint16_t*>(row) + word * 8;
    return x[u] | static_cast<uint32_t>(x[u + 4]) << 16;
  } else {
    uint32_t bits;
    memcpy(&bits, static_cast<const float*>(row) + word * 8 + u, 4);
    return bits;
  }
}

// Rows of x in equal blocks of at most `most`; the last one may be smaller.
struct Blocks {
  int64_t rows, block;
  Blocks(int64_t rows, int64_t most) : rows(rows), block(div_up(rows, div_up(rows, most))) {}
  int64_t count() const { return div_up(rows, block); }
  int64_t size(int64_t b) const { return smaller(block, rows - b * block); }
};

// Adds the bias and rounds, once: sums [rows, stride] -> out[m0.., n0..n0+cols).
template <class P>
void emit(const Call& call, const float* sums, int64_t stride, int64_t m0, int64_t rows, int64_t n0, int64_t cols) {
  alignas(64) float bias[P::kMaxCols] = {};
  if (call.bias != nullptr) widen<P>(call.bias, call.bias_dtype, n0, cols, bias);
  for (int64_t m = 0; m < rows; ++m) {
    char* out = static_cast<char*>(call.out) + ((m0 + m) * call.N + n0) * size_of(call.x_dtype);
    for (int64_t i = 0; i < cols; i += P::L) {
      const typename P::F y = P::add(P::load(sums + m * stride + i), P::load(bias + i));
      alignas(64) char rounded[P::L * 4];
      const bool whole = i + P::L <= cols;
      char* dst = whole ? out + i * size_of(call.x_dtype) : rounded;
      switch (call.x_dtype) {
        case Dtype::bf16: P::store_bf16(reinterpret_cast<uint16_t*>(dst), y); break;
        case Dtype::f16: P::store_f16(reinterpret_cast<uint16_t*>(dst), y); break;
        default: P::store(reinterpret_cast<float*>(dst), y);
      }
      if (!whole) memcpy(out + i * size_of(call.x_dtype), rounded, (cols - i) * size_of(call.x_dtype));
    }
  }
}

}  // namespace
}  // namespace w4a16_cpu
