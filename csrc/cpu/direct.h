// Few rows of x. A step is one vector of words, P::L * 8 codes of one weight row; x is laid out so that the lanes meet.
#pragma once

#include "units.h"

namespace w4a16_cpu {
namespace {

constexpr int64_t kUnit = 16;           // rows of the weight: what a thread takes at a time
constexpr int64_t kAhead = 2048;        // words that are fetched before they are read, or a unit if that is more

// How the groups lie in the steps. Either a step lies in one group, or each lane looks its group up among the step's
// `per_step` ones. Groups that fit neither way are spread out, one scale a word.
template <class P>
struct Grouping {
  static constexpr int64_t kStep = P::L * 8;
  int64_t words, group_words, groups;
  bool spread, uniform;
  int64_t steps, stored, per_step, steps_per_group;
  alignas(64) int32_t lane_group[P::L];

  explicit Grouping(const Weight& weight)
      : words(weight.K / 8), group_words(weight.group / 8), groups(weight.K / weight.group) {
    uniform = weight.group % kStep == 0;
    spread = !uniform && kStep % weight.group != 0;
    steps = div_up(weight.K, kStep);
    per_step = uniform ? 1 : spread ? P::L : kStep / weight.group;
    steps_per_group = uniform ? weight.group / kStep : 1;
    stored = uniform ? groups : steps * per_step;
    for (int i = 0; i < P::L; ++i) lane_group[i] = static_cast<int32_t>(i * per_step / P::L);
  }
};

// The groups of a unit as direct_tile reads them: [kUnit, stored], and P::L more, for a vector load may begin at any group.
template <class P>
struct UnitGroups {
  const Grouping<P>& grouping;
  Buffer<float> scale{kUnit * grouping.stored + P::L}, zero{kUnit * grouping.stored + P::L};
  Buffer<float> packed_scale{kUnit * grouping.groups + P::L}, packed_zero{kUnit * grouping.groups + P::L};

  explicit UnitGroups(const Grouping<P>& grouping) : grouping(grouping) {}

  void load(const Tile& tile) {
    if (grouping.stored == grouping.groups) return load_groups<P>(tile, scale, zero);
    load_groups<P>(tile, packed_scale, packed_zero);
    for (int64_t r = 0; r < kUnit; ++r) {
      expand(packed_scale + r * grouping.groups, scale + r * grouping.stored);
      expand(packed_zero + r * grouping.groups, zero + r * grouping.stored);
    }
  }

  // Past the row's end x is 0, and so is the scale: were it another row's NaN, it would count all the same.
  void expand(const float* packed, float* dst) const {
    const int64_t end = grouping.spread ? grouping.words : grouping.groups;
    for (int64_t i = 0; i < end; ++i) dst[i] = packed[grouping.spread ? i / grouping.group_words : i];
    for (int64_t i = end; i < grouping.stored; ++i) dst[i] = 0.0f;
  }
};

// sums[m * kUnit + r] of MB rows of x and NR rows of the weight. The NR rows at `next` are fetched meanwhile, from front to
// end: what the processor then fetches by itself, seeing addresses go up, is what will be read.
template <class P, int MB, int NR, bool Uniform>
void direct_tile(const Grouping<P>& grouping, const int32_t* const* codes, const int32_t* next, const float* scale, const float* zero,
                 const uint32_t* const* x, float* sums) {
  const int64_t words = grouping.words, stored = grouping.stored, per_step = grouping.per_step;
  const auto lane_group = P::load_words(grouping.lane_group);
  typename P::F acc[MB][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) acc[m][r] = P::zero();

  for (int64_t first = 0; first < words; scale += per_step, zero += per_step) {
    typename P::Z z[NR];
    typename P::F sum[MB][NR];
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const float* zr = zero + r * stored;
      z[r] = Uniform ? P::zero_uniform(zr) : P::zero_lanes(P::permute(P::load(zr), lane_group));
#pragma GCC unroll 8
      for (int m = 0; m < MB; ++m) sum[m][r] = P::zero();
    }
    const int64_t end = first + (Uniform ? grouping.group_words : P::L);
    for (; first < end; first += P::L) {
      typename P::I word[NR];
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
        if (Uniform || __builtin_expect(words - first >= P::L, 1)) {
          word[r] = P::load_words(codes[r] + first);
          prefetch(next + (first * NR + r * P::L));
        } else {
          alignas(64) int32_t tail[P::L] = {};
          memcpy(tail, codes[r] + first, (words - first) * 4);
          word[r] = P::load_words(tail);
        }
      }
#pragma GCC unroll 8
      for (int u = 0; u < P::kUnits; ++u) {
        typename P::W w[NR];
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) w[r] = P::template decode<Uniform>(word[r], u, z[r]);
#pragma GCC unroll 8
        for (int m = 0; m < MB; ++m) {
          const typename P::W xv = P::load_unit(x[m] + first * P::kUnits + u * P::L);
#pragma GCC unroll 8
          for (int r = 0; r < NR; ++r) sum[m][r] = P::mac(sum[m][r], w[r], xv);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const float* sr = scale + r * stored;
      const typename P::F s = Uniform ? P::set1(*sr) : P::permute(P::load(sr), lane_group);
#pragma GCC unroll 8
      for (int m = 0; m < MB; ++m) acc[m][r] = P::fma(sum[m][r], s, acc[m][r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) sums[m * kUnit + r] = P::sum(acc[m][r]);
}

// The same for `rows` <= MB rows of x and kUnit rows of the weight, NR at a time: as many as the registers hold sums of.
template <class P, bool Uniform, int MB = P::kDirectRows>
void direct_unit(int64_t rows, const Grouping<P>& grouping, const int32_t* const* codes, const float* scale, const float* zero,
                 const uint32_t* const* x, float* sums) {
  if constexpr (MB > 1) {
    if (rows < MB) return direct_unit<P, Uniform, MB - 1>(rows, grouping, codes, scale, zero, x, sums);
  }
  constexpr int NR = P::direct_columns(MB);
  for (int64_t i = 0; i < kUnit; i += NR) {
    const int64_t g = i * grouping.stored;
    direct_tile<P, MB, NR, Uniform>(grouping, codes + i, codes[kUnit + i], scale + g, zero + g, x, sums + i);
  }
}

// All tasks, each of fewer than P::kPanelFrom rows in the direct form. sink(task, tile, first row, rows, sums [rows, stride], stride).
template <class P, class Sink>
void multiply_direct(const Task* tasks, int64_t count, const Sink& sink) {
  static_assert(kUnit % P::L == 0);
  if (count == 0) return;
  const Weight& shape = tasks[0].weight;
  const Grouping<P> grouping(shape);
  const auto unit = grouping.uniform ? &direct_unit<P, true> : &direct_unit<P, false>;
  const int64_t units = div_up(shape.N, kUnit), words = shape.K / 8;
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += tasks[i].count;

  Queue queue(count * units, kUnit * shape.K * div_up(rows, count));
  queue.run([&] {
    UnitGroups<P> groups(grouping);
    Buffer<float> sums(P::kPanelFrom * kUnit);
    const int32_t* codes[2 * kUnit];  // and those of a later unit, to be fetched
    for (Items items(queue, div_up(kAhead, kUnit * words)); items.any(); items.advance()) {
      const int64_t i = items.now(), later = items.later();
      const Task& task = tasks[i / units];
      const Tile tile{task.weight, i % units * kUnit, kUnit};
      const Tile later_tile{tasks[later / units].weight, later % units * kUnit, kUnit};
      for (int64_t r = 0; r < kUnit; ++r) {
        codes[r] = tile.weight.codes + tile.row(r) * words;
        codes[kUnit + r] = later_tile.weight.codes + later_tile.row(r) * words;
      }
      groups.load(tile);
      const Blocks blocks(task.count, P::kDirectRows);
      for (int64_t b = 0, m = 0; b < blocks.count(); ++b, m += blocks.block)
        unit(blocks.size(b), grouping, codes, groups.scale, groups.zero, task.x + m, sums + m * kUnit);
      sink(task, tile, 0, task.count, sums, kUnit);
    }
  });
}

}  // namespace
}  // namespace w4a16_cpu
