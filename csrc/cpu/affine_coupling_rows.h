// Vectors of features in fp32, [N, C], many with one call: what is read once for all is read once, and every second feature, or raw scale
// and shift in turn, are taken apart and put together in registers.
#pragma once

#include "cpu/affine_coupling.h"

namespace fastgen::affine_coupling {
namespace {

// Two vectors of elements that take turns in memory: those at the chosen places and those between them.
class InTurn {
 public:
  explicit InTurn(bool odd) {
#if defined(__AVX512F__)
    const VecI lane([](auto i) { return static_cast<int>(i); }), chosen = lane * 2 + (odd ? 1 : 0), others = lane * 2 + (odd ? 0 : 1);
    VecI low([](auto i) { return static_cast<int>(i) / 2 + (i % 2 ? 16 : 0); });
    if (odd) low = VecI([](auto i) { return static_cast<int>(i) / 2 + (i % 2 ? 0 : 16); });
    chosen_ = static_cast<__m512i>(chosen), others_ = static_cast<__m512i>(others);
    low_ = static_cast<__m512i>(low), high_ = static_cast<__m512i>(VecI(low + 8));
#else
    odd_ = odd;
#endif
  }

  template <class At>
  FASTGEN_INLINE void take(const float* p, At at, VecF& chosen, VecF& others) const {
    const VecF low = first(p, at), high = second(p, at);
#if defined(__AVX512F__)
    const auto a = static_cast<__m512>(low), b = static_cast<__m512>(high);
    chosen = VecF(_mm512_permutex2var_ps(a, chosen_, b)), others = VecF(_mm512_permutex2var_ps(a, others_, b));
#else
    float line[2 * kWidth<float>];
    low.copy_to(line, stdx::element_aligned), high.copy_to(line + kWidth<float>, stdx::element_aligned);
    chosen = VecF([&](auto i) { return line[2 * i + odd_]; }), others = VecF([&](auto i) { return line[2 * i + !odd_]; });
#endif
  }

  template <class At>
  FASTGEN_INLINE void put(float* p, At at, VecF chosen, VecF others) const {
#if defined(__AVX512F__)
    const auto a = static_cast<__m512>(chosen), b = static_cast<__m512>(others);
    const VecF low(_mm512_permutex2var_ps(a, low_, b)), high(_mm512_permutex2var_ps(a, high_, b));
#else
    float line[2 * kWidth<float>];
    for (int i = 0; i < kWidth<float>; ++i) line[2 * i + odd_] = chosen[i], line[2 * i + !odd_] = others[i];
    const VecF low(line, stdx::element_aligned), high(line + kWidth<float>, stdx::element_aligned);
#endif
    if constexpr (std::is_same_v<At, Whole>) {
      store(p, low), store(p + kWidth<float>, high);
    } else {
      store_part(p, low, std::min(2 * at.count, kWidth<float>));
      if (2 * at.count > kWidth<float>) store_part(p + kWidth<float>, high, 2 * at.count - kWidth<float>);
    }
  }

 private:
  FASTGEN_INLINE static VecF first(const float* p, Whole) { return load(p); }
  FASTGEN_INLINE static VecF second(const float* p, Whole) { return load(p + kWidth<float>); }
  FASTGEN_INLINE static VecF first(const float* p, Part at) { return load_part(p, std::min(2 * at.count, kWidth<float>)); }
  FASTGEN_INLINE static VecF second(const float* p, Part at) {
    return 2 * at.count > kWidth<float> ? load_part(p + kWidth<float>, 2 * at.count - kWidth<float>) : VecF(0.0f);
  }

#if defined(__AVX512F__)
  __m512i chosen_, others_, low_, high_;
#else
  bool odd_;
#endif
};

// Rows whose transformed elements lie side by side, or in every second place.
class Rows {
 public:
  const Walk<float>& walk;
  const Strip* strip = nullptr;  // null where a call is not of that kind
  const Strip* rest = nullptr;   // what is copied, where that is one strip and as long
  std::int64_t count = 0;
  bool alternate = false, interleaved = false;
  InTurn features, parameters;

  explicit Rows(const Walk<float>& walk)
      : walk(walk), alternate(walk.plan.step == 2), interleaved(walk.raw_step == 2), features(walk.plan.indices[0] % 2 == 1),
        parameters(walk.raw.data > walk.shift.data) {
    const Plan& plan = walk.plan;
    if (!plan.rows || plan.positions != 1 || walk.means || plan.checkerboard()) return;
    if (plan.step == 0 || (alternate && (plan.channels != 2 * plan.transformed || plan.indices[0] > 1))) return;
    int copied = 0;
    for (const Strip& s : plan.strips[0]) {
      if (s.copied) {
        rest = &s, ++copied;
        continue;
      }
      if (strip) {  // one of several
        strip = nullptr;
        return;
      }
      strip = &s;
    }
    count = strip->count;
    if (copied != 1 || rest->count != count) rest = nullptr;
  }

  // Whether two rows make four whole vectors, and what is copied beside them as many. Not where there is a weight a feature: it is one
  // row's, and the second row would read past it.
  bool in_pairs() const { return count == 2 * kWidth<float> && (alternate || rest) && !walk.weight; }

  // Where one row lies: its features from the first that is transformed on, or from the first where those alternate.
  struct Row {
    const float *x, *grad, *raw, *shift, *both, *rest;
    float *y, *d_raw, *d_shift, *d_both, *rest_to;
  };
  FASTGEN_INLINE Row row(std::int64_t n) const {
    const std::int64_t first = alternate ? 0 : strip->channel;
    const auto at = [&](const auto& place, std::int64_t channel) FASTGEN_LAMBDA { return place.data ? place.at(n, channel, 0) : nullptr; };
    const auto &read = walk.grad.data ? walk.grad : walk.x;
    const Row r{at(walk.x, first), at(walk.grad, first), at(walk.raw, 0), at(walk.shift, 0), nullptr, rest ? at(read, rest->channel) : nullptr,
                at(walk.y, first), at(walk.d_raw, 0), at(walk.d_shift, 0), nullptr, rest ? at(walk.y, rest->channel) : nullptr};
    return {r.x, r.grad, r.raw, r.shift, std::min(r.raw, r.shift), r.rest, r.y, r.d_raw, r.d_shift, std::min(r.d_raw, r.d_shift), r.rest_to};
  }

  // Calls f(n, of, i, at, vectors, together) for all vectors of `rows` rows from the n-th on: for so many that go side by side from the
  // i-th element on, of one row or of two that are taken together, which lie at `of`.
  template <class F>
  FASTGEN_INLINE void for_groups(std::int64_t n, std::int64_t rows, const F& f) const {
    constexpr int width = kWidth<float>;
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    const std::int64_t end = n + rows;
    if (in_pairs())
      for (; n + 2 <= end; n += 2) {
        const Row of[] = {row(n), row(n + 1)};
        f(n, of, std::int64_t(0), Whole{}, std::integral_constant<int, 4>{}, two);
      }
    for (; n < end; ++n) {
      const Row of[] = {row(n)};
      std::int64_t i = 0;
      for (; i + 2 * width <= count; i += 2 * width) f(n, of, i, Whole{}, two, one);
      for (; i + width <= count; i += width) f(n, of, i, Whole{}, one, one);
      if (i < count) f(n, of, i, Part{static_cast<int>(count - i)}, one, one);
    }
  }

  // A vector of raw scales and one of shifts.
  template <class At>
  FASTGEN_INLINE void take_parameters(const Row& of, std::int64_t i, At at, VecF& raw, VecF& shift) const {
    if (interleaved) parameters.take(of.both + 2 * i, at, raw, shift);
    else raw = at.load(of.raw + i), shift = at.load(of.shift + i);
  }
  template <class At>
  FASTGEN_INLINE void take_features(const float* row, std::int64_t i, At at, VecF& chosen, VecF& others) const {
    if (alternate) features.take(row + 2 * i, at, chosen, others);
    else chosen = at.load(row + i);
  }
  // Beside them goes what is not transformed, where it alternates with what is or is as long.
  template <class At>
  FASTGEN_INLINE void put_features(const Row& of, std::int64_t i, At at, VecF chosen, VecF others) const {
    if (alternate) return features.put(of.y + 2 * i, at, chosen, others);
    at.store(of.y + i, chosen);
    if (of.rest) at.store(of.rest_to + i, at.load(of.rest + i));
  }
  // All of it, where it is not.
  void copy_rest(std::int64_t n) const {
    if (alternate || rest) return;
    for (const Strip& s : walk.plan.strips[0])
      if (s.copied) walk.copy(n, 0, s);
  }
};

}  // namespace
}  // namespace fastgen::affine_coupling
