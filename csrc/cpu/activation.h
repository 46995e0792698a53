// What an expert does between its two projections, P::L values at a time. Every P::F is a vector of the compiler's, with its
// operators.
#pragma once

#include "kernel.h"

namespace w4a16_cpu {
namespace {

// e^x to 2 ulp; bounded by e^-86 and e^88. NaN for NaN.
template <class F>
F exponential(F x) {
  using Bits = decltype(x < x);
  x = x < -86.0f ? F{} - 86.0f : x;
  x = x > 88.0f ? F{} + 88.0f : x;
  const F shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer n, which its low bits then hold
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (F)((Bits)p + ((Bits)shifted << 23));  // n is added to the exponent
}

// x * sigmoid(z). Where e^-z is beyond its bound that is nothing, of infinity NaN.
template <class F>
F gated(F x, F z) {
  const F y = x / (exponential(-z) + 1.0f);
  return z < -88.0f ? x * 0.0f : y;
}

template <class F>
F clamp_above(F x, float limit) {
  return x > limit ? F{} + limit : x;
}

template <class F>
F act(Activation activation, F h) {
  switch (activation) {
    case Activation::silu: return gated(h, h);
    case Activation::gelu_tanh: return gated(h, (h * h * 0.044715f + 1.0f) * h * 1.59576912f);  // (1 + tanh z) / 2 = sigmoid(2 z)
    case Activation::relu: return h < 0.0f ? F{} : h;
    default: break;
  }
  F erf = h * 0.70710678f;
  for (size_t i = 0; i < sizeof(F) / 4; ++i) erf[i] = erff(erf[i]);
  return h * 0.5f * (erf + 1.0f);
}

// The nearest value of fp8 (e4m3), ties to even; beyond 448 it is 448. NaN for NaN.
template <class F>
F to_e4m3(F x) {
  using Bits = decltype(x < x);
  x = x > 448.0f ? F{} + 448.0f : x;
  x = x < -448.0f ? F{} - 448.0f : x;
  const Bits bits = (Bits)x;
  const F normal = (F)((bits + 0x7ffff + (bits >> 20 & 1)) & ~0xfffff);
  const F subnormal = (x + 24576.0f) - 24576.0f;  // whose last place is 2^-9
  const F rounded = (x < 0.015625f) & (x > -0.015625f) ? subnormal : normal;
  return x == x ? rounded : x;
}

// out[0..count) = act(h), or act(gate) * up where there is a gate. Reads and writes up to the next multiple of P::L.
template <class P>
void activate(const MoeCall& call, const float* h, const float* up, int64_t count, float* out) {
  using F = typename P::F;
  for (int64_t i = 0; i < count; i += P::L) {
    F y = P::load(h + i);
    if (call.activation == Activation::swigluoai) {
      const F gate = clamp_above(y, call.limit), linear = -clamp_above(-clamp_above(P::load(up + i), call.limit), call.limit);
      y = (linear + 1.0f) * gated(gate, gate * call.alpha);
    } else {
      y = act(call.activation, y);
      if (call.gate_up != GateUp::none) y = y * P::load(up + i);
    }
    P::store(out + i, y);
  }
}

}  // namespace
}  // namespace w4a16_cpu
