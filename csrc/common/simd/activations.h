// tanh, sigmoid and ELU of any x, with their derivatives: to 3 ulp from -Inf to Inf, of denormals too, the derivatives to 6; a NaN
// stays. All are made of exp(-a) with a >= 0, which cannot overflow, and of exp(-a) - 1 where a difference of neighbours would lose
// digits. In fp32 an exponential below 8e-39 is 0.
#pragma once

#include "common/simd/transcendental.h"

namespace fastgen {

// (exp(r) - 1 - r) / r^2 on [-ln(2) / 2, ln(2) / 2].
inline constexpr float kDecayCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// exp(-a) and exp(-a) - 1 by one exponential.
template <class A>
struct Decay {
  Vec<A> power, less_one;
};

// Cephes' expf, as in `exp`, for a >= 0: nothing to saturate above, and 2^k is plainly 0 where a > 87.7.
FASTGEN_INLINE Decay<float> decay(VecF a) {
  const VecF x = at_least(-a, -88.0f), shift(12582912.0f + 127.0f);  // 1.5 * 2^23 and the bias: the exponent of 2^k in the low bits
  const VecF magic = madd<float>(x, VecF(1.44269504f), shift), k = magic - shift;
  VecF r = madd<float>(k, VecF(-0.693359375f), x);
  r = madd<float>(k, VecF(2.12194440e-4f), r);
  SideBySide<float, 1> fraction = {r}, p;
  polynomials<float>(kDecayCoefficients, fraction, p);
  const VecF less_one = madd<float>(p[0], r * r, r), scale = bits_as<VecF>(VecU(bits_as<VecU>(magic) << 23));
  return {madd<float>(less_one, scale, scale), madd<float>(less_one, scale, scale - 1.0f)};
}
FASTGEN_INLINE Decay<double> decay(Vec<double> a) {
  constexpr double near = 0.69314718055994530942;  // up to here exp(-a) >= 1/2 is the sum that is exact to rounding, beyond the other
  const Vec<double> one([&](auto i) {
    const auto x = static_cast<double>(a[i]);
    return x < near ? std::expm1(-x) : std::exp(-x);
  });
  Decay<double> d{one, one - 1.0};
  const auto small = a < near;
  stdx::where(small, d.power) = one + 1.0;
  stdx::where(small, d.less_one) = one;
  return d;
}

FASTGEN_INLINE Vec<double> reciprocal(Vec<double> d) { return 1.0 / d; }

// A function of x and its derivative.
template <class A>
struct WithSlope {
  Vec<A> value, slope;
};

// tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|); the derivative is 4 e / (1 + e)^2.
template <class A>
FASTGEN_INLINE WithSlope<A> tanh_with_slope(Vec<A> x) {
  const Decay<A> d = decay(stdx::abs(x) * A(2));
  const Vec<A> r = reciprocal(d.less_one + A(2));
  return {stdx::copysign(d.less_one * r, x), d.power * (r * r) * A(4)};
}
// Not templates: a call prefers them to libstdc++'s tanh, which goes lane by lane.
FASTGEN_INLINE VecF tanh(VecF x) { return tanh_with_slope<float>(x).value; }
FASTGEN_INLINE Vec<double> tanh(Vec<double> x) { return tanh_with_slope<double>(x).value; }

// sigmoid |x| = 1 / (1 + e) with e = exp(-|x|), that of -|x| is e / (1 + e); the derivative is their product. `sigmoid` is faster where x
// is known to lie in [-80, 80] and the last digits of what is small do not matter.
template <class A>
FASTGEN_INLINE WithSlope<A> sigmoid_with_slope(Vec<A> x) {
  const Vec<A> e = decay(stdx::abs(x)).power, r = reciprocal(e + A(1)), small = e * r;
  Vec<A> value = r;
  stdx::where(x < A(0), value) = small;
  return {value, small * r};
}
template <class A>
FASTGEN_INLINE Vec<A> sigmoid_of_any(Vec<A> x) {
  return sigmoid_with_slope<A>(x).value;
}

// elu(x) = x where x > 0, exp(x) - 1 elsewhere (Clevert et al. 2016), alpha = 1; and of -x by the same exponential.
template <class A>
struct EluOfBoth {
  Vec<A> value, of_negative;
};
template <class A>
FASTGEN_INLINE EluOfBoth<A> elu_of_both(Vec<A> x) {
  const Vec<A> below = decay(stdx::abs(x)).less_one;
  EluOfBoth<A> elu{below, below};
  stdx::where(x > A(0), elu.value) = x;
  stdx::where(x < A(0), elu.of_negative) = -x;
  return elu;
}
template <class A>
FASTGEN_INLINE Vec<A> elu(Vec<A> x) {
  return elu_of_both<A>(x).value;
}

// The derivatives of elu at x and at -x: 1 where the argument is positive, its exponential elsewhere.
template <class A>
FASTGEN_INLINE EluOfBoth<A> elu_slopes_of_both(Vec<A> x) {
  const Vec<A> below = decay(stdx::abs(x)).power;
  EluOfBoth<A> slopes{below, below};
  stdx::where(x > A(0), slopes.value) = A(1);
  stdx::where(x < A(0), slopes.of_negative) = A(1);
  return slopes;
}

}  // namespace fastgen
