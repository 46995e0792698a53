// The GPU that the tests have: every lane of a block is a fiber of its own, run in a random order on the CPU.
//
// Lanes run until they meet: at a barrier all lanes of the block, at a wave operation (WMMA, shuffle, ...) the 32 of a
// wave, which must all be at the same one. LDS is NaN when a block starts, so what was not written, or is read before
// the barrier, shows in the result. Reading or writing memory that is not there ends the launch with an error.
// x86-64 only: the switch between fibers is its assembly.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lanes {

struct Kernel {
    std::string name;
    void (*run)(const void* kernarg);
    uint32_t threads;
    size_t kernarg_bytes;
};

inline std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

struct Registered {
    explicit Registered(Kernel kernel) { kernels().push_back(std::move(kernel)); }
};

constexpr size_t STACK = 256 * 1024, MOST = 1024;

struct Lane {
    void* stack_pointer;
    void* slot;             // what this lane brings to the wave operation it waits at
    void (*meet)(void** slots);
    int line;               // of the source, where it waits
};

struct Block {
    uint32_t index[3];
    uint32_t threads;
    const Kernel* kernel;
    const void* kernarg;
    Lane lanes[MOST];
    uint32_t now;                      // the lane that runs
    void* scheduler;                   // its stack pointer
    std::vector<uint32_t> ready;
    std::vector<uint32_t> at_wave[MOST / 32];
    std::vector<uint32_t> at_barrier;
    uint32_t done;
    std::set<const void*> poisoned;    // the arrays in LDS that were filled with NaN
    std::mt19937 random;
    std::string error;
};
inline Block block;

// Saves the registers that a call keeps, goes over to another stack and takes its registers.
__attribute__((naked, noinline)) inline void go(void** from, void* to) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

// Threads keep nothing across this: the compiler must not hold the address of a lane over a switch.
__attribute__((noinline)) inline void wait() {
    asm volatile("" ::: "memory");
    go(&block.lanes[block.now].stack_pointer, block.scheduler);
}

inline void lane_main() {
    block.kernel->run(block.kernarg);
    ++block.done;
    wait();
    __builtin_trap();
}

inline void release(std::vector<uint32_t>& waiting) {
    block.ready.insert(block.ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

// All lanes of a wave bring a slot; `meet` is given the 32 of them, in the order of the lanes, once they are all here.
__attribute__((noinline)) inline void together(void* slot, void (*meet)(void**), int line) {
    Lane& lane = block.lanes[block.now];
    lane.slot = slot;
    lane.meet = meet;
    lane.line = line;
    block.at_wave[block.now / 32].push_back(block.now);
    wait();
}

inline void fail(std::string what) {
    if (block.error.empty()) block.error = std::move(what);
}

inline void meet_wave(std::vector<uint32_t>& waiting) {
    const uint32_t first = waiting[0] / 32 * 32;
    void* slots[32];
    for (uint32_t i = 0; i < 32; ++i) {
        const Lane& lane = block.lanes[first + i];
        slots[i] = lane.slot;
        if (lane.meet != block.lanes[first].meet || lane.line != block.lanes[first].line)
            return fail("lanes of one wave are at different operations, lines " + std::to_string(lane.line) + " and " +
                        std::to_string(block.lanes[first].line));
    }
    block.lanes[first].meet(slots);
    release(waiting);
}

inline void meet_barrier() {
    const int line = block.lanes[block.at_barrier[0]].line;
    for (uint32_t i : block.at_barrier)
        if (block.lanes[i].line != line)
            return fail("lanes are at different barriers, lines " + std::to_string(line) + " and " +
                        std::to_string(block.lanes[i].line));
    release(block.at_barrier);
}

inline void start_lanes() {
    static char* stacks = static_cast<char*>(
        mmap(nullptr, STACK * MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (uint32_t i = 0; i < block.threads; ++i) {
        void** top = reinterpret_cast<void**>(stacks + STACK * (i + 1));
        *--top = nullptr;  // nobody returns from lane_main
        *--top = reinterpret_cast<void*>(lane_main);
        top -= 6;
        memset(top, 0, 6 * sizeof *top);
        block.lanes[i].stack_pointer = top;
    }
}

inline void run_block() {
    start_lanes();
    block.done = 0;
    block.poisoned.clear();
    for (auto& waiting : block.at_wave) waiting.clear();
    block.at_barrier.clear();
    block.ready.resize(block.threads);
    std::iota(block.ready.begin(), block.ready.end(), 0u);
    while (block.error.empty() && !block.ready.empty()) {
        std::swap(block.ready[block.random() % block.ready.size()], block.ready.back());
        block.now = block.ready.back();
        block.ready.pop_back();
        go(&block.scheduler, block.lanes[block.now].stack_pointer);
        auto& wave = block.at_wave[block.now / 32];
        if (wave.size() == 32) meet_wave(wave);
        if (!block.at_barrier.empty() && block.at_barrier.size() + block.done == block.threads) meet_barrier();
    }
    if (block.error.empty() && block.done != block.threads)
        fail("lanes wait for others that never come, the first at line " +
             std::to_string([] {
                 for (auto& waiting : block.at_wave)
                     if (!waiting.empty()) return block.lanes[waiting[0]].line;
                 return block.lanes[block.at_barrier[0]].line;
             }()));
}

inline sigjmp_buf outside;
inline void trapped(int) { siglongjmp(outside, 1); }

// Runs a kernel over a grid, its blocks in a random order too. The error, or "".
inline std::string run(const Kernel& kernel, const uint32_t grid[3], uint32_t threads, const void* kernarg, uint64_t seed) {
    if (threads != kernel.threads || threads % 32 != 0 || threads > MOST)
        return "blocks of " + std::to_string(threads) + " threads, the kernel is for " + std::to_string(kernel.threads);
    block.kernel = &kernel;
    block.kernarg = kernarg;
    block.threads = threads;
    block.error.clear();
    block.random.seed(static_cast<uint32_t>(seed));
    static char signal_stack[64 * 1024];
    stack_t alternative{signal_stack, 0, sizeof signal_stack}, before_stack;
    sigaltstack(&alternative, &before_stack);
    struct sigaction action {}, before[2];
    action.sa_handler = trapped;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
    if (sigsetjmp(outside, 1) == 0) {
        const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
        std::vector<uint64_t> order(blocks);
        std::iota(order.begin(), order.end(), uint64_t(0));
        std::shuffle(order.begin(), order.end(), block.random);
        for (uint64_t which : order) {
            block.index[0] = which % grid[0];
            block.index[1] = which / grid[0] % grid[1];
            block.index[2] = which / grid[0] / grid[1];
            run_block();
            if (!block.error.empty()) break;
        }
    } else {
        fail("memory that is not there was read or written, by lane " + std::to_string(block.now) + " of block " +
             std::to_string(block.index[0]) + ", " + std::to_string(block.index[1]) + ", " + std::to_string(block.index[2]));
    }
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGBUS, &before[1], nullptr);
    sigaltstack(&before_stack, nullptr);
    return block.error;
}

template <class T>
T* poison(T* array, size_t bytes) {
    if (block.poisoned.insert(array).second) memset(array, 0xff, bytes);
    return array;
}

template <class Vector>
struct Product {
    Vector a, b;
    f32x8 c;
};

inline float wide(f16 value) { return static_cast<float>(value); }
inline float wide(short value) { return __builtin_bit_cast(float, static_cast<uint32_t>(static_cast<uint16_t>(value)) << 16); }

template <class Vector>
void multiply(void** slots) {
    const auto of = [&](int lane) -> Product<Vector>& { return *static_cast<Product<Vector>*>(slots[lane]); };
    float a[16][16], b[16][16];
    for (int lane = 0; lane < 16; ++lane) {
        if (memcmp(&of(lane).a, &of(lane + 16).a, sizeof(Vector)) || memcmp(&of(lane).b, &of(lane + 16).b, sizeof(Vector)))
            return fail("WMMA's operands in lanes " + std::to_string(lane) + " and " + std::to_string(lane + 16) + " differ");
        for (int k = 0; k < 16; ++k) {
            a[lane][k] = wide(of(lane).a[k]);
            b[k][lane] = wide(of(lane).b[k]);
        }
    }
    for (int row = 0; row < 16; ++row) {
        float sums[16];
        for (int column = 0; column < 16; ++column) sums[column] = of(column + 16 * (row % 2)).c[row / 2];
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 16; ++column) sums[column] += a[row][k] * b[k][column];
        for (int column = 0; column < 16; ++column) of(column + 16 * (row % 2)).c[row / 2] = sums[column];
    }
}

template <class Vector>
f32x8 product(Vector a, Vector b, f32x8 c, int line) {
    Product<Vector> slot{a, b, c};
    together(&slot, multiply<Vector>, line);
    return slot.c;
}

struct Exchange {
    uint32_t value, from, got;
};

inline void exchange(void** slots) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& mine = *static_cast<Exchange*>(slots[lane]);
        mine.got = static_cast<Exchange*>(slots[mine.from % 32])->value;
    }
}

inline void agree(void** slots) {
    for (int lane = 1; lane < 32; ++lane)
        if (*static_cast<int32_t*>(slots[lane]) != *static_cast<int32_t*>(slots[0])) fail("lanes of one wave disagree on a uniform value");
}

inline void nothing(void**) {}

}  // namespace lanes

#define KERNEL(name, Args, threads, waves)                                                            \
    static void name##_lane(const Args args);                                                         \
    static void name##_run(const void* kernarg) { name##_lane(*static_cast<const Args*>(kernarg)); }  \
    static lanes::Registered name##_registered({#name, name##_run, threads, sizeof(Args)});           \
    static void name##_lane(const Args args)

#define SHARED(type, name, dims)                      \
    alignas(16) static type name dims;                \
    lanes::poison(&name, sizeof name)

DEVICE u32 thread() { return lanes::block.now; }
DEVICE u32 block_x() { return lanes::block.index[0]; }
DEVICE u32 block_y() { return lanes::block.index[1]; }
DEVICE u32 block_z() { return lanes::block.index[2]; }

__attribute__((noinline)) inline void barrier(int line = __builtin_LINE()) {
    lanes::block.lanes[lanes::block.now].line = line;
    lanes::block.at_barrier.push_back(lanes::block.now);
    lanes::wait();
}
inline void wave_barrier(int line = __builtin_LINE()) { lanes::together(nullptr, lanes::nothing, line); }

inline i32 uniform(i32 value, int line = __builtin_LINE()) {
    lanes::together(&value, lanes::agree, line);
    return value;
}
inline const char* uniform(const char* address, int line = __builtin_LINE()) {
    const u64 value = reinterpret_cast<u64>(address);
    uniform(i32(value >> 32), line);
    uniform(i32(value), line);
    return address;
}
DEVICE const char* scalar(const char* address) { return address; }
inline u32 shuffle(u32 value, u32 lane, int line = __builtin_LINE()) {
    lanes::Exchange slot{value, lane, 0};
    lanes::together(&slot, lanes::exchange, line);
    return slot.got;
}
inline float read_lane(float value, u32 lane, int line = __builtin_LINE()) {
    return bits<float>(shuffle(bits<u32>(value), lane, line));
}
template <class V>
DEVICE V scalar_load(const char* base, u32 offset = 0, i32 further = 0) {
    V value;
    memcpy(&value, base + offset + further, sizeof value);
    return value;
}
template <int mask>
float shuffle_xor(float value, int line = __builtin_LINE()) {
    static_assert(0 < mask && mask < WAVE);
    return bits<float>(shuffle(bits<u32>(value), (thread() % WAVE) ^ mask, line));
}

DEVICE float reciprocal(float x) { return 1 / x; }

DEVICE float dot2(f16x2 a, f16x2 b, float c) { return lanes::wide(a.x) * lanes::wide(b.x) + lanes::wide(a.y) * lanes::wide(b.y) + c; }
DEVICE float dot2(bf16x2 a, bf16x2 b, float c) { return lanes::wide(a.x) * lanes::wide(b.x) + lanes::wide(a.y) * lanes::wide(b.y) + c; }

inline f32x8 wmma(f16x16 a, f16x16 b, f32x8 c, int line = __builtin_LINE()) { return lanes::product(a, b, c, line); }
inline f32x8 wmma(bf16x16 a, bf16x16 b, f32x8 c, int line = __builtin_LINE()) { return lanes::product(a, b, c, line); }

DEVICE u32 count(u32* counter, u32 by) { return __atomic_fetch_add(counter, by, __ATOMIC_SEQ_CST); }
DEVICE u32 count_shared(u32* counter, u32 by) { return __atomic_fetch_add(counter, by, __ATOMIC_SEQ_CST); }
DEVICE float opaque(float value) { return value; }
DEVICE void acquire() {}
DEVICE void release() {}
DEVICE void stay() {}
DEVICE void arrived(u32) {}
template <class V>
V anew(V value) {
    return value;
}
template <class Args>
Args again(const Args& args) {
    return args;
}
