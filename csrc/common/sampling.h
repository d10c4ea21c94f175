// What draws pixels: uniforms of one seed a sample, categorical levels and mixtures of discretised logistics at one position.
//
// The same stands in fastgen/reference/_sampling.py (what it means) and kernels/_sampling.py (Triton). A level is drawn by the
// inverse of its cumulative distribution, summed in fp64 in the order of the levels, so that kernels differ only where a uniform
// falls within rounding of a step.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/philox_scalar.h"
#include "common/simd.h"

namespace fastgen {

// Uniform `element` of the stream (seed, step): word e % 4 of the Philox block e / 4, whose fourth counter word is 1 where that
// of the normals is 0; u = (r / 2^9 + 1/2) / 2^23, which a float holds exactly and which is never 0 or 1.
inline float uniform(std::uint64_t seed, std::uint32_t step, std::uint64_t element) {
  const std::uint64_t block = element / 4;
  const auto words = scalar::philox_4x32({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), step, 1u}},
                                         static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  return (static_cast<float>(words.w[element % 4] >> 9) + 0.5f) * 0x1p-23f;
}

inline constexpr std::int64_t kLevelBlock = 64;  // levels whose probabilities are summed at once

// The memory that one draw needs, kept by its thread.
template <class A>
struct LevelScratch {
  std::vector<A> levels, weights;
  std::vector<double> sums;  // of each block of levels
  std::vector<std::int64_t> order;

  static LevelScratch& of_thread(std::int64_t count) {
    thread_local LevelScratch scratch;
    if (static_cast<std::int64_t>(scratch.levels.size()) < count) {
      scratch.levels.resize(count), scratch.weights.resize(count), scratch.order.resize(count);
      scratch.sums.resize((count + kLevelBlock - 1) / kLevelBlock);
    }
    return scratch;
  }
};

// The levels in order, in place where they are.
template <class A>
inline const A* levels_in_order(const A* logits, std::int64_t stride, std::int64_t count, A* buffer) {
  if (stride == 1) return logits;
  for (std::int64_t k = 0; k < count; ++k) buffer[k] = logits[k * stride];
  return buffer;
}

// The largest of the levels; NaN where one is NaN (of a NaN stdx::max is not to be asked).
template <class A>
inline A largest_level(const A* levels, std::int64_t count) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  Vec<A> largest(lowest);
  typename Vec<A>::mask_type spoiled(false);
  std::int64_t k = 0;
  for (; k + kWidth<A> <= count; k += kWidth<A>) {
    const Vec<A> v = load(levels + k);
    spoiled = spoiled || v != v;
    stdx::where(v > largest, largest) = v;
  }
  bool nan = stdx::any_of(spoiled);
  A found = lowest;
  for (int i = 0; i < kWidth<A>; ++i) found = largest[i] > found ? largest[i] : found;
  for (; k < count; ++k) nan |= levels[k] != levels[k], found = levels[k] > found ? levels[k] : found;
  return nan ? std::numeric_limits<A>::quiet_NaN() : found;
}

// exp((l - largest) / temperature) of every level: plainly 0 below exp(-87), so that a level of -inf is never drawn.
template <class A>
inline void level_weights(const A* levels, std::int64_t count, A largest, A temperature, A* weights) {
  for_vectors<A>(count, [&](std::int64_t i, auto at) {
    const Vec<A> x = (at.load(levels + i) - largest) / temperature;
    Vec<A> e = exp(x);
    if constexpr (std::is_same_v<A, float>) stdx::where(x < -87.0f, e) = 0.0f;
    at.store(weights + i, e);
  });
}

// The sum of the weights in fp64 and, where wanted, of each block of them, in four chains whatever the vectors of this machine are.
template <class A>
inline double sum_of_weights(const A* weights, std::int64_t count, double* sums = nullptr) {
  double total = 0;
  for (std::int64_t first = 0; first < count; first += kLevelBlock) {
    const std::int64_t end = std::min(first + kLevelBlock, count);
    double chains[4] = {};
    std::int64_t k = first;
    for (; k + 4 <= end; k += 4)
      for (int c = 0; c < 4; ++c) chains[c] += static_cast<double>(weights[k + c]);
    for (; k < end; ++k) chains[0] += static_cast<double>(weights[k]);
    const double sum = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    if (sums) sums[first / kLevelBlock] = sum;
    total += sum;
  }
  return total;
}

// Sets the weights of all but the `top_k` largest levels to zero, and then of all but the fewest of those that are left that hold
// `top_p` of their sum. Of equal levels the first counts as the larger.
template <class A>
inline void cut_levels(const A* levels, std::int64_t count, std::int64_t top_k, A top_p, A* weights, std::int64_t* order) {
  for (std::int64_t k = 0; k < count; ++k) order[k] = k;
  const auto larger = [levels](std::int64_t i, std::int64_t j) { return levels[i] > levels[j] || (levels[i] == levels[j] && i < j); };
  const std::int64_t kept = top_k > 0 ? std::min(top_k, count) : count;
  if (kept < count) {
    std::nth_element(order, order + kept, order + count, larger);
    for (std::int64_t k = kept; k < count; ++k) weights[order[k]] = A(0);
  }
  if (!(top_p < A(1))) return;
  std::sort(order, order + kept, larger);
  double total = 0, sum = 0;
  for (std::int64_t k = 0; k < kept; ++k) total += static_cast<double>(weights[order[k]]);
  std::int64_t k = 0;
  do sum += static_cast<double>(weights[order[k++]]);
  while (k < kept && sum < static_cast<double>(top_p) * total);
  for (; k < kept; ++k) weights[order[k]] = A(0);
}

// The first level whose cumulative weight exceeds u * total; where rounding leaves none, the last that has any.
template <class A>
inline std::int64_t invert_weights(const A* weights, std::int64_t count, const double* sums, double total, float u) {
  const double wanted = static_cast<double>(u) * total;
  double sum = 0;
  std::int64_t k = 0;
  for (; k + kLevelBlock < count && !(sum + sums[k / kLevelBlock] > wanted); k += kLevelBlock) sum += sums[k / kLevelBlock];
  for (; k < count; ++k)
    if ((sum += static_cast<double>(weights[k])) > wanted) return k;
  for (k = count - 1; k > 0 && !(weights[k] > A(0)); --k) {
  }
  return k;
}

// The logarithm of the probability of `level` in [0, count): NaN where the largest level is not finite.
template <class A>
inline A log_prob_categorical(const A* logits, std::int64_t stride, std::int64_t count, std::int64_t level) {
  auto& scratch = LevelScratch<A>::of_thread(count);
  const A* levels = levels_in_order(logits, stride, count, scratch.levels.data());
  const A largest = largest_level(levels, count);
  if (!std::isfinite(largest) || level < 0 || level >= count) return std::numeric_limits<A>::quiet_NaN();
  level_weights(levels, count, largest, A(1), scratch.weights.data());
  return static_cast<A>(static_cast<double>(levels[level] - largest) - std::log(sum_of_weights(scratch.weights.data(), count)));
}

// A level of `count` >= 1 by the uniform u, or -1 where the largest is not finite: a NaN, an infinity, or nothing to draw.
//
// The probabilities are softmax(logits / temperature) over the `top_k` largest levels (0: all), of which those most probable are
// kept that hold `top_p` of the sum (1: all). Of equal levels the first counts as the larger; at temperature 0 the largest is
// drawn. `log_prob`, where not null, gets the logarithm of its probability under the logits as they are.
template <class A>
inline std::int64_t draw_categorical(const A* logits, std::int64_t stride, std::int64_t count, A temperature, std::int64_t top_k,
                                     A top_p, float u, A* log_prob) {
  auto& scratch = LevelScratch<A>::of_thread(count);
  const A* levels = levels_in_order(logits, stride, count, scratch.levels.data());
  A* weights = scratch.weights.data();
  const A largest = largest_level(levels, count);
  if (log_prob) *log_prob = std::numeric_limits<A>::quiet_NaN();
  if (!std::isfinite(largest)) return -1;
  std::int64_t drawn = 0;
  double plain_total = 0;  // of the weights at temperature 1, nothing cut
  if (temperature > A(0)) {
    level_weights(levels, count, largest, temperature, weights);
    double total = sum_of_weights(weights, count, scratch.sums.data());
    if (temperature == A(1)) plain_total = total;
    if (top_k > 0 || top_p < A(1)) {
      cut_levels(levels, count, top_k, top_p, weights, scratch.order.data());
      total = sum_of_weights(weights, count, scratch.sums.data());
    }
    drawn = invert_weights(weights, count, scratch.sums.data(), total, u);
  } else {
    drawn = std::find(levels, levels + count, largest) - levels;
  }
  if (!log_prob) return drawn;
  if (plain_total == 0) {
    level_weights(levels, count, largest, A(1), weights);
    plain_total = sum_of_weights(weights, count);
  }
  *log_prob = static_cast<A>(static_cast<double>(levels[drawn] - largest) - std::log(plain_total));
  return drawn;
}

// Where the parameters of a mixture of logistics stand, as pixel-cnn-pp lays them out: `mixtures` logits, then for each color the
// means, the logarithms of the scales and, for three colors, what tanh makes the coefficients of: of the first color in the second,
// of the first and of the second in the third.
struct MixtureLayout {
  std::int64_t mixtures, channels;

  std::int64_t kinds() const { return channels == 1 ? 2 : 3; }
  std::int64_t parameters() const { return mixtures * (1 + channels * kinds()); }
  std::int64_t logit(std::int64_t m) const { return m; }
  std::int64_t mean(std::int64_t c, std::int64_t m) const { return (1 + c * kinds()) * mixtures + m; }
  std::int64_t log_scale(std::int64_t c, std::int64_t m) const { return (2 + c * kinds()) * mixtures + m; }
  std::int64_t coefficient(std::int64_t c, std::int64_t m) const { return (3 + c * kinds()) * mixtures + m; }
};

inline constexpr double kLeastLogScale = -7;

// The mean of color c of mixture m, given the colors before it.
template <class A>
inline A coupled_mean(const A* parameters, std::int64_t stride, const MixtureLayout& at, std::int64_t c, std::int64_t m,
                      const A* values) {
  const auto coefficient = [&](std::int64_t k) { return std::tanh(parameters[at.coefficient(k, m) * stride]); };
  A mean = parameters[at.mean(c, m) * stride];
  if (c == 1) mean += coefficient(0) * values[0];
  if (c == 2) mean += coefficient(1) * values[0] + coefficient(2) * values[1];
  return mean;
}

// The nearest of the `levels` values 2 k / (levels - 1) - 1, rounded once.
template <class A>
inline A nearest_level(A x, std::int64_t levels) {
  const A steps = static_cast<A>(levels - 1), k = std::nearbyint((x + A(1)) * A(0.5) * steps);
  return (A(2) * k - steps) / steps;
}

// One pixel of `channels` (1 or 3) colors in [-1, 1] from a mixture of logistics: the mixture by u[0], each color by the next
// uniform, its mean moved by the colors already drawn, rounded to one of `levels` values (0: not rounded). The temperature
// divides the logits of the mixtures and multiplies the scales. False, and nothing drawn, where a parameter is not finite.
template <class A>
inline bool draw_logistic_mixture(const A* parameters, std::int64_t stride, std::int64_t mixtures, std::int64_t channels,
                                  std::int64_t levels, A temperature, const float* u, A* values) {
  const MixtureLayout at{mixtures, channels};
  for (std::int64_t i = 0; i < at.parameters(); ++i)
    if (!std::isfinite(parameters[i * stride])) return false;
  const std::int64_t m = draw_categorical<A>(parameters, stride, mixtures, temperature, 0, A(1), u[0], nullptr);
  for (std::int64_t c = 0; c < channels; ++c) {
    A x = coupled_mean(parameters, stride, at, c, m, values);
    if (temperature > A(0)) {
      const A log_scale = std::max(parameters[at.log_scale(c, m) * stride], static_cast<A>(kLeastLogScale));
      const A uniform = static_cast<A>(u[1 + c]);
      x += temperature * std::exp(log_scale) * (std::log(uniform) - std::log1p(-uniform));
    }
    x = std::min(std::max(x, A(-1)), A(1));
    values[c] = levels > 0 ? nearest_level(x, levels) : x;
  }
  return true;
}

// The logarithm of the probability that a logistic distribution gives the bin of `value`, half a step to either side and open at
// the ends: with its edges at a and b scales from the mean, sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)),
// whose logarithms are all negative, so nothing cancels.
template <class A>
inline A log_bin(A value, A mean, A log_scale, std::int64_t levels) {
  const A half = A(1) / static_cast<A>(levels - 1), edge = A(1) - std::min(half, A(1e-3));
  const A inverse = std::exp(-log_scale), a = (value - mean + half) * inverse, b = (value - mean - half) * inverse;
  const auto log_sigmoid = [](A x) { return std::min(x, A(0)) - std::log1p(std::exp(-std::abs(x))); };
  if (value < -edge) return log_sigmoid(a);
  if (value > edge) return log_sigmoid(-b);
  const A width = A(2) * half * inverse;
  const A inside = width < A(1e-3)  // a series: the width itself may be denormal
                       ? std::log(A(2) * half) - log_scale - width * A(0.5) + width * width * (A(1) / A(24))
                       : std::log(-std::expm1(-width));
  return log_sigmoid(a) + log_sigmoid(-b) + inside;
}

// The logarithm of the probability of the `channels` values of one pixel, each one of `levels` >= 2; NaN where a parameter is not
// finite.
template <class A>
inline A log_prob_logistic_mixture(const A* parameters, std::int64_t stride, std::int64_t mixtures, std::int64_t channels,
                                   std::int64_t levels, const A* values) {
  const MixtureLayout at{mixtures, channels};
  for (std::int64_t i = 0; i < at.parameters(); ++i)
    if (!std::isfinite(parameters[i * stride])) return std::numeric_limits<A>::quiet_NaN();
  // Two logarithms of sums of exponentials, of the logits and of logits + log-probabilities, each from its largest term so far.
  struct Sum {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    void add(double x) {
      if (x > largest) sum *= std::exp(largest - x), largest = x;
      sum += std::exp(x - largest);
    }
    double logarithm() const { return largest + std::log(sum); }
  } prior, joint;
  for (std::int64_t m = 0; m < mixtures; ++m) {
    const double logit = static_cast<double>(parameters[at.logit(m) * stride]);
    double term = logit;
    for (std::int64_t c = 0; c < channels; ++c) {
      const A log_scale = std::max(parameters[at.log_scale(c, m) * stride], static_cast<A>(kLeastLogScale));
      term += static_cast<double>(log_bin(values[c], coupled_mean(parameters, stride, at, c, m, values), log_scale, levels));
    }
    prior.add(logit), joint.add(term);
  }
  return static_cast<A>(joint.logarithm() - prior.logarithm());
}

}  // namespace fastgen
