// The vector operations that both AVX-512 policies use: sixteen lanes. Included after the target pragma.
#pragma once

#include "linear.h"
#include "moe.h"

namespace w4a16_cpu {
namespace {

struct Avx512Base {
  static constexpr int L = 16;
  static constexpr bool kE2m1 = false;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static F permute(F v, I lanes) { return _mm512_permutexvar_ps(lanes, v); }

  static __m256i load16(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16));
  }
  static F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load16(p)); }
  static F load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store16(uint16_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  // By hand: the bfloat16 instruction flushes subnormal numbers to zero.
  static void store_bf16(uint16_t* p, F v) {
    const I bits = _mm512_castps_si512(v), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
    const I quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    store16(p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet)));
  }
  static void store_f16(uint16_t* p, F v) { store16(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

  static I load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_words(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static void transpose(I* v) {
    I a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
      a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
        b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
      }
    // b[4 q + c] holds, in 128-bit quarter t, column 4 t + c of rows 4 q .. 4 q + 3.
    for (int c = 0; c < 4; ++c) {
      const I low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
      const I low_odd = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd), high_odd = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
      v[c] = _mm512_shuffle_i32x4(low, high, 0x88);
      v[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
      v[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
      v[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
  }
};

}  // namespace
}  // namespace w4a16_cpu
