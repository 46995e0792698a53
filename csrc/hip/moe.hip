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
    u32* counters;        // by block and tile, or by tile; zero before and after
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
    if (wave() == 0) {
        wave_barrier();
        if (lane() == 0) before[0] = count(args.counters + tile, 1);
    }
    barrier();
    if (before[0] != static_cast<u32>(args.blocks * args.splits) - 1) return;
    acquire();
    if (thread() == 0) args.counters[tile] = 0;
    for (i32 row = wave(); row < args.slots / args.together; row += WAVES) {
        f32x4 sum;
        if (add_up(args, row, tile, n, sum) && n < args.N) add_to_row<T>(args, row, n, sum);
    }
}

template <class T, int M>
DEVICE void block_of_slots(MoeArgs args, i32 block, i32 tile, i32 n, i32 expert) {
    const i32 split = block_y();
    i32 slots[M];
    Rows<M> x = {args.x};
#pragma unroll
    for (int m = 0; m < M; ++m) {
        slots[m] = scalar_load<i32>(args.sorted, (block * M + m) * 4);
        const i32 slot = static_cast<u32>(slots[m]) < static_cast<u32>(args.slots) ? slots[m] : 0;  // padding: any row
        x.offsets[m] = slot / args.per_row * (args.K * 2);
    }
    const i64 words = i64(args.K / 8) * args.N, groups = i64(args.K / args.G) * args.N;
    const i32 bits_of_a_zero = args.kind == EIGHT ? 0 : args.kind == BYTES ? 8 : 4;
    const Weight w = {args.words + expert * words * 4, args.scales + expert * groups * 2,
                      args.zeros + expert * groups * bits_of_a_zero / 8, args.kind, args.K, args.N, args.G};
    f32x4 y[M] = {};
    multiply_part<T, M>(w, x, split, args.steps, n, y);
    fold(y);
    if (wave() != 0) return;
    args = again(args);
#pragma unroll
    for (int m = 0; m < M; ++m) slots[m] = scalar_load<i32>(args.sorted, (block * M + m) * 4);
    if (args.weights)
#pragma unroll
        for (int m = 0; m < M; ++m)
            if (static_cast<u32>(slots[m]) < static_cast<u32>(args.slots)) y[m] *= args.weights[slots[m]];
    const auto every = [&](auto&& act) {
#pragma unroll
        for (int m = 0; m < M; ++m)
            if (static_cast<u32>(slots[m]) < static_cast<u32>(args.slots) && n < args.N) act(m, i64(slots[m]) * args.splits);
    };
    if (args.partials)
        every([&](int m, i64 part) {
            *reinterpret_cast<f32x4*>(args.partials + (part + split) * args.N + n) = y[m];
            if (args.marks && lane() == 0) args.marks[i64(tile) * args.slots * args.splits + part + split] = 1;
        });
    if (args.marks) return;
    if (args.partials) {
        if (!last_to_arrive(args.counters + block_x(), args.splits)) return;
        every([&](int m, i64 part) { y[m] = in_order(args.partials + part * args.N + n, args.splits, args.N); });
    }
    every([&](int m, i64) { add_to_row<T>(args, slots[m], n, y[m]); });
}

template <class T, int M>
DEVICE void moe(const MoeArgs& args) {
    const i32 tiles = ceiling(args.N, TILE), block = block_x() / tiles, tile = block_x() % tiles;
    const i32 n = tile * TILE + lane() * COLUMNS;
    const i32 expert = block * M < scalar_load<i32>(args.end) ? scalar_load<i32>(args.experts, block * 4) : -1;
    if (static_cast<u32>(expert) < static_cast<u32>(args.E)) block_of_slots<T, M>(args, block, tile, n, expert);
    const MoeArgs later = again(args);
    if (later.marks) gather<T>(later, tile, n);
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
