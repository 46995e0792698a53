// AVX2 with FMA and F16C: eight lanes. See portable.cpp for what the names of a policy mean.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "calls.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "linear.h"
#include "moe.h"

namespace w4a16_cpu {
namespace {

struct Avx2 {
  static constexpr int L = 8, kUnits = 8, kDirectRows = 4, kPanelFrom = 12, kPanelRows = 4, kPanelVectors = 3;
  static constexpr int kMaxCols = kPanelVectors * L;
  static constexpr int direct_columns(int rows) { return rows == 1 ? 4 : 2; }
  static constexpr bool kPairs = false, kE2m1 = false;
  using F = __m256;
  using I = __m256i;
  using W = F;
  using Z = F;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static F permute(F v, I lanes) { return _mm256_permutevar8x32_ps(v, lanes); }

  static __m128i load16(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(load16(p)); }
  static F load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store16(uint16_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  static void store_bf16(uint16_t* p, F v) {
    const I bits = _mm256_castps_si256(v), even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
    const I quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I half = _mm256_blendv_epi8(rounded, quiet, nan);
    store16(p, _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  static void store_f16(uint16_t* p, F v) { store16(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

  static I load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static void store_words(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<I*>(p), v); }
  static void transpose(I* v) {
    I a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
      a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
        b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
      }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
      v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
  }

  static F encode_zeros(F z) { return z; }
  static Z zero_uniform(const float* z) { return set1(*z); }
  static Z zero_lanes(F z) { return z; }
  template <bool Uniform>
  static W decode(I words, int u, Z z) {
    return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, 4 * u), _mm256_set1_epi32(15))), z);
  }
  // The index of the look-up is three bits; the fourth is the sign.
  static W decode_e2m1(I words, int u) {
    const F magnitudes = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
    const I code = _mm256_srli_epi32(words, 4 * u), sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(8)), 28);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, code), _mm256_castsi256_ps(sign));
  }
  static W load_unit(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static W broadcast_unit(const uint32_t* p) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(*p))); }
  static void store_unit(uint32_t* p, W w) { store(reinterpret_cast<float*>(p), w); }
  static F first(W w, W x) { return _mm256_mul_ps(w, x); }
  static F mac(F sum, W w, W x) { return fma(w, x, sum); }
};

}  // namespace

void linear_avx2(const LinearCall& call) { call.weight.mxfp4() ? linear<E2m1<Avx2>>(call) : linear<Avx2>(call); }
void moe_avx2(const MoeCall& call) { call.mxfp4 ? moe<E2m1<Avx2>>(call) : moe<Avx2>(call); }

}  // namespace w4a16_cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
