// Rows of x times rows of an int4 weight, written once over a policy P: the vector operations of one instruction set (see
// portable.cpp for the list).
//
// units.h    x as the algorithms read it.
// direct.h   a few rows of x: the weight is read once, decoded in registers, lanes run along K.
// panel.h    many rows of x: a block of the weight is decoded into an L2-sized panel, lanes run along N, x is broadcast.
// linear.h, moe.h    the ops: what is multiplied with what, and what becomes of the sums.
//
// Both algorithms multiply x by the exact code - zero and apply the scale to float32 sums that never span two groups, so that
// nothing is rounded before the sum. Every output is summed by one thread in an order that depends on the shapes only.
//
// These files are included after a `#pragma GCC target`. So everything here is in an anonymous namespace and no template of the
// standard library is instantiated: the linker merges inline functions of the same name, and a copy that was compiled for
// AVX-512 must not end up in code that runs without it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "calls.h"

namespace w4a16_cpu {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into L2: past its end a stream of words is not worth a place in L1.
inline void prefetch(const int32_t* p) { __builtin_prefetch(p, 0, 2); }

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(aligned_alloc(64, div_up(count * sizeof(T) + 1, 64) * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

template <class F>
void run_parallel(int64_t count, int64_t grain, const F& body) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Work that is cut into equal items. Threads take a few neighbouring ones at a time until none is left, so that none waits long
// for another. Who computes an item does not change its result.
class Queue {
 public:
  Queue(int64_t items, int64_t work_per_item)
      : items_(items), workers_(larger(1, smaller(num_threads(), items * work_per_item / kWorthAThread))) {
    chunk_ = workers_ == 1 ? items : div_up(items, 32 * workers_);
  }
  // body() once on each thread; it calls take.
  template <class F>
  void run(const F& body) {
    run_parallel(workers_, 1, [&](int64_t, int64_t) { body(); });
  }
  bool take(int64_t& begin, int64_t& end) {
    begin = __atomic_fetch_add(&next_, chunk_, __ATOMIC_RELAXED);
    end = smaller(begin + chunk_, items_);
    return begin < end;
  }

 private:
  static constexpr int64_t kWorthAThread = 1 << 16;  // multiplications, a few microseconds of one row of x
  int64_t items_, workers_, chunk_, next_ = 0;
};

// The items that one thread takes from a queue, and those that it will take after the present one: what is to be fetched.
class Items {
 public:
  Items(Queue& queue, int64_t ahead) : queue_(queue), ahead_(smaller(ahead, kMost)) {
    for (int64_t i = 0; i <= ahead_; ++i) coming_[i] = one();
  }
  bool any() const { return coming_[0] >= 0; }
  int64_t now() const { return coming_[0]; }
  // The last one that is known, at most `ahead` items from now.
  int64_t later() const {
    int64_t i = ahead_;
    while (coming_[i] < 0) --i;
    return coming_[i];
  }
  void advance() {
    for (int64_t i = 0; i < ahead_; ++i) coming_[i] = coming_[i + 1];
    coming_[ahead_] = one();
  }

 private:
  static constexpr int64_t kMost = 8;
  int64_t one() { return begin_ < end_ || queue_.take(begin_, end_) ? begin_++ : -1; }
  Queue& queue_;
  int64_t ahead_, begin_ = 0, end_ = 0, coming_[kMost + 1];
};

// 2^(byte - 127), by its bits; 2^-127 is subnormal, and 255 NaN.
template <class F>
F power_of_two(F byte) {
  using Bits = decltype(byte < byte);
  const Bits b = __builtin_convertvector(byte, Bits);
  const Bits bits = b << 23;
  const Bits whole = b == 255 ? Bits{} + 0x7fc00000 : bits;
  return (F)(b == 0 ? Bits{} + 0x00400000 : whole);
}

template <class P>
typename P::F load_as_float(const void* p, Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return P::load_bf16(static_cast<const uint16_t*>(p));
    case Dtype::f16: return P::load_f16(static_cast<const uint16_t*>(p));
    case Dtype::u8: return P::load_u8(static_cast<const uint8_t*>(p));
    case Dtype::e8m0: return power_of_two(P::load_u8(static_cast<const uint8_t*>(p)));
    default: return P::load(static_cast<const float*>(p));
  }
}

// dst[0..count) in float32, and zeros up to the next multiple of P::L.
template <class P>
void widen(const void* base, Dtype dtype, int64_t begin, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + P::L <= count; i += P::L) P::store(dst + i, load_as_float<P>(at(base, dtype, begin + i), dtype));
  if (i == count) return;
  alignas(64) char tail[P::L * 4] = {};
  memcpy(tail, at(base, dtype, begin + i), (count - i) * size_of(dtype));
  P::store(dst + i, load_as_float<P>(tail, dtype));
}

// Rounds the first `count` lanes.
template <class P>
void narrow(typename P::F value, Dtype dtype, void* dst, int64_t count) {
  alignas(64) char tail[P::L * 4];
  void* to = count >= P::L ? dst : tail;
  switch (dtype) {
    case Dtype::bf16: P::store_bf16(static_cast<uint16_t*>(to), value); break;
    case Dtype::f16: P::store_f16(static_cast<uint16_t*>(to), value); break;
    default: P::store(static_cast<float*>(to), value);
  }
  if (to == tail) memcpy(dst, tail, count * size_of(dtype));
}

// What is computed at a time for all rows of x: `columns` rows of the weight from n0 on, or half as many and their partners.
// Columns past the end of the weight repeat its last row; what they give is not stored.
struct Tile {
  const Weight& weight;
  int64_t n0, columns;

  int64_t row(int64_t column) const {
    if (weight.partner == 0) return smaller(n0 + column, weight.N - 1);
    return n0 / 2 + column + (column < columns / 2 ? 0 : weight.partner - columns / 2);
  }
  // How many columns from this one on lie one after the other in memory.
  int64_t run(int64_t column) const {
    if (weight.partner == 0) return larger(1, smaller(columns - column, weight.N - n0 - column));
    return columns / (column < columns / 2 ? 2 : 1) - column;
  }
  int64_t stored() const { return smaller(columns, weight.N - n0); }
};

// Scales and zeros of the tile's rows, [columns, K / group], in float32 and in P's own form. Writes P::L more.
template <class P>
void load_groups(const Tile& tile, float* scale, float* zero) {
  const Weight& weight = tile.weight;
  const int64_t groups = weight.K / weight.group;
  for (int64_t i = 0, run; i < tile.columns; i += run, scale += run * groups, zero += run * groups) {
    run = tile.run(i);
    const int64_t begin = tile.row(i) * groups, count = run * groups;
    widen<P>(weight.scales, weight.scale_dtype, begin, count, scale);
    if constexpr (P::kE2m1) continue;
    if (weight.zeros == nullptr) {
      for (int64_t j = 0; j < count; j += P::L) P::store(zero + j, P::encode_zeros(P::set1(8.0f)));
      continue;
    }
    widen<P>(weight.zeros, weight.zero_dtype, begin, count, zero);
    for (int64_t j = 0; j < count; j += P::L) P::store(zero + j, P::encode_zeros(P::load(zero + j)));
    if (weight.zero_dtype != Dtype::u8) continue;
    const uint8_t* stored = static_cast<const uint8_t*>(weight.zeros) + begin;
    uint8_t highest = 0;
    for (int64_t j = 0; j < count; ++j) highest = stored[j] > highest ? stored[j] : highest;
    if (highest > 16) __atomic_store_n(weight.bad_zero, static_cast<int>(highest), __ATOMIC_RELAXED);
  }
}

// A policy whose codes are e2m1's values instead of integers: exact in bfloat16 as those are.
template <class Base>
struct E2m1 : Base {
  static constexpr bool kE2m1 = true;
  template <bool Uniform>
  static typename Base::W decode(typename Base::I words, int u, typename Base::Z) { return Base::decode_e2m1(words, u); }
};

// `rows`, maybe none, in equal blocks of at most `most`; the last one may be smaller.
struct Blocks {
  int64_t rows, block;
  Blocks(int64_t rows, int64_t most) : rows(rows), block(larger(1, div_up(rows, larger(1, div_up(rows, most))))) {}
  int64_t count() const { return div_up(rows, block); }
  int64_t size(int64_t b) const { return smaller(block, rows - b * block); }
};

}  // namespace
}  // namespace w4a16_cpu
