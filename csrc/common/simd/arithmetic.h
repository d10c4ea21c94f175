// Arithmetic that std::experimental::simd does not have, or does lane by lane: the fused multiply-add, sums in one order, scaling
// by 2^k, rounding, the approximate reciprocal and square root, and bounds that let a NaN through.
#pragma once

#include "common/simd/load_store.h"

namespace fastgen {

// x in all lanes. The constructor of libstdc++ is a call, fifty times as slow, where a function is so large that nothing is inlined
// any more unless it must be.
template <class A>
FASTGEN_INLINE Vec<A> in_all_lanes(A x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return VecF(_mm512_set1_ps(x));
  else return Vec<double>(_mm512_set1_pd(x));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) return VecF(_mm256_set1_ps(x));
  else return Vec<double>(_mm256_set1_pd(x));
#else
  return Vec<A>(x);
#endif
}

// a * b + c, rounded once where the variant has the instruction (libstdc++'s own fma goes lane by lane).
template <class A>
FASTGEN_INLINE Vec<A> madd(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return VecF(_mm512_fmadd_ps(static_cast<__m512>(a), static_cast<__m512>(b), static_cast<__m512>(c)));
  else
    return Vec<double>(_mm512_fmadd_pd(static_cast<__m512d>(a), static_cast<__m512d>(b), static_cast<__m512d>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<A, float>)
    return VecF(_mm256_fmadd_ps(static_cast<__m256>(a), static_cast<__m256>(b), static_cast<__m256>(c)));
  else
    return Vec<double>(_mm256_fmadd_pd(static_cast<__m256d>(a), static_cast<__m256d>(b), static_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

template <class A>
FASTGEN_INLINE A sum_lanes(Vec<A> v) {
  return stdx::reduce(v);
}

// The sum of f(i, at) over the vectors of [0, count), in an order that depends on nothing but count; f as in for_vectors.
template <class A, class F>
FASTGEN_INLINE A sum_vectors(std::int64_t count, const F& f) {
  constexpr int unroll = 4;  // chains of additions in flight: the latency of one
  Vec<A> sums[unroll];
  for (auto& sum : sums) sum = Vec<A>(A(0));
  std::int64_t i = 0;
  for (; i + unroll * kWidth<A> <= count; i += unroll * kWidth<A>)
    for (int k = 0; k < unroll; ++k) sums[k] += f(i + k * kWidth<A>, Whole{});
  for (; i + kWidth<A> <= count; i += kWidth<A>) sums[0] += f(i, Whole{});
  if (i < count) {
    const Part part{static_cast<int>(count - i)};
    sums[1] += part.keep<A>(f(i, part));
  }
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// p * 2^k for integral k with |k| <= 126 (larger, and the power below any k, where the hardware can); a NaN in either stays.
FASTGEN_INLINE VecF scale_by_power(VecF p, VecF k) {
#if defined(__AVX512F__)
  return VecF(_mm512_scalef_ps(static_cast<__m512>(p), static_cast<__m512>(k)));
#else
  const VecF magic = k + 12582912.0f;  // 1.5 * 2^23: the integer now stands in the low mantissa bits
  return p * bits_as<VecF>(VecU((bits_as<VecU>(magic) + 127u) << 23));
#endif
}

#if defined(__AVX512F__)
// x - floor(x), from 0 to 1; 0 of an infinity, a NaN stays.
FASTGEN_INLINE VecF fraction(VecF x) {
  return VecF(_mm512_reduce_ps(static_cast<__m512>(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
#endif

// Round to the nearest integer for |x| < 2^22.
FASTGEN_INLINE VecF round_near(VecF x) {
#if defined(__AVX512F__)
  return VecF(_mm512_roundscale_ps(static_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecF magic(12582912.0f);
  return (x + magic) - magic;
#endif
}

// 1 / d for normal d with a normal reciprocal, to 1 ulp; `kLow` stops at 14 bits, enough for a bf16 result.
template <bool kLow = false>
FASTGEN_INLINE VecF reciprocal(VecF d) {
#if defined(__AVX512F__)
  const VecF r(_mm512_rcp14_ps(static_cast<__m512>(d)));
  if constexpr (kLow) return r;
  return madd<float>(r, madd<float>(-d, r, VecF(1.0f)), r);
#else
  return 1.0f / d;
#endif
}

// sqrt(x) for x >= 0.
FASTGEN_INLINE VecF root(VecF x) {
#if defined(__AVX512F__)
  // Newton on the 14-bit estimate; the floor keeps 0 * Inf out and is far below any radius of a normal that is not zero.
  const VecF safe(_mm512_max_ps(static_cast<__m512>(x), _mm512_set1_ps(1e-30f)));
  const VecF estimate(_mm512_rsqrt14_ps(static_cast<__m512>(safe)));
  const VecF y = safe * estimate;
  return madd<float>(madd<float>(-y, y, safe), estimate * 0.5f, y);
#else
  return stdx::sqrt(x);
#endif
}

// x within [low, high]; a NaN stays.
FASTGEN_INLINE VecF clamp(VecF x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 floored = _mm512_max_ps(_mm512_set1_ps(low), static_cast<__m512>(x));  // of a NaN the second operand is kept
  return VecF(_mm512_min_ps(_mm512_set1_ps(high), floored));
#else
  stdx::where(x < low, x) = low;
  stdx::where(x > high, x) = high;
  return x;
#endif
}

// The larger of x and a number; a NaN stays.
FASTGEN_INLINE VecF at_least(VecF x, float low) {
#if defined(__AVX512F__)
  return VecF(_mm512_max_ps(_mm512_set1_ps(low), static_cast<__m512>(x)));  // of a NaN the second operand is kept
#elif defined(__AVX2__)
  return VecF(_mm256_max_ps(_mm256_set1_ps(low), static_cast<__m256>(x)));
#else
  stdx::where(x < low, x) = low;
  return x;
#endif
}

}  // namespace fastgen
