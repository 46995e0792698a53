// From the sums of a block to its rows of the result: bias, activation, the router's weight, one rounding.
//
// 16 rows at a time pass through LDS, where a gate meets its up, and from where whole lines are written. With k split,
// each wave leaves its part of them in memory, and the last one to arrive adds the splits up (arrive.h).
#pragma once
#include "activation.h"
#include "arrive.h"
#include "tile.h"

template <class T, int ROWS>
struct Epilogue {
    static constexpr int COLS = columns_of(ROWS), WAVES = 2 * ROWS, WIDTH = WAVES * COLS * 16, PITCH = (WIDTH + 4) * 4;
    static constexpr int BYTES = 16 * PITCH;

    const WmmaArgs& args;
    const char* bias;
    i32 biases;        // an expert has
    i32 width, first;  // columns of the result that are this block's, and the first of them

    DEVICE Epilogue(const WmmaArgs& args, i64 expert) : args(args), width(args.gate_up ? WIDTH / 2 : WIDTH) {
        biases = args.gate_up ? 2 * args.columns : args.columns;
        bias = args.bias ? args.bias + expert * biases * (args.wide_bias ? 4 : 2) : nullptr;
        first = block_y() * width;
    }

    // The first of this lane's columns of the weight; beyond the last one, that is 0: its sums are not used. Where gates
    // and ups are separate, the first half of the waves has gates, the second the ups to them.
    static DEVICE u32 column(const WmmaArgs& args) {
        const i32 parts = args.gate_up == SEPARATE ? 2 : 1, waves = WAVES / parts, end = args.N / parts;
        const i32 wave = thread() / WAVE, n = (block_y() * waves + wave % waves) * (COLS * 16) + thread() % 16 * COLS;
        return n < end ? wave / waves * end + n : 0;
    }

    // 16 rows after the other, by the same instructions: those that wait move up.
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
            each(rows + r * 16, [&](i32 line, i32 row, i32 place) {
                const char* from = room + line * PITCH;
                if (args.partials)
                    *reinterpret_cast<f32x4*>(part_of(block_z(), row, first + place)) = at<f32x4>(from, place * 4);
                else
                    write(row, first + place, result(from, row, place));
            });
#pragma unroll
            for (int next = 1; next < ROWS; ++next)
#pragma unroll
                for (int c = 0; c < COLS; ++c) sums[next - 1][c] = sums[next][c];
        }
        if (args.partials) add_up(rows);
    }

   private:
    // A wave of every split has the same places, so it need not wait for the others of its block.
    DEVICE void add_up(const i32* rows) const {
        const u32 tile = block_y() * args.blocks + block_x();
        if (!last_to_arrive(args.counters + tile * WAVES + thread() / WAVE, args.splits)) return;
#pragma unroll 1
        for (i32 r = 0; r < ROWS; ++r)
            each(rows + r * 16, [&](i32, i32 row, i32 place) {
                const i32 n = first + place;
                const f32x4 sum = in_order(part_of(0, row, n), args.splits, i64(args.rows) * args.N);
                write(row, n, activated(args.activation, biased(sum, n), args.alpha));
            });
    }

    DEVICE float* part_of(i32 split, i32 row, i32 n) const {
        return args.partials + (i64(split) * args.rows + row) * args.N + n;
    }

    // Four columns each, of 16 rows.
    template <class Do>
    DEVICE void each(const i32* rows, Do&& act) const {
#pragma unroll 1
        for (i32 i = thread(); i < width * 4; i += WAVES * WAVE) {
            const i32 line = i / (width / 4), place = i % (width / 4) * 4, row = rows[in_lane_order(line)];
            if (first + place < args.columns && static_cast<u32>(row) < static_cast<u32>(args.rows)) act(line, row, place);
        }
    }

    DEVICE f32x4 biased(f32x4 sum, i32 n) const {
        if (!bias) return sum;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 at = least(n + i, biases - 1);
            sum[i] += args.wide_bias ? from_memory<float>(bias, at * 4) : wide<T>(from_memory<u16>(bias, at * 2));
        }
        return sum;
    }

    // Four columns of the weight from n on, at `place` in LDS.
    DEVICE f32x4 product(const char* from, i32 row, i32 place, i32 n) const {
        const f32x4 sum = at<f32x4>(from, place * 4);
        return biased(args.weigh == INPUT ? sum * args.weights[row] : sum, n);
    }

    // Four columns of the result, at `place` of this block.
    DEVICE f32x4 result(const char* from, i32 row, i32 place) const {
        const bool interleaved = args.gate_up == INTERLEAVED;
        const i32 n = first + place, spread = interleaved ? 2 : 1;
        f32x4 y = product(from, row, place * spread, n * spread);
        if (args.gate_up) {
            f32x4 up = interleaved ? product(from, row, 2 * place + 4, 2 * n + 4)
                                   : product(from, row, place + WIDTH / 2, n + args.columns);
            if (interleaved) {
                const f32x4 low = y, high = up;
                y = evens(low, high);
                up = odds(low, high);
            }
            y = gated(args.activation, y, up, args.alpha, args.limit);
        } else {
            y = activated(args.activation, y, args.alpha);
        }
        return args.weigh == RESULT ? y * args.weights[row] : y;
    }

    DEVICE void write(i32 row, i32 n, f32x4 y) const {
        const i64 to = i64(row) * args.columns + n;
        if (args.wide_out)
            reinterpret_cast<f32x4*>(args.out)[to / 4] = y;
        else if (args.columns % 4 == 0)
            reinterpret_cast<u16x4*>(args.out)[to / 4] = rounded4<T>(y);
        else
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (n + i < args.columns) reinterpret_cast<u16*>(args.out)[to + i] = rounded<T>(y[i]);
    }
};
