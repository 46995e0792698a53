// Many rows of x. A panel is P::L * NV rows of the weight by kBlockK columns, decoded once and used for all rows of x.
#pragma once

#include "units.h"

namespace w4a16_cpu {
namespace {

constexpr int64_t kBlockK = 512;    // a panel of it and the rows of x that meet it stay in L2
constexpr int64_t kBlockM = 256;    // rows of x at a time

// Words first..first+count of `rows` (P::L of them), turned: columns[j] holds word j of every row.
template <class P>
void load_columns(const int32_t* const* rows, int64_t first, int64_t count, int32_t* columns) {
  for (int64_t j = 0; j < count; j += P::L) {
    typename P::I block[P::L];
    const int64_t width = smaller(P::L, count - j);
    for (int i = 0; i < P::L; ++i) {
      if (width == P::L) {
        prefetch(rows[i] + first + j + kBlockK / 8);  // for the next panel along K
        block[i] = P::load_words(rows[i] + first + j);
      } else {
        alignas(64) int32_t tail[P::L] = {};
        memcpy(tail, rows[i] + first + j, width * 4);
        block[i] = P::load_words(tail);
      }
    }
    P::transpose(block);
    for (int i = 0; i < P::L; ++i) P::store_words(columns + (j + i) * P::L, block[i]);
  }
}

// The weight rows of a tile as code - zero, for a range of K: [words, P::kUnits, columns] 32-bit units, a column for each row.
template <class P>
struct Panel {
  const int64_t words, group_words, groups;
  Buffer<uint32_t> units{kBlockK / 8 * P::kUnits * P::kMaxCols};
  Buffer<float> scale{groups * P::kMaxCols}, zero{groups * P::kMaxCols};  // [groups, columns]
  Buffer<float> row_scale{groups * P::kMaxCols + P::L}, row_zero{groups * P::kMaxCols + P::L};
  Buffer<int32_t> turned{kBlockK / 8 * P::L};

  explicit Panel(const Weight& shape) : words(shape.K / 8), group_words(shape.group / 8), groups(shape.K / shape.group) {}

  void begin(const Tile& tile) {
    load_groups<P>(tile, row_scale, row_zero);
    for (int64_t i = 0; i < tile.columns; ++i)
      for (int64_t g = 0; g < groups; ++g) {
        scale[g * tile.columns + i] = row_scale[i * groups + g];
        zero[g * tile.columns + i] = row_zero[i * groups + g];
      }
  }

  // Words first..last of K.
  void decode(const Tile& tile, int64_t first, int64_t last) {
    for (int64_t c = 0; c < tile.columns; c += P::L) {
      const int32_t* rows[P::L];
      for (int i = 0; i < P::L; ++i) rows[i] = tile.weight.codes + tile.row(c + i) * words;
      load_columns<P>(rows, first, last - first, turned);
      for (int64_t j = first; j < last;) {
        const int64_t g = j / group_words, end = smaller(last, (g + 1) * group_words);
        const typename P::Z z = P::zero_lanes(P::load(zero + g * tile.columns + c));
        for (; j < end; ++j) {
          const typename P::I word = P::load_words(turned + (j - first) * P::L);
#pragma GCC unroll 8
          for (int u = 0; u < P::kUnits; ++u)
            P::store_unit(units + ((j - first) * P::kUnits + u) * tile.columns + c, P::template decode<false>(word, u, z));
        }
      }
    }
  }
};

// sums[m, n] += scale[n] * (x[m] . units) over `steps` units of one group, from the offset-th of x on.
template <class P, int MB, int NV>
void panel_tile(const uint32_t* units, const uint32_t* const* x, int64_t offset, int64_t steps, const float* scale, float* sums) {
  const uint32_t* row[MB];
  typename P::F sum[MB][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) {
    row[m] = x[m] + offset;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[m][v] = P::zero();
  }
  for (int64_t t = 0; t < steps; ++t) {
    typename P::W w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = P::load_unit(units + (t * NV + v) * P::L);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      const typename P::W xv = P::broadcast_unit(row[m] + t);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] = P::mac(sum[m][v], w[v], xv);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* c = sums + (m * NV + v) * P::L;
      P::store(c, P::fma(sum[m][v], P::load(scale + v * P::L), P::load(c)));
    }
}

using PanelTile = void (*)(const uint32_t*, const uint32_t* const*, int64_t, int64_t, const float*, float*);

template <class P, int NV, int MB = P::kPanelRows>
PanelTile tile_of_rows(int64_t rows) {
  if constexpr (MB == 1) return &panel_tile<P, 1, NV>;
  else return rows == MB ? &panel_tile<P, MB, NV> : tile_of_rows<P, NV, MB - 1>(rows);
}

template <class P, int NV = P::kPanelVectors>
PanelTile tile_of(int64_t rows, int64_t vectors) {
  if constexpr (NV == 1) return tile_of_rows<P, 1>(rows);
  else return vectors == NV ? tile_of_rows<P, NV>(rows) : tile_of<P, NV - 1>(rows, vectors);
}

// sums [rows of the blocks first..last, columns] of a tile.
template <class P>
void multiply_tile(Panel<P>& panel, const Tile& tile, const uint32_t* const* x, const Blocks& blocks, int64_t first, int64_t last,
                   float* sums) {
  const int64_t rows = smaller(blocks.rows, last * blocks.block) - first * blocks.block;
  memset(sums, 0, rows * tile.columns * sizeof(float));
  panel.begin(tile);
  for (int64_t k = 0; k < panel.words; k += kBlockK / 8) {
    const int64_t k_end = smaller(panel.words, k + kBlockK / 8);
    panel.decode(tile, k, k_end);
    for (int64_t b = first; b < last; ++b) {
      const PanelTile multiply = tile_of<P>(blocks.size(b), tile.columns / P::L);
      for (int64_t j = k; j < k_end;) {
        const int64_t g = j / panel.group_words, end = smaller(k_end, (g + 1) * panel.group_words);
        multiply(panel.units + (j - k) * P::kUnits * tile.columns, x + b * blocks.block, j * P::kUnits, (end - j) * P::kUnits,
                 panel.scale + g * tile.columns, sums + (b - first) * blocks.block * tile.columns);
        j = end;
      }
    }
  }
}

// All tasks, each of up to kBlockM rows in the panel form. sink as for multiply_direct.
template <class P, class Sink>
void multiply_panel(const Task* tasks, int64_t count, const Sink& sink) {
  static_assert(P::kMaxCols == P::kPanelVectors * P::L && kBlockK % (8 * P::L) == 0);
  if (count == 0) return;
  const Weight& shape = tasks[0].weight;
  const int64_t panels = div_up(shape.N, P::kMaxCols);
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += tasks[i].count;
  // Few panels: split the rows of x as well, at the price of decoding a panel more than once. No sum is split.
  const int64_t splits = div_up(num_threads(), panels * count);

  Queue queue(count * panels * splits, P::kMaxCols * shape.K * div_up(rows, count * splits));
  queue.run([&] {
    Panel<P> panel(shape);
    Buffer<float> sums(kBlockM * P::kMaxCols);
    for (int64_t i, end; queue.take(i, end);) {
      for (; i < end; ++i) {
        const Task& task = tasks[i / (panels * splits)];
        const int64_t n0 = i / splits % panels * P::kMaxCols, split = i % splits;
        const Tile tile{task.weight, n0, div_up(smaller(P::kMaxCols, shape.N - n0), P::L) * P::L};
        const Blocks blocks(task.count, P::kPanelRows);
        const int64_t first = blocks.count() * split / splits, last = blocks.count() * (split + 1) / splits;
        if (first == last) continue;
        multiply_tile<P>(panel, tile, task.x, blocks, first, last, sums);
        const int64_t m0 = first * blocks.block;
        sink(task, tile, m0, smaller(blocks.rows, last * blocks.block) - m0, sums, tile.columns);
      }
    }
  });
}

}  // namespace
}  // namespace w4a16_cpu
