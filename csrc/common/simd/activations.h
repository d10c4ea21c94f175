// tanh, sigmoid and ELU of any x, with their derivatives: to 3 ulp from -Inf to Inf, of denormals too, the derivatives to 6; a NaN
// stays. All are made of exp(-a) with a >= 0, which cannot overflow, and of exp(-a) - 1 where a difference of neighbours would lose
// digits. What would be less than 1.7e-38 because of its exponential is 0 in fp32.
#pragma once

#include "common/simd/transcendental.h"

namespace fastgen {

// exp(-a) and exp(-a) - 1 by one exponential.
template <class A>
struct Decay {
  Vec<A> power, less_one;
};

// For a >= 0. In fp32 the power is plainly 0 where a > 87, just above the smallest normal.
FASTGEN_INLINE Decay<float> decay(VecF a) {
  VecF p, k;
  reduced_exp(-a, p, k);
  const VecF scale = scale_by_power(VecF(1.0f), k);
  VecF power = madd<float>(p, scale, scale);
  stdx::where(a > 87.0f, power) = 0.0f;
  return {power, madd<float>(p, scale, scale - 1.0f)};
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
