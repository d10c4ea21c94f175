// GELU (Hendrycks and Gimpel 2016), x Phi(x), and its derivative: by the normal distribution function itself, or by tanh.
//
// In fp32 Phi(-a) = exp(-a^2 / 2) P(u) with u = 0.23 a / (1 + 0.23 a): P is minimax on a in [0, 13.3], relative error 5e-8, beyond
// which the exponential is 0. So the tail keeps its digits, the density that the derivative takes is there already, and near 0,
// where P begins with 1/2, what u is rounded by counts little.
#pragma once

#include "common/simd/transcendental.h"

namespace fastgen {

// In the order of GELU_APPROXIMATIONS of fastgen/_schema.py.
enum class Gelu { kNone, kTanh };

// GELU and its derivative.
template <class A>
struct GeluParts {
  Vec<A> value, slope;
};

inline constexpr float kNormalCoefficients[] = {-7.7991163647e-2f, 3.3574348031e-1f,  -4.4013674316e-1f, -3.3883895698e-1f, 1.9749957576e0f,
                                                -3.2105061633e0f,  2.9912374126e0f,   -1.7345284566e0f,  0.5f};

// Phi(x), and exp(-x^2 / 2) in `power`; a NaN stays.
FASTGEN_INLINE VecF normal_distribution(VecF x, VecF& power) {
  const VecF a = stdx::abs(x);
  VecF scaled = a * 0.23f;
  stdx::where(scaled > 1e3f, scaled) = 1e3f;  // of infinity u is 1
  SideBySide<float, 1> e = {a * a * -0.72134752f}, u = {scaled / (scaled + 1.0f)}, p;
  exp2(e);
  polynomials<float>(kNormalCoefficients, u, p);
  power = e[0];
  VecF tail = e[0] * p[0];
  stdx::where(x > 0.0f, tail) = 1.0f - tail;
  return tail;
}
FASTGEN_INLINE Vec<double> normal_distribution(Vec<double> x, Vec<double>& power) {
  power = exp(x * x * -0.5);
  return Vec<double>([&](auto i) { return 0.5 * std::erfc(-0.70710678118654752440 * static_cast<double>(x[i])); });
}

// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): what x (1 + tanh(u)) / 2 is without cancellation.
template <class A, bool kWithSlope>
FASTGEN_INLINE GeluParts<A> gelu_tanh(Vec<A> x) {
  constexpr A twice = A(1.59576912160573071176), cubic = A(0.044715), far = A(12);  // beyond it s is 0 or 1
  Vec<A> near = x;
  stdx::where(near > far, near) = far;
  stdx::where(near < -far, near) = -far;
  const Vec<A> square = near * near;
  Vec<A> u = near * madd<A>(square, Vec<A>(twice * cubic), Vec<A>(twice));  // 2 u
  stdx::where(u > A(80), u) = A(80);
  stdx::where(u < A(-80), u) = A(-80);
  Sigmoid<A> sigma = sigmoid(u);
  stdx::where(u <= A(-80), sigma.s) = A(0);
  GeluParts<A> parts{x * sigma.s, {}};
  if constexpr (kWithSlope) {
    const Vec<A> derivative = madd<A>(square, Vec<A>(3 * twice * cubic), Vec<A>(twice));  // of 2 u
    parts.slope = madd<A>(near * derivative, sigma.e * sigma.s * sigma.s, sigma.s);
  }
  return parts;
}

template <class A, Gelu kind>
FASTGEN_INLINE Vec<A> gelu(Vec<A> x) {
  if constexpr (kind == Gelu::kTanh) return gelu_tanh<A, false>(x).value;
  Vec<A> power;
  return x * normal_distribution(x, power);
}

template <class A, Gelu kind>
FASTGEN_INLINE GeluParts<A> gelu_with_slope(Vec<A> x) {
  if constexpr (kind == Gelu::kTanh) return gelu_tanh<A, true>(x);
  Vec<A> power;
  const Vec<A> phi = normal_distribution(x, power);
  return {x * phi, madd<A>(x * A(0.39894228040143267794), power, phi)};
}

}  // namespace fastgen
