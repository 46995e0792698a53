// Blocks that share a result leave their parts in memory; the last one to arrive adds them up, in their own order, so that
// the result does not depend on which one that is.
#pragma once
#include "prelude.h"

// Called by a wave, all of whose lanes have written their part: whether all `parts` are there now. If so, the counter is
// zero again, and this wave sees what the others wrote.
DEVICE bool last_to_arrive(u32* counter, u32 parts) {
    wave_barrier();
    const u32 before = shuffle(thread() % WAVE == 0 ? count(counter, 1) : 0, 0);
    if (before != parts - 1) return false;
    acquire();
    if (thread() % WAVE == 0) *counter = 0;
    return true;
}

// The sum of `parts` values, `pitch` apart.
DEVICE f32x4 in_order(const float* from, i32 parts, i64 pitch) {
    f32x4 sum = {};
#pragma unroll 4
    for (i32 i = 0; i < parts; ++i) sum += *reinterpret_cast<const f32x4*>(from + i * pitch);
    return sum;
}
