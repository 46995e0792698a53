// x W^T of routed experts: kernels moe_gptq_gemm_rdna3_<f16|bf16>_<1|2|4|8>, blocks of that many slots of one expert.
//
// A slot is a token's choice of an expert. Its result is added to its own row of `out`, or, with `together` slots a row,
// to the row of its token. Then nobody can tell beforehand which blocks have slots of a row, since slots may be left out:
// all blocks of a tile of columns arrive at one counter, those with nothing to do too, each leaves a mark for what it
// has written, and the last one adds up every row in the order of its slots (arrive.h).
#include "dot.h"

struct MoeArgs {
    const char* x;        // [rows, K]
    const char* words;    // [E, ...], see Weight
    const char* scales;
    const char* zeros;
    const char* sorted;   // int32: the slots of each block
    const char* experts;  // int32: the expert of each block, or -1
    const char* end;      // int32: where the last block ends
    const float* weights; // by slot; or null: 1
    char* out;            // [slots / together, N]: added to; or float32, written
    float* partials;      // [slots, splits, N]; null if a slot's sum goes straight to its row
    u32* marks;           // [tiles, slots, splits], zero before and after; null with one slot a row
    u32* counters;        // by slot and tile, with marks by tile; zero before and after
    i32 K, N, G, E;
    i32 kind;             // of zeros
    i32 slots, per_row;   // slots that share a row of x
    i32 together;         // slots that share a row of the result
    i32 blocks, splits, steps;  // steps of a split
    i32 written;          // out is float32 and is not added to
};

template <class T>
DEVICE void add_to_row(const MoeArgs& args, i32 row, i32 n, f32x4 values) {
    const i64 at = i64(row) * args.N + n;
    if (args.written) {
        *reinterpret_cast<f32x4*>(args.out + at * 4) = values;
        return;
    }
    u16x4* const place = reinterpret_cast<u16x4*>(args.out + at * 2);
    *place = rounded4<T>(wide4<T>(*place) + values);
}

// The sum of the parts of a row of `together` slots, and whether there is any. Parts without a mark were not written.
DEVICE bool add_up(const MoeArgs& args, i32 row, i32 tile, i32 n, f32x4& sum) {
    const i32 parts = args.together * args.splits;
    const i64 first = i64(row) * parts;
    u32* const marks = args.marks + i64(tile) * args.slots * args.splits + first;
    const float* const partials = args.partials + first * args.N + least(n, args.N - COLUMNS);
    u32 any = 0;
    sum = f32x4{};
#pragma unroll 8
    for (i32 i = 0; i < parts; ++i) {
        const u32 mark = marks[i];
        const f32x4 part = *reinterpret_cast<const f32x4*>(partials + i64(i) * args.N);
        sum = mark ? sum + part : sum;
        any |= mark;
    }
    wave_barrier();
    for (i32 i = lane(); i < parts; i += WAVE) marks[i] = 0;
    return any != 0;
}

// Every block of the tile ends here: the last one makes the rows.
template <class T>
DEVICE void gather(const MoeArgs& args, i32 tile, i32 n) {
    SHARED(u32, before, [1]);
    release();
    barrier();
    if (thread() == 0) before[0] = count(args.counters + tile, 1);
    barrier();
    if (before[0] != static_cast<u32>(args.blocks * args.splits) - 1) return;
    acquire();
    if (thread() == 0) args.counters[tile] = 0;
    for (i32 row = wave(); row < args.slots / args.together; row += WAVES) {
        f32x4 sum;
        if (add_up(args, row, tile, n, sum) && n < args.N) add_to_row<T>(args, row, n, sum);
    }
}

DEVICE bool is_slot(const MoeArgs& args, i32 slot) { return static_cast<u32>(slot) < static_cast<u32>(args.slots); }

// For wave m < M: the sums of slot m of a block of this expert.
template <class T, int M>
DEVICE f32x4 multiplied(const MoeArgs& args, i32 block, i32 n, i32 expert) {
    Rows<M> x = {args.x};
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const i32 slot = scalar_load<i32>(args.sorted, (block * M + m) * 4);
        x.offsets[m] = static_cast<u32>((is_slot(args, slot) ? slot : 0) / args.per_row) * (args.K * 2);  // padding: any row
    }
    const i64 words = i64(args.K / 8) * args.N, groups = i64(args.K / args.G) * args.N;
    const i32 bits_of_a_zero = args.kind == EIGHT ? 0 : args.kind == BYTES ? 8 : 4;
    const Weight w = {args.words + expert * words * 4, args.scales + expert * groups * 2,
                      args.zeros + expert * groups * bits_of_a_zero / 8, args.kind, args.K, args.N, args.G};
    f32x4 sums[M] = {};
    multiply_part<T, M>(w, x, block_y(), args.steps, n, sums);
    return fold(sums);
}

// What a wave has of a slot, to its row, or to where the last block finds it.
template <class T>
DEVICE void leave(const MoeArgs& args, i32 slot, i32 tile, i32 n, f32x4 y) {
    if (args.weights) y *= args.weights[slot];
    const i64 part = i64(slot) * args.splits + block_y();
    if (args.partials && n < args.N) *reinterpret_cast<f32x4*>(args.partials + part * args.N + n) = y;
    if (args.marks) {
        if (lane() == 0) args.marks[i64(tile) * args.slots * args.splits + part] = 1;
        return;
    }
    if (args.partials) {
        if (!last_to_arrive(args.counters + i64(slot) * ceiling(args.N, TILE) + tile, args.splits)) return;
        if (n < args.N) y = in_order(args.partials + i64(slot) * args.splits * args.N + n, args.splits, args.N);
    }
    if (n < args.N) add_to_row<T>(args, slot, n, y);
}

template <class T, int M>
DEVICE void moe(const MoeArgs& args) {
    const i32 tiles = ceiling(args.N, TILE), block = block_x() / tiles, tile = block_x() % tiles;
    const i32 n = tile * TILE + lane() * COLUMNS;
    const i32 expert = block * M < scalar_load<i32>(args.end) ? scalar_load<i32>(args.experts, block * 4) : -1;
    const bool here = static_cast<u32>(expert) < static_cast<u32>(args.E);
    f32x4 y = {};
    if (here) y = multiplied<T, M>(args, block, n, expert);
    const MoeArgs late = again(args);
    if (here && wave() < M) {
        const i32 slot = uniform(load<i32>(late.sorted, (block * M + wave()) * 4));
        if (is_slot(late, slot)) leave<T>(late, slot, tile, n, y);
    }
    if (late.marks) gather<T>(late, tile, n);
}

#define MOE(type, rows, waves) \
    KERNEL(moe_gptq_gemm_rdna3_##type##_##rows, MoeArgs, THREADS, waves) { moe<type, rows>(args); }

MOE(f16, 1, 12)
MOE(f16, 2, 12)
MOE(f16, 4, 10)
MOE(f16, 8, 8)
MOE(bf16, 1, 12)
MOE(bf16, 2, 12)
MOE(bf16, 4, 10)
MOE(bf16, 8, 8)
