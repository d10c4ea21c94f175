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

// Of `count` elements in two passes, the mean and then the squared deviations from it, in an order that depends on `count` alone.
template <class T>
inline Moments chunk_moments(const T* x, std::int64_t count) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  constexpr std::int64_t w = kWidth<A>;
  V sum[4] = {V(0), V(0), V(0), V(0)};
  std::int64_t i = 0;
  for (; i + 4 * w <= count; i += 4 * w)
    for (int j = 0; j < 4; ++j) sum[j] += load(x + i + j * w);
  for (; i + w <= count; i += w) sum[0] += load(x + i);
  if (i < count) sum[1] += load_part(x + i, static_cast<int>(count - i));
  const A mean = sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<A>(count);

  V rest[4] = {V(0), V(0), V(0), V(0)}, square[4] = {V(0), V(0), V(0), V(0)};
  const auto take = [&](int j, V value) {
    rest[j] += value;
    square[j] = madd<A>(value, value, square[j]);
  };
  for (i = 0; i + 4 * w <= count; i += 4 * w)
    for (int j = 0; j < 4; ++j) take(j, load(x + i + j * w) - mean);
  for (; i + w <= count; i += w) take(0, load(x + i) - mean);
  if (i < count) take(1, keep_part<A>(load_part(x + i, static_cast<int>(count - i)) - mean, static_cast<int>(count - i)));
  // What the rounded mean missed: sum (x - m)^2 = sum (x - mean)^2 + count (mean - m)^2.
  const double missed = sum_lanes<A>((rest[0] + rest[1]) + (rest[2] + rest[3])) / static_cast<double>(count);
  const double squares = sum_lanes<A>((square[0] + square[1]) + (square[2] + square[3]));
  const double m2 = squares - missed * missed * static_cast<double>(count);
  return {static_cast<double>(count), mean + missed, m2 < 0 ? 0 : m2};  // NaN stays
}

}  // namespace fastgen
