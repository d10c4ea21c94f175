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

std::tuple<Tensor, Tensor> group_norm_affine(const Tensor& input, OptionalTensor skip, std::int64_t num_groups, OptionalTensor weight,
                                             OptionalTensor bias, OptionalTensor channel_bias, OptionalTensor scale, OptionalTensor shift,
                                             double eps) {
  const Problem p = make_problem("group_norm_affine", input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, 0);
  const ScalarType opmath = opmath_type(input.scalar_type());
  Tensor out_scale = empty_contiguous({p.n, p.channels}, opmath), out_shift = empty_contiguous({p.n, p.channels}, opmath);
  const Inputs inputs(p, input, skip);
  dispatch_dtype("group_norm_affine", input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    A* const a = static_cast<A*>(out_scale.mutable_data_ptr());
    A* const b = static_cast<A*>(out_shift.mutable_data_ptr());
    const auto moments = p.elements() == 0 ? std::vector<Moments>(p.n * p.groups) : all_moments(p, inputs.pieces<T>());
    Channels<A> channels(p.channels);
    for (std::int64_t n = 0; n < p.n; ++n) {
      channels.read(p, n, 0, p.channels);
      for (std::int64_t c = 0; c < p.channels; ++c) {
        const Moments& m = moments[n * p.groups + c / p.per_group];
        const double modulation = 1.0 + channels.scale[c], slope = m.rstd(p.eps) * channels.weight[c] * modulation;
        const double centre = m.mean - channels.channel_bias[c];
        a[n * p.channels + c] = static_cast<A>(slope);
        b[n * p.channels + c] = static_cast<A>(channels.bias[c] * modulation + channels.shift[c] - centre * slope);
      }
    }
  });
  return {out_scale, out_shift};
}

}  // namespace
}  // namespace fastgen::group_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("group_norm_affine", TORCH_BOX(&fastgen::group_norm::group_norm_affine)); }
