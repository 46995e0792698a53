// Dense x W^T for few rows of x: kernels gptq_gemm_rdna3_<f16|bf16>_<1|2|4|8>, rows in tiles of that height. Splits of k may share a tile of the result (arrive.h).
#include "dot.h"

struct DenseArgs {
    const char* x;       // [M, K]
    const char* words;   // see Weight
    const char* scales;
    const char* zeros;
    const char* bias;    // [columns], or null
    char* out;           // [M, columns]
    float* partials;     // [splits, M, N], float32; with one split null
    u32* counters;       // by row and tile, zero before and after; with one split null
    i32 M, K, N, G;      // N: of the weight, a multiple of 8
    i32 columns;         // of the result
    i32 kind;            // of zeros
    i32 splits, steps;   // steps of a split
};

// Four neighbours, or as many of them as there are.
template <class T>
DEVICE void store(u16* to, f32x4 values, i32 columns, i32 n) {
    const u16x4 all = rounded4<T>(values);
    if (columns % COLUMNS == 0) {
        *reinterpret_cast<u16x4*>(to) = all;
        return;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
        if (n + c < columns) to[c] = all[c];
}

template <class T, int ROWS>
DEVICE void dense(DenseArgs args) {
    const i32 tiles = ceiling(args.N, TILE), tile = block_x() % tiles, first = block_x() / tiles * ROWS, split = block_y();
    const i32 rows = least(ROWS, args.M - first), n = tile * TILE + lane() * COLUMNS;
    Rows<ROWS> x = {args.x + i64(first) * args.K * 2};
#pragma unroll
    for (int m = 0; m < ROWS; ++m) x.offsets[m] = least(m, rows - 1) * args.K * 2;
    const Weight w = {args.words, args.scales, args.zeros, args.kind, args.K, args.N, args.G};
    f32x4 sums[ROWS] = {};
    multiply_part<T, ROWS>(w, x, split, args.steps, n, sums);
    f32x4 y = fold(sums);
    args = again(args);
    const i32 row = first + wave();
    if (wave() >= ROWS || row >= args.M) return;

    if (args.splits > 1) {
        const i64 pitch = i64(args.M) * args.N;
        float* const parts = args.partials + i64(row) * args.N + n;
        if (n < args.N) *reinterpret_cast<f32x4*>(parts + split * pitch) = y;
        if (!last_to_arrive(args.counters + i64(row) * tiles + tile, args.splits)) return;
        if (n < args.N) y = in_order(parts, args.splits, pitch);
    }
    if (n >= args.columns) return;
    if (args.bias)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (n + c < args.columns) y[c] += wide<T>(reinterpret_cast<const u16*>(args.bias)[n + c]);
    store<T>(reinterpret_cast<u16*>(args.out) + i64(row) * args.columns + n, y, args.columns, n);
}

#define DENSE(type, rows, waves) \
    KERNEL(gptq_gemm_rdna3_##type##_##rows, DenseArgs, THREADS, waves) { dense<type, rows>(args); }

DENSE(f16, 1, 12)
DENSE(f16, 2, 12)
DENSE(f16, 4, 10)
DENSE(f16, 8, 8)
DENSE(bf16, 1, 12)
DENSE(bf16, 2, 12)
DENSE(bf16, 4, 10)
DENSE(bf16, 8, 8)
