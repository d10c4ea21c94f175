// A vector of monotone rational-quadratic splines, one element a lane: the arithmetic of `rational_quadratic_spline`. What the formulas mean
// stands in fastgen/reference/_spline.py.
//
// The parameters come as columns, one vector each. Both softmaxes take one exponential a bin; as the knots are summed up the bin of the
// element is picked by comparing, so that slopes are made at two knots and not at all, and there is one logarithm.
#pragma once

#include "common/simd.h"

namespace fastgen::rational_quadratic_spline {

enum class Tails { kLinear, kCircular, kNone };             // SPLINE_TAILS of fastgen/_schema.py
enum class Parametrization { kNflows, kZuko };              // SPLINE_PARAMETRIZATIONS

template <class A>
inline constexpr A kLog2E = A(1.44269504088896340736);

// A constant in [0, 1] as the sum of two numbers, the first of half as many bits, so that its product with a short number is exact. One rounding
// of it would be the same for all elements, in every bin: what is random cancels in a gradient summed over a batch, and this does not.
template <class A>
struct TwoParts {
  A value, error;
  explicit TwoParts(double exact) {
    constexpr int half = std::numeric_limits<A>::digits / 2;
    value = static_cast<A>(std::ldexp(std::nearbyint(std::ldexp(exact, half)), -half));
    error = static_cast<A>(exact - static_cast<double>(value));
  }
};

// What all elements of a call share.
template <class A>
struct Form {
  std::int64_t bins, derivatives;
  Tails tails;
  A least_width, least_height, least_slope, scale;
  A clip;                                // of zuko's soft clip: 1 / -log(min_derivative)
  const std::int64_t* knots;             // the column of each of the K + 1 slopes
  TwoParts<A> rest_of_width, rest_of_height;  // 1 - bins * least
};

template <class A>
struct Box {
  Vec<A> left, right, bottom, top;
};

template <class A>
FASTGEN_INLINE Vec<A> choose(typename Vec<A>::mask_type which, Vec<A> yes, Vec<A> no) {
  stdx::where(which, no) = yes;
  return no;
}

// log(1 + t) for t in [0, 1], relative to itself: 2 atanh(s) with s = t / (2 + t), minimax in s^2.
FASTGEN_INLINE VecF log_of_one_and(VecF t) {
  const VecF s = t / (t + 2.0f), z = s * s;
  VecF p = madd<float>(VecF(2.686754891e-1f), z, VecF(2.823395600e-1f));
  p = madd<float>(madd<float>(p, z, VecF(4.000767086e-1f)), z, VecF(6.666663967e-1f));
  return madd<float>(p * z, s, s + s);
}
FASTGEN_INLINE Vec<double> log_of_one_and(Vec<double> t) {
  return Vec<double>([&](auto i) { return std::log1p(static_cast<double>(t[i])); });
}

// A slope at a knot, and its own derivative by the number that it comes of.
template <class A, Parametrization kind>
FASTGEN_INLINE WithSlope<A> slope_of(Vec<A> raw, const Form<A>& form) {
  using V = Vec<A>;
  if constexpr (kind == Parametrization::kZuko) {
    const V shrink = A(1) / (A(1) + stdx::abs(raw) * form.clip), value = exp(V(raw * shrink));
    return {value, value * shrink * shrink};
  } else {
    const V t = exp(V(-stdx::abs(raw))), near = A(1) / (t + A(1));
    const auto positive = raw > A(0);
    const V value = form.least_slope + choose<A>(positive, raw, V(A(0))) + log_of_one_and(t);
    return {choose<A>(raw != raw, raw, value), choose<A>(positive, near, V(t * near))};
  }
}

// What goes into a softmax of an unnormalized number.
template <class A, Parametrization kind>
FASTGEN_INLINE Vec<A> exponent_of(Vec<A> raw, A scale, A clip) {
  raw *= scale;
  if constexpr (kind == Parametrization::kZuko) raw /= A(1) + stdx::abs(raw) * (A(2) * clip);
  return raw;
}

// exp(x) of each for x <= 0, to 2 ulp; of x below -86 next to nothing; a NaN stays.
template <int n>
FASTGEN_INLINE void powers(SideBySide<float, n>& x) {
  VecF power[n];
  for (int i = 0; i < n; ++i) {
    x[i] = at_least(x[i], -86.0f), power[i] = round_near(x[i] * kLog2E<float>);
    x[i] = madd<float>(x[i], VecF(kLog2E<float>), -power[i]);  // the product unrounded
  }
  SideBySide<float, n> p;
  polynomials<float>(kPowerCoefficients, x, p);
  for (int i = 0; i < n; ++i) x[i] = scale_by_power(p[i], power[i]);
}
[[gnu::noinline]] inline void powers(Vec<double>* x, int count) {
  for (int i = 0; i < count; ++i) x[i] = exp(x[i]);
}
template <int n>
FASTGEN_INLINE void powers(SideBySide<double, n>& x) {
  powers(x, n);
}

// The exponentials of a softmax over `bins` columns, and one over their sum.
template <class A, Parametrization kind>
FASTGEN_INLINE Vec<A> exponentials(const A* raw, const Form<A>& form, A* out) {
  using V = Vec<A>;
  constexpr int width = kWidth<A>, together = 4;
  const std::int64_t bins = form.bins;
  V most = exponent_of<A, kind>(load(raw), form.scale, form.clip);
  store(out, most);
  for (std::int64_t k = 1; k < bins; ++k) {
    const V exponent = exponent_of<A, kind>(load(raw + k * width), form.scale, form.clip);
    store(out + k * width, exponent);
    most = choose<A>(exponent > most, exponent, most);
  }
  V total(A(0));
  std::int64_t k = 0;
  for (; k + together <= bins; k += together) {
    V e[together];
    for (int i = 0; i < together; ++i) e[i] = load(out + (k + i) * width) - most;
    powers(e);
    for (int i = 0; i < together; ++i) store(out + (k + i) * width, e[i]);
    total += (e[0] + e[1]) + (e[2] + e[3]);
  }
  for (; k < bins; ++k) {
    V e[1] = {load(out + k * width) - most};
    powers(e);
    store(out + k * width, e[0]);
    total += e[0];
  }
  return A(1) / total;
}

// One axis of the box: the exponentials of its softmax, size = exponential * each + least.
template <class A>
struct Axis {
  const A* powers;
  Vec<A> inverse_total, low, each, least;

  FASTGEN_INLINE Axis(const A* powers, Vec<A> inverse_total, Vec<A> low, Vec<A> high, A least_share, TwoParts<A> rest)
      : powers(powers), inverse_total(inverse_total), low(low), least((high - low) * least_share) {
    const Vec<A> span = high - low, product = span * rest.value;
    const Vec<A> error = madd<A>(span, Vec<A>(rest.error), madd<A>(span, Vec<A>(rest.value), -product));
    each = madd<A>(product, inverse_total, error * inverse_total);
  }
};

// Of the bin of an element, along one axis: where it begins, its size; with kGrad the exponentials before it and its own.
template <class A>
struct Side {
  Vec<A> begin, size, before, own;
};

template <class A>
struct Bin {
  Vec<A> index, raw_first, raw_last;
  Side<A> x, y;
};

template <class A, bool kGrad>
FASTGEN_INLINE void advance(Side<A>& running, const Axis<A>& axis, std::int64_t k) {
  const Vec<A> power = load(axis.powers + k * kWidth<A>);
  running.begin += running.size;
  running.size = madd<A>(power, axis.each, axis.least);
  if constexpr (kGrad) running.before += running.own, running.own = power;
}

template <class A, bool kGrad>
FASTGEN_INLINE void pick(typename Vec<A>::mask_type here, const Side<A>& running, Side<A>& picked) {
  stdx::where(here, picked.begin) = running.begin;
  stdx::where(here, picked.size) = running.size;
  if constexpr (kGrad) {
    stdx::where(here, picked.before) = running.before;
    stdx::where(here, picked.own) = running.own;
  }
}

// The bin of `at`, a coordinate along x, or along y where `inverse`; a NaN stays in the first.
template <class A, bool kInverse, bool kGrad>
FASTGEN_INLINE Bin<A> bin_of(Vec<A> at, const Axis<A>& horizontal, const Axis<A>& vertical, const A* columns, const Form<A>& form) {
  using V = Vec<A>;
  const V zero(A(0));
  Side<A> x{horizontal.low, zero, zero, zero}, y{vertical.low, zero, zero, zero};
  const auto slope = [&](std::int64_t knot) { return load(columns + form.knots[knot] * kWidth<A>); };
  advance<A, kGrad>(x, horizontal, 0);
  advance<A, kGrad>(y, vertical, 0);
  V next = slope(1);
  Bin<A> bin{zero, slope(0), next, x, y};
  for (std::int64_t k = 1; k < form.bins; ++k) {
    advance<A, kGrad>(x, horizontal, k);
    advance<A, kGrad>(y, vertical, k);
    const V last = slope(k + 1);
    const auto here = (kInverse ? y.begin : x.begin) <= at;
    pick<A, kGrad>(here, x, bin.x);
    pick<A, kGrad>(here, y, bin.y);
    stdx::where(here, bin.index) = V(static_cast<A>(k));
    stdx::where(here, bin.raw_first) = next;
    stdx::where(here, bin.raw_last) = last;
    next = last;
  }
  return bin;
}

template <class A>
FASTGEN_INLINE Vec<A> within(Vec<A> x, Vec<A> low, Vec<A> high) {
  stdx::where(x < low, x) = low;
  stdx::where(x > high, x) = high;
  return x;
}

// An element in its bin: theta and 1 - theta, slopes, and what the formulas are made of.
template <class A>
struct Place {
  Vec<A> theta, rest, s, first, last, inverse_width, between, inverse_den, u, numerator;
};

template <class A, bool kInverse>
FASTGEN_INLINE Place<A> place_of(Vec<A> at, const Bin<A>& bin, Vec<A> first, Vec<A> last) {
  using V = Vec<A>;
  Place<A> p;
  const V zero(A(0)), one(A(1));
  p.first = first, p.last = last, p.inverse_width = A(1) / bin.x.size, p.s = bin.y.size * p.inverse_width;
  if constexpr (kInverse) {
    // theta is 2 s u / (2 s u + d + sqrt(d^2 + 4 s^2 u v)) with d = d_k v - d_{k+1} u; where d is negative 1 - theta is so, with u and v exchanged
    const V u = within<A>((at - bin.y.begin) / bin.y.size, zero, one), v = one - u, difference = first * v - last * u;
    const V twice = p.s + p.s, root = stdx::sqrt(V(madd<A>(difference, difference, twice * twice * (u * v))));
    const auto falling = difference < zero;
    const V small = twice * choose<A>(falling, v, u), near = small / (small + (stdx::abs(difference) + root)), far = one - near;
    p.theta = choose<A>(falling, far, near), p.rest = choose<A>(falling, near, far);
  } else {
    p.theta = within<A>((at - bin.x.begin) * p.inverse_width, zero, one), p.rest = one - p.theta;
  }
  p.between = p.theta * p.rest;
  p.inverse_den = one / madd<A>(p.s, one - (p.between + p.between), (first + last) * p.between);
  p.u = p.theta * madd<A>(p.s, p.theta, first * p.rest) * p.inverse_den;
  p.numerator = madd<A>(last, p.theta * p.theta, madd<A>(first, p.rest * p.rest, (p.s + p.s) * p.between));
  return p;
}

// The output and the log-determinant of a vector of elements. `work` has room for 2 K vectors.
template <class A, Parametrization kind, bool kInverse>
FASTGEN_INLINE void values(const A* columns, const Form<A>& form, const Box<A>& box, Vec<A> x, A* work, Vec<A>& output, Vec<A>& log_det) {
  using V = Vec<A>;
  const std::int64_t side = form.bins * kWidth<A>;
  const V total_x = exponentials<A, kind>(columns, form, work), total_y = exponentials<A, kind>(columns + side, form, work + side);
  const Axis<A> horizontal(work, total_x, box.left, box.right, form.least_width, form.rest_of_width);
  const Axis<A> vertical(work + side, total_y, box.bottom, box.top, form.least_height, form.rest_of_height);
  const V low = kInverse ? box.bottom : box.left, high = kInverse ? box.top : box.right;
  const auto outside = x < low || x > high;
  const V at = within<A>(x, low, high);
  const Bin<A> bin = bin_of<A, kInverse, false>(at, horizontal, vertical, columns, form);
  const V first = slope_of<A, kind>(bin.raw_first, form).value, last = slope_of<A, kind>(bin.raw_last, form).value;
  const Place<A> p = place_of<A, kInverse>(at, bin, first, last);
  const V ratio = p.s * p.inverse_den;
  log_det = log(V(p.numerator * ratio * ratio));
  if constexpr (kInverse) {
    output = within<A>(madd<A>(bin.x.size, p.theta, bin.x.begin), box.left, box.right);
    log_det = -log_det;
  } else {
    output = within<A>(madd<A>(bin.y.size, p.u, bin.y.begin), box.bottom, box.top);
  }
  const bool bounded = form.tails == Tails::kNone;
  const V end = kInverse ? choose<A>(x > high, box.right, box.left) : choose<A>(x > high, box.top, box.bottom);
  stdx::where(outside, output) = bounded ? end : x;
  stdx::where(outside, log_det) = V(bounded ? -std::numeric_limits<A>::infinity() : A(0));
}

// The gradient of what goes into one softmax, in place of its exponentials, from those of the knots at either end of the bin.
template <class A, Parametrization kind>
FASTGEN_INLINE void through_softmax(const A* raw, A* powers, const Axis<A>& axis, const Side<A>& side, Vec<A> index, Vec<A> first, Vec<A> last,
                                    typename Vec<A>::mask_type outside, const Form<A>& form, Vec<A> span) {
  using V = Vec<A>;
  constexpr int width = kWidth<A>;
  stdx::where(index == static_cast<A>(form.bins - 1), last) = A(0);  // the ends of the box are fixed
  stdx::where(index == A(0), first) = A(0);
  const V below = (first + last) * span, here = last * span;
  const V mean = (below * side.before + here * side.own) * axis.inverse_total;
  V factor = axis.inverse_total * form.scale;
  stdx::where(outside, factor) = A(0);
  const V if_below = (below - mean) * factor, if_here = (here - mean) * factor, if_above = -mean * factor;
  for (std::int64_t k = 0; k < form.bins; ++k) {
    const V at(static_cast<A>(k));
    V grad = choose<A>(at < index, if_below, choose<A>(at == index, if_here, if_above)) * load(powers + k * width);
    if constexpr (kind == Parametrization::kZuko) {
      const V shrink = A(1) / (A(1) + stdx::abs(load(raw + k * width)) * (std::abs(form.scale) * A(2) * form.clip));
      grad *= shrink * shrink;
    }
    stdx::where(outside, grad) = A(0);  // not NaN even where a parameter is
    store(powers + k * width, grad);
  }
}

// The gradient of the input, and where kParameters in `work` those of all parameters.
template <class A, Parametrization kind, bool kInverse, bool kParameters>
FASTGEN_INLINE void gradients(const A* columns, const Form<A>& form, const Box<A>& box, Vec<A> x, Vec<A> grad, Vec<A> grad_log, A* work,
                              Vec<A>& by_input) {
  using V = Vec<A>;
  constexpr int width = kWidth<A>;
  const std::int64_t side = form.bins * width;
  const V total_x = exponentials<A, kind>(columns, form, work), total_y = exponentials<A, kind>(columns + side, form, work + side);
  const Axis<A> horizontal(work, total_x, box.left, box.right, form.least_width, form.rest_of_width);
  const Axis<A> vertical(work + side, total_y, box.bottom, box.top, form.least_height, form.rest_of_height);
  const V low = kInverse ? box.bottom : box.left, high = kInverse ? box.top : box.right;
  const auto outside = x < low || x > high;
  const V at = within<A>(x, low, high);
  const Bin<A> bin = bin_of<A, kInverse, kParameters>(at, horizontal, vertical, columns, form);
  const WithSlope<A> first = slope_of<A, kind>(bin.raw_first, form), last = slope_of<A, kind>(bin.raw_last, form);
  const Place<A> p = place_of<A, kInverse>(at, bin, first.value, last.value);

  const V d = p.inverse_den, turn = p.rest - p.theta, two(A(2)), inverse_num = A(1) / p.numerator;
  const V bend = first.value + last.value - two * p.s, middle = A(1) - two * p.between;
  const V theta2 = p.theta * p.theta, rest2 = p.rest * p.rest;
  const V log_theta = two * ((last.value * p.theta + p.s * turn - first.value * p.rest) * inverse_num - bend * turn * d);
  const V log_s = two * (A(1) / p.s + p.between * inverse_num - middle * d);
  const V log_ends = two * p.between * d;
  const V u_theta = p.s * p.numerator * d * d;
  V by_u, weight_u, weight_log = grad_log;
  if constexpr (kInverse) {
    by_u = (grad * bin.x.size - grad_log * log_theta) / u_theta;
    weight_u = -by_u, weight_log = -grad_log;
    by_input = by_u / bin.y.size;
  } else {
    weight_u = grad * bin.y.size;
    by_input = (weight_u * u_theta + grad_log * log_theta) * p.inverse_width;
  }
  if constexpr (kParameters) {
    const V by_s = weight_u * (theta2 - p.u * middle) * d + weight_log * log_s;
    const V by_first = weight_u * p.between * (A(1) - p.u) * d + weight_log * (rest2 * inverse_num - log_ends);
    const V by_last = weight_log * (theta2 * inverse_num - log_ends) - weight_u * p.u * p.between * d;
    V by_x, by_y, by_width, by_height;
    if constexpr (kInverse) {
      by_x = grad, by_y = -by_input;
      by_width = grad * p.theta - by_s * p.s * p.inverse_width, by_height = by_s * p.inverse_width - by_input * p.u;
    } else {
      by_x = -by_input, by_y = grad;
      by_width = -(by_input * p.theta + by_s * p.s * p.inverse_width), by_height = grad * p.u + by_s * p.inverse_width;
    }
    const V span_x = (box.right - box.left) * (form.rest_of_width.value + form.rest_of_width.error);
    const V span_y = (box.top - box.bottom) * (form.rest_of_height.value + form.rest_of_height.error);
    through_softmax<A, kind>(columns, work, horizontal, bin.x, bin.index, by_x - by_width, by_width, outside, form, span_x);
    through_softmax<A, kind>(columns + side, work + side, vertical, bin.y, bin.index, by_y - by_height, by_height, outside, form, span_y);
    V at_first = by_first * first.slope, at_last = by_last * last.slope;
    stdx::where(outside, at_first) = A(0);
    stdx::where(outside, at_last) = A(0);
    const std::int64_t before = form.derivatives == form.bins - 1 ? 1 : 0;  // knots before the first that was given
    for (std::int64_t column = 0; column < form.derivatives; ++column) {
      const std::int64_t knot = column + before;
      V value(A(0));
      if (form.tails == Tails::kNone || knot < form.bins) {
        stdx::where(bin.index == static_cast<A>(knot), value) = at_first;
        stdx::where(bin.index == static_cast<A>(knot - 1), value) = at_last;
        if (knot == 0 && form.tails == Tails::kLinear) value = V(A(0));
        if (knot == 0 && form.tails == Tails::kCircular) stdx::where(bin.index == static_cast<A>(form.bins - 1), value) += at_last;
      }
      store(work + 2 * side + column * width, value);
    }
  }
  if (form.tails == Tails::kNone) grad = V(A(0));
  stdx::where(outside, by_input) = grad;
}

}  // namespace fastgen::rational_quadratic_spline
