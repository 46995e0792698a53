// Few rows of x. A step is one vector of words, P::L * 8 codes of one weight row; x is laid out so that the lanes meet.
#pragma once

#include "kernel.h"

namespace w4a16_cpu {
namespace {

constexpr int64_t kUnit = 16;  // rows of the weight: what a thread takes at a time

// How the groups lie in the steps. Either a step lies in one group, or each lane looks its group up among the step's
// `per_step` ones. Groups that fit neither way are spread out, one scale a word.
template <class P>
struct Grouping {
  static constexpr int64_t kStep = P::L * 8;
  bool spread, uniform;
  int64_t steps, stored, per_step, steps_per_group;
  alignas(64) int32_t lane_group[P::L];

  explicit Grouping(const Call& call) {
    uniform = call.group % kStep == 0;
    spread = !uniform && kStep % call.group != 0;
    steps = div_up(call.K, kStep);
    per_step = uniform ? 1 : spread ? P::L : kStep / call.group;
    steps_per_group = uniform ? call.group / kStep : 1;
    stored = uniform ? call.K / call.group : steps * per_step;
    for (int i = 0; i < P::L; ++i) lane_group[i] = static_cast<int32_t>(i * per_step / P::L);
  }
  // A vector load may begin at any group.
  int64_t stride() const { return stored + P::L; }
};

// Past the row's end x is 0, and so is the scale: were it another row's NaN, it would count all the same.
template <class P>
void load_row_groups(const Call& call, const Grouping<P>& grouping, int64_t row, float* scratch, float* scale, float* zero) {
  const int64_t groups = call.K / call.group, words = call.K / 8;
  if (!grouping.spread) return load_groups<P>(call, row, 0, groups, scale, zero);
  float* zero_scratch = scratch + div_up(groups, P::L) * P::L;
  load_groups<P>(call, row, 0, groups, scratch, zero_scratch);
  for (int64_t i = 0; i < grouping.stored; ++i) {
    const int64_t g = i * 8 / call.group;
    scale[i] = i < words ? scratch[g] : 0.0f;
    zero[i] = i < words ? zero_scratch[g] : 0.0f;
  }
}

// sums[m * kUnit + r] of MB rows of x and NR rows of the weight.
template <class P, int MB, int NR, bool Uniform>
void direct_tile(const Grouping<P>& grouping, const int32_t* const* codes, int64_t words, const float* scale, const float* zero,
                 const uint32_t* x, float* sums) {
  const int64_t g_stride = grouping.stride();
  const auto lane_group = P::load_words(grouping.lane_group);
  typename P::F acc[MB][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) acc[m][r] = P::zero();

  int64_t g = 0, left = grouping.steps_per_group;
  for (int64_t step = 0; step < grouping.steps; ++step) {
    typename P::I word[NR];
    typename P::Z z[NR];
    const int64_t first = step * P::L, count = smaller(P::L, words - first);
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      if (__builtin_expect(count == P::L, 1)) {
        word[r] = P::load_words(codes[r] + first);
        prefetch(codes[0] + NR * words + (step * NR + r) * P::L);  // the next NR rows, in the order of memory
      } else {
        alignas(64) int32_t tail[P::L] = {};
        memcpy(tail, codes[r] + first, count * 4);
        word[r] = P::load_words(tail);
      }
      const float* zr = zero + r * g_stride + g;
      z[r] = Uniform ? P::zero_uniform(zr) : P::zero_lanes(P::permute(P::load(zr), lane_group));
    }
    typename P::F sum[MB][NR];
    const uint32_t* xs = x + step * P::kUnits * MB * P::L;
#pragma GCC unroll 8
    for (int u = 0; u < P::kUnits; ++u) {
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
        const typename P::W w = P::template decode<Uniform>(word[r], u, z[r]);
#pragma GCC unroll 8
        for (int m = 0; m < MB; ++m) {
          const typename P::W xv = P::load_unit(xs + (u * MB + m) * P::L);
          sum[m][r] = u == 0 ? P::first(w, xv) : P::mac(sum[m][r], w, xv);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const float* sr = scale + r * g_stride + g;
      const typename P::F s = Uniform ? P::set1(*sr) : P::permute(P::load(sr), lane_group);
#pragma GCC unroll 8
      for (int m = 0; m < MB; ++m) acc[m][r] = P::fma(sum[m][r], s, acc[m][r]);
    }
    if (--left == 0) {
      g += grouping.per_step;
      left = grouping.steps_per_group;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) sums[m * kUnit + r] = P::sum(acc[m][r]);
}

// The same for `rows` <= MB rows of x and kUnit rows of the weight, NR at a time: as many as the registers hold sums of.
template <class P, bool Uniform, int MB = P::kDirectRows>
void direct_unit(int64_t rows, const Grouping<P>& grouping, const int32_t* const* codes, int64_t words, const float* scale,
                 const float* zero, const uint32_t* x, float* sums) {
  if constexpr (MB > 1) {
    if (rows < MB) return direct_unit<P, Uniform, MB - 1>(rows, grouping, codes, words, scale, zero, x, sums);
  }
  constexpr int NR = P::direct_columns(MB);
  for (int64_t i = 0; i < kUnit; i += NR) {
    const int64_t g = i * grouping.stride();
    direct_tile<P, MB, NR, Uniform>(grouping, codes + i, words, scale + g, zero + g, x, sums + i);
  }
}

// x in units, block after block: [steps, P::kUnits, rows of the block, P::L].
template <class P>
void lay_out_steps(const Call& call, const Grouping<P>& grouping, const Blocks& blocks, uint32_t* dst) {
  const int64_t words = call.K / 8, row_units = grouping.steps * P::kUnits * P::L;
  run_parallel(call.M, div_up(1 << 16, call.K), [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(call.K + P::L);
    for (int64_t m = begin; m < end; ++m) {
      const void* row = x_row<P>(call, m, scratch);
      const int64_t b = m / blocks.block, stride = blocks.size(b) * P::L;
      uint32_t* out = dst + b * blocks.block * row_units + m % blocks.block * P::L;
      for (int64_t first = 0; first < grouping.steps * P::L; first += P::L) {
        const int64_t count = smaller(P::L, words - first);
        for (int u = 0; u < P::kUnits; ++u, out += stride) {
          for (int64_t i = 0; i < count; ++i) out[i] = x_unit<P>(row, first + i, u);
          for (int64_t i = count; i < P::L; ++i) out[i] = 0;
        }
      }
    }
  });
}

template <class P>
void linear_direct(const Call& call) {
  static_assert(kUnit % P::L == 0 && kUnit <= P::kMaxCols);
  const Grouping<P> grouping(call);
  const Blocks blocks(call.M, P::kDirectRows);
  const int64_t words = call.K / 8, row_units = grouping.steps * P::kUnits * P::L;
  Buffer<uint32_t> x(call.M * row_units);
  lay_out_steps<P>(call, grouping, blocks, x);

  const auto unit = grouping.uniform ? &direct_unit<P, true> : &direct_unit<P, false>;
  run_parallel(div_up(call.N, kUnit), div_up(1 << 16, kUnit * call.K * call.M), [&](int64_t begin, int64_t end) {
    const int64_t stride = grouping.stride();
    Buffer<float> scale(kUnit * stride), zero(kUnit * stride), scratch(2 * (call.K / call.group + P::L)), sums(call.M * kUnit);
    for (int64_t n0 = begin * kUnit; n0 < end * kUnit; n0 += kUnit) {
      const int32_t* codes[kUnit];
      for (int r = 0; r < kUnit; ++r) {
        const int64_t row = smaller(n0 + r, call.N - 1);  // past the end: the last row again, not stored
        codes[r] = call.codes + row * words;
        load_row_groups<P>(call, grouping, row, scratch, scale + r * stride, zero + r * stride);
      }
      for (int64_t b = 0, m = 0; b < blocks.count(); ++b, m += blocks.block)
        unit(blocks.size(b), grouping, codes, words, scale, zero, x + m * row_units, sums + m * kUnit);
      emit<P>(call, sums, kUnit, 0, call.M, n0, smaller(kUnit, call.N - n0));
    }
  });
}

}  // namespace
}  // namespace w4a16_cpu
