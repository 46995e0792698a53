// float16 and bfloat16 as the kernels meet them: 16 bits in memory, pairs in registers, and pairs of codes.
//
// A word holds 8 codes, 2 p in bits 4 p, 2 p + 1 in bits 16 + 4 p ("exllama" in inductor_ext/formats.py). A code q under
// the exponent of BASE is the number BASE + q, so an and-or makes two of them, after a shift where they are not yet in place.
// `pair` takes one word or a vector of them.
// The BASE comes off in float32, with the zero: sum x (q - zero) = sum x (BASE + q) - (BASE + zero) sum x.
#pragma once
#include "prelude.h"

using bf16 = short;  // its bits

template <class T>
struct Half;

template <>
struct Half<f16> {
    using Pair = f16x2;
    static constexpr float BASE = 64;  // not 1024: float32 would lose 4 bits more against the sum
    static constexpr u32 ONES = 0x3c003c00;
    template <int p, class V>
    static DEVICE V pair(V word) {
        return ((p == 0 ? word << 4 : word >> (4 * p - 4 & 31)) & 0x00f000f0) | 0x54005400;
    }
};

template <>
struct Half<bf16> {
    using Pair = bf16x2;
    static constexpr float BASE = 128;
    static constexpr u32 ONES = 0x3f803f80;
    template <int p, class V>
    static DEVICE V pair(V word) {
        return (word >> 4 * p & 0x000f000f) | 0x43004300;
    }
};

template <class T>
DEVICE float wide(u16 value);
template <>
DEVICE float wide<f16>(u16 value) {
    return bits<f16>(value);
}
template <>
DEVICE float wide<bf16>(u16 value) {
    return bits<float>(static_cast<u32>(value) << 16);
}

// To nearest, ties to even.
template <class T>
DEVICE u16 rounded(float value);
template <>
DEVICE u16 rounded<f16>(float value) {
    return bits<u16>(static_cast<f16>(value));
}
template <>
DEVICE u16 rounded<bf16>(float value) {
    const u32 word = bits<u32>(value);
    return value == value ? (word + (word >> 16 & 1) + 0x7fff) >> 16 : 0x7fc0;
}

using u16x4 = vec<u16, 4>;

template <class T>
DEVICE f32x4 wide4(u16x4 values) {
    return f32x4{wide<T>(values.x), wide<T>(values.y), wide<T>(values.z), wide<T>(values.w)};
}
template <class T>
DEVICE u16x4 rounded4(f32x4 values) {
    return u16x4{rounded<T>(values.x), rounded<T>(values.y), rounded<T>(values.z), rounded<T>(values.w)};
}

// Where zeros are: 8 everywhere; bytes [K/G, N]; nibbles [K/G, N/8], as they are or less than the zero by one.
enum Zeros { EIGHT, BYTES, NIBBLES, NIBBLES_LESS_ONE };
