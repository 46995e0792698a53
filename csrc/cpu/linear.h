// y = x @ W^T + bias.
#pragma once

#include "direct.h"
#include "panel.h"

namespace w4a16_cpu {
namespace {

// Adds the bias and rounds, once.
template <class P>
struct LinearSink {
  const LinearCall& call;

  void operator()(const Task& task, const Tile& tile, int64_t m0, int64_t rows, const float* sums, int64_t stride) const {
    const int64_t cols = tile.stored();
    alignas(64) float bias[larger(P::kMaxCols, kUnit)] = {};
    if (call.bias != nullptr) widen<P>(call.bias, call.bias_dtype, tile.n0, cols, bias);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t out = (task.first + m0 + m) * call.weight.N + tile.n0;
      for (int64_t i = 0; i < cols; i += P::L) {
        const typename P::F y = P::add(P::load(sums + m * stride + i), P::load(bias + i));
        narrow<P>(y, call.x_dtype, static_cast<char*>(call.out) + (out + i) * size_of(call.x_dtype), cols - i);
      }
    }
  }
};

template <class P>
void linear(const LinearCall& call) {
  const Blocks blocks(call.M, kBlockM);
  const Form form = form_of<P>(blocks.block);
  const int64_t K = call.weight.K, stride = row_units<P>(form, K);
  Buffer<uint32_t> units(blocks.block * stride);
  Buffer<const uint32_t*> x(blocks.block);
  for (int64_t m = 0; m < blocks.block; ++m) x[m] = units + m * stride;

  for (int64_t b = 0; b < blocks.count(); ++b) {
    const int64_t m0 = b * blocks.block;
    const Task task{call.weight, x, form, blocks.size(b), m0, 0};
    run_parallel(task.count, div_up(1 << 16, K), [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(K + P::L);
      for (int64_t m = begin; m < end; ++m) lay_out_row<P>(call.x, call.x_dtype, m0 + m, K, form, scratch, units + m * stride);
    });
    if (form == Form::direct) multiply_direct<P>(&task, 1, LinearSink<P>{call});
    else multiply_panel<P>(&task, 1, LinearSink<P>{call});
  }
}

}  // namespace
}  // namespace w4a16_cpu
