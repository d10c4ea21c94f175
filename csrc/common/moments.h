// Count, mean and squared deviations of elements that lie in order: of as many as fit the first-level cache, and merged.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace fastgen {

// Of some elements; merged as in Chan, Golub and LeVeque 1979.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
  double rstd(double eps) const { return 1.0 / std::sqrt(m2 / count + eps); }
};

// Of `count` elements, given a number that is not far from their mean, in an order that depends on `count` alone.
template <class T>
inline Moments moments_about(const T* x, std::int64_t count, opmath_t<T> centre) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  constexpr std::int64_t w = kWidth<A>;
  V rest[4] = {V(0), V(0), V(0), V(0)}, square[4] = {V(0), V(0), V(0), V(0)};
  const auto take = [&](int j, V value) {
    rest[j] += value;
    square[j] = madd<A>(value, value, square[j]);
  };
  std::int64_t i = 0;
  for (; i + 4 * w <= count; i += 4 * w)
    for (int j = 0; j < 4; ++j) take(j, load(x + i + j * w) - centre);
  for (; i + w <= count; i += w) take(0, load(x + i) - centre);
  if (i < count) take(1, keep_part<A>(load_part(x + i, static_cast<int>(count - i)) - centre, static_cast<int>(count - i)));
  // What the centre missed: sum (x - m)^2 = sum (x - centre)^2 + count (centre - m)^2.
  const double missed = sum_lanes<A>((rest[0] + rest[1]) + (rest[2] + rest[3])) / static_cast<double>(count);
  const double squares = sum_lanes<A>((square[0] + square[1]) + (square[2] + square[3]));
  const double m2 = squares - missed * missed * static_cast<double>(count);
  return {static_cast<double>(count), centre + missed, m2 < 0 ? 0 : m2};  // NaN stays
}

// In two passes, the mean and then the squared deviations from it.
template <class T>
inline Moments chunk_moments(const T* x, std::int64_t count) {
  using A = opmath_t<T>;
  const A sum = sum_vectors<A>(count, [&](std::int64_t i, auto at) { return at.load(x + i); });
  return moments_about(x, count, sum / static_cast<A>(count));
}

// In one pass where the mean of the first few elements is a deviation or less from that of all, which costs no digit; else in two.
template <class T>
inline Moments quick_moments(const T* x, std::int64_t count) {
  using A = opmath_t<T>;
  constexpr std::int64_t few = 4 * kWidth<A>;
  if (count <= few) return chunk_moments(x, count);
  const A sum = sum_vectors<A>(few, [&](std::int64_t i, auto at) { return at.load(x + i); });
  const A centre = sum / static_cast<A>(few);
  const Moments moments = moments_about(x, count, centre);
  const double missed = moments.mean - centre;
  return missed * missed * static_cast<double>(count) <= moments.m2 ? moments : chunk_moments(x, count);
}

// By some values of an image of `rows` channels of `pixels` each, one in each of a few channels, it is seen whether it is the one whose
// moments are known. Calls f(row, place). `fastgen/reference/_moments.py` says the same.
template <class F>
inline void for_watched(std::int64_t rows, std::int64_t pixels, const F& f) {
  constexpr std::int64_t most = 16, step = 40503;
  const std::int64_t apart = (rows + most - 1) / most;
  for (std::int64_t row = 0; row < rows; row += apart) f(row, row * step % pixels);
}

}  // namespace fastgen
