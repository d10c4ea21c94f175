// The scales of an affine coupling: of a vector of raw scales the multiplier, its logarithm, and how that changes; and sums of such
// logarithms. A multiplier is s, or 1 / s for the inverse of a product and for a quotient forwards.
#pragma once

#include <algorithm>

#include "common/simd/groups.h"

namespace fastgen::affine_coupling {
namespace {

// In the order of COUPLING_SCALES of fastgen/_schema.py.
enum class Scale { kExp, kTanh, kSoftTanh, kAtan, kSigmoidCentered, kSoftClip, kSigmoid, kSoftplus };

// What a scale is computed as: three of them are tanh, with and without an inner factor.
enum class Form { kExp, kTanh, kAtan, kSoftClip, kSigmoid, kShiftedSigmoid, kSoftplus };

// Whether s is what is computed first, and not its logarithm.
constexpr bool is_direct(Form form) { return form >= Form::kSigmoid; }

template <class A>
struct Numbers {
  Scale scale;
  A bound, offset, eps, gain;
  A power, sign;    // -1 where the multiplier is 1 / s; of the shift
  bool shift_last;  // x * multiplier + shift, and not (x + shift) * multiplier
  bool weighted;    // one bound a channel
};

// What stands beside each element: one number for all, or one each.
template <class A>
struct Beside {
  const A* each = nullptr;
  A same = A(0);
  template <class At>
  FASTGEN_INLINE Vec<A> load(std::int64_t i, At at) const { return each ? at.load(each + i) : Vec<A>(same); }
};

template <class A>
struct Besides {
  Beside<A> weight, mean, added;
};

// (atan(u) - u) / u^3 of z = u^2 in [0, 1], minimax: atan(u) to 2e-8 before it is rounded.
inline constexpr float kAtanCoefficients[] = {2.92069104e-3f, -1.63679232e-2f, 4.32118528e-2f,  -7.55221360e-2f,
                                              1.06660043e-1f, -1.42110552e-1f, 1.99937728e-1f, -3.33331527e-1f};
FASTGEN_INLINE VecF atan_of_any(VecF x) {
  const VecF size = at_most(stdx::abs(x), 1e30f);
  const auto far = size > 1.0f;
  SideBySide<float, 1> z, p;
  VecF u = size;
  stdx::where(far, u) = reciprocal(size);
  z[0] = u * u;
  polynomials<float>(kAtanCoefficients, z, p);
  VecF y = madd<float>(VecF(p[0] * z[0]), u, u);
  stdx::where(far, y) = 1.57079633f - y;
  return stdx::copysign(y, x);
}
FASTGEN_INLINE Vec<double> atan_of_any(Vec<double> x) {
  return Vec<double>([&](auto i) { return std::atan(static_cast<double>(x[i])); });
}

// ln(1 + e) for e in [0, 1], with all digits of a small e.
FASTGEN_INLINE VecF log_one_plus(VecF e) {
  const VecF one_plus = e + 1.0f, rest = one_plus - 1.0f;
  VecF y = log(one_plus) * (e / rest);
  stdx::where(rest == 0.0f, y) = e;
  return y;
}
FASTGEN_INLINE Vec<double> log_one_plus(Vec<double> e) {
  return Vec<double>([&](auto i) { return std::log1p(static_cast<double>(e[i])); });
}

// ln(s) of any s >= 0.
FASTGEN_INLINE VecF log_of_any(VecF s) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  VecF y = log(s);
  const auto low = s < 1.17549435e-38f;
  if (stdx::any_of(low)) [[unlikely]] {
    stdx::where(low, y) = log(VecF(s * 0x1p30f)) - 20.7944154f;
    stdx::where(s == 0.0f, y) = -infinity;
  }
  stdx::where(s == infinity, y) = infinity;
  return y;
}
FASTGEN_INLINE Vec<double> log_of_any(Vec<double> s) { return log(s); }

// log s of a, where that comes first, its derivatives by a and by the weight w.
template <class A>
struct LogScale {
  Vec<A> value, by_a, by_weight;
};

template <class A, Form form>
FASTGEN_INLINE LogScale<A> log_scale(Vec<A> a, const Numbers<A>& numbers, Vec<A> w) {
  using V = Vec<A>;
  if constexpr (form == Form::kExp) {
    return {a, V(A(1)), V(A(0))};
  } else if constexpr (form == Form::kTanh) {
    const bool soft = numbers.scale == Scale::kSoftTanh, centered = numbers.scale == Scale::kSigmoidCentered;
    const V u = !soft ? V(a * (centered ? A(0.5) : A(1))) : numbers.weighted ? V(a / w) : V(a * (A(1) / numbers.bound));
    const WithSlope<A> t = tanh_with_slope<A>(u);
    if (soft) return {w * t.value, t.slope, t.value - u * t.slope};
    return {w * t.value, w * t.slope * (centered ? A(0.5) : A(1)), t.value};
  } else if constexpr (form == Form::kAtan) {
    const V height = w * A(0.636);  // of FrEIA, not 2 / pi
    return {height * atan_of_any(a), height / (a * a + A(1)), V(A(0))};
  } else {
    const V r = A(1) / (stdx::abs(a / numbers.bound) + A(1));
    return {a * r, r * r, V(A(0))};
  }
}

// s of a raw scale, where that comes first, and, where `slopes` are asked for, its derivative by a over s.
template <class A>
struct DirectScale {
  Vec<A> value, by_a_over_value, one_plus, least;  // of a sigmoid: s = exp(least) / one_plus
};

template <class A, Form form, bool slopes = true>
FASTGEN_INLINE DirectScale<A> direct_scale(Vec<A> raw, const Numbers<A>& numbers) {
  using V = Vec<A>;
  if constexpr (form == Form::kSoftplus) {
    const V a = raw * numbers.gain;
    const V e = decay(stdx::abs(a)).power, r = reciprocal(V(e + A(1)));
    V positive = a, sigmoid = r;
    stdx::where(a < A(0), positive) = A(0);
    stdx::where(a < A(0), sigmoid) = e * r;
    V s = positive + log_one_plus(e) + numbers.eps;
    const auto beyond = s > numbers.bound;
    stdx::where(beyond, s) = numbers.bound;
    V slope(A(0));
    if constexpr (slopes) slope = sigmoid / s;
    stdx::where(beyond, slope) = A(0);
    return {s, slope, V(A(1)), V(A(0))};
  } else {
    const V z = madd<A>(raw, V(numbers.gain), V(numbers.offset));
    if constexpr (form == Form::kShiftedSigmoid) {
      const V e = exp(-z), sigma = A(1) / (e + A(1)), s = sigma + numbers.eps;
      return {s, slopes ? V(sigma * sigma * e / s) : V(A(0)), V(A(1)), V(A(0))};
    } else {
      const V e = decay(stdx::abs(z)).power, one_plus = e + A(1), r = reciprocal(one_plus);
      V s = r, rest = e * r, least(A(0));  // sigmoid(z) and sigmoid(-z)
      const auto negative = z < A(0);
      stdx::where(negative, s) = e * r;
      stdx::where(negative, rest) = r;
      stdx::where(!(z >= A(0)), least) = z;  // a NaN too
      return {s, rest, one_plus, least};
    }
  }
}

// 2^f on [0, 1], minimax: relative error 8e-8 everywhere, so that it is not quite 1 at 0.
inline constexpr float kFreePowerCoefficients[] = {1.87757665e-3f, 8.98934016e-3f, 5.58263180e-2f, 2.40153617e-1f, 6.93153073e-1f, 9.99999925e-1f};

// The same of n vectors side by side.
template <class A, Form form, bool slopes, int n>
FASTGEN_INLINE void direct_scales(const SideBySide<A, n>& raw, const Numbers<A>& numbers, DirectScale<A> (&scales)[n]) {
  if constexpr (form == Form::kShiftedSigmoid && std::is_same_v<A, float>) {
    VecF e[n], k[n], p[n];  // e = exp(-z)
    const float by = numbers.gain * -1.44269504f, from = numbers.offset * -1.44269504f;
    // beyond the bounds eps is all that is left of one of s and 1 - s
#if defined(__AVX512F__)
    for (int i = 0; i < n; ++i) k[i] = at_most(madd<float>(raw[i], VecF(by), VecF(from)), 115.0f), e[i] = fraction(k[i]);
    polynomials<float>(kFreePowerCoefficients, e, p);  // the hardware scales by the power below k
#else
    for (int i = 0; i < n; ++i) e[i] = clamp(madd<float>(raw[i], VecF(by), VecF(from)), -115.0f, 115.0f), k[i] = round_near(e[i]);
    for (int i = 0; i < n; ++i) e[i] -= k[i];
    polynomials<float>(kPowerCoefficients, e, p);
#endif
    for (int i = 0; i < n; ++i) {
      e[i] = scale_by_power(p[i], k[i]);
      const VecF sigma = reciprocal(VecF(e[i] + 1.0f)), s = sigma + numbers.eps;
      scales[i].value = s;
      if constexpr (slopes) scales[i].by_a_over_value = sigma * sigma * e[i] / s;
    }
  } else {
    for (int i = 0; i < n; ++i) scales[i] = direct_scale<A, form, slopes>(raw[i], numbers);
  }
}

template <class A, Form form>
FASTGEN_INLINE Vec<A> log_of(const DirectScale<A>& s) {
  if constexpr (form == Form::kSigmoid) return s.least - log(s.one_plus);
  else return log_of_any(s.value);
}

template <class A, Form form>
FASTGEN_INLINE Vec<A> multiplier_of(const DirectScale<A>& s, const Numbers<A>& numbers) {
  if (numbers.power > A(0)) return s.value;
  return A(1) / s.value;
}

// A sum of logarithms before its lanes are added up: sum, and the logarithm of product 2^power.
template <class A>
struct LogParts {
  Vec<A> sum = Vec<A>(A(0)), product = Vec<A>(A(1)), power = Vec<A>(A(0));
};

// Sums of log s over whole vectors; of scales that are computed themselves that of a product, out of which the exponent is taken before it
// can leave the range of a float.
template <class A, Form form>
class LogSum {
 public:
  using V = Vec<A>;
  static constexpr bool kProduct = is_direct(form) && std::is_same_v<A, float>;

  explicit LogSum(A eps) : together_(form == Form::kSigmoid || (form == Form::kShiftedSigmoid && eps > A(1e-9))) {}

  template <int n>
  FASTGEN_INLINE void add(const SideBySide<A, n>& logarithms) {
    for (int i = 0; i < n; ++i) sum_ += logarithms[i];
  }
  template <int n>
  FASTGEN_INLINE void add(const DirectScale<A> (&scales)[n]) {
    static_assert(n <= 4);  // 1e-9 to the fourth is a normal
    if constexpr (kProduct) {
      for (int i = 0; i < n; ++i) {
        const DirectScale<A>& s = scales[i];
        if constexpr (form == Form::kSigmoid) sum_ += s.least;  // a NaN goes this way
        else if constexpr (form == Form::kShiftedSigmoid && !kCarriesNan) sum_ = madd<A>(s.value, V(A(0)), sum_);
        else if constexpr (form == Form::kSoftplus) inside_ = inside_ && s.value > A(1e-30) && s.value < A(1e30);
        product_ *= form == Form::kSigmoid ? s.one_plus : s.value;
        if (i == n - 1 || !together_) take_exponent();
      }
    } else {
      for (int i = 0; i < n; ++i) sum_ += log_of<A, form>(scales[i]);
    }
  }
  // Whether all factors were such that their product says what their logarithms add up to.
  bool is_exact() const { return !kProduct || form != Form::kSoftplus || stdx::all_of(inside_); }
  A total() const { return sum_lanes<A>(sum_); }  // of what is no product
  LogParts<A> parts() const {
    if constexpr (kProduct) return {sum_, product_, power_};
    else return {sum_};
  }

 private:
#if defined(__AVX512F__)
  static constexpr bool kCarriesNan = true;
  FASTGEN_INLINE void take_exponent() {
    const auto product = static_cast<__m512>(product_);
    power_ += VecF(_mm512_getexp_ps(product));
    product_ = VecF(_mm512_getmant_ps(product, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src));
  }
#else
  static constexpr bool kCarriesNan = false;
  FASTGEN_INLINE void take_exponent() {
    const VecU bits = bits_as<VecU>(VecF(product_));
    power_ += stdx::static_simd_cast<VecF>(bits_as<VecI>(VecU(bits >> 23)) - 127);
    product_ = bits_as<VecF>(VecU((bits & 0x007fffffu) | 0x3f800000u));
  }
#endif

  V sum_ = V(A(0)), product_ = V(A(1)), power_ = V(A(0));
  typename V::mask_type inside_ = typename V::mask_type(true);
  bool together_;
};

// Sums of many strips at a time, one in each lane: the logarithm of one alone would be waited for.
template <class A>
using Finish = void (*)(const LogParts<A>* parts, int count, A power, A* sums);

// The lanes of each of up to kWidth vectors, f(which), joined in one order.
template <class F, class Join>
FASTGEN_INLINE VecF join_lanes(int count, const F& f, float none, const Join& join) {
  constexpr int width = kWidth<float>;
  VecF v[width];
  for (int i = 0; i < width; ++i) v[i] = i < count ? f(i) : VecF(none);
  transpose(v);
  for (int half = width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = join(v[i], v[i + half]);
  return v[0];
}

template <class A, Form form>
void finish_sums(const LogParts<A>* parts, int count, A power, A* sums) {
  if constexpr (std::is_same_v<A, float>) {
    const auto plus = [](VecF a, VecF b) { return a + b; };
    for (int i = 0; i < count; i += kWidth<A>) {
      const LogParts<A>* const of = parts + i;
      const int some = std::min(count - i, kWidth<A>);
      VecF sum = join_lanes(some, [&](int k) { return of[k].sum; }, 0.0f, plus);
      if constexpr (LogSum<A, form>::kProduct) {
        // mantissas below 2, of which all lanes together make 2^16
        VecF product = join_lanes(some, [&](int k) { return of[k].product; }, 1.0f, [](VecF a, VecF b) { return a * b; });
        const VecF powers = join_lanes(some, [&](int k) { return of[k].power; }, 0.0f, plus);
        const VecF logarithm = madd<A>(powers, VecF(0.69314718f), log(product));
        sum = form == Form::kSigmoid ? sum - logarithm : sum + logarithm;
      }
      store_part(sums + i, VecF(sum * power), some);
    }
  }
}

// Calls f.template operator()<form>().
template <class F>
void dispatch_form(Scale scale, double eps, const F& f) {
  switch (scale) {
    case Scale::kExp: return f.template operator()<Form::kExp>();
    case Scale::kAtan: return f.template operator()<Form::kAtan>();
    case Scale::kSoftClip: return f.template operator()<Form::kSoftClip>();
    case Scale::kSoftplus: return f.template operator()<Form::kSoftplus>();
    case Scale::kSigmoid:
      if (eps == 0) return f.template operator()<Form::kSigmoid>();
      return f.template operator()<Form::kShiftedSigmoid>();
    default: return f.template operator()<Form::kTanh>();
  }
}

}  // namespace
}  // namespace fastgen::affine_coupling
