// A vector of pixels under mixtures of discretised logistics, one pixel a lane: the arithmetic of `logistic_mixture`. What one
// pixel alone is drawn from stands in common/sampling.h, and what the formulas mean in fastgen/reference/_sampling.py.
#pragma once

#include "common/sampling.h"

namespace fastgen {

// exp(-|x|) and what it makes of the logistic function of x and of -x, without cancellation.
template <class A>
struct Logistic {
  Vec<A> small;  // exp(-|x|)

  FASTGEN_INLINE explicit Logistic(Vec<A> x) : small(exp(Vec<A>(-stdx::abs(x)))) {}
  FASTGEN_INLINE Vec<A> of_minus(Vec<A> x) const {
    Vec<A> top = small;
    stdx::where(x < A(0), top) = A(1);
    return top / (small + A(1));
  }
  FASTGEN_INLINE Vec<A> of(Vec<A> x) const {
    Vec<A> top(A(1));
    stdx::where(x < A(0), top) = small;
    return top / (small + A(1));
  }
};

// tanh(x) and its derivative, from expm1(-2 |x|).
template <class A>
struct Tanh {
  Vec<A> value, slope;

  FASTGEN_INLINE explicit Tanh(Vec<A> x) {
    const Vec<A> t = expm1(Vec<A>(A(-2) * stdx::abs(x))), below = A(1) / (t + A(2));
    value = -t * below;
    stdx::where(x < A(0), value) = -value;
    slope = A(4) * (t + A(1)) * below * below;
  }
};

// What all bins share.
template <class A>
struct Bins {
  A half, edge, log_width;

  explicit Bins(std::int64_t levels)
      : half(A(1) / static_cast<A>(levels - 1)), edge(A(1) - std::min(half, A(1e-3))), log_width(std::log(A(2) * half)) {}
};

// One bin of one logistic distribution: its log-probability and, where `kGrad`, the negative of its derivatives by mean and log
// scale. With the edges a and b scales from the mean and the width d: log sigmoid(a) + log sigmoid(-b) + log(1 - exp(-d)), the
// first alone in the lowest bin and the second alone in the highest; the three logarithms are taken as one.
template <class A, bool kGrad>
struct Bin {
  using V = Vec<A>;
  V log_prob, by_mean, by_log_scale;

  FASTGEN_INLINE Bin(const Bins<A>& bins, V value, V mean, V raw_log_scale) {
    V log_scale = raw_log_scale;
    stdx::where(log_scale < A(kLeastLogScale), log_scale) = A(kLeastLogScale);
    const V inverse = exp(V(-log_scale)), centred = value - mean, width = A(2) * bins.half * inverse;
    const V a = (centred + bins.half) * inverse, b = (centred - bins.half) * inverse;
    const auto lowest = value < -bins.edge, highest = value > bins.edge, narrow = width < A(1e-3);
    const Logistic<A> above(a), below(b);
    const V shrunk = expm1(V(-width));

    V linear_a = a, linear_b = -b, inside = -shrunk, under_a = above.small + A(1), under_b = below.small + A(1);
    stdx::where(a > A(0), linear_a) = A(0);
    stdx::where(b < A(0), linear_b) = A(0);
    V series = bins.log_width - log_scale + madd<A>(V(width * (A(1) / A(24))), width, width * A(-0.5));
    stdx::where(!narrow || lowest || highest, series) = A(0);
    stdx::where(narrow || lowest || highest, inside) = A(1);
    stdx::where(highest, linear_a) = A(0);
    stdx::where(highest, under_a) = A(1);
    stdx::where(lowest, linear_b) = A(0);
    stdx::where(lowest, under_b) = A(1);
    log_prob = (linear_a + linear_b) + (log(V(inside / (under_a * under_b))) + series);

    if constexpr (kGrad) {
      V from_a = above.of_minus(a), from_b = below.of(b);
      V from_width = width * (shrunk + A(1)) / -shrunk;
      stdx::where(narrow, from_width) = madd<A>(V(width * (A(1) / A(12))), width, A(1) - width * A(0.5));
      stdx::where(highest, from_a) = A(0);
      stdx::where(lowest, from_b) = A(0);
      stdx::where(lowest || highest, from_width) = A(0);
      by_mean = inverse * (from_a - from_b);
      by_log_scale = (a * from_a - b * from_b) + from_width;
      stdx::where(raw_log_scale < A(kLeastLogScale), by_log_scale) = A(0);
    }
  }
};

// One vector of pixels: `rows` holds parameter c of it at c * tile, `values` its colors.
template <class A>
class MixtureOfPixels {
 public:
  using V = Vec<A>;

  MixtureOfPixels(const MixtureLayout& at, std::int64_t levels, std::int64_t tile) : at_(at), bins_(levels), tile_(tile) {
    joint_.resize(at.mixtures * kWidth<A>);
  }

  // The negative log-likelihoods. Where `gradient` is given it gets their derivatives by all parameters, times `factor`.
  template <bool kGrad>
  FASTGEN_INLINE V loss(const A* rows, const A* values, A factor, A* gradient) {
    V x[3], top_prior(-std::numeric_limits<A>::infinity()), top_joint = top_prior;
    for (std::int64_t c = 0; c < at_.channels; ++c) x[c] = load(values + c * tile_);
    for (std::int64_t m = 0; m < at_.mixtures; ++m) {
      const V logit = load(rows + at_.logit(m) * tile_);
      const V joint = logit + colors<kGrad>(m, rows, x, gradient);
      store(joint_.data() + m * kWidth<A>, joint);
      stdx::where(logit > top_prior, top_prior) = logit;
      stdx::where(joint > top_joint, top_joint) = joint;
    }
    const auto hopeless = top_joint == -std::numeric_limits<A>::infinity();  // or NaN under every mixture, which the sum shows
    stdx::where(hopeless, top_joint) = A(0);
    V prior(A(0)), posterior(A(0));
    for (std::int64_t m = 0; m < at_.mixtures; ++m) {
      prior += exp(V(load(rows + at_.logit(m) * tile_) - top_prior));
      posterior += exp(V(load(joint_.data() + m * kWidth<A>) - top_joint));
    }
    if constexpr (kGrad) {
      const V prior_factor = factor / prior, posterior_factor = factor / posterior;
      for (std::int64_t m = 0; m < at_.mixtures; ++m) {
        const V weight = posterior_factor * exp(V(load(joint_.data() + m * kWidth<A>) - top_joint));
        const V share = prior_factor * exp(V(load(rows + at_.logit(m) * tile_) - top_prior));
        store(gradient + at_.logit(m) * tile_, V(share - weight));
        for (std::int64_t row = at_.mean(0, m); row < at_.parameters(); row += at_.mixtures)
          store(gradient + row * tile_, V(weight * load(gradient + row * tile_)));
      }
    }
    V loss = (top_prior - top_joint) + (log(prior) - log(posterior));
    stdx::where(hopeless && posterior == posterior, loss) = std::numeric_limits<A>::infinity();
    return loss;
  }

 private:
  // The log-probability of all colors under mixture m; its derivatives, negative, in its rows of `gradient`.
  template <bool kGrad>
  FASTGEN_INLINE V colors(std::int64_t m, const A* rows, const V* x, A* gradient) const {
    V log_prob(A(0));
    for (std::int64_t c = 0; c < at_.channels; ++c) {
      V mean = load(rows + at_.mean(c, m) * tile_), slopes[2];
      const std::int64_t first = c == 2 ? 1 : 0;  // the coefficient of color 0 in color 1; those of 0 and 1 in color 2
      for (std::int64_t k = 0; k < c; ++k) {
        const Tanh<A> coefficient(load(rows + at_.coefficient(first + k, m) * tile_));
        mean = madd<A>(coefficient.value, x[k], mean);
        slopes[k] = coefficient.slope;
      }
      const Bin<A, kGrad> bin(bins_, x[c], mean, load(rows + at_.log_scale(c, m) * tile_));
      log_prob += bin.log_prob;
      if constexpr (kGrad) {
        store(gradient + at_.mean(c, m) * tile_, bin.by_mean);
        store(gradient + at_.log_scale(c, m) * tile_, bin.by_log_scale);
        for (std::int64_t k = 0; k < c; ++k)
          store(gradient + at_.coefficient(first + k, m) * tile_, V(bin.by_mean * x[k] * slopes[k]));
      }
    }
    return log_prob;
  }

  const MixtureLayout at_;
  const Bins<A> bins_;
  const std::int64_t tile_;
  std::vector<A> joint_;  // logit + log-probability of each mixture
};

}  // namespace fastgen
