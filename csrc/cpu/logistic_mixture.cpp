// logistic_mixture: the negative log-likelihood of images under mixtures of discretised logistics (PixelCNN++), and its gradient.
//
// A tile of kTile pixels of one sample is owned by one thread. Its parameters are read once, into one row of memory each, so that
// the lanes of a vector are pixels in any layout. The forward leaves one sum a tile in fp64; those of a sample are added in
// order, so threads change no bit. The backward computes the same, keeps the derivatives of each mixture in rows of their own
// until the weights of the mixtures are known, and writes the gradient once.
#include "cpu/_pixels.h"
#include "cpu/logistic_mixture.h"

namespace fastgen {
namespace {

constexpr std::int64_t kTile = 32;   // with ten mixtures of three colors the rows take 12 KB in fp32, as many again in the backward
constexpr std::int64_t kWork = 100;  // an element of the target is as much work as so many of a light operation, for each mixture

// What forward and backward share: the tensors, checked.
struct Images {
  const Tensor &logits, &target;
  MixtureLayout at;
  Pixels parameters, values;
  std::int64_t samples, levels, tiles;

  static MixtureLayout layout_of(const Tensor& logits, const Tensor& target, std::int64_t levels) {
    check_floating("logistic_mixture", "logits", logits);
    check_floating("logistic_mixture", "target", target);
    FASTGEN_CHECK(logits.dim() == 4, "logistic_mixture: logits must be [N, 10 M or 3 M, H, W]");
    FASTGEN_CHECK(target.dim() == 4 && (target.size(1) == 1 || target.size(1) == 3), "logistic_mixture: target must be [N, 1 or 3, H, W]");
    for (const int d : {0, 2, 3})
      FASTGEN_CHECK(target.size(d) == logits.size(d), "logistic_mixture: target must have the samples and pixels of logits");
    FASTGEN_CHECK(levels >= 2, "logistic_mixture: levels must be at least 2, got ", levels);
    const std::int64_t channels = target.size(1), each = channels == 3 ? 10 : 3;
    FASTGEN_CHECK(logits.size(1) > 0 && logits.size(1) % each == 0, "logistic_mixture: logits of a target of ", channels,
                  " colors must have ", each, " channels a mixture, got ", logits.size(1));
    return {logits.size(1) / each, channels};
  }

  Images(const Tensor& logits, const Tensor& target, std::int64_t levels)
      : logits(logits), target(target), at(layout_of(logits, target, levels)), parameters(logits), values(target),
        samples(logits.size(0)), levels(levels), tiles((parameters.count + kTile - 1) / kTile) {}

  // Calls f(n, item, first, count, rows, values, mixture) for every tile of every sample, the tile read.
  template <class A, class F>
  void for_tiles(const F& f) const {
    parallel(samples * tiles, samples * parameters.count * at.channels * at.mixtures * kWork, [&](std::int64_t begin, std::int64_t end) {
      MixtureOfPixels<A> mixture(at, levels, kTile);
      const std::unique_ptr<A[]> rows(new A[at.parameters() * kTile]), colors(new A[at.channels * kTile]);
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t n = item / tiles, first = item % tiles * kTile, count = std::min(kTile, parameters.count - first);
        read_pixels<A>("logistic_mixture", logits, parameters, n, first, count, kTile, rows.get());
        read_pixels<A>("logistic_mixture", target, values, n, first, count, kTile, colors.get());
        f(item, n, first, count, rows.get(), colors.get(), mixture);
      }
    });
  }
};

Tensor logistic_mixture_fwd(const Tensor& logits, const Tensor& target, std::int64_t levels) {
  const Images images(logits, target, levels);
  Tensor out = empty_contiguous({images.samples}, opmath_type(logits.scalar_type()));
  std::vector<double> sums(images.samples * images.tiles);
  const auto run = [&]<class A>(A) {
    images.for_tiles<A>([&](std::int64_t item, std::int64_t, std::int64_t, std::int64_t count, const A* rows, const A* values, auto& mixture) {
      double sum = 0;
      for (std::int64_t i = 0; i < count; i += kWidth<A>) {
        const Vec<A> loss = mixture.template loss<false>(rows + i, values + i, A(1), nullptr);
        for (std::int64_t k = 0; k < std::min<std::int64_t>(kWidth<A>, count - i); ++k) sum += static_cast<double>(loss[k]);
      }
      sums[item] = sum;
    });
    A* losses = static_cast<A*>(out.mutable_data_ptr());
    for (std::int64_t n = 0; n < images.samples; ++n) {
      double sum = 0;
      for (std::int64_t i = 0; i < images.tiles; ++i) sum += sums[n * images.tiles + i];
      losses[n] = static_cast<A>(sum);
    }
  };
  logits.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return out;
}

Tensor logistic_mixture_bwd(const Tensor& grad, const Tensor& logits, const Tensor& target, std::int64_t levels) {
  const Images images(logits, target, levels);
  FASTGEN_CHECK(grad.dim() == 1 && grad.size(0) == images.samples, "logistic_mixture: grad must be one per sample");
  check_floating("logistic_mixture", "grad", grad);
  Tensor out = empty_dense(logits, is_channels_last(logits), logits.scalar_type());
  const Pixels to(out);
  dispatch_dtype("logistic_mixture", logits.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    std::vector<A> grads(images.samples);
    dispatch_dtype("logistic_mixture", grad.scalar_type(), [&]<class G>() {
      for (std::int64_t n = 0; n < images.samples; ++n)
        grads[n] = static_cast<A>(widen(static_cast<const G*>(grad.data_ptr())[n * grad.stride(0)]));
    });
    T* data = static_cast<T*>(out.mutable_data_ptr());
    images.for_tiles<A>([&](std::int64_t, std::int64_t n, std::int64_t first, std::int64_t count, const A* rows, const A* values, auto& mixture) {
      const std::unique_ptr<A[]> gradient(new A[images.at.parameters() * kTile]);
      for (std::int64_t i = 0; i < count; i += kWidth<A>) mixture.template loss<true>(rows + i, values + i, grads[n], gradient.get() + i);
      write_pixels<A>(data + n * to.sample, to, first, count, images.at.parameters(), kTile, gradient.get());
    });
  });
  return out;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("logistic_mixture_fwd", TORCH_BOX(&fastgen::logistic_mixture_fwd));
  m.impl("logistic_mixture_bwd", TORCH_BOX(&fastgen::logistic_mixture_bwd));
}
