// What an expert does between its two projections; numbers as ACTIVATIONS in inductor_ext/kernels/hip/experts.py.
#pragma once
#include "prelude.h"

DEVICE float sigmoid(float x) { return 1 / (1 + __builtin_expf(-x)); }

// Abramowitz and Stegun 7.1.26: within 2e-7.
DEVICE float erf_of(float x) {
    const float a = __builtin_fabsf(x), t = 1 / (1 + 0.3275911f * a);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    return __builtin_copysignf(1 - p * __builtin_expf(-a * a), x);
}

DEVICE float activated(i32 activation, float x) {
    switch (activation) {
        case 1: return x * sigmoid(x);
        case 2: return x * 0.5f * (1 + erf_of(x * 0.70710678f));
        case 3: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
        case 4: return x > 0 ? x : 0;
        default: return x;
    }
}

// activated(gate) * up, or what gpt-oss does (5): gate up to the limit, up within it.
DEVICE float gated(i32 activation, float gate, float up, float alpha, float limit) {
    if (activation != 5) return activated(activation, gate) * up;
    gate = gate < limit ? gate : limit;
    up = up < limit ? (up > -limit ? up : -limit) : limit;
    return (up + 1) * gate * sigmoid(alpha * gate);
}
