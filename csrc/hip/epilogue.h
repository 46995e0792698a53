// From the sums of a block to its rows of the result: bias, activation, the router's weight, one rounding.
//
// 16 rows at a time pass through LDS, where a gate meets its up, and from where whole lines are written.
#pragma once
#include "activation.h"
#include "tile.h"

template <class T, int ROWS>
struct Epilogue {
    static constexpr int COLS = columns_of(ROWS), WAVES = 2 * ROWS, WIDTH = WAVES * COLS * 16, PITCH = (WIDTH + 4) * 4;
    static constexpr int BYTES = 16 * PITCH;

    const WmmaArgs& args;
    const char* bias;
    i32 across, first;  // columns of the result, and the first of this block

    DEVICE Epilogue(const WmmaArgs& args, i64 expert) : args(args) {
        bias = args.bias ? address(args.bias) + expert * args.N * (args.wide_bias ? 4 : 2) : nullptr;
        across = args.gate_up ? args.N / 2 : args.N;
        first = block_y() * (args.gate_up ? WIDTH / 2 : WIDTH);
    }

    // The first of this lane's columns of the weight; beyond the last one, that is 0: its sums are not used. With gates
    // and ups in halves the first half of the waves has gates, the second the ups to them.
    static DEVICE u32 column(const WmmaArgs& args) {
        const i32 wave = thread() / WAVE, part = args.gate_up == 1 ? 2 : 1, end = args.N / part, half = wave / (WAVES / part);
        const i32 n = block_y() * (WIDTH / part) + wave % (WAVES / part) * (COLS * 16) + thread() % 16 * COLS;
        return n < end ? half * end + n : 0;
    }

    DEVICE void store(char* room, const i32* rows, const f32x8 (&sums)[ROWS][COLS]) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                vec<float, COLS> line;
#pragma unroll
                for (int c = 0; c < COLS; ++c) line[c] = sums[r][c][i];
                at<vec<float, COLS>>(room, (2 * i + thread() % WAVE / 16) * PITCH + thread() / WAVE * (COLS * 64) +
                                               thread() % 16 * (COLS * 4)) = line;
            }
            barrier();
            write(room, rows + r * 16);
            barrier();
        }
    }

   private:
    DEVICE f32x4 biases(i32 column) const {
        if (args.wide_bias) return load<f32x4>(bias, column * 4);
        const vec<u16, 4> b = load<vec<u16, 4>>(bias, column * 2);
        return f32x4{wide<T>(b.x), wide<T>(b.y), wide<T>(b.z), wide<T>(b.w)};
    }

    // Columns n .. n + 3 of the weight, which are at `place` in LDS.
    DEVICE f32x4 sums_of(const char* row, i32 place, i32 n) const {
        const f32x4 sum = at<f32x4>(row, place * 4);
        return bias ? sum + biases(n) : sum;
    }

    // Columns n .. n + 3 of the result, at `place` of this block.
    DEVICE f32x4 results(const char* row, i32 place, i32 n) const {
        f32x4 y, gate, up;
        if (args.gate_up == 1) {
            gate = sums_of(row, place, n);
            up = sums_of(row, place + WIDTH / 2, n + across);
        } else if (args.gate_up == 2) {
            const f32x4 low = sums_of(row, 2 * place, 2 * n), high = sums_of(row, 2 * place + 4, 2 * n + 4);
            gate = f32x4{low.x, low.z, high.x, high.z};
            up = f32x4{low.y, low.w, high.y, high.w};
        } else {
            y = sums_of(row, place, n);
            for (int i = 0; i < 4; ++i) y[i] = activated(args.activation, y[i]);
            return y;
        }
        for (int i = 0; i < 4; ++i) y[i] = gated(args.activation, gate[i], up[i], args.alpha, args.limit);
        return y;
    }

    DEVICE void write(const char* room, const i32* rows) const {
        const i32 groups = (args.gate_up ? WIDTH / 2 : WIDTH) / 4;
#pragma unroll 1
        for (i32 i = thread(); i < 16 * groups; i += WAVES * WAVE) {
            const i32 line = i / groups, place = i % groups * 4, n = first + place, row = rows[in_lane_order(line)];
            if (n >= across || row >= args.rows_out) continue;
            f32x4 y = results(room + line * PITCH, place, n);
            if (args.weights) y *= args.weights[row];
            const i64 to = (i64(block_z()) * args.rows_out + row) * across + n;
            if (args.wide_out)
                at<f32x4>(static_cast<char*>(args.out) + to * 4, 0) = y;
            else
                at<vec<u16, 4>>(static_cast<char*>(args.out) + to * 2, 0) =
                    vec<u16, 4>{rounded<T>(y.x), rounded<T>(y.y), rounded<T>(y.z), rounded<T>(y.w)};
        }
    }
};
