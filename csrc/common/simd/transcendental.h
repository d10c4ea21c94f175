// Exponential, logarithm, sigmoid and SiLU: Cephes' and own minimax polynomials for vectors of fp32, libm lane by lane for fp64.
#pragma once

#include <cmath>
#include <limits>

#include "common/simd/arithmetic.h"

namespace fastgen {

// exp(x) = (1 + p) 2^k for x in [-87, 88], to which it is clamped; p = exp(r) - 1 with |r| <= ln(2) / 2, NaN stays.
FASTGEN_INLINE void reduced_exp(VecF x, VecF& p_out, VecF& k_out) {
  stdx::where(x > 88.0f, x) = 88.0f;
  stdx::where(x < -87.0f, x) = -87.0f;
  const VecF k = round_near(x * 1.44269504f);
  VecF r = madd<float>(k, VecF(-0.693359375f), x);
  r = madd<float>(k, VecF(2.12194440e-4f), r);
  VecF p(1.9875691500e-4f);  // Cephes expf
  p = madd<float>(p, r, VecF(1.3981999507e-3f));
  p = madd<float>(p, r, VecF(8.3334519073e-3f));
  p = madd<float>(p, r, VecF(4.1665795894e-2f));
  p = madd<float>(p, r, VecF(1.6666665459e-1f));
  p = madd<float>(p, r, VecF(5.0000001201e-1f));
  p_out = madd<float>(p, r * r, r);
  k_out = k;
}

// exp(x) to 1 ulp in [-87, 88]; saturates to 0-like and Inf-like values outside, NaN stays.
FASTGEN_INLINE VecF exp(VecF x) {
  VecF p, k;
  reduced_exp(x, p, k);
  return scale_by_power(p + 1.0f, k);
}
FASTGEN_INLINE Vec<double> exp(Vec<double> x) {
  return Vec<double>([&](auto i) { return std::exp(static_cast<double>(x[i])); });
}

// exp(x) - 1, without cancellation near 0.
FASTGEN_INLINE VecF expm1(VecF x) {
  VecF p, k;
  reduced_exp(x, p, k);
  const VecF power = scale_by_power(VecF(1.0f), k);
  return madd<float>(p, power, power - 1.0f);
}
FASTGEN_INLINE Vec<double> expm1(Vec<double> x) {
  return Vec<double>([&](auto i) { return std::expm1(static_cast<double>(x[i])); });
}

// ln(x 2^-power) for normal x > 0. Cephes logf on the mantissa.
FASTGEN_INLINE VecF log_scaled(VecF x, int power) {
  const VecU bits = bits_as<VecU>(x);
  // Mantissa to [sqrt(1/2), sqrt(2)): take the exponent relative to the bit pattern of sqrt(1/2).
  const VecI exponent = bits_as<VecI>(VecU(bits - 0x3f3504f3u)) >> 23;
  const VecF m = bits_as<VecF>(VecU(bits - bits_as<VecU>(VecI(exponent << 23)))) - 1.0f;
  const VecF e = stdx::static_simd_cast<VecF>(VecI(exponent - power));
  VecF p(7.0376836292e-2f);
  p = madd<float>(p, m, VecF(-1.1514610310e-1f));
  p = madd<float>(p, m, VecF(1.1676998740e-1f));
  p = madd<float>(p, m, VecF(-1.2420140846e-1f));
  p = madd<float>(p, m, VecF(1.4249322787e-1f));
  p = madd<float>(p, m, VecF(-1.6668057665e-1f));
  p = madd<float>(p, m, VecF(2.0000714765e-1f));
  p = madd<float>(p, m, VecF(-2.4999993993e-1f));
  p = madd<float>(p, m, VecF(3.3333331174e-1f));
  const VecF square = m * m;
  VecF log_m = madd<float>(p * m, square, e * -2.12194440e-4f);
  log_m = madd<float>(square, VecF(-0.5f), log_m) + m;
  return madd<float>(e, VecF(0.693359375f), log_m);
}
// ln(x) for normal x > 0; a NaN stays.
FASTGEN_INLINE VecF log(VecF x) {
  VecF y = log_scaled(x, 0);
  stdx::where(x != x, y) = x;
  return y;
}
FASTGEN_INLINE Vec<double> log(Vec<double> x) {
  return Vec<double>([&](auto i) { return std::log(static_cast<double>(x[i])); });
}

// s = 1 / (1 + e) and e = exp(-x), which makes 1 - s = e s without cancellation. In fp32 x must lie in [-80, 80], so that e
// and 1 / (1 + e) stay normal; relative error 2e-7, or 2e-4 with `kLow`.
template <class A>
struct Sigmoid {
  Vec<A> s, e;
};
template <bool kLow = false>
FASTGEN_INLINE Sigmoid<float> sigmoid(VecF x) {
  const VecF k = round_near(x * -1.44269504f);
  const VecF r = madd<float>(x, VecF(-1.44269504f), -k);  // the product unrounded
  VecF p;  // 2^r on [-1/2, 1/2], minimax with p(0) = 1: relative error 9e-8, or 1e-4
  if constexpr (kLow) {
    p = madd<float>(VecF(5.50089305e-2f), r, VecF(2.42210961e-1f));
    p = madd<float>(p, r, VecF(6.93282927e-1f));
  } else {
    p = madd<float>(VecF(1.32647271e-3f), r, VecF(9.67151264e-3f));
    p = madd<float>(p, r, VecF(5.55073374e-2f));
    p = madd<float>(p, r, VecF(2.40222421e-1f));
    p = madd<float>(p, r, VecF(6.93146978e-1f));
  }
  const VecF e = scale_by_power(madd<float>(p, r, VecF(1.0f)), k);
  return {reciprocal<kLow>(e + 1.0f), e};
}
template <bool kLow = false>
FASTGEN_INLINE Sigmoid<double> sigmoid(Vec<double> x) {
  const Vec<double> e = exp(-x);
  return {1.0 / (1.0 + e), e};
}

// x * sigmoid(x). Below -80 it is zero to any precision in use, and so is what stands for it here.
template <class A, bool kLow = false>
FASTGEN_INLINE Vec<A> silu(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return x * sigmoid(x).s;
  } else {
    constexpr float largest = std::numeric_limits<float>::max();
    return clamp(x, -80.0f, largest) * sigmoid<kLow>(clamp(x, -80.0f, 80.0f)).s;
  }
}

// d silu(x) / dx = s (1 + x (1 - s)), s = sigmoid(x).
template <class A, bool kLow = false>
FASTGEN_INLINE Vec<A> silu_grad(Vec<A> x) {
  if constexpr (std::is_same_v<A, float>) x = clamp(x, -80.0f, 80.0f);
  const Sigmoid<A> sigma = sigmoid<kLow>(x);
  return madd<A>(x, sigma.e * sigma.s, Vec<A>(A(1))) * sigma.s;
}

}  // namespace fastgen
