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
        const i32 wave = thread() / WAVE, part = args.gate_up == SEPARATE ? 2 : 1, end = args.N / part, half = wave / (WAVES / part);
        const i32 n = block_y() * (WIDTH / part) + wave % (WAVES / part) * (COLS * 16) + thread() % 16 * COLS;
        return n < end ? half * end + n : 0;
    }

    // One after the other, by the same instructions: sums that wait move up.
    DEVICE void store(char* room, const i32* rows, f32x8 (&sums)[ROWS][COLS]) const {
        char* mine = room + thread() % WAVE / 16 * PITCH + thread() / WAVE * (COLS * 64) + thread() % 16 * (COLS * 4);
#pragma unroll 1
        for (i32 r = 0; r < ROWS; ++r) {
            if (r > 0) barrier();
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                vec<float, COLS> line;
#pragma unroll
                for (int c = 0; c < COLS; ++c) line[c] = sums[0][c][i];
                at<vec<float, COLS>>(mine, 2 * i * PITCH) = line;
            }
            barrier();
            write(room, rows + r * 16);
#pragma unroll
            for (int next = 1; next < ROWS; ++next)
#pragma unroll
                for (int c = 0; c < COLS; ++c) sums[next - 1][c] = sums[next][c];
        }
    }

   private:
    // Four columns of the weight from n on, at `place` in LDS.
    DEVICE f32x4 sums_of(const char* row, i32 place, i32 n) const {
        const f32x4 sum = at<f32x4>(row, place * 4);
        if (!bias) return sum;
        return sum + (args.wide_bias ? load<f32x4>(bias, n * 4) : wide4<T>(load<u16x4>(bias, n * 2)));
    }

    // Four columns of the result from n on, at `place` of this block.
    DEVICE f32x4 results(const char* row, i32 place, i32 n) const {
        const i32 apart = args.gate_up == SEPARATE ? WIDTH / 2 : 4, spread = args.gate_up == INTERLEAVED ? 2 : 1;
        f32x4 gate = sums_of(row, place * spread, n * spread);
        if (!args.gate_up) return activated(args.activation, gate, args.alpha);
        f32x4 up = sums_of(row, place * spread + apart, n * spread + (args.gate_up == SEPARATE ? across : 4));
        if (args.gate_up == INTERLEAVED) {
            const f32x4 low = gate, high = up;
            gate = f32x4{low.x, low.z, high.x, high.z};
            up = f32x4{low.y, low.w, high.y, high.w};
        }
        return gated(args.activation, gate, up, args.alpha, args.limit);
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
                reinterpret_cast<f32x4*>(args.out)[to / 4] = y;
            else
                reinterpret_cast<u16x4*>(args.out)[to / 4] = rounded4<T>(y);
        }
    }
};
