// x W^T for up to 8 rows of x with dot2: what the kernels of dense.hip and moe.hip are made of.
//
// A block has 128 columns, a lane 4 neighbours of them; its 8 waves share k, in steps of 32. The rows of x are the same
// for all lanes: scalar loads bring them, up to 32 values an instruction, and dot2 takes them from scalar registers, so
// they need neither LDS nor a lane's registers. Codes of the next step are on their way while those of this one are used.
#pragma once
#include "arrive.h"
#include "codes.h"

constexpr i32 WAVES = 8, THREADS = WAVES * WAVE, COLUMNS = 4, TILE = WAVE * COLUMNS, STEP = 32, WORDS = STEP / 8;

struct Weight {
    const char* words;   // [K/8, N]
    const char* scales;  // [K/G, N]
    const char* zeros;
    i32 kind;  // of zeros
    i32 K, N, G;
};

DEVICE i32 least(i32 a, i32 b) { return a < b ? a : b; }
DEVICE i32 ceiling(i32 a, i32 b) { return (a + b - 1) / b; }
DEVICE i32 lane() { return thread() % WAVE; }
DEVICE i32 wave() { return uniform(thread() / WAVE); }

// A value at an offset in bytes from an address that all lanes of the wave share.
template <class V>
DEVICE V load(const char* base, u32 offset) {
    typedef V __attribute__((may_alias)) Any;
    return *reinterpret_cast<const Any*>(base + anew(offset));
}

// Scales and zeros of this lane's columns, one group after the other.
template <class T, Zeros Z>
struct Groups {
    // As they are in memory.
    struct Raw {
        u16x4 scales;
        u32 zeros;
    };
    const char *scales, *zeros;
    i32 columns, n, steps, left;
    u32 more;  // what is stored lacks this to BASE + zero, in each byte

    DEVICE Groups(const Weight& w, i32 step, i32 n)
        : columns(w.N), n(n), steps(w.G / STEP), more(Half<T>::BASE + (w.kind == NIBBLES_LESS_ONE)) {
        more *= 0x01010101;
        const i32 group = step / steps;
        left = steps - step % steps;
        scales = w.scales + i64(group) * columns * 2;
        zeros = w.zeros + i64(group) * zeros_of_a_group();
    }
    DEVICE i32 zeros_of_a_group() const { return Z == EIGHT ? 0 : Z == BYTES ? columns : columns / 2; }
    DEVICE Raw fetch() const {
        u32 raw = 0;
        if (Z == BYTES) raw = load<u32>(zeros, n);
        if (Z == NIBBLES) raw = load<u16>(zeros, n / 2);
        return {load<u16x4>(scales, n * 2), raw};
    }
    // BASE + zero.
    DEVICE f32x4 bases(Raw raw) const {
        if (Z == EIGHT) return f32x4(Half<T>::BASE + 8);
        u32 bytes = raw.zeros;
        if (Z == NIBBLES) {
            bytes = (bytes | bytes << 8) & 0x00ff00ff;
            bytes = (bytes | bytes << 4) & 0x0f0f0f0f;
        }
        bytes += more;
        f32x4 all;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) all[c] = static_cast<float>(bytes >> 8 * c & 255);
        return all;
    }
    // So many steps on, 0 or 1.
    DEVICE void advance(i32 by) {
        left -= by;
        const i32 next = left == 0;
        left += next ? steps : 0;
        scales += static_cast<u32>(next ? columns * 2 : 0);
        zeros += static_cast<u32>(next ? zeros_of_a_group() : 0);
    }
};

// Rows of x, by where they begin, in bytes.
template <int M>
struct Rows {
    const char* x;
    u32 offsets[M];
};

// The sums of the rows of x over a step. Lanes share the work: of each row, one has 2 to 8 values.
template <class T, int M>
struct Sums {
    static constexpr int LANES = M == 1 ? 16 : WAVE / M, PAIRS = STEP / 2 / LANES;
    using Part = vec<u32, PAIRS>;
    u32 offset;

    DEVICE Sums(const Rows<M>& rows) {
        offset = rows.offsets[0];
#pragma unroll
        for (int m = 1; m < M; ++m)
            if (lane() / LANES == m) offset = rows.offsets[m];
        offset += lane() % LANES * sizeof(Part);
    }
    DEVICE Part fetch(const char* x) const { return load<Part>(x, offset); }
    static DEVICE void add(Part part, float (&sums)[M]) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i)
            sum = dot2(bits<typename Half<T>::Pair>(part[i]), bits<typename Half<T>::Pair>(Half<T>::ONES), sum);
        if constexpr (LANES > 8) sum += shuffle_xor<8>(sum);
        if constexpr (LANES > 4) sum += shuffle_xor<4>(sum);
        sum += shuffle_xor<2>(sum);
        sum += shuffle_xor<1>(sum);
#pragma unroll
        for (int m = 0; m < M; ++m) sums[m] = M == 1 ? sum : read_lane(sum, m * LANES);
    }
};

// Which values of x are in scalar registers at once: so many rows and so many words' worth of k, one such part while the
// next is on its way. The parts of a step come by rows first.
template <int M>
struct Parts {
    static constexpr int ROWS = M < 4 ? M : 4, LENGTH = M < 4 ? 2 : 1, BY_ROWS = M / ROWS, COUNT = BY_ROWS * WORDS / LENGTH;
    using Row = vec<u32, LENGTH * 4>;
    Row rows[ROWS];

    DEVICE void wait() const {
#pragma unroll
        for (int m = 0; m < ROWS; ++m) arrived(rows[m][0]);
    }
    // Part number `i`, from 0 to COUNT - 1, of the step at x.
    DEVICE void fetch(const char* x, const u32 (&offsets)[M], int i) {
#pragma unroll
        for (int m = 0; m < ROWS; ++m)
            rows[m] = scalar_load<Row>(x, offsets[i % BY_ROWS * ROWS + m], i / BY_ROWS * sizeof(Row));
    }
};

// products[first + m][c] += x[m] (BASE + q[c]) over 8 values of k.
template <class T, int M>
DEVICE void multiply_words(const Parts<M>& x, int at, u32x4 words, int first, f32x4 (&products)[M]) {
    using H = Half<T>;
    using Pair = typename H::Pair;
    const auto add = [&](int p, u32x4 pairs) {
#pragma unroll
        for (int m = 0; m < Parts<M>::ROWS; ++m)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                f32x4& sums = products[first + m];
                sums[c] = dot2(bits<Pair>(x.rows[m][at + p]), bits<Pair>(pairs[c]), sums[c]);
            }
    };
    add(0, H::template pair<0>(words));
    add(1, H::template pair<1>(words));
    add(2, H::template pair<2>(words));
    add(3, H::template pair<3>(words));
}

// y[m][c] = x[m] W[n + c] over the steps from `first` on, before `last`.
template <class T, int M, Zeros Z>
DEVICE void multiply(const Weight& w, const Rows<M>& rows, i32 first, i32 last, i32 n, f32x4 (&y)[M]) {
    using P = Parts<M>;
    if (first >= last) return;
    const u32 pitch = w.N * 4;
    const char *words = w.words + i64(first) * WORDS * pitch, *x = rows.x + first * (STEP * 2);
    u32x4 held[WORDS];
#pragma unroll
    for (int j = 0; j < WORDS; ++j) held[j] = load<u32x4>(words, n * 4 + j * pitch);
    Groups<T, Z> groups(w, first, n);
    auto raw = groups.fetch();
    const Sums<T, M> sums(rows);
    auto summands = sums.fetch(x);
    P parts[2];
    parts[0].fetch(x, rows.offsets, 0);
#pragma unroll 1
    for (i32 left = last - first; left > 0; --left) {
        const i32 more = left > 1;  // the last step fetches itself once more
        const f32x4 scales = wide4<T>(raw.scales), bases = groups.bases(raw);
        groups.advance(more);
        raw = groups.fetch();
        words += more ? WORDS * u64(pitch) : 0;
        const char* next = x + static_cast<u32>(more ? STEP * 2 : 0);
        f32x4 products[M] = {};
#pragma unroll
        for (int i = 0; i < P::COUNT; ++i) {
            parts[i % 2].wait();
            parts[(i + 1) % 2].fetch(i + 1 < P::COUNT ? x : next, rows.offsets, (i + 1) % P::COUNT);
#pragma unroll
            for (int j = i / P::BY_ROWS * P::LENGTH, at = 0; at < P::LENGTH; ++at, ++j) {
                multiply_words<T, M>(parts[i % 2], at * 4, held[j], i % P::BY_ROWS * P::ROWS, products);
                if (i % P::BY_ROWS == P::BY_ROWS - 1) held[j] = load<u32x4>(words, n * 4 + j * pitch);
            }
            stay();
        }
        float sum[M];
        sums.add(summands, sum);
        x = next;
        summands = sums.fetch(x);
#pragma unroll
        for (int m = 0; m < M; ++m) y[m] += scales * (products[m] - bases * sum[m]);
    }
}

// The steps that this wave has of those that split `split` of the work has: y as in multiply.
template <class T, int M>
DEVICE void multiply_part(const Weight& w, const Rows<M>& rows, i32 split, i32 steps, i32 n, f32x4 (&y)[M]) {
    const i32 start = split * steps, end = least(start + steps, w.K / STEP), mine = ceiling(steps, WAVES);
    const i32 first = start + wave() * mine, last = least(first + mine, end);
    n = least(n, w.N - COLUMNS);  // beyond the last column: computed, but stored by nobody
    if (w.kind == EIGHT) return multiply<T, M, EIGHT>(w, rows, first, last, n, y);
    if (w.kind == BYTES) return multiply<T, M, BYTES>(w, rows, first, last, n, y);
    return multiply<T, M, NIBBLES>(w, rows, first, last, n, y);
}

// The sum of what the waves have, added up in a fixed order: wave m gets row m, waves from M on nothing.
template <int M>
DEVICE f32x4 fold(const f32x4 (&y)[M]) {
    SHARED(f32x4, room, [WAVES / 2][M][WAVE]);
    const i32 mine = wave();
    if (mine >= WAVES / 2)
#pragma unroll
        for (int m = 0; m < M; ++m) room[mine - WAVES / 2][m][lane()] = y[m];
    barrier();
    if (mine < WAVES / 2)
#pragma unroll
        for (int m = 0; m < M; ++m) room[mine][m][lane()] += y[m];
    barrier();
    f32x4 sum = {};
    if (mine < M)
#pragma unroll
        for (int i = 0; i < WAVES / 2; ++i) sum += room[i][mine][lane()];
    return sum;
}
