// AVX-512 with bfloat16 dot products, for bfloat16 x and integer zeros: code - zero is an integer in -16..15, exact in bfloat16,
// the products are exact and their sums float32. (The instruction takes subnormal x, below 1.2e-38, as 0.)
// See portable.cpp for what the names of a policy mean.
#if defined(__x86_64__)
#if !defined(__clang__)
// GCC's own AVX-512 headers start many vectors uninitialised on purpose, and GCC warns of it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "calls.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,fma")
#endif

#include "avx512.h"

namespace w4a16_cpu {
namespace {

alignas(64) const uint16_t kIota[32] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// The five-bit two's complement numbers 0..15, -16..-1 in bfloat16.
alignas(64) const uint16_t kSigned[32] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
    0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};

// The values of e2m1 in bfloat16, twice.
alignas(64) const uint16_t kE2m1Values[32] = {
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

struct Avx512Bf16 : Avx512Base {
  static constexpr int kUnits = 4, kDirectRows = 6, kPanelFrom = 13, kPanelRows = 8, kPanelVectors = 3;
  static constexpr int kMaxCols = kPanelVectors * L;
  static constexpr int direct_columns(int rows) { return rows <= 2 ? 4 : 2; }
  static constexpr bool kPairs = true;
  using W = I;
  using Z = I;

  // As an integer, in both halves of a lane.
  static F encode_zeros(F z) {
    const I integer = _mm512_cvtps_epi32(z);
    return _mm512_castsi512_ps(_mm512_or_si512(integer, _mm512_slli_epi32(integer, 16)));
  }
  // One zero for all lanes: a table of the 16 values, twice, so that the fifth bit of an index does not matter: it is the lowest
  // bit of the next code.
  static Z zero_uniform(const float* z) {
    const I zeros = _mm512_castps_si512(set1(*z));
    return _mm512_permutexvar_epi16(_mm512_sub_epi16(_mm512_load_si512(kIota), zeros), _mm512_load_si512(kSigned));
  }
  static Z zero_lanes(F z) { return _mm512_castps_si512(z); }
  // A pair: the codes of nibbles u and u + 4.
  template <bool Uniform>
  static W decode(I words, int u, Z z) {
    const I index = _mm512_srli_epi32(words, 4 * u);
    if (Uniform) return _mm512_permutexvar_epi16(index, z);
    const I codes = _mm512_and_si512(index, _mm512_set1_epi32(0x000f000f));
    return _mm512_permutexvar_epi16(_mm512_sub_epi16(codes, z), _mm512_load_si512(kSigned));
  }
  // The fifth bit of an index does not matter here either.
  static W decode_e2m1(I words, int u) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * u), _mm512_load_si512(kE2m1Values));
  }
  static W load_unit(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static W broadcast_unit(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int32_t>(*p)); }
  static void store_unit(uint32_t* p, W w) { _mm512_storeu_si512(p, w); }
  static F first(W w, W x) { return mac(zero(), w, x); }
  static F mac(F sum, W w, W x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};

bool whole_zeros(const Weight& weight) { return weight.zero_dtype == Dtype::none || weight.zero_dtype == Dtype::u8; }

}  // namespace

void linear_avx512_bf16(const LinearCall& call) {
  if (call.x_dtype == Dtype::bf16 && call.weight.mxfp4()) linear<E2m1<Avx512Bf16>>(call);
  else if (call.x_dtype == Dtype::bf16 && whole_zeros(call.weight)) linear<Avx512Bf16>(call);
  else linear_avx512(call);
}

void moe_avx512_bf16(const MoeCall& call) {
  // Values of fp8 are exact in bfloat16, whatever x was.
  if (call.mxfp4) return call.fp8 || call.x_dtype == Dtype::bf16 ? moe<E2m1<Avx512Bf16>>(call) : moe_avx512(call);
  if (call.x_dtype == Dtype::bf16 && whole_zeros(call.w13) && whole_zeros(call.w2)) moe<Avx512Bf16>(call);
  else moe_avx512(call);
}

}  // namespace w4a16_cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
