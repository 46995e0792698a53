// Few rows of x. A step is one vector of words, P::L * 8 codes of one weight row; x is laid out so that the lanes meet.
#pragma once

#include "kernel.h"

namespace w4a16_cpu {
namespace {

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

template <class P>
void load_row_groups(const Call& call, const Grouping<P>& grouping, int64_t row, float* scratch, float* scale, float* zero) {
  const int64_t groups = call.K / call.group, words = call.K / 8, stride = grouping.stride();
  if (!grouping.spread) {
    load_groups<P>(call, row, 0, groups, scale, zero);
    // Past the row's end x is 0; were the scale there another row's NaN, it would count all the same.
    for (int64_t i = groups; i < stride; ++i) scale[i] = zero[i] = 0.0f;
    return;
  }
  float* zero_scratch = scratch + div_up(groups, P::L) * P::L;
  load_groups<P>(call, row, 0, groups, scratch, zero_scratch);
  for (int64_t i = 0; i < stride; ++i) {
    const int64_t g = i * 8 / call.group;
    scale[i] = i < words ? scratch[g] : 0.0f;
    zero[i] = i < words ? zero_scratch[g] : 0.0f;
  }
}

// sums[m * stride + r] of MB rows of x and P::kRows rows of the weight.
template <class P, int MB, bool Uniform>
void direct_tile(const Grouping<P>& grouping, const int32_t* const* codes, int64_t words, const float* scale, const float* zero,
                 const uint32_t* x, float* sums, int64_t stride) {
  constexpr int NR = P::kRows;
  const int64_t x_stride = grouping.steps * P::L * P::kUnits, g_stride = grouping.stride();
  const auto lane_group = P::load_words(grouping.lane_group);
  typename P::F acc[MB][NR];
  for (int m = 0; m < MB; ++m)
    for (int r = 0; r < NR; ++r) acc[m][r] = P::zero();

  int64_t g = 0, left = grouping.steps_per_group;
  for (int64_t step = 0; step < grouping.steps; ++step) {
    typename P::I word[NR];
    typename P::Z z[NR];
    const int64_t first = step * P::L, count = smaller(P::L, words - first);
    for (int r = 0; r < NR; ++r) {
      if (__builtin_expect(count == P::L, 1)) {
        word[r] = P::load_words(codes[r] + first);
        P::prefetch(codes[r] + first + NR * words);
      } else {
        alignas(64) int32_t tail[P::L] = {};
        memcpy(tail, codes[r] + first, count * 4);
        word[r] = P::load_words(tail);
      }
      const float* zr = zero + r * g_stride + g;
      z[r] = Uniform ? P::zero_uniform(*zr) : P::zero_lanes(P::permute(P::load(zr), lane_group));
    }
    typename P::F sum[MB][NR];
    const uint32_t* xs = x + step * P::L * P::kUnits;
#pragma GCC unroll 8
    for (int u = 0; u < P::kUnits; ++u) {
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
        const typename P::W w = P::template decode<Uniform>(word[r], u, z[r]);
#pragma GCC unroll 8
        for (int m = 0; m < MB; ++m) {
          const typename P::W xv = P::load_unit(xs + m * x_stride + u * P::L);
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
  for (int m = 0; m < MB; ++m)
    for (int r = 0; r < NR; ++r) sums[m * stride + r] = P::sum(acc[m][r]);
}

template <class P, bool Uniform, int MB = P::kDirectBlock>
void direct_rows(int64_t rows, const Grouping<P>& grouping, const int32_t* const* codes, int64_t words, const float* scale,
                 const float* zero, const uint32_t* x, float* sums, int64_t stride) {
  if constexpr (MB > 0) {
    if (rows < MB) return direct_rows<P, Uniform, MB - 1>(rows, grouping, codes, words, scale, zero, x, sums, stride);
    direct_tile<P, MB, Uniform>(grouping, codes, words, scale, zero, x, sums, stride);
  }
}

// x in steps: [M, steps, P::kUnits, P::L].
template <class P>
void lay_out_steps(const Call& call, const Grouping<P>& grouping, uint32_t* dst) {
  const int64_t words = call.K / 8, stride = grouping.steps * P::L * P::kUnits;
  run_parallel(call.M, div_up(1 << 14, call.K), [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(call.K + P::L);
    for (int64_t m = begin; m < end; ++m) {
      const void* row = x_row<P>(call, m, scratch);
      for (int64_t step = 0; step < grouping.steps; ++step) {
        uint32_t* out = dst + m * stride + step * P::L * P::kUnits;
        const int64_t first = step * P::L, count = smaller(P::L, words - first);
        if (count < P::L) memset(out, 0, P::L * P::kUnits * 4);
        for (int u = 0; u < P::kUnits; ++u)
          for (int64_t i = 0; i < count; ++i) out[u * P::L + i] = x_unit<P>(row, first + i, u);
      }
    }
  });
}

template <class P>
void linear_direct(const Call& call) {
  constexpr int64_t kUnit = 16;  // rows of the weight: what a thread takes at a time
  static_assert(kUnit % P::kRows == 0 && kUnit % P::L == 0 && kUnit <= P::kMaxCols);
  const Grouping<P> grouping(call);
  const int64_t words = call.K / 8, x_stride = grouping.steps * P::L * P::kUnits;
  Buffer<uint32_t> x(call.M * x_stride);
  lay_out_steps<P>(call, grouping, x);

  const int64_t units = div_up(call.N, kUnit), grain = div_up(1 << 16, kUnit * call.K * call.M);
  run_parallel(units, grain, [&](int64_t begin, int64_t end) {
    Buffer<float> groups(2 * P::kRows * grouping.stride()), scratch(2 * (call.K / call.group + P::L)), sums(call.M * kUnit);
    float *scale = groups, *zero = groups + P::kRows * grouping.stride();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n0 = unit * kUnit, cols = smaller(kUnit, call.N - n0);
      for (int64_t i = 0; i < cols; i += P::kRows) {
        const int32_t* codes[P::kRows];
        for (int r = 0; r < P::kRows; ++r) {
          const int64_t row = smaller(n0 + i + r, call.N - 1);  // past the end: the last row again, not stored
          codes[r] = call.codes + row * words;
          load_row_groups<P>(call, grouping, row, scratch, scale + r * grouping.stride(), zero + r * grouping.stride());
        }
        for (int64_t m = 0; m < call.M; m += P::kDirectBlock) {
          const int64_t rows = smaller(P::kDirectBlock, call.M - m);
          auto* tile = grouping.uniform ? &direct_rows<P, true> : &direct_rows<P, false>;
          tile(rows, grouping, codes, words, scale, zero, x + m * x_stride, sums + m * kUnit + i, kUnit);
        }
      }
      emit<P>(call, sums, kUnit, 0, call.M, n0, cols);
    }
  });
}

}  // namespace
}  // namespace w4a16_cpu
