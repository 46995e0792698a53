// What lies before, between and behind the two products of routed experts: kernels route, activate_<f16|bf16>,
// combine_<f16|bf16>.
#include "activation.h"
#include "codes.h"

constexpr i32 THREADS = 256, MOST_EXPERTS = 4096;

// The ids that the router gave, slot by slot, and the row of the weights that each stands for.
struct Ids {
    const char* ids;
    const i32* map;  // id -> row, or -1; or null: the id is the row
    i32 number, E;   // of ids, of rows
    i32 wide;        // ids are int64

    // -1 for one that stands for no row.
    DEVICE i32 row(i32 slot) const {
        const i64 id = wide ? reinterpret_cast<const i64*>(ids)[slot] : reinterpret_cast<const i32*>(ids)[slot];
        if (id < 0 || id >= number) return -1;
        const i32 row = map ? map[id] : static_cast<i32>(id);
        return row < E ? row : -1;
    }
};

// Slots by expert, in their order within one, each expert's filled up to whole blocks with `slots`; experts of blocks, -1
// for those that are not used; where the last used one ends.
struct RouteArgs {
    Ids ids;
    i32* sorted;   // [blocks * height]
    i32* experts;  // [blocks]
    i32* end;      // [1]
    i32 slots, height, blocks;
};

// A block an expert: each counts all, and writes its own.
KERNEL(route, RouteArgs, THREADS, 8) {
    SHARED(u32, counts, [MOST_EXPERTS]);
    SHARED(u32, before, [2]);  // blocks of the experts before this one, and of all
    SHARED(u32, mine, [THREADS]);
    const i32 expert = block_x(), E = args.ids.E, t = thread(), share = (args.slots + THREADS - 1) / THREADS;
    const i32 first = t * share, last = first + share < args.slots ? first + share : args.slots;
    for (i32 e = t; e < E; e += THREADS) counts[e] = 0;
    if (t < 2) before[t] = 0;
    barrier();
    u32 own = 0;
    for (i32 slot = first; slot < last; ++slot) {
        const i32 row = args.ids.row(slot);
        if (row >= 0) count_shared(counts + row, 1);
        own += row == expert;
    }
    mine[t] = own;
    barrier();
    for (i32 e = t; e < E; e += THREADS) {
        const u32 needed = (counts[e] + args.height - 1) / args.height;
        count_shared(before + 1, needed);
        if (e < expert) count_shared(before, needed);
    }
    barrier();
    const i32 start = before[0], used = (counts[expert] + args.height - 1) / args.height;
    i32* place = args.sorted + start * args.height;
    for (i32 i = counts[expert] + t; i < used * args.height; i += THREADS) place[i] = args.slots;
    for (i32 i = t; i < used; i += THREADS) args.experts[start + i] = expert;
    for (i32 i = 0; i < t; ++i) place += mine[i];
    for (i32 slot = first; slot < last; ++slot)
        if (args.ids.row(slot) == expert) *place++ = slot;
    if (expert != 0) return;
    for (i32 i = before[1] + t; i < args.blocks; i += THREADS) args.experts[i] = -1;
    if (t == 0) *args.end = before[1] * args.height;
}

// h, float32 [slots, columns or twice as many] -> act [slots, columns], for products that could not do it themselves.
struct ActivateArgs {
    const char* h;
    char* act;
    i32 columns, gate_up, activation;
    float alpha, limit;
};

// y [tokens * per_token, columns] -> out [tokens, columns]: the sum of a token's slots that have an expert, in order,
// times `scaling`. Rows of others were never written.
struct CombineArgs {
    Ids ids;
    const char* y;
    char* out;
    i32 per_token, columns;
    i32 wide_y;  // it is float32
    float scaling;
};

// Four columns a thread.
template <class T>
DEVICE void activate(const ActivateArgs& args) {
    const i32 n = (block_y() * THREADS + thread()) * 4;
    if (n >= args.columns) return;
    const i32 pitch = args.gate_up ? 2 * args.columns : args.columns;
    const float* h = reinterpret_cast<const float*>(args.h) + i64(block_x()) * pitch;
    const auto four = [&](i32 at) { return *reinterpret_cast<const f32x4*>(h + at); };
    f32x4 y;
    if (args.gate_up == NO_GATE) {
        y = activated(args.activation, four(n), args.alpha);
    } else if (args.gate_up == SEPARATE) {
        y = gated(args.activation, four(n), four(n + args.columns), args.alpha, args.limit);
    } else {
        const f32x4 low = four(2 * n), high = four(2 * n + 4);
        y = gated(args.activation, evens(low, high), odds(low, high), args.alpha, args.limit);
    }
    *reinterpret_cast<u16x4*>(args.act + (i64(block_x()) * args.columns + n) * 2) = rounded4<T>(y);
}

template <class T>
DEVICE void combine(const CombineArgs& args) {
    const i32 n = (block_y() * THREADS + thread()) * 4;
    if (n >= args.columns) return;
    f32x4 sum = {};
    for (i32 j = 0; j < args.per_token; ++j) {
        const i32 slot = block_x() * args.per_token + j;
        if (args.ids.row(slot) < 0) continue;
        const i64 at = i64(slot) * args.columns + n;
        sum += args.wide_y ? reinterpret_cast<const f32x4*>(args.y)[at / 4]
                           : wide4<T>(reinterpret_cast<const u16x4*>(args.y)[at / 4]);
    }
    reinterpret_cast<u16x4*>(args.out)[(i64(block_x()) * args.columns + n) / 4] = rounded4<T>(sum * args.scaling);
}

#define EXPERTS(type)                                                               \
    KERNEL(activate_##type, ActivateArgs, THREADS, 8) { activate<type>(args); }     \
    KERNEL(combine_##type, CombineArgs, THREADS, 8) { combine<type>(args); }

EXPERTS(f16)
EXPERTS(bf16)
