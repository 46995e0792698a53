// What an expert does between its two projections; numbers as in inductor_ext/kernels/hip/wmma.py.
#pragma once
#include "prelude.h"

DEVICE float exponential(float x) { return __builtin_exp2f(x * 1.44269504f); }
DEVICE float sigmoid(float x) { return reciprocal(1 + exponential(-x)); }

// Abramowitz and Stegun 7.1.26: within 2e-7.
DEVICE float error_function(float x) {
    const float a = __builtin_fabsf(x), t = reciprocal(1 + 0.3275911f * a);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    return __builtin_copysignf(1 - p * exponential(-a * a), x);
}

enum Activation { NONE, SILU, GELU, GELU_TANH, RELU, CLAMPED };

// SILU and CLAMPED: x sigmoid(alpha x).
DEVICE f32x4 activated(i32 activation, f32x4 x, float alpha) {
    f32x4 y = x;
    switch (activation) {
        case SILU:
        case CLAMPED:
            for (int i = 0; i < 4; ++i) y[i] = x[i] * sigmoid(alpha * x[i]);
            break;
        case GELU:
            for (int i = 0; i < 4; ++i) y[i] = x[i] * 0.5f * (1 + error_function(x[i] * 0.70710678f));
            break;
        case GELU_TANH:
            for (int i = 0; i < 4; ++i) y[i] = x[i] * sigmoid(1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
            break;
        case RELU:
            for (int i = 0; i < 4; ++i) y[i] = x[i] > 0 ? x[i] : 0;
            break;
    }
    return y;
}

// activated(gate) times up; CLAMPED, as gpt-oss has it: both within the limit first, and up + 1.
DEVICE f32x4 gated(i32 activation, f32x4 gate, f32x4 up, float alpha, float limit) {
    if (activation == CLAMPED)
        for (int i = 0; i < 4; ++i) {
            gate[i] = gate[i] > limit ? limit : gate[i];
            up[i] = (up[i] > limit ? limit : up[i] < -limit ? -limit : up[i]) + 1;
        }
    return activated(activation, gate, alpha) * up;
}

// Columns of a gate and its up: n and n + N/2, or 2 n and 2 n + 1.
enum GateUp { NO_GATE, SEPARATE, INTERLEAVED };

DEVICE f32x4 evens(f32x4 low, f32x4 high) { return f32x4{low.x, low.z, high.x, high.z}; }
DEVICE f32x4 odds(f32x4 low, f32x4 high) { return f32x4{low.y, low.w, high.y, high.w}; }
