// What the op (linear.cpp) hands to the code for one instruction set (avx512_bf16.cpp, avx512.cpp, avx2.cpp, portable.cpp).
#pragma once

#include <cstdint>

namespace w4a16_cpu {

enum class Dtype { none, u8, bf16, f16, f32 };

// y[m, n] = bias[n] + sum_k x[m, k] * (code[n, k] - zero[n, k / group]) * scale[n, k / group], everything contiguous.
struct Call {
  const void* x;         // [M, K]
  const int32_t* codes;  // [N, K/8], nibble i of word j is k = 8j + i
  const void* scales;    // [N, K/group]
  const void* zeros;     // [N, K/group]; none means that every zero is 8
  const void* bias;      // [N] or none
  void* out;             // [M, N], x_dtype
  Dtype x_dtype, scale_dtype, zero_dtype, bias_dtype;
  int64_t M, N, K, group;
  int* bad_zero;  // set to a uint8 zero that is above 16, should one be met: the codes then cannot be trusted either
};

// torch's own threads: body(begin, end, context) on disjoint ranges that cover 0..count. Raises what body raises.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t num_threads();

struct Isa {
  const char* name;
  bool (*supported)();
  void (*linear)(const Call&);
};

void linear_portable(const Call& call);
#if defined(__x86_64__)
void linear_avx2(const Call& call);
void linear_avx512(const Call& call);
void linear_avx512_bf16(const Call& call);
#endif

}  // namespace w4a16_cpu
