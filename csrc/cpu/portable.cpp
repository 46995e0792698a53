// Any machine: GCC's and Clang's vectors of four floats, which become NEON on aarch64 and SSE2 on x86-64.
// Also the list of what a policy has; the other instruction sets give the same names.
#include <torch/headeronly/util/Half.h>

#include "linear.h"
#include "moe.h"

namespace w4a16_cpu {
namespace {

struct Portable {
  static constexpr int L = 4;                // lanes of a vector
  static constexpr int kUnits = 8;           // 32-bit units of x for one word of codes (8: float32, 4: pairs of bfloat16)
  static constexpr bool kPairs = false;      // whether units are pairs of bfloat16
  static constexpr bool kE2m1 = false;       // whether codes are values of e2m1 (see E2m1)
  static constexpr int kDirectRows = 4;      // direct: rows of x at a time, and for so many
  static constexpr int direct_columns(int rows) { return rows == 1 ? 4 : 2; }  // rows of the weight: 1, 2, 4, 8 or 16
  static constexpr int kPanelFrom = 9;       // rows of x from which a panel pays
  static constexpr int kPanelRows = 4;       // panel: rows of x at a time
  static constexpr int kPanelVectors = 4;    //        vectors of weight rows at a time
  static constexpr int kMaxCols = kPanelVectors * L;

  typedef float F __attribute__((vector_size(16)));    // float32 sums
  typedef int32_t I __attribute__((vector_size(16)));  // words of codes
  typedef uint32_t U __attribute__((vector_size(16)));
  using W = F;  // decoded units of the weight, and units of x
  using Z = F;  // what decode needs of the zeros

  template <class V>
  static V read(const void* p) { V v; memcpy(&v, p, sizeof(v)); return v; }

  static F zero() { return F{}; }
  static F set1(float x) { return F{x, x, x, x}; }
  static F load(const float* p) { return read<F>(p); }
  static void store(float* p, F v) { memcpy(p, &v, sizeof(v)); }
  static F add(F a, F b) { return a + b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static float sum(F v) { return (v[0] + v[1]) + (v[2] + v[3]); }
  static F permute(F v, I lanes) { return F{v[lanes[0]], v[lanes[1]], v[lanes[2]], v[lanes[3]]}; }

  static F load_bf16(const uint16_t* p) {
    U bits{p[0], p[1], p[2], p[3]};
    bits <<= 16;
    return read<F>(&bits);
  }
  static F load_f16(const uint16_t* p) {
    F v;
    for (int i = 0; i < L; ++i) v[i] = c10::detail::fp16_ieee_to_fp32_value(p[i]);
    return v;
  }
  static F load_u8(const uint8_t* p) {
    return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
  }
  static void store_bf16(uint16_t* p, F v) {
    const U bits = read<U>(&v);
    for (int i = 0; i < L; ++i) p[i] = v[i] == v[i] ? (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16 : bits[i] >> 16 | 0x40;
  }
  static void store_f16(uint16_t* p, F v) {
    for (int i = 0; i < L; ++i) p[i] = c10::detail::fp16_ieee_from_fp32_value(v[i]);
  }

  static I load_words(const int32_t* p) { return read<I>(p); }
  static void store_words(int32_t* p, I v) { memcpy(p, &v, sizeof(v)); }
  static void transpose(I* v) {
    for (int i = 0; i < L; ++i)
      for (int j = 0; j < i; ++j) {
        const int32_t t = v[i][j];
        v[i][j] = v[j][i];
        v[j][i] = t;
      }
  }

  // Zeros in the form that suits decode, then for decode<true> (one for all lanes) and decode<false> (one a lane).
  static F encode_zeros(F z) { return z; }
  static Z zero_uniform(const float* z) { return set1(*z); }
  static Z zero_lanes(F z) { return z; }
  // Unit u of code - zero, exact.
  template <bool Uniform>
  static W decode(I words, int u, Z z) { return __builtin_convertvector((words >> 4 * u) & 15, F) - z; }
  // The same of e2m1's values.
  static W decode_e2m1(I words, int u) {
    const I code = words >> 4 * u, magnitude = code & 7;
    const I bits = magnitude < 2 ? -magnitude & 0x3f000000 : (magnitude << 22) + 0x3f000000;  // 0 and 0.5 have no exponent
    return (F)(bits | (code & 8) << 28);
  }
  static W load_unit(const uint32_t* p) { return read<F>(p); }
  static W broadcast_unit(const uint32_t* p) { return set1(read<float>(p)); }
  static void store_unit(uint32_t* p, W w) { memcpy(p, &w, sizeof(w)); }
  // w * x, and sum + w * x, in float32.
  static F first(W w, W x) { return w * x; }
  static F mac(F sum, W w, W x) { return w * x + sum; }
};

}  // namespace

void linear_portable(const LinearCall& call) { call.weight.mxfp4() ? linear<E2m1<Portable>>(call) : linear<Portable>(call); }
void moe_portable(const MoeCall& call) { call.mxfp4 ? moe<E2m1<Portable>>(call) : moe<Portable>(call); }

}  // namespace w4a16_cpu
