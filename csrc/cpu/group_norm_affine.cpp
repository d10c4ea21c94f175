// group_norm_affine: group normalization as a scale and a shift a (sample, channel), for an op that applies them as it reads.
//
// One read of the input: chunks or slabs (group_norm_moments.h) are shared out to the threads and merged in order. The scale and the
// shift are put together in fp64 and rounded once; a fused multiply-add by them is as exact as ATen's GroupNorm.
#include "group_norm_moments.h"

namespace fastgen::group_norm {
namespace {

// Moments of all groups [N * groups].
template <class T>
std::vector<Moments> all_moments(const Problem& p, const Pieces<T>& pieces) {
  using A = opmath_t<T>;
  const std::int64_t items = p.n * p.groups;
  std::vector<Moments> merged(items);
  if (p.channels_last) {
    const Slabs slabs(p);
    std::vector<Moments> parts(p.n * slabs.count * p.groups);
    parallel(p.n * slabs.count, p.elements(), [&](std::int64_t begin, std::int64_t end) {
      SlabMoments<T> slab_moments(p);
      std::vector<A> channel_bias(p.channels);
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t n = i / slabs.count, first = i % slabs.count * slabs.slab;
        p.channel_bias.read(n, 0, p.channels, A(0), channel_bias.data());
        slab_moments.run(slabs, pieces, n, first, std::min(slabs.slab, p.pixels - first), channel_bias.data(), parts.data() + i * p.groups);
      }
    });
    for (std::int64_t i = 0; i < p.n * slabs.count; ++i)
      for (std::int64_t g = 0; g < p.groups; ++g) merged[i / slabs.count * p.groups + g].merge(parts[i * p.groups + g]);
    return merged;
  }
  const std::int64_t chunks = ContiguousGroup<T>(p, pieces.run(0, 0, p.per_group)).chunks();
  std::vector<Moments> parts(items * chunks);
  parallel(items * chunks, p.elements(), [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> channel_bias(p.per_group);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t n = i / chunks / p.groups, g = i / chunks % p.groups;
      if (i == begin || i % chunks == 0) p.channel_bias.read(n, g * p.per_group, p.per_group, A(0), channel_bias.data());
      parts[i] = ContiguousGroup<T>(p, pieces.run(n, g * p.per_group, p.per_group)).moments(i % chunks, channel_bias.data());
    }
  });
  for (std::int64_t i = 0; i < items * chunks; ++i) merged[i / chunks].merge(parts[i]);
  return merged;
}

// The scale and the shift of each channel, from the moments of all groups.
std::tuple<Tensor, Tensor> affine_maps(const Problem& p, ScalarType dtype, const std::vector<Moments>& moments) {
  const ScalarType opmath = opmath_type(dtype);
  Tensor out_scale = empty_contiguous({p.n, p.channels}, opmath), out_shift = empty_contiguous({p.n, p.channels}, opmath);
  const auto fill = [&]<class A>() {
    A* const a = static_cast<A*>(out_scale.mutable_data_ptr());
    A* const b = static_cast<A*>(out_shift.mutable_data_ptr());
    Channels<A> channels(p.channels);
    for (std::int64_t n = 0; n < p.n; ++n) {
      channels.read(p, n, 0, p.channels);
      for (std::int64_t g = 0; g < p.groups; ++g) {
        const double mean = moments[n * p.groups + g].mean, rstd = moments[n * p.groups + g].rstd(p.eps);
        for (std::int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c) {
          const double modulation = 1.0 + channels.scale[c], slope = rstd * channels.weight[c] * modulation;
          const double centre = mean - channels.channel_bias[c];
          a[n * p.channels + c] = static_cast<A>(slope);
          b[n * p.channels + c] = static_cast<A>(channels.bias[c] * modulation + channels.shift[c] - centre * slope);
        }
      }
    }
  };
  opmath == ScalarType::Double ? fill.template operator()<double>() : fill.template operator()<float>();
  return {out_scale, out_shift};
}

std::tuple<Tensor, Tensor> group_norm_affine(const Tensor& input, OptionalTensor skip, std::int64_t num_groups, OptionalTensor weight,
                                             OptionalTensor bias, OptionalTensor channel_bias, OptionalTensor scale, OptionalTensor shift,
                                             double eps) {
  const Problem p = make_problem("group_norm_affine", input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, 0);
  const Inputs inputs(p, input, skip);
  std::vector<Moments> moments(p.n * p.groups);
  if (p.elements() > 0)
    dispatch_dtype("group_norm_affine", input.scalar_type(), [&]<class T>() { moments = all_moments(p, inputs.pieces<T>()); });
  return affine_maps(p, input.scalar_type(), moments);
}

// Whether the values that were kept with the moments [N, C, 3] are those of `t` still; a NaN is none.
bool fits(const Tensor& t, const double* moments) {
  const std::int64_t dim = t.dim(), channels = t.size(1);
  std::int64_t pixels = 1;
  for (std::int64_t d = 2; d < dim; ++d) pixels *= t.size(d);
  bool same = true;
  dispatch_dtype("group_norm_affine_known", t.scalar_type(), [&]<class T>() {
    const T* const data = static_cast<const T*>(t.data_ptr());
    for_watched(t.size(0) * channels, pixels, [&](std::int64_t row, std::int64_t place) {
      std::int64_t at = row / channels * t.stride(0) + row % channels * t.stride(1);
      for (std::int64_t d = dim - 1; d >= 2; --d) at += place % t.size(d) * t.stride(d), place /= t.size(d);
      same = same && static_cast<double>(widen(data[at])) == moments[row * 3 + 2];
    });
  });
  return same;
}

const double* moments_of(const char* name, const Tensor& t, const Tensor& moments) {
  const bool fits = moments.scalar_type() == ScalarType::Double && moments.dim() == 3 && moments.is_contiguous() &&
                    moments.size(0) == t.size(0) && moments.size(1) == t.size(1) && moments.size(2) == 3;
  FASTGEN_CHECK(fits, "group_norm_affine_known: ", name, " must be what a convolution returns, contiguous float64 [N, C, 3]");
  return static_cast<const double*>(moments.data_ptr());
}

// From the moments of each channel.
std::tuple<Tensor, Tensor> group_norm_affine_known(const Tensor& input, OptionalTensor skip, const Tensor& moments,
                                                   OptionalTensor skip_moments, std::int64_t num_groups, OptionalTensor weight,
                                                   OptionalTensor bias, OptionalTensor channel_bias, OptionalTensor scale,
                                                   OptionalTensor shift, double eps) {
  const Problem p = make_problem("group_norm_affine_known", input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, 0);
  FASTGEN_CHECK(skip.has_value() == skip_moments.has_value(), "group_norm_affine_known: skip_moments must be given where skip is");
  const double* const first = moments_of("moments", input, moments);
  const double* const second = skip.has_value() ? moments_of("skip_moments", *skip, *skip_moments) : nullptr;
  if (p.elements() == 0 || !fits(input, first) || (second && !fits(*skip, second)))
    return group_norm_affine(input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps);
  std::vector<Moments> merged(p.n * p.groups);
  std::vector<double> added(p.channels);
  const auto pixels = static_cast<double>(p.pixels);
  for (std::int64_t n = 0; n < p.n; ++n) {
    p.channel_bias.read(n, 0, p.channels, 0.0, added.data());
    const auto of = [&](std::int64_t c) { return c < p.seam ? first + (n * p.seam + c) * 3 : second + (n * (p.channels - p.seam) + c - p.seam) * 3; };
    for (std::int64_t g = 0; g < p.groups; ++g) {
      double mean = 0, m2 = 0;
      for (std::int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c) mean += of(c)[0] + added[c];
      mean /= static_cast<double>(p.per_group);
      for (std::int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c) {
        const double delta = of(c)[0] + added[c] - mean;
        m2 += of(c)[1] + pixels * delta * delta;
      }
      merged[n * p.groups + g] = {pixels * static_cast<double>(p.per_group), mean, m2};
    }
  }
  return affine_maps(p, input.scalar_type(), merged);
}

}  // namespace
}  // namespace fastgen::group_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("group_norm_affine", TORCH_BOX(&fastgen::group_norm::group_norm_affine));
  m.impl("group_norm_affine_known", TORCH_BOX(&fastgen::group_norm::group_norm_affine_known));
}
