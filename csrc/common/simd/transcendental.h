// Exponential, logarithm, sine and cosine, sigmoid and SiLU: Cephes' and own minimax polynomials for vectors of fp32; for fp64
// polynomials where normals are made, libm lane by lane elsewhere.
#pragma once

#include <cmath>
#include <limits>

#include "common/simd/arithmetic.h"
#include "common/simd/integer.h"

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

// Where a chain of multiply-adds is long, several vectors go through it side by side: the latency of one hides behind the others.
template <class A, int n>
using SideBySide = Vec<A>[n];

// The polynomial with these coefficients, the highest first, of each of n vectors.
template <class A, int n, std::size_t count>
FASTGEN_INLINE void polynomials(const A (&coefficients)[count], const SideBySide<A, n>& x, SideBySide<A, n>& y) {
  for (int i = 0; i < n; ++i) y[i] = Vec<A>(coefficients[0]);
  for (std::size_t k = 1; k < count; ++k)
    for (int i = 0; i < n; ++i) y[i] = madd<A>(y[i], x[i], Vec<A>(coefficients[k]));
}

// 2^r on [-1/2, 1/2], minimax with 1 at 0: relative error 9e-8, or 1e-4 with `kLow`.
inline constexpr float kPowerCoefficients[] = {1.32647271e-3f, 9.67151264e-3f, 5.55073374e-2f, 2.40222421e-1f, 6.93146978e-1f, 1.0f};
inline constexpr float kLowPowerCoefficients[] = {5.50089305e-2f, 2.42210961e-1f, 6.93282927e-1f, 1.0f};

// A number in all lanes of one register: without this the compiler reads it from memory at every use, which takes more time than the
// arithmetic where several vectors go side by side.
FASTGEN_INLINE VecF held(float value) {
  VecF v(value);
#if defined(__AVX512F__)
  auto raw = static_cast<__m512>(v);
  asm volatile("" : "+v"(raw));
  v = VecF(raw);
#elif defined(__AVX2__)
  auto raw = static_cast<__m256>(v);
  asm volatile("" : "+x"(raw));
  v = VecF(raw);
#endif
  return v;
}

// 2^x of each for x <= 127: plainly 0 where it would be less than a normal, as for -Inf; a NaN stays.
template <int n>
FASTGEN_INLINE void exp2(SideBySide<float, n>& x) {
  VecF power[n], p[n];
#if defined(__AVX512F__)
  for (int i = 0; i < n; ++i) x[i] = at_least(x[i], -200.0f);  // the hardware's own scaling goes below the normals
  for (int i = 0; i < n; ++i) power[i] = round_near(x[i]), x[i] -= power[i];
#else
  for (int i = 0; i < n; ++i) x[i] = at_least(x[i], -127.0f);
  const VecF magic = held(12582912.0f + 127.0f);  // 1.5 * 2^23 and the bias of an exponent: that of 2^k ends up in the low bits
  for (int i = 0; i < n; ++i) power[i] = x[i] + magic, x[i] -= power[i] - magic;
#endif
  for (int i = 0; i < n; ++i) p[i] = VecF(kPowerCoefficients[0]);
  for (std::size_t k = 1; k < std::size(kPowerCoefficients); ++k) {
    const VecF coefficient = held(kPowerCoefficients[k]);
    for (int i = 0; i < n; ++i) p[i] = madd<float>(p[i], x[i], coefficient);
  }
#if defined(__AVX512F__)
  for (int i = 0; i < n; ++i) x[i] = scale_by_power(p[i], power[i]);
#else
  for (int i = 0; i < n; ++i) x[i] = p[i] * bits_as<VecF>(VecU(bits_as<VecU>(power[i]) << 23));
#endif
}
template <int n>
FASTGEN_INLINE void exp2(SideBySide<double, n>& x) {
  for (int k = 0; k < n; ++k) x[k] = Vec<double>([&](auto i) { return std::exp2(static_cast<double>(x[k][i])); });
}

// The same to 2e-7, in three instructions fewer where the hardware takes the fraction and scales by the power below x.
inline constexpr float kFractionPowerCoefficients[] = {1.86713007e-3f, 9.01703032e-3f, 5.57999131e-2f, 2.40164450e-1f, 6.93151312e-1f, 1.0f};
template <class A, int n>
FASTGEN_INLINE void short_exp2(Vec<A> (&x)[n]) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    VecF r[n], p[n];
    for (int i = 0; i < n; ++i) r[i] = fraction(x[i]), p[i] = VecF(kFractionPowerCoefficients[0]);
    for (std::size_t k = 1; k < std::size(kFractionPowerCoefficients); ++k) {
      const VecF coefficient = held(kFractionPowerCoefficients[k]);
      for (int i = 0; i < n; ++i) p[i] = madd<float>(p[i], r[i], coefficient);
    }
    for (int i = 0; i < n; ++i) x[i] = scale_by_power(p[i], x[i]);
    return;
  }
#endif
  exp2(x);
}

// ln(x 2^-power) for normal x > 0. Cephes logf on the mantissa.
inline constexpr float kLogCoefficients[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                             -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                             2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
template <int n>
FASTGEN_INLINE void log_scaled(SideBySide<float, n>& x, int power) {
  VecF m[n], e[n], p[n];
  for (int i = 0; i < n; ++i) {
    const VecU bits = bits_as<VecU>(x[i]);
    // Mantissa to [sqrt(1/2), sqrt(2)): take the exponent relative to the bit pattern of sqrt(1/2).
    const VecI exponent = bits_as<VecI>(VecU(bits - 0x3f3504f3u)) >> 23;
    m[i] = bits_as<VecF>(VecU(bits - bits_as<VecU>(VecI(exponent << 23)))) - 1.0f;
    e[i] = stdx::static_simd_cast<VecF>(VecI(exponent - power));
  }
  polynomials<float>(kLogCoefficients, m, p);
  for (int i = 0; i < n; ++i) {
    const VecF square = m[i] * m[i];
    VecF log_m = madd<float>(p[i] * m[i], square, e[i] * -2.12194440e-4f);
    log_m = madd<float>(square, VecF(-0.5f), log_m) + m[i];
    x[i] = madd<float>(e[i], VecF(0.693359375f), log_m);
  }
}
FASTGEN_INLINE VecF log_scaled(VecF x, int power) {
  VecF alone[] = {x};
  log_scaled(alone, power);
  return alone[0];
}
// The same to 1 ulp of fp64: with f = m - 1, s = f / (2 + f) and ln(1 + f) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)); fdlibm's R, whose odd
// and even powers go apart.
inline constexpr double kLogOdd[] = {1.479819860511658591e-1, 1.818357216161805012e-1, 2.857142874366239149e-1, 6.666666666666735130e-1};
inline constexpr double kLogEven[] = {1.531383769920937332e-1, 2.222219843214978396e-1, 3.999999999940941908e-1};
template <int n>
FASTGEN_INLINE void log_scaled(SideBySide<double, n>& x, int power) {
  using V = Vec<double>;
  constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcdu, one = 0x3ff0000000000000u;
  V f[n], s[n], z[n], w[n], e[n], odd[n], even[n];
  for (int i = 0; i < n; ++i) {
    const VecU64 bits = bits_as<VecU64>(x[i]) + (one - root_half);  // the exponent counts from sqrt(1/2)
    e[i] = bits_as<V>(VecU64((bits >> 52) | 0x4330000000000000u)) - (0x1p52 + 1023 + power);
    f[i] = bits_as<V>(VecU64((bits & 0x000fffffffffffffu) + root_half)) - 1.0;
    s[i] = f[i] / (f[i] + 2.0), z[i] = s[i] * s[i], w[i] = z[i] * z[i];
  }
  polynomials<double>(kLogOdd, w, odd);
  polynomials<double>(kLogEven, w, even);
  for (int i = 0; i < n; ++i) {
    const V half = f[i] * f[i] * 0.5, rest = madd<double>(odd[i], z[i], even[i] * w[i]);
    const V low = madd<double>(s[i], half + rest, e[i] * 1.90821492927058770002e-10);
    x[i] = madd<double>(e[i], V(6.93147180369123816490e-1), f[i] - (half - low));
  }
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

// Cephes sinf and cosf, sin and cos on [-pi/4, pi/4]: sin r = r + r r^2 P(r^2), cos r = 1 - r^2 / 2 + r^4 Q(r^2); and a quarter turn in
// three parts, the first two of which any of up to four turns leaves exact.
template <class A>
struct Turns;
template <>
struct Turns<float> {
  static constexpr float sine[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
  static constexpr float cosine[] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
  static constexpr float quarter[] = {1.5703125f, 4.837512969970703125e-4f, 7.54978995489188216e-8f};
};
template <>
struct Turns<double> {
  static constexpr double sine[] = {1.58962301576546568060e-10, -2.50507477628578072866e-8, 2.75573136213857245213e-6,
                                    -1.98412698295895385996e-4, 8.33333333332211858878e-3, -1.66666666666666307295e-1};
  static constexpr double cosine[] = {-1.13585365213876817300e-11, 2.08757008419747316778e-9, -2.75573141792967388112e-7,
                                      2.48015872888517045348e-5, -1.38888888888730564116e-3, 4.16666666666665929218e-2};
  static constexpr double quarter[] = {1.57079625129699707031, 7.54978941586159635336e-8, 5.39030285815811905290e-15};
};

// The quarter turns nearest to an angle in [0, 2 pi]: as an integer, which is returned, and as a number.
FASTGEN_INLINE VecU quarter_turns(VecF angle, VecF& number) {
  const VecI count = (stdx::static_simd_cast<VecI>(angle * 1.27323954f) + 1) >> 1;  // of eighths, as Cephes
  number = stdx::static_simd_cast<VecF>(count);
  return bits_as<VecU>(count);
}
FASTGEN_INLINE VecU64 quarter_turns(Vec<double> angle, Vec<double>& number) {
  const Vec<double> magic = madd<double>(angle, Vec<double>(6.36619772367581343076e-1), Vec<double>(0x1.8p52));
  number = magic - 0x1.8p52;
  return bits_as<VecU64>(magic);  // in the low bits
}

// The sines and cosines of angles in [0, 2 pi], to 1 ulp of the larger of the two.
template <class A, int n>
FASTGEN_INLINE void sincos(const SideBySide<A, n>& angle, SideBySide<A, n>& sine, SideBySide<A, n>& cosine) {
  using V = Vec<A>;
  using U = decltype(quarter_turns(angle[0], sine[0]));
  constexpr int sign = 8 * sizeof(A) - 2;  // moves the second bit to the sign
  V r[n], square[n], number[n], s[n], c[n];
  U turns[n];
  for (int i = 0; i < n; ++i) turns[i] = quarter_turns(angle[i], number[i]), r[i] = angle[i];
  for (const A part : Turns<A>::quarter)
    for (int i = 0; i < n; ++i) r[i] = madd<A>(number[i], V(-part), r[i]);
  for (int i = 0; i < n; ++i) square[i] = r[i] * r[i];
  polynomials<A>(Turns<A>::sine, square, s);
  polynomials<A>(Turns<A>::cosine, square, c);
  for (int i = 0; i < n; ++i) {
    s[i] = madd<A>(s[i] * square[i], r[i], r[i]);
    c[i] = madd<A>(c[i] * square[i], square[i], square[i] * A(-0.5)) + A(1);
    // Odd quarter turns exchange sine and cosine; the sine is negative after 2 and 3 of them, the cosine after 1 and 2.
    const auto odd = bits_as<typename V::mask_type>((turns[i] & 1u) != 0u);
    sine[i] = s[i], cosine[i] = c[i];
    stdx::where(odd, sine[i]) = c[i];
    stdx::where(odd, cosine[i]) = s[i];
    sine[i] = bits_as<V>(U(bits_as<U>(sine[i]) ^ ((turns[i] & 2u) << sign)));
    cosine[i] = bits_as<V>(U(bits_as<U>(cosine[i]) ^ (((turns[i] + 1u) & 2u) << sign)));
  }
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
  SideBySide<float, 1> fraction = {r}, power;
  if constexpr (kLow) polynomials<float>(kLowPowerCoefficients, fraction, power);
  else polynomials<float>(kPowerCoefficients, fraction, power);
  const VecF e = scale_by_power(power[0], k);
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
