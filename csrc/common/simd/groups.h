// Loops over a row by groups of vectors, whose chains of arithmetic hide one another's latency, and what such loops call: the exponential
// of any x, sums of lanes. Included by the kernels that need it.
#pragma once

#include "common/simd.h"

// The body of such a loop is inlined like what it calls (common/simd/vector.h).
#define FASTGEN_LAMBDA __attribute__((always_inline))

namespace fastgen {

// f(i, at, n) for the vectors of [0, count), of which n, a constant, go side by side from the i-th element on: one in fp64.
template <class A, class F>
FASTGEN_INLINE void for_groups(std::int64_t count, const F& f) {
  constexpr int width = kWidth<A>;
  std::int64_t i = 0;
  if constexpr (std::is_same_v<A, float>)
    for (; i + 4 * width <= count; i += 4 * width) f(i, Whole{}, std::integral_constant<int, 4>{});
  for (; i + width <= count; i += width) f(i, Whole{}, std::integral_constant<int, 1>{});
  if (i < count) f(i, Part{static_cast<int>(count - i)}, std::integral_constant<int, 1>{});
}

// The smaller of x and a number; a NaN stays.
FASTGEN_INLINE VecF at_most(VecF x, float high) {
#if defined(__AVX512F__)
  return VecF(_mm512_min_ps(_mm512_set1_ps(high), static_cast<__m512>(x)));  // of a NaN the second operand is kept
#elif defined(__AVX2__)
  return VecF(_mm256_min_ps(_mm256_set1_ps(high), static_cast<__m256>(x)));
#else
  stdx::where(x > high, x) = high;
  return x;
#endif
}

// exp(x) of any x, to 1 ulp: Inf above 88.8, through the denormals to 0 below; a NaN stays. The polynomial is exp(r) with |r| <= ln(2) / 2,
// minimax with 1 and slope 1 at 0: 2e-9 before it is rounded.
inline constexpr float kExpCoefficients[] = {1.38436441e-3f, 8.37416338e-3f, 4.16680026e-2f, 1.66664312e-1f, 4.99999942e-1f, 1.0f, 1.0f};
template <int n>
FASTGEN_INLINE void exp_of_any(SideBySide<float, n>& x) {
  VecF k[n], p[n];
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  for (int i = 0; i < n; ++i) x[i] = clamp(x[i], -104.0f, 89.0f);
  for (int i = 0; i < n; ++i) k[i] = madd<float>(x[i], VecF(1.44269504f), VecF(magic)) - magic;
  for (int i = 0; i < n; ++i) x[i] = madd<float>(k[i], VecF(-0.693359375f), x[i]);
  for (int i = 0; i < n; ++i) x[i] = madd<float>(k[i], VecF(2.12194440e-4f), x[i]);
  polynomials<float>(kExpCoefficients, x, p);
  for (int i = 0; i < n; ++i) {
#if defined(__AVX512F__)
    x[i] = scale_by_power(p[i], k[i]);
#else
    const VecF half = round_near(k[i] * 0.5f);  // 2^k itself may be out of range
    x[i] = scale_by_power(scale_by_power(p[i], half), k[i] - half);
#endif
  }
}
template <int n>
FASTGEN_INLINE void exp_of_any(SideBySide<double, n>& x) {
  for (int i = 0; i < n; ++i) x[i] = exp(x[i]);
}

// Lane i is the sum of the lanes of v[i], all in the same order.
template <class A>
FASTGEN_INLINE Vec<A> sums_of_lanes(Vec<A> (&v)[kWidth<A>]) {
  transpose(v);
  for (int half = kWidth<A> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

}  // namespace fastgen
