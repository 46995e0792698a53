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
    u32* counters;       // by tile, zero before and after; with one split null
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
    f32x4 y[ROWS] = {};
    const Weight w = {args.words, args.scales, args.zeros, args.kind, args.K, args.N, args.G};
    multiply_part<T, ROWS>(w, x, split, args.steps, n, y);
    fold(y);
    if (wave() != 0) return;
    args = again(args);

    if (args.splits > 1) {
        if (n < args.N)
#pragma unroll
            for (int m = 0; m < ROWS; ++m)
                if (m < rows)
                    *reinterpret_cast<f32x4*>(args.partials + (i64(split) * args.M + first + m) * args.N + n) = y[m];
        if (!last_to_arrive(args.counters + block_x(), args.splits)) return;
        if (n < args.N)
#pragma unroll
            for (int m = 0; m < ROWS; ++m)
                if (m < rows)
                    y[m] = in_order(args.partials + (i64(first) + m) * args.N + n, args.splits, i64(args.M) * args.N);
    }
    const u16* bias = reinterpret_cast<const u16*>(args.bias);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
        if (bias && n + c < args.columns)
#pragma unroll
            for (int m = 0; m < ROWS; ++m) y[m][c] += wide<T>(bias[n + c]);
    if (n < args.columns)
#pragma unroll
        for (int m = 0; m < ROWS; ++m)
            if (m < rows) store<T>(reinterpret_cast<u16*>(args.out) + i64(first + m) * args.columns + n, y[m], args.columns, n);
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
