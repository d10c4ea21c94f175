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
  std::int64_t count = 0;
  bool alternate = false, interleaved = false;
  InTurn features, parameters;

  explicit Rows(const Walk<float>& walk)
      : walk(walk), alternate(walk.plan.step == 2), interleaved(walk.raw_step == 2), features(walk.plan.indices[0] % 2 == 1),
        parameters(walk.raw.data > walk.shift.data) {
    const Plan& plan = walk.plan;
    if (!plan.rows || plan.positions != 1 || walk.means || plan.checkerboard()) return;
    if (plan.step == 0 || (alternate && (plan.channels != 2 * plan.transformed || plan.indices[0] > 1))) return;
    for (const Strip& s : plan.strips[0]) {
      if (s.copied) continue;
      if (strip) {  // one of several
        strip = nullptr;
        return;
      }
      strip = &s;
    }
    count = strip->count;
  }

  // Calls f(i, at, n) for the vectors of a row, of which n go side by side from the i-th element on.
  template <class F>
  FASTGEN_INLINE void for_groups(const F& f) const {
    constexpr int width = kWidth<float>;
    std::int64_t i = 0;
    for (; i + 2 * width <= count; i += 2 * width) f(i, Whole{}, std::integral_constant<int, 2>{});
    for (; i + width <= count; i += width) f(i, Whole{}, std::integral_constant<int, 1>{});
    if (i < count) f(i, Part{static_cast<int>(count - i)}, std::integral_constant<int, 1>{});
  }

  // The first of a row's transformed features, or of all where those alternate.
  template <class P>
  auto* features_of(const P& place, std::int64_t n) const { return place.at(n, alternate ? 0 : strip->channel, 0); }
  template <class P>
  auto* parameters_of(const P& raw, const P& shift, std::int64_t n) const { return std::min(raw.at(n, 0, 0), shift.at(n, 0, 0)); }

  template <class At>
  FASTGEN_INLINE void take_features(const float* row, std::int64_t i, At at, VecF& chosen, VecF& others) const {
    if (alternate) features.take(row + 2 * i, at, chosen, others);
    else chosen = at.load(row + i);
  }
  template <class At>
  FASTGEN_INLINE void put_features(float* row, std::int64_t i, At at, VecF chosen, VecF others) const {
    if (alternate) features.put(row + 2 * i, at, chosen, others);
    else at.store(row + i, chosen);
  }
  // Copies what is not transformed and does not alternate with it.
  void copy_rest(std::int64_t n) const {
    if (alternate) return;
    for (const Strip& s : walk.plan.strips[0])
      if (s.copied) walk.copy(n, 0, s);
  }
};

}  // namespace
}  // namespace fastgen::affine_coupling
