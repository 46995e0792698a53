// What the kernels use in place of HIP's headers: types, indices, barriers, dots and lane exchanges.
//
// On a GPU these are the compiler's builtins (gfx11 and gfx12, 32 lanes a wave). Compiled for the host they come from
// "lanes.h", which runs every lane on its own, so that the tests execute this very source.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
using f16 = _Float16;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

using f16x2 = vec<f16, 2>;
using f16x4 = vec<f16, 4>;
using f16x8 = vec<f16, 8>;
using f16x16 = vec<f16, 16>;
// bfloat16 travels as its bits.
using bf16x2 = vec<short, 2>;
using bf16x4 = vec<short, 4>;
using bf16x8 = vec<short, 8>;
using bf16x16 = vec<short, 16>;
using f32x2 = vec<float, 2>;
using f32x4 = vec<float, 4>;
using f32x8 = vec<float, 8>;
using u32x2 = vec<u32, 2>;
using u32x4 = vec<u32, 4>;

constexpr int WAVE = 32;

template <class To, class From>
__attribute__((always_inline)) constexpr To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    return __builtin_bit_cast(To, value);
}

#ifdef __HIP__
#define DEVICE __attribute__((device, always_inline)) inline
#else
#define DEVICE __attribute__((always_inline)) inline
#endif

#if defined(__AMDGCN__)

// A kernel of one argument, a struct by value; blocks of exactly `threads`, registers for at least `waves` waves a SIMD:
//     KERNEL(name, Args, 256, 8) { ... args.x ... }
#define KERNEL(name, Args, threads, waves)                                                                              \
    extern "C" __attribute__((global, amdgpu_flat_work_group_size(threads, threads), amdgpu_waves_per_eu(waves))) void name( \
        const Args args)

// A kernel's argument, read again: between what is read before and after, it takes no registers. Once in a kernel: clang
// 19 does not compile it twice.
template <class Args>
DEVICE Args again(const Args&) {
    auto from = __builtin_amdgcn_kernarg_segment_ptr();
    asm volatile("" : "+s"(from));
    return *(const Args*)from;
}

// An array in LDS: SHARED(f16, tile, [32][72]);
#define SHARED(type, name, dims) __attribute__((shared, aligned(16))) type name dims

DEVICE u32 thread() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE u32 block_x() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE u32 block_y() { return __builtin_amdgcn_workgroup_id_y(); }
DEVICE u32 block_z() { return __builtin_amdgcn_workgroup_id_z(); }

// All threads of the block meet here, and what was written to LDS before is seen after. Global memory is not ordered:
// loads in flight stay in flight.
DEVICE void barrier() {
#if defined(__gfx1200__) || defined(__gfx1201__)
    asm volatile("s_wait_dscnt 0x0\n\ts_barrier_signal -1\n\ts_barrier_wait -1" ::: "memory");
#else
    asm volatile("s_waitcnt lgkmcnt(0)\n\ts_barrier" ::: "memory");
#endif
}

// The lanes of a wave meet here, and what they wrote to LDS before is seen after.
DEVICE void wave_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

// A value that all lanes of the wave share, in a scalar register.
DEVICE i32 uniform(i32 value) { return __builtin_amdgcn_readfirstlane(value); }
DEVICE const char* uniform(const char* address) {
    const u64 value = reinterpret_cast<u64>(address);
    return reinterpret_cast<const char*>(u64(u32(uniform(i32(value >> 32)))) << 32 | u32(uniform(i32(value))));
}

// The same address, which is in scalar registers already: what each lane adds to it stays an offset of 32 bits.
DEVICE const char* scalar(const char* address) {
    asm("" : "+s"(address));
    return address;
}

// The same value, of which the compiler no longer knows where it comes from.
DEVICE float opaque(float value) {
    asm("" : "+v"(value));
    return value;
}

// What lane `lane`, the same number in all lanes, holds, in a scalar register.
DEVICE float read_lane(float value, u32 lane) { return bits<float>(__builtin_amdgcn_readlane(bits<i32>(value), lane)); }

// From memory that nobody writes while the kernel runs, at an address that all lanes of the wave share, a multiple of 4:
// into scalar registers, by one instruction, which adds the offset itself.
template <class V>
DEVICE V scalar_load(const char* base, u32 offset = 0, i32 further = 0) {
    typedef V __attribute__((aligned(4), may_alias)) Any;
    using Constant = const char __attribute__((address_space(4)))*;
    asm volatile("" : "+s"(offset));
    const Constant from = (Constant)(base) + offset + further;
    return *(const volatile Any __attribute__((address_space(4)))*)(from);
}

// What scalar_load gave is waited for here. They arrive in any order, so a later wait is for all that were begun by then.
DEVICE void arrived(u32 value) { asm volatile("" ::"s"(value)); }

// The compiler moves no instruction from before to after this, or the other way round.
DEVICE void stay() { __builtin_amdgcn_sched_barrier(0); }

// The same offset, of which the compiler no longer knows that it was there before the loop: the load adds it to the base,
// which is in scalar registers, and no instruction does.
DEVICE u32 anew(u32 offset) {
    asm volatile("" : "+v"(offset));
    return offset;
}

// The value that the lane with this lane's number xor `mask` holds.
template <int mask>
DEVICE float shuffle_xor(float value) {
    static_assert(0 < mask && mask < WAVE);
    i32 held = bits<i32>(value);
    if constexpr (mask < 16)
        return bits<float>(__builtin_amdgcn_update_dpp(held, held, 0x160 | mask, 0xf, 0xf, true));  // row_xmask
    held = __builtin_amdgcn_permlanex16(held, held, 0x76543210, 0xfedcba98, false, false);
    if constexpr (mask > 16)
        return shuffle_xor<mask - 16>(bits<float>(held));
    return bits<float>(held);
}

// The value that lane `lane` of the wave holds.
DEVICE u32 shuffle(u32 value, u32 lane) { return __builtin_amdgcn_ds_bpermute(lane * 4, value); }

// Within one unit in the last place.
DEVICE float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }

// a.x * b.x + a.y * b.y + c
DEVICE float dot2(f16x2 a, f16x2 b, float c) { return __builtin_amdgcn_fdot2(a, b, c, false); }
DEVICE float dot2(bf16x2 a, bf16x2 b, float c) {
#if __clang_major__ >= 20
    using native = vec<__bf16, 2>;
#else
    using native = bf16x2;
#endif
    return __builtin_amdgcn_fdot2_f32_bf16(bits<native>(a), bits<native>(b), c, false);
}

// 16 x 16 += (16 x 16) (16 x 16). Lane l holds row l % 16 of A and column l % 16 of B, lanes 16..31 what 0..15 hold;
// element i of C is row 2 i + l / 16, column l % 16. gfx12 lays its operands out differently and has no such builtin.
#if !defined(__gfx1200__) && !defined(__gfx1201__)
DEVICE f32x8 wmma(f16x16 a, f16x16 b, f32x8 c) { return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, c); }
DEVICE f32x8 wmma(bf16x16 a, bf16x16 b, f32x8 c) { return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(a, b, c); }
#endif

// Adds to a counter in global memory and gives its old value. What this thread wrote before is seen by whoever sees the
// sum, and the other way round.
DEVICE u32 count(u32* counter, u32 by) {
    return __hip_atomic_fetch_add(counter, by, __ATOMIC_ACQ_REL, __HIP_MEMORY_SCOPE_AGENT);
}
// What this thread wrote is seen by whoever knows of a count that comes after, made by another thread of the block.
DEVICE void release() { __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent"); }
// What was written before a count that this thread knows of, by whatever way, is seen after.
DEVICE void acquire() { __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent"); }
// The same for a counter in LDS; a barrier makes it visible.
DEVICE u32 count_shared(u32* counter, u32 by) {
    return __hip_atomic_fetch_add(counter, by, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}

#elif !defined(__HIP__)
#include "lanes.h"
#endif
