// diffusion_loss: the training losses of a diffusion model, without a tensor for the target.
//
// A tile of kTile elements of one sample is owned by one thread and stays in the first-level cache. The forward reads each
// operand that the target names once and leaves one sum a tile; the sums of a sample are added in order, so threads change no
// bit. The backward reads the same and writes the gradient once. Everything follows from the residual r = model - target:
// the x0 that a model's output stands for is off by a multiple of r that depends on the timestep alone, and so is the mean.
//
// With a table of the variational bound the model's output has twice the channels and its second half v interpolates the log
// variance: where channels lie innermost a tile holds the halves apart, gathered pixel by pixel.
#include "common/operand.h"
#include "common/timesteps.h"

namespace fastgen {
namespace {

constexpr std::int64_t kTile = 1024;   // up to seven operands and results of 4 KB in flight: within 48 KB
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kRootTwoOverPi = 0.79788456080286535588, kCubic = 0.044715;  // of the tanh that stands for the normal cdf
constexpr double kLeastProbability = 1e-12;
enum VlbColumn { kMean, kInverseDeviation, kLogVarianceRange, kNumVlbColumns };  // VLB_COLUMNS in fastgen/_schema.py

// What a timestep says of a sample.
struct Sample {
  TargetParts target;
  double weight = 1;             // of the squared error
  double mean = 0;               // the mean is off by mean * r
  double inverse_deviation = 0;  // of the true posterior: the model's where v = -1
  double half_range = 0;         // v in [-1, 1] raises the log variance by half_range * (v + 1)
  bool decodes = false;          // t = 0: the likelihood of the image under the discretised Gaussian, in place of the divergence
};

struct Loss {
  Operand model, x0, noise;
  std::vector<Sample> samples;
  std::int64_t size = 0, channels = 1;  // elements of a sample of x0; channels where the halves lie side by side in each pixel
  bool bound = false, interleaved = false;
  bool uniform = true;  // one dtype: vectors are loaded as they are stored
  double bound_weight = 0;  // lambda / ln 2

  std::int64_t tile_size() const { return interleaved ? std::max<std::int64_t>(kTile / channels, 1) * channels : kTile; }
};

// The operands of one tile, as they are stored or in opmath; null where they are not needed.
template <class S>
struct Tile {
  const S *model = nullptr, *v = nullptr, *x0 = nullptr, *noise = nullptr;
};
enum Slot { kModelSlot, kVSlot, kX0Slot, kNoiseSlot, kResidualSlot, kGradSlot, kGradVSlot, kWideSlot, kNumSlots = kWideSlot + 2 };

// Elements [offset, offset + count) of sample n in opmath.
template <class A>
Tile<A> load_tile(const Loss& loss, std::int64_t n, std::int64_t offset, std::int64_t count, Scratch<A>& scratch) {
  const std::int64_t at = n * loss.size + offset, at_model = (loss.bound ? 2 : 1) * n * loss.size + offset;
  Tile<A> tile;
  if (loss.x0.data) tile.x0 = loss.x0.tile<A>(at, count, scratch[kX0Slot]);
  if (loss.noise.data) tile.noise = loss.noise.tile<A>(at, count, scratch[kNoiseSlot]);
  if (!loss.interleaved) {
    tile.model = loss.model.tile<A>(at_model, count, scratch[kModelSlot]);
    if (loss.bound) tile.v = loss.model.tile<A>(at_model + loss.size, count, scratch[kVSlot]);
  } else {
    const A* wide = loss.model.tile<A>(2 * at, 2 * count, scratch[kWideSlot]);
    A *model = scratch[kModelSlot], *v = scratch[kVSlot];
    for (std::int64_t i = 0; i < count; i += loss.channels, wide += 2 * loss.channels)
      for (std::int64_t c = 0; c < loss.channels; ++c) model[i + c] = wide[c], v[i + c] = wide[loss.channels + c];
    tile.model = model, tile.v = v;
  }
  return tile;
}

// Calls f(tile) for the squared error alone: operands of one dtype are used where they are.
template <class T, class F>
FASTGEN_INLINE void with_tile(const Loss& loss, std::int64_t n, std::int64_t offset, std::int64_t count,
                              Scratch<opmath_t<T>>& scratch, const F& f) {
  if (!loss.uniform) return f(load_tile<opmath_t<T>>(loss, n, offset, count, scratch));
  const std::int64_t at = n * loss.size + offset;
  const auto pointer = [at](const Operand& operand) { return operand.data ? static_cast<const T*>(operand.data) + at : nullptr; };
  f(Tile<T>{pointer(loss.model), nullptr, pointer(loss.x0), pointer(loss.noise)});
}

// Calls f(residual), residual(i, at) the vector r = model - target at element i.
template <class S, class F>
FASTGEN_INLINE void with_residual(const Tile<S>& tile, const Sample& sample, const F& f) {
  using A = opmath_t<S>;
  const TargetParts& target = sample.target;
  const S *model = tile.model, *x0 = tile.x0, *noise = tile.noise;
  if (!target.takes_x0) return f([=](std::int64_t i, auto at) { return at.load(model + i) - at.load(noise + i); });
  if (!target.takes_noise) return f([=](std::int64_t i, auto at) { return at.load(model + i) - at.load(x0 + i); });
  const Vec<A> x0_part(static_cast<A>(target.x0_part)), noise_part(static_cast<A>(target.noise_part));
  f([=](std::int64_t i, auto at) { return at.load(model + i) - madd<A>(noise_part, at.load(noise + i), x0_part * at.load(x0 + i)); });
}

// The divergence of the model's Gaussian from the posterior, in nats, and its derivative by v, with u the log of the ratio of
// the variances: (u - 1 + exp(-u) (1 + d)) / 2, d the squared difference of the means over the posterior's variance.
template <class A>
struct Divergence {
  Vec<A> mean_square, half_range;
  explicit Divergence(const Sample& s)
      : mean_square(static_cast<A>(s.mean * s.mean * s.inverse_deviation * s.inverse_deviation)), half_range(static_cast<A>(s.half_range)) {}

  FASTGEN_INLINE Vec<A> value(Vec<A> r, Vec<A> v) const {
    const Vec<A> u = madd<A>(half_range, v, half_range), e = expm1(Vec<A>(-u)), d = mean_square * r * r;
    return A(0.5) * madd<A>(e + A(1), d, u + e);
  }
  FASTGEN_INLINE Vec<A> by_v(Vec<A> r, Vec<A> v) const {
    const Vec<A> u = madd<A>(half_range, v, half_range), e = expm1(Vec<A>(-u)), d = mean_square * r * r;
    return A(-0.5) * half_range * madd<A>(e + A(1), d, e);
  }
};

// The negative log-likelihood of x0 in a bin of width 2 / 255 under the model's Gaussian, in nats, and its derivative by v.
// The cdf (1 + tanh y) / 2 is the logistic function of 2 y.
template <class A>
struct Likelihood {
  using V = Vec<A>;
  V mean, inverse_deviation, half_range;
  explicit Likelihood(const Sample& s)
      : mean(static_cast<A>(s.mean)), inverse_deviation(static_cast<A>(s.inverse_deviation)), half_range(static_cast<A>(s.half_range)) {}

  struct Edge {  // of the bin: the logistic function of its place x, and of -x, and the derivative of x by v
    V x, below, above, slope;
  };
  FASTGEN_INLINE Edge edge(V inverse, V at) const {
    constexpr A limit = std::is_same_v<A, float> ? A(80) : A(700);  // the exponential of it and one over that are normal
    const V p = inverse * at, scaled = V(A(2 * kRootTwoOverPi)) * p, square = p * p;
    V x = madd<A>(scaled * A(kCubic), square, scaled);
    stdx::where(x < -limit, x) = -limit;
    stdx::where(x > limit, x) = limit;
    const Sigmoid<A> logistic = sigmoid(x);
    return {x, logistic.s, logistic.e * logistic.s, A(-0.5) * half_range * scaled * madd<A>(V(A(3 * kCubic)), square, V(A(1)))};
  }
  struct Bin {
    V probability, slope;  // of the logarithm of it, by v
  };
  FASTGEN_INLINE Bin bin(V x0, V r, V v) const {
    const V inverse = inverse_deviation * exp(V(A(-0.5) * madd<A>(half_range, v, half_range))), centred = -mean * r;
    const Edge upper = edge(inverse, centred + A(1 / 255.0)), lower = edge(inverse, centred - A(1 / 255.0));
    V probability = -(upper.below * lower.above) * expm1(V(lower.x - upper.x));  // the difference of the cdfs, not cancelled
    V slope = (upper.below * upper.above * upper.slope - lower.below * lower.above * lower.slope) / probability;
    const auto dark = x0 < A(-0.999), light = x0 > A(0.999);
    stdx::where(dark, probability) = upper.below;
    stdx::where(dark, slope) = upper.above * upper.slope;
    stdx::where(light, probability) = lower.above;
    stdx::where(light, slope) = -lower.below * lower.slope;
    const auto cut = probability < A(kLeastProbability);
    stdx::where(cut, probability) = A(kLeastProbability);
    stdx::where(cut, slope) = A(0);
    return {probability, slope};
  }
  FASTGEN_INLINE V value(V x0, V r, V v) const { return -log(bin(x0, r, v).probability); }
  FASTGEN_INLINE V by_v(V x0, V r, V v) const { return -bin(x0, r, v).slope; }
};

// The residual of a tile, computed once: what the bound does with it is one loop, whatever the target.
template <class A>
const A* store_residual(const Tile<A>& tile, const Sample& sample, std::int64_t count, A* out) {
  with_residual(tile, sample, [&](const auto& residual) {
    for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(out + i, residual(i, at)); });
  });
  return out;
}

// The sum over one tile of weight * r^2 + lambda / ln 2 * bound.
template <class T>
double simple_sum(const Loss& loss, std::int64_t n, std::int64_t offset, std::int64_t count, Scratch<opmath_t<T>>& scratch) {
  using A = opmath_t<T>;
  double squares = 0;
  with_tile<T>(loss, n, offset, count, scratch, [&](const auto& tile) {
    with_residual(tile, loss.samples[n], [&](const auto& residual) {
      squares = static_cast<double>(sum_vectors<A>(count, [&](std::int64_t i, auto at) {
        const Vec<A> r = residual(i, at);
        return Vec<A>(r * r);
      }));
    });
  });
  return loss.samples[n].weight * squares;
}

template <class A>
double hybrid_sum(const Loss& loss, std::int64_t n, std::int64_t offset, std::int64_t count, Scratch<A>& scratch) {
  const Sample& sample = loss.samples[n];
  const Tile<A> tile = load_tile<A>(loss, n, offset, count, scratch);
  const A* residual = store_residual<A>(tile, sample, count, scratch[kResidualSlot]);
  const Vec<A> weight(static_cast<A>(sample.weight)), bound_weight(static_cast<A>(loss.bound_weight));
  const auto sum_with = [&](const auto& bound) {
    return static_cast<double>(sum_vectors<A>(count, [&](std::int64_t i, auto at) {
      const Vec<A> r = at.load(residual + i);
      return madd<A>(weight, r * r, bound_weight * bound(i, at, r, at.load(tile.v + i)));
    }));
  };
  if (sample.decodes) {
    const Likelihood<A> likelihood(sample);
    return sum_with([&](std::int64_t i, auto at, Vec<A> r, Vec<A> v) { return likelihood.value(at.load(tile.x0 + i), r, v); });
  }
  const Divergence<A> divergence(sample);
  return sum_with([&](std::int64_t, auto, Vec<A> r, Vec<A> v) { return divergence.value(r, v); });
}

// The gradient of one tile; `grad` is that of the sample's loss over the number of elements.
template <class T>
void simple_gradient(const Loss& loss, std::int64_t n, std::int64_t offset, std::int64_t count, double grad, T* out,
                     Scratch<opmath_t<T>>& scratch) {
  using A = opmath_t<T>;
  T* const gradient = out + n * loss.size + offset;
  const Vec<A> factor(static_cast<A>(2 * loss.samples[n].weight * grad));
  with_tile<T>(loss, n, offset, count, scratch, [&](const auto& tile) {
    with_residual(tile, loss.samples[n], [&](const auto& residual) {
      for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(gradient + i, Vec<A>(factor * residual(i, at))); });
    });
  });
}

template <class T>
void hybrid_gradient(const Loss& loss, std::int64_t n, std::int64_t offset, std::int64_t count, double grad, T* out,
                     Scratch<opmath_t<T>>& scratch) {
  using A = opmath_t<T>;
  const Sample& sample = loss.samples[n];
  const Tile<A> tile = load_tile<A>(loss, n, offset, count, scratch);
  const A* residual = store_residual<A>(tile, sample, count, scratch[kResidualSlot]);
  const Vec<A> factor(static_cast<A>(2 * sample.weight * grad)), bound_factor(static_cast<A>(loss.bound_weight * grad));
  const auto write = [&](auto* gradient, auto* gradient_v) {
    const auto write_with = [&](const auto& by_v) {
      for_vectors<A>(count, [&](std::int64_t i, auto at) {
        const Vec<A> r = at.load(residual + i);
        at.store(gradient_v + i, Vec<A>(bound_factor * by_v(i, at, r, at.load(tile.v + i))));
        at.store(gradient + i, Vec<A>(factor * r));
      });
    };
    if (sample.decodes) {
      const Likelihood<A> likelihood(sample);
      write_with([&](std::int64_t i, auto at, Vec<A> r, Vec<A> v) { return likelihood.by_v(at.load(tile.x0 + i), r, v); });
    } else {
      const Divergence<A> divergence(sample);
      write_with([&](std::int64_t, auto, Vec<A> r, Vec<A> v) { return divergence.by_v(r, v); });
    }
  };
  if (!loss.interleaved) {
    T* const at_model = out + 2 * n * loss.size + offset;
    return write(at_model, at_model + loss.size);
  }
  A *gradient = scratch[kGradSlot], *gradient_v = scratch[kGradVSlot], *wide = scratch[kWideSlot];
  write(gradient, gradient_v);
  const std::int64_t channels = loss.channels;
  for (std::int64_t i = 0; i < count; i += channels)
    for (std::int64_t c = 0; c < channels; ++c) wide[2 * i + c] = gradient[i + c], wide[2 * i + channels + c] = gradient_v[i + c];
  T* const at_pixels = out + 2 * (n * loss.size + offset);
  for_vectors<A>(2 * count, [&](std::int64_t i, auto at) { at.store(at_pixels + i, at.load(wide + i)); });
}

// Calls f(n, tile index, offset, count, scratch) for every tile of every sample.
template <class A, class F>
void for_tiles(const Loss& loss, const F& f) {
  const auto samples = static_cast<std::int64_t>(loss.samples.size());
  const std::int64_t tile = loss.tile_size(), tiles = (loss.size + tile - 1) / tile;
  parallel(samples * tiles, samples * loss.size * (loss.bound ? 4 : 1), [&](std::int64_t begin, std::int64_t end) {
    Scratch<A> scratch(kNumSlots, tile);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t offset = item % tiles * tile;
      f(item / tiles, item, offset, std::min(tile, loss.size - offset), scratch);
    }
  });
}

// Reads the arguments that forward and backward share; `operands` keeps dense copies alive.
Loss describe(Operands& operands, const Tensor& model_output, const Tensor& x0, const Tensor& noise, const Tensor& t,
              const Tensor& alphas, const Tensor& sigmas, const OptionalTensor& weights, const OptionalTensor& vlb_table,
              std::int64_t prediction, double vlb_weight) {
  const auto sizes = sizes_of(x0);
  auto model_sizes = sizes;
  Loss loss;
  loss.bound = vlb_table.has_value();
  FASTGEN_CHECK(x0.dim() >= (loss.bound ? 2 : 1), "diffusion_loss: x0 must be [N, *], or [N, C, *] with a vlb_table");
  FASTGEN_CHECK(prediction >= 0 && prediction < kNumPredictions, "diffusion_loss: prediction must be an index of PREDICTION_TYPES, got ",
                prediction);
  const bool channels_last = is_channels_last(model_output);
  if (loss.bound) {
    model_sizes[1] *= 2;
    loss.interleaved = channels_last;
    loss.channels = std::max<std::int64_t>(sizes[1], 1);
    loss.bound_weight = vlb_weight / kLn2;
  }
  const std::int64_t samples = sizes[0];
  loss.size = samples == 0 ? 0 : x0.numel() / samples;
  const Timesteps timesteps("diffusion_loss", t, samples, alphas);
  const auto alpha = timesteps.read("alphas", alphas), sigma = timesteps.read("sigmas", sigmas);
  const auto weight = weights ? timesteps.read("weights", *weights) : std::vector<double>(samples, 1.0);
  std::vector<double> columns[kNumVlbColumns];
  if (loss.bound)
    for (int column = 0; column < kNumVlbColumns; ++column)
      columns[column] = timesteps.read_column("vlb_table", *vlb_table, column, kNumVlbColumns);

  bool needs_x0 = false, needs_noise = false;
  for (std::int64_t n = 0; n < samples; ++n) {
    const double a = alpha[n], s = sigma[n];
    Sample sample;
    sample.target = target_parts(static_cast<Prediction>(prediction), a, s);
    sample.weight = weight[n];
    if (loss.bound) {
      const double x0_error[] = {-s / a, 1, -s / (a * a + s * s), -s / (a + s)};  // the error of x0, as a multiple of r
      sample.mean = columns[kMean][n] * x0_error[prediction];
      sample.inverse_deviation = columns[kInverseDeviation][n];
      sample.half_range = columns[kLogVarianceRange][n] / 2;
      sample.decodes = timesteps[n] == 0;
    }
    needs_x0 |= sample.target.takes_x0 || sample.decodes;
    needs_noise |= sample.target.takes_noise;
    loss.samples.push_back(sample);
  }
  loss.model = operands("model_output", model_output, loss.bound ? "x0, with twice the channels" : "x0", model_sizes);
  FASTGEN_CHECK(sizes_of(noise) == sizes, "diffusion_loss: noise must have the shape of x0");
  check_floating("diffusion_loss", "x0", x0);
  check_floating("diffusion_loss", "noise", noise);
  if (needs_x0) loss.x0 = operands("x0", x0, "x0", sizes);
  if (needs_noise) loss.noise = operands("noise", noise, "x0", sizes);
  for (const Operand* operand : {&loss.x0, &loss.noise}) loss.uniform &= !operand->data || operand->dtype == loss.model.dtype;
  return loss;
}

Tensor diffusion_loss_fwd(const Tensor& model_output, const Tensor& x0, const Tensor& noise, const Tensor& t, const Tensor& alphas,
                          const Tensor& sigmas, OptionalTensor weights, OptionalTensor vlb_table, std::int64_t prediction,
                          double vlb_weight) {
  Operands operands("diffusion_loss", is_channels_last(model_output));
  const Loss loss =
      describe(operands, model_output, x0, noise, t, alphas, sigmas, weights, vlb_table, prediction, vlb_weight);
  const auto samples = static_cast<std::int64_t>(loss.samples.size());
  Tensor out = empty_contiguous({samples}, opmath_type(model_output.scalar_type()));
  dispatch_dtype("diffusion_loss", model_output.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    const std::int64_t tiles = (loss.size + loss.tile_size() - 1) / loss.tile_size();
    std::vector<double> sums(samples * tiles);
    for_tiles<A>(loss, [&](std::int64_t n, std::int64_t item, std::int64_t offset, std::int64_t count, Scratch<A>& scratch) {
      sums[item] = loss.bound ? hybrid_sum<A>(loss, n, offset, count, scratch) : simple_sum<T>(loss, n, offset, count, scratch);
    });
    A* losses = static_cast<A*>(out.mutable_data_ptr());
    for (std::int64_t n = 0; n < samples; ++n) {
      double sum = 0;
      for (std::int64_t i = 0; i < tiles; ++i) sum += sums[n * tiles + i];
      losses[n] = static_cast<A>(sum / static_cast<double>(loss.size));
    }
  });
  return out;
}

Tensor diffusion_loss_bwd(const Tensor& grad, const Tensor& model_output, const Tensor& x0, const Tensor& noise, const Tensor& t,
                          const Tensor& alphas, const Tensor& sigmas, OptionalTensor weights, OptionalTensor vlb_table,
                          std::int64_t prediction, double vlb_weight) {
  const bool channels_last = is_channels_last(model_output);
  Operands operands("diffusion_loss", channels_last);
  const Loss loss =
      describe(operands, model_output, x0, noise, t, alphas, sigmas, weights, vlb_table, prediction, vlb_weight);
  const auto samples = static_cast<std::int64_t>(loss.samples.size());
  FASTGEN_CHECK(grad.dim() == 1 && grad.size(0) == samples, "diffusion_loss: grad must be one per sample");
  std::vector<double> grads(samples);
  dispatch_dtype("diffusion_loss", grad.scalar_type(), [&]<class G>() {
    const G* p = static_cast<const G*>(grad.data_ptr());
    for (std::int64_t n = 0; n < samples; ++n)
      grads[n] = static_cast<double>(widen(p[n * grad.stride(0)])) / static_cast<double>(loss.size);
  });
  Tensor out = empty_dense(model_output, channels_last, model_output.scalar_type());
  dispatch_dtype("diffusion_loss", model_output.scalar_type(), [&]<class T>() {
    T* data = static_cast<T*>(out.mutable_data_ptr());
    for_tiles<opmath_t<T>>(
        loss, [&](std::int64_t n, std::int64_t, std::int64_t offset, std::int64_t count, Scratch<opmath_t<T>>& scratch) {
          (loss.bound ? hybrid_gradient<T> : simple_gradient<T>)(loss, n, offset, count, grads[n], data, scratch);
        });
  });
  return out;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("diffusion_loss_fwd", TORCH_BOX(&fastgen::diffusion_loss_fwd));
  m.impl("diffusion_loss_bwd", TORCH_BOX(&fastgen::diffusion_loss_bwd));
}
