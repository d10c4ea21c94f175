// categorical_sample: a level for each position of [N, K, *], drawn by the uniform of its place in the stream of its sample's seed.
//
// Positions go kPositions at a time through a tile in which the levels of each lie in order, so that one routine draws them in
// any layout (common/sampling.h), and threads, batch and strides change no bit. What lies so already, and needs no widening, is
// read in place.
#include "common/sampling.h"
#include "common/tensor.h"

namespace fastgen {
namespace {

constexpr std::int64_t kPositions = 16;  // a cache line of fp32 where positions are neighbours
constexpr std::int64_t kWork = 3;        // a level is as much work as so many elements of a light operation

// Where position p of [N, K, *rest], counted in order, stands behind its sample.
class Positions {
 public:
  explicit Positions(const Tensor& t) {
    for (std::int64_t d = t.dim() - 1; d >= 2; --d) {
      count_ *= t.size(d);
      if (t.size(d) == 1) continue;
      if (!dims_.empty() && t.stride(d) == dims_.back().stride * dims_.back().size) dims_.back().size *= t.size(d);
      else dims_.push_back({t.size(d), t.stride(d)});
    }
  }
  std::int64_t count() const { return count_; }
  std::int64_t at(std::int64_t p) const {
    if (dims_.size() == 1) return p * dims_[0].stride;
    std::int64_t offset = 0;
    for (const Dim& dim : dims_) offset += p % dim.size * dim.stride, p /= dim.size;
    return offset;
  }

 private:
  struct Dim {
    std::int64_t size, stride;
  };
  std::vector<Dim> dims_;  // the innermost first, neighbours that continue one another together
  std::int64_t count_ = 1;
};

Tensor empty_levels(const std::vector<std::int64_t>& sizes) {
  const auto strides = dense_strides(sizes, false);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::tuple<Tensor, Tensor> categorical_sample(const Tensor& logits, const Tensor& seeds, std::int64_t element, std::int64_t step,
                                              double temperature, std::int64_t top_k, double top_p, bool return_log_prob) {
  check_floating("categorical_sample", "logits", logits);
  FASTGEN_CHECK(logits.dim() >= 2 && logits.size(1) > 0, "categorical_sample: logits must be [N, K, *] with K >= 1");
  FASTGEN_CHECK(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long && seeds.size(0) == logits.size(0),
                "categorical_sample: seeds must be int64, one per sample");
  FASTGEN_CHECK(element >= 0, "categorical_sample: element must not be negative, got ", element);
  FASTGEN_CHECK(temperature >= 0 && std::isfinite(temperature), "categorical_sample: temperature must be finite and not negative");
  FASTGEN_CHECK(top_k >= 0, "categorical_sample: top_k must not be negative, got ", top_k);
  FASTGEN_CHECK(top_p > 0 && top_p <= 1, "categorical_sample: top_p must be in (0, 1]");
  const std::int64_t samples = logits.size(0), count = logits.size(1);
  auto sizes = sizes_of(logits);
  sizes.erase(sizes.begin() + 1);
  Tensor out = empty_levels(sizes);
  Tensor log_probs = empty_contiguous(return_log_prob ? sizes : std::vector<std::int64_t>{0}, opmath_type(logits.scalar_type()));
  const Positions positions(logits);
  const auto* seed = static_cast<const std::int64_t*>(seeds.data_ptr());
  const std::int64_t size = positions.count(), tiles = (size + kPositions - 1) / kPositions, stride = logits.stride(1);
  dispatch_dtype("categorical_sample", logits.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    const T* data = static_cast<const T*>(logits.data_ptr());
    auto* drawn = static_cast<std::int64_t*>(out.mutable_data_ptr());
    A* scores = return_log_prob ? static_cast<A*>(log_probs.mutable_data_ptr()) : nullptr;
    const bool in_place = std::is_same_v<T, A> && stride == 1;
    parallel(samples * tiles, samples * size * count * kWork, [&](std::int64_t begin, std::int64_t end) {
      const std::unique_ptr<A[]> rows(new A[in_place ? 1 : kPositions * count]);
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t n = item / tiles, first = item % tiles * kPositions, taken = std::min(kPositions, size - first);
        const T* sample = data + n * logits.stride(0);
        std::int64_t at[kPositions];
        for (std::int64_t i = 0; i < taken; ++i) at[i] = positions.at(first + i);
        if (!in_place)
          for (std::int64_t k = 0; k < count; ++k)
            for (std::int64_t i = 0; i < taken; ++i) rows[i * count + k] = widen(sample[k * stride + at[i]]);
        for (std::int64_t i = 0; i < taken; ++i) {
          const A* levels = rows.get() + i * count;
          if constexpr (std::is_same_v<T, A>)
            if (in_place) levels = sample + at[i];
          const float u = uniform(static_cast<std::uint64_t>(seed[n * seeds.stride(0)]), static_cast<std::uint32_t>(step),
                                  static_cast<std::uint64_t>(element + first + i));
          A* score = scores ? scores + n * size + first + i : nullptr;
          drawn[n * size + first + i] =
              draw_categorical<A>(levels, 1, count, static_cast<A>(temperature), top_k, static_cast<A>(top_p), u, score);
        }
      }
    });
  });
  return {out, log_probs};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("categorical_sample", TORCH_BOX(&fastgen::categorical_sample)); }
