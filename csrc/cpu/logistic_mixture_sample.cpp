// logistic_mixture_sample: pixels drawn from mixtures of logistics.
//
// A pixel is drawn by itself (common/sampling.h) from uniforms that its place and its sample's seed alone decide, so neither
// threads nor batch nor layout change a bit. Its parameters are gathered where they are; those of its neighbours in memory follow
// from the cache.
#include "common/sampling.h"
#include "cpu/_pixels.h"

namespace fastgen {
namespace {

constexpr std::int64_t kPiece = 32;  // pixels of one sample that one thread takes at a time
constexpr std::int64_t kWork = 16;   // a parameter is as much work as so many elements of a light operation

Tensor logistic_mixture_sample(const Tensor& logits, const Tensor& seeds, std::int64_t channels, std::int64_t element, std::int64_t step,
                               std::int64_t levels, double temperature) {
  check_floating("logistic_mixture_sample", "logits", logits);
  FASTGEN_CHECK(logits.dim() == 4, "logistic_mixture_sample: logits must be [N, 10 M or 3 M, H, W]");
  FASTGEN_CHECK(channels == 1 || channels == 3, "logistic_mixture_sample: channels must be 1 or 3, got ", channels);
  const std::int64_t each = channels == 3 ? 10 : 3, samples = logits.size(0);
  FASTGEN_CHECK(logits.size(1) > 0 && logits.size(1) % each == 0, "logistic_mixture_sample: logits of ", channels,
                " colors must have ", each, " channels a mixture, got ", logits.size(1));
  FASTGEN_CHECK(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long && seeds.size(0) == samples,
                "logistic_mixture_sample: seeds must be int64, one per sample");
  FASTGEN_CHECK(element >= 0, "logistic_mixture_sample: element must not be negative, got ", element);
  FASTGEN_CHECK(levels == 0 || levels >= 2, "logistic_mixture_sample: levels must be 0 or at least 2, got ", levels);
  FASTGEN_CHECK(temperature >= 0 && std::isfinite(temperature), "logistic_mixture_sample: temperature must be finite and not negative");
  const MixtureLayout at{logits.size(1) / each, channels};
  const std::vector<std::int64_t> sizes{samples, channels, logits.size(2), logits.size(3)};
  const ScalarType dtype = opmath_type(logits.scalar_type());
  Tensor out = empty_strided(sizes, dense_strides(sizes, is_channels_last(logits)), dtype);
  const Pixels from(logits), to(out);
  const auto* seed = static_cast<const std::int64_t*>(seeds.data_ptr());
  const std::int64_t pieces = (from.count + kPiece - 1) / kPiece;
  dispatch_dtype("logistic_mixture_sample", logits.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    const T* data = static_cast<const T*>(logits.data_ptr());
    A* drawn = static_cast<A*>(out.mutable_data_ptr());
    parallel(samples * pieces, samples * from.count * at.parameters() * kWork, [&](std::int64_t begin, std::int64_t end) {
      std::vector<A> parameters(at.parameters());
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t n = item / pieces, first = item % pieces * kPiece;
        for (std::int64_t p = first; p < std::min(first + kPiece, from.count); ++p) {
          const T* pixel = data + n * from.sample + from.at(p);
          for (std::int64_t c = 0; c < at.parameters(); ++c) parameters[c] = widen(pixel[c * from.channel]);
          float u[4];
          for (std::int64_t k = 0; k <= channels; ++k)
            u[k] = uniform(static_cast<std::uint64_t>(seed[n * seeds.stride(0)]), static_cast<std::uint32_t>(step),
                           static_cast<std::uint64_t>(element + p * (channels + 1) + k));
          A values[3] = {std::numeric_limits<A>::quiet_NaN(), std::numeric_limits<A>::quiet_NaN(), std::numeric_limits<A>::quiet_NaN()};
          draw_logistic_mixture<A>(parameters.data(), 1, at.mixtures, channels, levels, static_cast<A>(temperature), u, values);
          for (std::int64_t c = 0; c < channels; ++c) drawn[n * to.sample + to.at(p) + c * to.channel] = values[c];
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("logistic_mixture_sample", TORCH_BOX(&fastgen::logistic_mixture_sample)); }
