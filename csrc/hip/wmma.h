// x W^T for 16, 32 or 64 rows of x at a time with WMMA: what the kernels of wmma.hip are made of. gfx11 only.
//
// A block computes 16 ROWS rows; each of its 2 ROWS waves has 16 COLS columns of its own. It goes over k in stages of
// STAGE values, which lie in one group. All waves fetch the next stage of x while they multiply this one, and put it in
// the other half of a ring of two in LDS: one barrier a stage suffices. Codes go straight to the lanes that multiply
// them, two fragments ahead; a fragment, once unpacked, serves ROWS products.
//
// A code q is multiplied as BASE + q, which costs an and-or for two. The product of a stage therefore starts from
// -(BASE + 8) times the sum of x over it, which the threads that fetch x find on their way, and a zero other than 8 adds
// its difference. Products, sums and scales are float32: the weight itself is never rounded.
#pragma once
#include "epilogue.h"

template <class T>
struct FragmentOf;
template <>
struct FragmentOf<f16> {
    using type = f16x16;
};
template <>
struct FragmentOf<bf16> {
    using type = bf16x16;
};
template <class T>
using Fragment = typename FragmentOf<T>::type;

template <class T>
DEVICE Fragment<T> unpack(u32x2 words) {
    using H = Half<T>;
    vec<u32, 8> pairs;
    pairs[0] = H::template pair<0>(words.x);
    pairs[1] = H::template pair<1>(words.x);
    pairs[2] = H::template pair<2>(words.x);
    pairs[3] = H::template pair<3>(words.x);
    pairs[4] = H::template pair<0>(words.y);
    pairs[5] = H::template pair<1>(words.y);
    pairs[6] = H::template pair<2>(words.y);
    pairs[7] = H::template pair<3>(words.y);
    return bits<Fragment<T>>(pairs);
}

template <class T>
DEVICE float sum_of(u32x4 values, float sum) {
    using Pair = typename Half<T>::Pair;
    for (int i = 0; i < 4; ++i) sum = dot2(bits<Pair>(values[i]), bits<Pair>(Half<T>::ONES), sum);
    return sum;
}

// Codes [E, K/8, N], scales [E, K/G, N], zeros [E, K/G, N/8]: a lane loads its columns, which are neighbours, at once.
template <class T, int COLS>
struct ByWord {
    static constexpr bool ZEROS = true;
    const char *codes, *scales, *zeros;
    u32 offset[2], column;
    i64 step;

    DEVICE ByWord(const WmmaArgs& args, i64 expert, u32 first_column, i32 k) : column(first_column), step(i64(args.N) * 8) {
        const i64 groups = args.K / args.G, group = k / args.G;
        codes = uniform(args.codes + (expert * (args.K / 8) + k / 8) * args.N * 4);
        scales = args.scales + (expert * groups + group) * args.N * 2;
        zeros = args.zeros + (expert * groups + group) * zeros_of_a_group(args);
        offset[0] = column * 4;
        offset[1] = (column + args.N) * 4;
    }
    DEVICE void renew() {
        offset[0] = anew(offset[0]);
        offset[1] = anew(offset[1]);
        column = anew(column);
    }
    // The codes of 16 values of k.
    DEVICE void fetch(const char* from, u32x2 (&words)[COLS]) const {
        using V = vec<u32, COLS>;
        const V low = from_memory<V>(from, offset[0]), high = from_memory<V>(from, offset[1]);
#pragma unroll
        for (int c = 0; c < COLS; ++c) words[c] = u32x2{low[c], high[c]};
    }
    DEVICE vec<u16, COLS> scale() const { return from_memory<vec<u16, COLS>>(scales, column * 2); }
    // A byte a column.
    DEVICE u32 zero(const WmmaArgs& args) const {
        if (args.kind == BYTES) return COLS == 4 ? from_memory<u32>(zeros, column) : from_memory<u16>(zeros, column);
        u32 bytes = from_memory<u32>(zeros, column / 8 * 4) >> column % 8 * 4 & 0xffff;
        bytes = (bytes | bytes << 8) & 0x00ff00ff;
        bytes = (bytes | bytes << 4) & 0x0f0f0f0f;
        return args.kind == NIBBLES_LESS_ONE ? bytes + 0x01010101 : bytes;
    }
    DEVICE void next_group(const WmmaArgs& args) {
        scales += i64(args.N) * 2;
        zeros += zeros_of_a_group(args);
    }

   private:
    static DEVICE i64 zeros_of_a_group(const WmmaArgs& args) {
        return args.kind == EIGHT ? 0 : args.kind == BYTES ? args.N : args.N / 2;
    }
};

// Codes [E, N, stride], scales [E, N, K/G], no zeros: the field's layout for its WMMA kernel.
template <class T, int COLS>
struct ByRow {
    static constexpr bool ZEROS = false;
    const char *codes, *scales;
    u32 offset[COLS], scale_offset[COLS];
    static constexpr i64 step = 8;

    DEVICE ByRow(const WmmaArgs& args, i64 expert, u32 first_column, i32 k) {
        const i64 groups = args.K / args.G;
        codes = uniform(args.codes + expert * args.N * args.stride * 4 + k / 2);
        scales = args.scales + (expert * args.N * groups + k / args.G) * 2;
        for (int c = 0; c < COLS; ++c) {
            offset[c] = (first_column + c) * args.stride * 4;
            scale_offset[c] = (first_column + c) * static_cast<u32>(groups) * 2;
        }
    }
    DEVICE void renew() {
        for (int c = 0; c < COLS; ++c) {
            offset[c] = anew(offset[c]);
            scale_offset[c] = anew(scale_offset[c]);
        }
    }
    DEVICE void fetch(const char* from, u32x2 (&words)[COLS]) const {
#pragma unroll
        for (int c = 0; c < COLS; ++c) words[c] = from_memory<u32x2>(from, offset[c]);
    }
    DEVICE vec<u16, COLS> scale() const {
        vec<u16, COLS> all;
#pragma unroll
        for (int c = 0; c < COLS; ++c) all[c] = from_memory<u16>(scales, scale_offset[c]);
        return all;
    }
    DEVICE void next_group(const WmmaArgs&) { scales += 2; }
};

// The stages of x in LDS, and what each row's product of a stage starts from, in the order in which a lane's accumulator
// has the rows. A row has 8 halves more than it needs, so that 8 lanes read 8 different banks.
template <class T, int ROWS, int STAGE>
struct Ring {
    static constexpr int HEIGHT = ROWS * 16, PITCH = (STAGE + 8) * 2, LOADS = STAGE / 32;
    static constexpr int STARTS = HEIGHT * PITCH, BYTES = STARTS + HEIGHT * 4;
    u32x4 held[LOADS];

    // Four threads a row, which all know its sum in the end.
    DEVICE void fetch(const char* x, u32 offset) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) held[i] = from_memory<u32x4>(x, offset + i * 64);
    }
    DEVICE void put(char* half) const {
        const u32 row = thread() / 4, part = thread() % 4;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            at<u32x4>(half, row * PITCH + part * 16 + i * 64) = held[i];
            sum = sum_of<T>(held[i], sum);
        }
        sum += shuffle_xor<1>(sum);
        sum += shuffle_xor<2>(sum);
        at<float>(half, STARTS + in_lane_order(row) * 4) = sum * -(Half<T>::BASE + 8);
    }
    static DEVICE Fragment<T> fragment(const char* half, int r, int k) {
        const u32 offset = (r * 16 + thread() % 16) * PITCH + k * 2;
        return bits<Fragment<T>>(Two{at<u32x4>(half, offset), at<u32x4>(half, offset + 16)});
    }
    static DEVICE f32x8 start(const char* half, int r) {
        const u32 offset = STARTS + (r * 16 + thread() % WAVE / 16 * 8) * 4;
        return bits<f32x8>(Two{at<u32x4>(half, offset), at<u32x4>(half, offset + 16)});
    }

   private:
    struct Two {
        u32x4 low, high;
    };
};

// In pairs that one instruction can do: of another scale, and of another parity.
template <int ROWS, int COLS>
DEVICE void add_scaled(f32x8 (&sums)[ROWS][COLS], const f32x8 (&products)[ROWS][COLS], const float (&scale)[COLS]) {
#pragma unroll
    for (int c = 0; c < COLS; c += 2)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sums[r][c][i] += products[r][c][i] * scale[c];
                sums[r][c + 1][i ^ 1] += products[r][c + 1][i ^ 1] * scale[c + 1];
            }
}

// What zeros, bytes, differ from 8 by.
template <class T, class Stages, int ROWS, int COLS>
DEVICE void add_zeros(f32x8 (&sums)[ROWS][COLS], const char* half, u32 zeros, const float (&scale)[COLS]) {
#pragma unroll
    for (int c = 0; c < COLS; ++c) {
        const float more = static_cast<i32>(zeros >> 8 * c & 255) - 8;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[r][c] += Stages::start(half, r) * (scale[c] * more / (Half<T>::BASE + 8));
    }
}

template <class T, int ROWS, int STAGE, class Weights>
DEVICE void multiply_and_store(const WmmaArgs& args) {
    constexpr int COLS = columns_of(ROWS), FRAGMENTS = STAGE / 16;
    using Stages = Ring<T, ROWS, STAGE>;
    using Out = Epilogue<T, ROWS>;
    constexpr int BYTES = Stages::BYTES * 2 > Out::BYTES ? Stages::BYTES * 2 : Out::BYTES;
    SHARED(u32x4, room, [BYTES / 16]);
    SHARED(i32, rows, [ROWS * 16]);

    const i32 expert = args.experts ? uniform(args.experts[block_x()]) : 0;
    if (static_cast<u32>(expert) >= static_cast<u32>(args.E)) return;
    const u32 place = block_x() * ROWS * 16 + thread() / 4;
    const i32 slot = args.slots ? args.slots[place] : place;
    if (thread() % 4 == 0) rows[in_lane_order(thread() / 4)] = slot;

    const i32 first_stage = block_z() * args.stages, k = uniform(first_stage * STAGE);
    const i32 stages = uniform(least(args.stages, args.K / STAGE - first_stage));
    const char* x = uniform(args.x + i64(k) * 2);
    const u32 row = (static_cast<u32>(slot) < static_cast<u32>(args.rows) ? slot : 0) / args.per_row;
    u32 mine = row * (args.K * 2) + thread() % 4 * 16;
    Weights weights(args, expert, Out::column(args), k);

    char* ring = reinterpret_cast<char*>(room);
    Stages stage;
    u32x2 words[2][COLS];
    stage.fetch(x, mine);
    weights.fetch(weights.codes, words[0]);
    weights.fetch(weights.codes + weights.step, words[1]);
    stage.put(ring);
    barrier();

    f32x8 sums[ROWS][COLS] = {};
    const i32 whole = uniform(args.G / STAGE);
    i32 left = uniform(whole - k % args.G / STAGE);
    u32 half = 0;
    const char* codes = weights.codes;
    for (i32 s = 0; s < stages; ++s) {
        const i32 after = least(s + 1, stages - 1);  // the last stage fetches itself once more
        mine = anew(mine);
        weights.renew();
        const char *from = codes + weights.step, *next = weights.codes + after * (weights.step * FRAGMENTS);
        stage.fetch(scalar(x + after * (STAGE * 2)), mine);
        const vec<u16, COLS> stored = weights.scale();
        const char* read = ring + half * Stages::BYTES;
        f32x8 products[ROWS][COLS];
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
            Fragment<T> a[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                a[r] = Stages::fragment(read, r, f * 16);
                if (f == 0)
                    for (int c = 0; c < COLS; ++c) products[r][c] = Stages::start(read, r);
            }
#pragma unroll
            for (int c = 0; c < COLS; ++c) {
                const auto b = unpack<T>(words[f % 2][c]);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) products[r][c] = wmma(a[r], b, products[r][c]);
            }
            from = scalar(f + 2 == FRAGMENTS ? next : from + weights.step);
            weights.fetch(from, words[f % 2]);
            stay();
        }
        float scale[COLS];
#pragma unroll
        for (int c = 0; c < COLS; ++c) scale[c] = opaque(wide<T>(stored[c]));  // a float16 factor rules out pairs
        add_scaled(sums, products, scale);
        if constexpr (Weights::ZEROS)
            if (args.kind != EIGHT) add_zeros<T, Stages>(sums, read, weights.zero(args), scale);
        if (--left == 0) {
            left = whole;
            weights.next_group(args);
        }
        codes = next;
        half ^= 1;
        stage.put(ring + half * Stages::BYTES);
        barrier();
    }
    Out(args, expert).store(ring, rows, sums);
}
