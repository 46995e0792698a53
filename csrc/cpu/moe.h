// Routed experts: for the tokens of every selected expert gate/up projection, activation and down projection; then each token's
// sum.
#pragma once

#include "activation.h"
#include "direct.h"
#include "panel.h"

namespace w4a16_cpu {
namespace {

constexpr int64_t kBlockPairs = 1 << 14;     // (token, slot) pairs at a time: bounds what lies between the projections
constexpr int64_t kSumsPerThread = 1 << 20;  // float32 results of the down projection at a time: they stay in the cache
constexpr int64_t kStripe = 48;              // a multiple of every tile

// The (token, slot) pairs of some tokens, sorted by expert. Those with a negative id are left out.
struct Routing {
  Buffer<int64_t> begin;   // [E + 1]: the place where an expert's pairs begin
  Buffer<int32_t> pairs;   // by place: t * top_k + j
  Buffer<int32_t> places;  // by pair; -1 is left out

  Routing(const int32_t* ids, int64_t count, int64_t E) : begin(E + 1), pairs(count), places(count) {
    Buffer<int64_t> next(E);
    memset(next, 0, E * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] >= 0) ++next[ids[i]];
    begin[0] = 0;
    for (int64_t e = 0; e < E; ++e) {
      begin[e + 1] = begin[e] + next[e];
      next[e] = begin[e];
    }
    for (int64_t i = 0; i < count; ++i) {
      places[i] = ids[i] < 0 ? -1 : static_cast<int32_t>(next[ids[i]]++);
      if (ids[i] >= 0) pairs[places[i]] = static_cast<int32_t>(i);
    }
  }
};

// Some tokens of a call, and the tasks that they make: rows of x and of h stand in the order of the experts ("places").
template <class P>
struct Tokens {
  const MoeCall& call;
  const int64_t t0, T;
  const float* const weights = call.weights + t0 * call.top_k;
  const Routing routing{call.ids + t0 * call.top_k, T * call.top_k, call.E};
  const int64_t places = routing.begin[call.E];
  const int64_t h_stride = row_units<P>(Form::direct, call.w2.K);
  const Buffer<uint32_t> h{places * h_stride};                   // act(W13 x)
  const Buffer<const uint32_t*> x_rows{places}, h_rows{places};  // each in the form of its task
  const int64_t most = call.E + places / kBlockM;
  const Buffer<Task> tasks{most};  // the direct ones from the front, the others from the back; without weights and x
  int64_t direct = 0, panel = most;

  Tokens(const MoeCall& call, int64_t t0, int64_t T) : call(call), t0(t0), T(T) {
    for (int64_t e = 0; e < call.E; ++e) {
      const int64_t begin = routing.begin[e];
      const Blocks blocks(routing.begin[e + 1] - begin, kBlockM);
      const Form form = form_of<P>(blocks.block);
      for (int64_t b = 0; b < blocks.count(); ++b)
        tasks[form == Form::direct ? direct++ : --panel] = {{}, nullptr, form, blocks.size(b), begin + b * blocks.block, e};
    }
  }

  // f(task) for all of them.
  template <class F>
  void each(const F& f) const {
    for (int64_t i = 0; i < direct; ++i) f(tasks[i]);
    for (int64_t i = panel; i < most; ++i) f(tasks[i]);
  }
};

// values[0..count) / scale, in fp8's values. Reads and writes up to the next multiple of P::L.
template <class P>
void round_to_fp8(float* values, int64_t count, float scale) {
  for (int64_t i = 0; i < count; i += P::L) P::store(values + i, to_e4m3(P::load(values + i) / P::set1(scale)));
}

// Row m of x in fp8's values. scratch: 2 (K + P::L) floats.
template <class P>
void lay_out_fp8_row(const MoeCall& call, int64_t m, Form form, float* scratch, uint32_t* row) {
  const int64_t K = call.w13.K;
  widen<P>(call.x, call.x_dtype, m * K, K, scratch);
  round_to_fp8<P>(scratch, K, call.x_scale);
  const void* values = scratch;
  if constexpr (P::kPairs) {
    uint16_t* narrow = reinterpret_cast<uint16_t*>(scratch + K + P::L);
    for (int64_t i = 0; i < K; i += P::L) P::store_bf16(narrow + i, P::load(scratch + i));
    values = narrow;
  }
  put_words<P>(form, values, 0, K / 8, row);
  put_padding<P>(form, K, row);
}

// Sets the rows of x and h. units: room for T rows of x in each form; those that some task needs are made.
template <class P>
void lay_out_tokens(const Tokens<P>& tokens, uint32_t* const* units) {
  const MoeCall& call = tokens.call;
  const int64_t K = call.w13.K;
  const Buffer<bool> needed(2 * tokens.T);
  memset(needed, 0, 2 * tokens.T);
  tokens.each([&](const Task& task) {
    const int form = static_cast<int>(task.form);
    for (int64_t s = task.first; s < task.first + task.count; ++s) {
      const int64_t t = tokens.routing.pairs[s] / call.top_k;
      needed[2 * t + form] = true;
      tokens.x_rows[s] = units[form] + t * row_units<P>(task.form, K);
      tokens.h_rows[s] = tokens.h + s * tokens.h_stride;
      if (call.mxfp4 && call.I != call.w2.K) memset(tokens.h + s * tokens.h_stride, 0, tokens.h_stride * sizeof(uint32_t));
      put_padding<P>(task.form, call.w2.K, tokens.h + s * tokens.h_stride);
    }
  });
  run_parallel(2 * tokens.T, div_up(1 << 16, K), [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(2 * (K + P::L));
    for (int64_t i = begin; i < end; ++i) {
      const Form form = static_cast<Form>(i % 2);
      uint32_t* row = units[i % 2] + i / 2 * row_units<P>(form, K);
      if (!needed[i]) continue;
      if (call.fp8) lay_out_fp8_row<P>(call, tokens.t0 + i / 2, form, scratch, row);
      else lay_out_row<P>(call.x, call.x_dtype, tokens.t0 + i / 2, K, form, scratch, row);
    }
  });
}

// rows times the rows n0..n0+N of each expert's weight.
template <class P, class Sink>
void multiply_experts(const Tokens<P>& tokens, const Weight& weight, int64_t n0, int64_t N, const uint32_t* const* rows,
                      const Sink& sink) {
  tokens.each([&](Task& task) {
    task.weight = weight.rows(task.expert * weight.N + n0, N);
    task.x = rows + task.first;
  });
  multiply_direct<P>(tokens.tasks, tokens.direct, sink);
  multiply_panel<P>(tokens.tasks + tokens.panel, tokens.most - tokens.panel, sink);
}

// The part of a bias [E, N] that goes with a tile whose weight begins at row `first`. Without a bias, left as it is.
template <class P>
void load_bias(const void* bias, Dtype dtype, int64_t first, const Tile& tile, float* dst) {
  if (bias == nullptr) return;
  for (int64_t i = 0, run; i < tile.stored(); i += run) {
    run = smaller(tile.run(i), tile.stored() - i);
    widen<P>(bias, dtype, first + tile.row(i), run, dst + i);
  }
}

// Sums of the first projection -> act(h), in units.
template <class P>
struct Activate {
  const Tokens<P>& tokens;

  static constexpr int64_t kMost = larger(P::kMaxCols, kUnit) + P::L;

  void operator()(const Task& task, const Tile& tile, int64_t m0, int64_t rows, const float* sums, int64_t stride) const {
    const MoeCall& call = tokens.call;
    alignas(64) float bias[kMost] = {}, h[kMost] = {}, gate[kMost] = {}, up[kMost] = {}, out[kMost] = {};
    load_bias<P>(call.bias13, call.bias13_dtype, task.expert * call.w13.N, tile, bias);
    const int64_t gates = call.gate_up == GateUp::none ? 1 : 2, count = tile.stored() / gates;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t place = task.first + m0 + m;
      const typename P::F weight = P::set1(call.weight_on_input ? tokens.weights[tokens.routing.pairs[place]] : call.x_scale);
      for (int64_t i = 0; i < tile.columns; i += P::L)
        P::store(h + i, P::fma(P::load(sums + m * stride + i), weight, P::load(bias + i)));
      if (call.gate_up == GateUp::interleaved) {
        for (int64_t i = 0; i < count; ++i) {
          gate[i] = h[2 * i];
          up[i] = h[2 * i + 1];
        }
        activate<P>(call, gate, up, count, out);
      } else {
        activate<P>(call, h, h + count, count, out);
      }
      if (call.fp8) round_to_fp8<P>(out, count, call.h_scale);
      for (int64_t i = count; i % 8 != 0; ++i) out[i] = 0.0f;  // to the end of a word
      keep(task.form, out, tile.n0 / gates, count, tokens.h + place * tokens.h_stride);
    }
  }

  static void keep(Form form, const float* values, int64_t first, int64_t count, uint32_t* row) {
    if constexpr (P::kPairs) {
      alignas(64) uint16_t rounded[kMost];
      for (int64_t i = 0; i < count; i += P::L) P::store_bf16(rounded + i, P::load(values + i));
      put_words<P>(form, rounded, first / 8, div_up(count, 8), row);
    } else if (form == Form::panel) {
      memcpy(row + first, values, count * 4);  // units as they are; a tile need not be whole words
    } else {
      put_words<P>(form, values, first / 8, div_up(count, 8), row);
    }
  }
};

// Sums of the second projection -> the terms of the tokens' sums, [places, stride].
template <class P>
struct KeepTerms {
  const Tokens<P>& tokens;
  int64_t n0;
  float* terms;
  int64_t terms_stride;

  void operator()(const Task& task, const Tile& tile, int64_t m0, int64_t rows, const float* sums, int64_t stride) const {
    const MoeCall& call = tokens.call;
    alignas(64) float bias[larger(P::kMaxCols, kUnit)] = {};
    load_bias<P>(call.bias2, call.bias2_dtype, task.expert * call.w2.N + n0, tile, bias);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t place = task.first + m0 + m;
      const typename P::F weight = P::set1(call.weight_on_input ? 1.0f : tokens.weights[tokens.routing.pairs[place]]);
      for (int64_t i = 0; i < tile.columns; i += P::L) {
        const typename P::F y = P::fma(P::load(sums + m * stride + i), P::set1(call.h_scale), P::load(bias + i));
        P::store(terms + place * terms_stride + tile.n0 + i, P::fma(y, weight, P::zero()));
      }
    }
  }
};

// The tokens' results, columns n0..n0+N: their terms in the order of the slots, rounded once.
template <class P>
void sum_terms(const Tokens<P>& tokens, int64_t n0, int64_t N, const float* terms, int64_t stride) {
  const MoeCall& call = tokens.call;
  run_parallel(tokens.T, div_up(1 << 15, N * call.top_k), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* places = tokens.routing.places + t * call.top_k;
      const int64_t out = (tokens.t0 + t) * call.w2.N + n0;
      for (int64_t i = 0; i < N; i += P::L) {
        typename P::F sum = P::zero();
        for (int64_t j = 0; j < call.top_k; ++j)
          if (places[j] >= 0) sum = P::add(sum, P::load(terms + places[j] * stride + i));
        sum = P::fma(sum, P::set1(call.routed_scaling), P::zero());
        narrow<P>(sum, call.x_dtype, static_cast<char*>(call.out) + (out + i) * size_of(call.x_dtype), N - i);
      }
    }
  });
}

template <class P>
void moe_block(const MoeCall& call, int64_t t0, int64_t T) {
  static_assert(kStripe % P::kMaxCols == 0 && kStripe % kUnit == 0);
  const Tokens<P> tokens(call, t0, T);
  {
    const Buffer<uint32_t> direct(T * row_units<P>(Form::direct, call.w13.K)), panel(T * row_units<P>(Form::panel, call.w13.K));
    uint32_t* const units[2] = {direct, panel};
    lay_out_tokens<P>(tokens, units);
    multiply_experts<P>(tokens, call.w13, 0, call.w13.N, tokens.x_rows, Activate<P>{tokens});
  }
  const int64_t H = call.w2.N, room = kSumsPerThread * num_threads() / larger(1, tokens.places);
  const int64_t stripe = smaller(H, larger(1, room / kStripe) * kStripe), stride = div_up(stripe, kUnit) * kUnit;
  const Buffer<float> terms(tokens.places * stride);
  for (int64_t n0 = 0; n0 < H; n0 += stripe) {
    const int64_t N = smaller(stripe, H - n0);
    multiply_experts<P>(tokens, call.w2, n0, N, tokens.h_rows, KeepTerms<P>{tokens, n0, terms, stride});
    sum_terms<P>(tokens, n0, N, terms, stride);
  }
}

template <class P>
void moe(const MoeCall& call) {
  const Blocks blocks(call.T, larger(1, kBlockPairs / larger(1, call.top_k)));
  for (int64_t b = 0; b < blocks.count(); ++b) moe_block<P>(call, b * blocks.block, blocks.size(b));
}

}  // namespace
}  // namespace w4a16_cpu
