// What the files of the WMMA kernels share: their arguments, and how they reach memory.
#pragma once
#include "codes.h"

// Columns of a gate and its up: n and n + N/2, or 2 n and 2 n + 1.
enum GateUp { NO_GATE, SEPARATE, INTERLEAVED };

struct WmmaArgs {
    const void* x;         // [rows, K]
    const void* codes;     // [E, K/8, N], or [E, N, stride]: a word's nibbles 0..7 are k = 0, 2, 4, 6, 1, 3, 5, 7
    const void* scales;    // [E, K/G, N], or [E, N, K/G]
    const void* zeros;     // [E, K/G, N/8], nibbles in order; or null: 8
    const void* bias;      // [E, N], or null
    const i32* slots;      // by place in the blocks, the row of `out`; or null: the place itself
    const i32* experts;    // by block, -1: nothing to do; or null: expert 0
    const float* weights;  // by row of `out`, or null: 1
    void* out;             // [splits, rows_out, N]; with a gate [rows_out, N/2]
    i32 K, N, G, stride;
    i32 rows_out;     // slots from here on are nobody's
    i32 per_row;      // rows of `out` that share a row of x
    i32 stages;       // in a split
    i32 zero_offset;  // added to a stored zero
    i32 gate_up;      // see GateUp
    i32 activation;   // see activation.h
    i32 wide_bias;    // it is float32
    i32 wide_out;     // it is float32
    float alpha, limit;
};

// A wave has 16 columns times this.
constexpr int columns_of(int rows) { return rows == 4 ? 2 : 4; }

DEVICE i32 least(i32 a, i32 b) { return a < b ? a : b; }

DEVICE const char* address(const void* p) { return static_cast<const char*>(p); }

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
