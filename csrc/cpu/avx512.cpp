// AVX-512 in float32. See portable.cpp for what the names of a policy mean.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
#endif

#include "avx512.h"

namespace w4a16_cpu {
namespace {

struct Avx512 : Avx512Base {
  static constexpr int kUnits = 8, kDirectRows = 6, kPanelFrom = 16, kPanelRows = 8, kPanelVectors = 3;
  static constexpr int kMaxCols = kPanelVectors * L;
  static constexpr int direct_columns(int rows) { return rows <= 2 ? 4 : 2; }
  static constexpr bool kPairs = false;
  using W = F;
  using Z = F;

  static F codes() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static F encode_zeros(F z) { return z; }
  // One zero for all lanes: decoding is a look-up in the table of the 16 values (the index is the low four bits of a lane).
  static Z zero_uniform(const float* z) { return _mm512_sub_ps(codes(), set1(*z)); }
  static Z zero_lanes(F z) { return z; }
  template <bool Uniform>
  static W decode(I words, int u, Z z) {
    const I index = _mm512_srli_epi32(words, 4 * u);
    if (Uniform) return _mm512_permutexvar_ps(index, z);
    return _mm512_sub_ps(_mm512_permutexvar_ps(index, codes()), z);
  }
  static W decode_e2m1(I words, int u) {
    const F values = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * u), values);
  }
  static W load_unit(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static W broadcast_unit(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(*p))); }
  static void store_unit(uint32_t* p, W w) { store(reinterpret_cast<float*>(p), w); }
  static F first(W w, W x) { return _mm512_mul_ps(w, x); }
  static F mac(F sum, W w, W x) { return fma(w, x, sum); }
};

}  // namespace

void linear_avx512(const LinearCall& call) { call.weight.mxfp4() ? linear<E2m1<Avx512>>(call) : linear<Avx512>(call); }
void moe_avx512(const MoeCall& call) { call.mxfp4 ? moe<E2m1<Avx512>>(call) : moe<Avx512>(call); }

}  // namespace w4a16_cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
