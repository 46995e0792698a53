// What the files of the WMMA kernels share: their arguments, and how they reach memory.
#pragma once
#include "codes.h"

// Where the router's weight goes in: nowhere, as a factor of x, or of the result.
enum Weigh { UNWEIGHED, INPUT, RESULT };

struct WmmaArgs {
    const char* x;         // [rows, K]
    const char* codes;     // [E, K/8, N], or [E, N, stride]: words as in codes.h
    const char* scales;    // [E, K/G, N], or [E, N, K/G]
    const char* zeros;     // see Zeros
    const char* bias;      // [E, columns], or gates and ups; or null
    const i32* slots;      // by place in the blocks, the row of `out`; or null: the place itself
    const i32* experts;    // by block, outside 0..E-1: nothing to do; or null: expert 0
    const float* weights;  // by row of `out`
    char* out;             // [rows, columns]
    float* partials;       // [splits, rows, N]; null with one split
    u32* counters;         // a wave of a tile, zero before and after; null with one split
    i32 K, N, G, stride;   // N: of the weight, a multiple of 8
    i32 E;
    i32 rows, columns;     // of `out`; slots beyond its rows are nobody's
    i32 per_row;           // slots that share a row of x
    i32 blocks;            // of rows
    i32 splits, stages;    // of k; stages of a split
    i32 kind;              // of zeros
    i32 weigh, gate_up, activation;  // see Weigh, GateUp, Activation
    i32 wide_bias, wide_out;         // they are float32; then columns is a multiple of 4
    float alpha, limit;
};

// A wave has 16 columns times this.
constexpr int columns_of(int rows) { return rows == 4 ? 2 : 4; }

DEVICE i32 least(i32 a, i32 b) { return a < b ? a : b; }

// A value in memory, at an offset in bytes from an address that all lanes of the wave share: of the address, only the
// offset takes a register in each lane.
template <class V>
DEVICE V from_memory(const char* base, u32 offset) {
    typedef const V __attribute__((may_alias, address_space(1))) Any;
    return *(Any*)((const char __attribute__((address_space(1)))*)base + offset);
}

// A value in LDS at an offset in bytes.
template <class V>
DEVICE const V& at(const char* base, u32 offset) {
    typedef V __attribute__((may_alias)) Any;
    return *reinterpret_cast<const Any*>(base + offset);
}
template <class V>
DEVICE V& at(char* base, u32 offset) {
    typedef V __attribute__((may_alias)) Any;
    return *reinterpret_cast<Any*>(base + offset);
}

// Element i of a lane's accumulator is row 2 i + lane / 16: where a row's value lies so that a lane's are neighbours.
DEVICE u32 in_lane_order(u32 row) { return row / 16 * 16 + row % 2 * 8 + row % 16 / 2; }
