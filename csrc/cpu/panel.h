// Many rows of x. A panel is P::L * NV rows of the weight by kBlockK columns, decoded once and used for all rows of x.
#pragma once

#include "kernel.h"

namespace w4a16_cpu {
namespace {

constexpr int64_t kBlockK = 512;    // a panel of it and the rows of x that meet it stay in L2
constexpr int64_t kBlockM = 256;    // rows of x laid out at a time

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

// The weight rows n0.. as code - zero, for a range of K: [words, P::kUnits, columns] 32-bit units, a column for each row.
template <class P>
struct Panel {
  const Call& call;
  int64_t n0 = 0, columns = 0;
  Buffer<uint32_t> units{kBlockK / 8 * P::kUnits * P::kMaxCols};
  Buffer<float> scale{call.K / call.group * P::kMaxCols}, zero{call.K / call.group * P::kMaxCols};  // [groups, columns]
  Buffer<float> row_scale{call.K / call.group + P::L}, row_zero{call.K / call.group + P::L};
  Buffer<int32_t> words{kBlockK / 8 * P::L};

  explicit Panel(const Call& call) : call(call) {}

  // Columns past the end of the weight repeat its last row; what they give is not stored.
  int64_t row_of(int64_t column) const { return smaller(n0 + column, call.N - 1); }

  void begin(int64_t n) {
    n0 = n;
    columns = div_up(smaller(P::kMaxCols, call.N - n0), P::L) * P::L;
    const int64_t groups = call.K / call.group;
    for (int64_t i = 0; i < columns; ++i) {
      load_groups<P>(call, row_of(i), 0, groups, row_scale, row_zero);
      for (int64_t g = 0; g < groups; ++g) {
        scale[g * columns + i] = row_scale[g];
        zero[g * columns + i] = row_zero[g];
      }
    }
  }

  // Words first..last of K.
  void decode(int64_t first, int64_t last) {
    for (int64_t c = 0; c < columns; c += P::L) {
      const int32_t* rows[P::L];
      for (int i = 0; i < P::L; ++i) rows[i] = call.codes + row_of(c + i) * (call.K / 8);
      load_columns<P>(rows, first, last - first, words);
      for (int64_t j = first; j < last;) {
        const int64_t g = j * 8 / call.group, end = smaller(last, (g + 1) * call.group / 8);
        const typename P::Z z = P::zero_lanes(P::load(zero + g * columns + c));
        for (; j < end; ++j) {
          const typename P::I word = P::load_words(words + (j - first) * P::L);
#pragma GCC unroll 8
          for (int u = 0; u < P::kUnits; ++u)
            P::store_unit(units + ((j - first) * P::kUnits + u) * columns + c, P::template decode<false>(word, u, z));
        }
      }
    }
  }
};

// sums[m, n] += scale[n] * (x . units) over `steps` units of one group. x is [steps, MB].
template <class P, int MB, int NV>
void panel_tile(const uint32_t* units, const uint32_t* x, int64_t steps, const float* scale, float* sums) {
  typename P::F sum[MB][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[m][v] = P::zero();
  for (int64_t t = 0; t < steps; ++t) {
    typename P::W w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = P::load_unit(units + (t * NV + v) * P::L);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      const typename P::W xv = P::broadcast_unit(x + t * MB + m);
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

using Tile = void (*)(const uint32_t*, const uint32_t*, int64_t, const float*, float*);

template <class P, int NV, int MB = P::kPanelRows>
Tile tile_of_rows(int64_t rows) {
  if constexpr (MB == 1) return &panel_tile<P, 1, NV>;
  else return rows == MB ? &panel_tile<P, MB, NV> : tile_of_rows<P, NV, MB - 1>(rows);
}

template <class P, int NV = P::kPanelVectors>
Tile tile_of(int64_t rows, int64_t vectors) {
  if constexpr (NV == 1) return tile_of_rows<P, 1>(rows);
  else return vectors == NV ? tile_of_rows<P, NV>(rows) : tile_of<P, NV - 1>(rows, vectors);
}

// Rows m0.. of x in units, block after block: [K / 8, P::kUnits, rows of the block].
template <class P>
void lay_out_blocks(const Call& call, int64_t m0, const Blocks& blocks, uint32_t* dst) {
  const int64_t words = call.K / 8;
  run_parallel(blocks.count(), div_up(1 << 16, call.K * blocks.block), [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(call.K + P::L);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t size = blocks.size(b);
      for (int64_t m = 0; m < size; ++m) {
        const void* row = x_row<P>(call, m0 + b * blocks.block + m, scratch);
        uint32_t* out = dst + b * blocks.block * words * P::kUnits + m;
        for (int64_t j = 0; j < words; ++j)
          for (int u = 0; u < P::kUnits; ++u) out[(j * P::kUnits + u) * size] = x_unit<P>(row, j, u);
      }
    }
  });
}

// Rows m0.. of the result, for the blocks first..last and the columns of the panel.
template <class P>
void multiply_panel(const Call& call, Panel<P>& panel, const uint32_t* x, int64_t m0, const Blocks& blocks, int64_t first,
                    int64_t last, float* sums) {
  const int64_t words = call.K / 8, columns = panel.columns;
  const int64_t rows = smaller(blocks.rows, last * blocks.block) - first * blocks.block;
  memset(sums, 0, rows * columns * sizeof(float));
  for (int64_t k = 0; k < words; k += kBlockK / 8) {
    const int64_t k_end = smaller(words, k + kBlockK / 8);
    panel.decode(k, k_end);
    for (int64_t b = first; b < last; ++b) {
      const int64_t size = blocks.size(b);
      const Tile tile = tile_of<P>(size, columns / P::L);
      const uint32_t* xb = x + b * blocks.block * words * P::kUnits;
      for (int64_t j = k; j < k_end;) {
        const int64_t g = j * 8 / call.group, end = smaller(k_end, (g + 1) * call.group / 8);
        tile(panel.units + (j - k) * P::kUnits * columns, xb + j * P::kUnits * size, (end - j) * P::kUnits,
             panel.scale + g * columns, sums + (b - first) * blocks.block * columns);
        j = end;
      }
    }
  }
  emit<P>(call, sums, columns, m0 + first * blocks.block, rows, panel.n0, smaller(columns, call.N - panel.n0));
}

template <class P>
void linear_panel(const Call& call) {
  static_assert(P::kMaxCols == P::kPanelVectors * P::L && kBlockK % (8 * P::L) == 0);
  const int64_t panels = div_up(call.N, P::kMaxCols), most = smaller(call.M, kBlockM);
  Buffer<uint32_t> x(most * call.K / 8 * P::kUnits);
  for (int64_t m0 = 0; m0 < call.M; m0 += kBlockM) {
    const Blocks blocks(smaller(kBlockM, call.M - m0), P::kPanelRows);
    lay_out_blocks<P>(call, m0, blocks, x);
    // Few panels: split the rows of x as well, at the price of decoding a panel more than once. No sum is split.
    const int64_t splits = smaller(blocks.count(), div_up(num_threads(), panels));
    const int64_t grain = div_up(1 << 16, P::kMaxCols * call.K * div_up(blocks.rows, splits));
    run_parallel(panels * splits, grain, [&](int64_t begin, int64_t end) {
      Panel<P> panel(call);
      Buffer<float> sums(kBlockM * P::kMaxCols);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t split = i % splits, first = blocks.count() * split / splits, last = blocks.count() * (split + 1) / splits;
        panel.begin(i / splits * P::kMaxCols);
        multiply_panel<P>(call, panel, x, m0, blocks, first, last, sums);
      }
    });
  }
}

template <class P>
void linear(const Call& call) {
  if (call.M < P::kPanelFrom) linear_direct<P>(call);
  else linear_panel<P>(call);
}

}  // namespace
}  // namespace w4a16_cpu
