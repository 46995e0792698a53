// The op `w4a16_cpu::rearrange`: packed codes rearranged without unpacking them. inductor_ext/bits.py says how, and derives the
// steps from the table of orders; here are none.
//
// source and out are views int32 [E, P, 2, ..., 2, Q], in any strides. Of each word of source the nibbles' places change, and it
// goes to the same index of out. A nibble's place is a number: bits 0..2 are its number in the word, bit 3 + i is the index of
// the i-th axis of size two. The steps are pairs (a, b), a in 0..2: bits a and b trade places, one pair after the other.
//
// The work is done by tiles that stay in L2, some p and q with all the twos: words come in, the bits trade places, words go out.
#include <algorithm>
#include <cstring>

#include "check.h"

namespace w4a16_cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kWords = 16384;       // of a tile
constexpr int64_t kSide = 32;          // of a tile that has neighbours along q on one side and along p on the other
constexpr int64_t kPerThread = 65536;  // words that are worth a thread
constexpr int64_t kMostTwos = 10;

struct Size {
  int64_t twos, p, q;
  int64_t words() const { return twos * p * q; }
};

// How an argument lies in memory.
struct Side {
  uint32_t* base;
  int64_t e, p, q;             // strides
  std::vector<int64_t> twos;   // the offset of each index of the twos
  std::vector<int64_t> order;  // these indices as they follow in memory
  bool along_twos, along_p;    // whether words that differ in the twos, or in p, are neighbours

  Side(const Tensor& t, void* data) : base(static_cast<uint32_t*>(data)), twos(1) {
    const auto strides = t.strides();
    e = strides[0], p = strides[1], q = strides[t.dim() - 1];
    for (int64_t axis = 2; axis < t.dim() - 1; ++axis) {
      std::vector<int64_t> more;
      for (int64_t offset : twos) more.insert(more.end(), {offset, offset + strides[axis]});
      twos = more;
    }
    for (size_t i = 0; i < twos.size(); ++i) order.push_back(i);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return twos[a] < twos[b]; });
    along_twos = twos.size() > 2;
    for (size_t i = 0; i < twos.size(); ++i) along_twos = along_twos && twos[order[i]] == static_cast<int64_t>(i);
    along_p = p == 1 && q != 1;
  }
};

typedef uint32_t Four __attribute__((vector_size(16)));

#if defined(__clang__)
inline Four zip_low(Four a, Four b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Four zip_high(Four a, Four b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
inline Four zip_low(Four a, Four b) { return __builtin_shuffle(a, b, Four{0, 4, 1, 5}); }
inline Four zip_high(Four a, Four b) { return __builtin_shuffle(a, b, Four{2, 6, 3, 7}); }
#endif

inline void transpose(Four (&x)[4]) {
  const Four a = zip_low(x[0], x[2]), b = zip_low(x[1], x[3]), c = zip_high(x[0], x[2]), d = zip_high(x[1], x[3]);
  x[0] = zip_low(a, b), x[1] = zip_high(a, b), x[2] = zip_low(c, d), x[3] = zip_high(c, d);
}

template <bool kIn>
inline void move(uint32_t* memory, uint32_t* words) {
  *(kIn ? words : memory) = *(kIn ? memory : words);
}

// A column of memory is a row of words: R words that are neighbours at each of Q places in memory, `apart` from each other, are
// those at q of the rows.
template <bool kIn, class Row>
void move_turned(uint32_t* memory, int64_t apart, int64_t R, int64_t Q, const Row& row) {
  const int64_t R4 = R & ~int64_t{3}, Q4 = Q & ~int64_t{3};
  for (int64_t q = 0; q < Q4; q += 4) {
    for (int64_t r = 0; r < R4; r += 4) {
      Four x[4];
      for (int i = 0; i < 4; ++i) memcpy(&x[i], kIn ? memory + (q + i) * apart + r : row(r + i) + q, sizeof(Four));
      transpose(x);
      for (int i = 0; i < 4; ++i) memcpy(kIn ? row(r + i) + q : memory + (q + i) * apart + r, &x[i], sizeof(Four));
    }
  }
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t r = q < Q4 ? R4 : 0; r < R; ++r) move<kIn>(memory + q * apart + r, row(r) + q);
}

// A tile comes in from memory or goes out to it. By itself it has its words by [twos, p, q].
template <bool kIn>
void move_tile(const Side& side, uint32_t* memory, const Size& tile, uint32_t* words) {
  const auto row = [&](int64_t i, int64_t p) { return words + (i * tile.p + p) * tile.q; };
  if (side.along_twos) {
    for (int64_t p = 0; p < tile.p; ++p)
      move_turned<kIn>(memory + p * side.p, side.q, tile.twos, tile.q, [&](int64_t i) { return row(side.order[i], p); });
  } else if (side.along_p) {
    for (int64_t i : side.order)
      move_turned<kIn>(memory + side.twos[i], side.q, tile.p, tile.q, [&](int64_t p) { return row(i, p); });
  } else {
    for (int64_t i : side.order) {
      for (int64_t p = 0; p < tile.p; ++p) {
        uint32_t *there = memory + side.twos[i] + p * side.p, *here = row(i, p);
        if (side.q == 1) memcpy(kIn ? here : there, kIn ? there : here, tile.q * sizeof(*here));
        else
          for (int64_t q = 0; q < tile.q; ++q) move<kIn>(there + q * side.q, here + q);
      }
    }
  }
}

// Of the nibbles whose numbers have all bits of `one` and none of `none`.
uint32_t mask(int64_t one, int64_t none) {
  uint32_t nibbles = 0;
  for (int64_t i = 0; i < 8; ++i)
    if ((i & one) == one && (i & none) == 0) nibbles |= 15u << 4 * i;
  return nibbles;
}

void exchange_inside(uint32_t* words, int64_t count, int64_t a, int64_t b) {
  const int64_t low = int64_t{1} << std::min(a, b), high = int64_t{1} << std::max(a, b);
  const int shift = 4 * (high - low);
  const uint32_t some = mask(low, high);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t x = words[i], differ = (x >> shift ^ x) & some;
    words[i] = x ^ differ ^ differ << shift;
  }
}

void exchange_outside(uint32_t* __restrict first, uint32_t* __restrict second, int64_t count, int64_t a) {
  const int shift = 4 << a;
  const uint32_t some = mask(0, int64_t{1} << a);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t differ = (first[i] >> shift ^ second[i]) & some;
    second[i] ^= differ;
    first[i] ^= differ << shift;
  }
}

void exchange(uint32_t* words, int64_t count, int64_t a, int64_t b) {
  if (b < 3) return exchange_inside(words, count, a, b);
  const int64_t half = count >> (b - 2);
  for (int64_t i = 0; i < count; i += 2 * half) exchange_outside(words + i, words + i + half, half, a);
}

struct Call {
  const Side source, out;
  int64_t E;
  const Size whole, tile;
  const std::vector<int64_t>& steps;

  int64_t across() const { return (whole.q + tile.q - 1) / tile.q; }
  int64_t down() const { return (whole.p + tile.p - 1) / tile.p; }

  void work(int64_t item, uint32_t* words) const {
    const int64_t q = item % across() * tile.q, p = item / across() % down() * tile.p, e = item / across() / down();
    const Size size{tile.twos, std::min(tile.p, whole.p - p), std::min(tile.q, whole.q - q)};
    move_tile<true>(source, source.base + e * source.e + p * source.p + q * source.q, size, words);
    for (size_t i = 0; i < steps.size(); i += 2) exchange(words, size.words(), steps[i], steps[i + 1]);
    move_tile<false>(out, out.base + e * out.e + p * out.p + q * out.q, size, words);
  }
};

Size tile_of(const Side& source, const Side& out, const Size& whole) {
  const int64_t most = std::max<int64_t>(1, kWords / whole.twos);
  const bool turned = source.along_p != out.along_p;
  const int64_t q = std::min({whole.q, most, turned ? kSide : most});
  return {whole.twos, std::min(whole.p, most / q), q};
}

void check_view(const Tensor& t, const char* name) {
  if (!t.is_cpu()) fail(name, " must be on the CPU; it is not.");
  if (t.scalar_type() != ScalarType::Int) fail_dtype(t, name, "int32");
  bool twos = t.dim() >= 3 && t.dim() <= 3 + kMostTwos;
  for (int64_t axis = 2; twos && axis < t.dim() - 1; ++axis) twos = t.size(axis) == 2;
  if (!twos) fail(name, " must be [E, P, 2, ..., 2, Q] with up to ", kMostTwos, " twos; its shape is ", shape(t), ".");
}

// The words that a view spans.
std::pair<const int32_t*, const int32_t*> span(const Tensor& t) {
  const int32_t* begin = static_cast<const int32_t*>(t.const_data_ptr());
  const int32_t* end = begin + 1;
  for (int64_t axis = 0; axis < t.dim(); ++axis) end += (t.size(axis) - 1) * t.strides()[axis];
  return {begin, end};
}

void check_apart(const Tensor& source, const Tensor& out) {
  bool same = source.const_data_ptr() == out.const_data_ptr();
  for (int64_t axis = 0; axis < out.dim(); ++axis) {
    if (out.size(axis) > 1 && out.strides()[axis] == 0) fail("out must have a place for each word; it is expanded.");
    same = same && (out.size(axis) == 1 || source.strides()[axis] == out.strides()[axis]);
  }
  const auto a = span(source), b = span(out);
  if (!same && a.first < b.second && b.first < a.second) fail("out must be source itself or lie apart from it; they overlap.");
}

void rearrange(const Tensor& source, const Tensor& out, std::vector<int64_t> steps) {
  check_view(source, "source");
  check_view(out, "out");
  const std::vector<int64_t> sizes(source.sizes().begin(), source.sizes().end());
  if (out.dim() != source.dim()) fail("out must have source's shape ", shape(source), "; its shape is ", shape(out), ".");
  check_shape(out, "out", sizes, "source's shape");
  const int64_t places = sizes.size();  // three in a word, and one for each two
  bool whole = steps.size() % 2 == 0;
  for (size_t i = 0; whole && i < steps.size(); i += 2)
    whole = 0 <= steps[i] && steps[i] < 3 && 0 <= steps[i + 1] && steps[i + 1] < places && steps[i] != steps[i + 1];
  if (!whole) fail("steps must be pairs of different bits, the first in 0..2, the second in 0..", places - 1, "; they are not.");
  if (source.numel() == 0) return;
  check_apart(source, out);

  const Side from(source, const_cast<void*>(source.const_data_ptr())), to(out, out.mutable_data_ptr());
  const Size size{int64_t{1} << (places - 3), sizes[1], sizes.back()};
  const Call call{from, to, sizes[0], size, tile_of(from, to, size), steps};
  parallel_for(
      call.E * call.down() * call.across(), std::max<int64_t>(1, kPerThread / call.tile.words()),
      [](int64_t begin, int64_t end, void* context) {
        const Call& call = *static_cast<const Call*>(context);
        alignas(64) uint32_t words[kWords];
        for (int64_t item = begin; item < end; ++item) call.work(item, words);
      },
      const_cast<Call*>(&call));
}

}  // namespace
}  // namespace w4a16_cpu

STABLE_TORCH_LIBRARY_FRAGMENT(w4a16_cpu, m) {
  m.def("rearrange(Tensor source, Tensor(a!) out, int[] steps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(w4a16_cpu, CPU, m) {
  m.impl("rearrange", TORCH_BOX(&w4a16_cpu::rearrange));
}
