// What an op (linear.cpp, moe.cpp) hands to the code for one instruction set (avx512_bf16.cpp, avx512.cpp, avx2.cpp,
// portable.cpp).
#pragma once

#include <cstdint>

namespace w4a16_cpu {

// e8m0: a byte b that stands for 2^(b - 127); 255 is NaN.
enum class Dtype { none, u8, e8m0, bf16, f16, f32 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::u8 || dtype == Dtype::e8m0 ? 1 : 2; }

inline const void* at(const void* base, Dtype dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

// The value of row n at column k is (code[n, k] - zero[n, k / group]) * scale[n, k / group]; everything is contiguous. With
// scales in e8m0 it is e2m1(code) * scale, and there are no zeros: MXFP4.
struct Weight {
  const int32_t* codes;  // [N, K/8], nibble i of word j is k = 8j + i
  const void* scales;    // [N, K/group]
  const void* zeros;     // [N, K/group]; none means that every zero is 8
  Dtype scale_dtype, zero_dtype;
  int64_t N, K, group;
  int64_t partner;  // where not 0, row i and row partner + i belong together: a tile takes both
  int* bad_zero;    // set to a uint8 zero that is above 16, should one be met: the codes then cannot be trusted either

  bool mxfp4() const { return scale_dtype == Dtype::e8m0; }

  Weight rows(int64_t first, int64_t count) const {
    Weight some = *this;
    some.codes += first * (K / 8);
    some.scales = at(scales, scale_dtype, first * (K / group));
    if (zeros != nullptr) some.zeros = at(zeros, zero_dtype, first * (K / group));
    some.N = count;
    return some;
  }
};

// y[m, n] = bias[n] + sum_k x[m, k] * weight[n, k].
struct LinearCall {
  const void* x;  // [M, K]
  Weight weight;
  const void* bias;  // [N] or none
  void* out;         // [M, N], x_dtype
  Dtype x_dtype, bias_dtype;
  int64_t M;
};

enum class Activation { silu, gelu, gelu_tanh, relu, swigluoai };
enum class GateUp { none, halves, interleaved };

// out[t] = routed_scaling * sum_j weight[t, j] * (W2[e] act(W13[e] x[t] + b13[e]) + b2[e]) with e = ids[t, j], for every e
// that is not negative.
struct MoeCall {
  const void* x;         // [T, H]
  const float* weights;  // [T, top_k]
  const int32_t* ids;    // [T, top_k], below E
  Weight w13, w2;        // of expert 0; expert e is N * e rows further on
  const void* bias13;    // [E, w13.N] or none
  const void* bias2;     // [E, w2.N] or none
  void* out;             // [T, H], x_dtype
  Dtype x_dtype, bias13_dtype, bias2_dtype;
  int64_t T, top_k, E;
  Activation activation;
  GateUp gate_up;
  float alpha, limit;    // of swigluoai; an infinite limit does not clamp
  bool weight_on_input;  // the weight goes into x[t], not into the sum
  float routed_scaling;
  // MXFP4: w13 has `gates` * I rows; w2.K is I, rounded up to a whole group, with codes of 0 there.
  bool mxfp4, fp8;
  int64_t I;
  // Before they are multiplied with a weight x and act(h) are divided by these and rounded to e4m3, if fp8; else they are 1.
  float x_scale, h_scale;
};

// torch's own threads: body(begin, end, context) on disjoint ranges that cover 0..count. Raises what body raises.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t num_threads();

struct Isa {
  const char* name;
  bool (*supported)();
  void (*linear)(const LinearCall&);
  void (*moe)(const MoeCall&);
};

void linear_portable(const LinearCall& call);
void moe_portable(const MoeCall& call);
#if defined(__x86_64__)
void linear_avx2(const LinearCall& call);
void moe_avx2(const MoeCall& call);
void linear_avx512(const LinearCall& call);
void moe_avx512(const MoeCall& call);
void linear_avx512_bf16(const LinearCall& call);
void moe_avx512_bf16(const MoeCall& call);
#endif

}  // namespace w4a16_cpu
