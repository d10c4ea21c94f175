// group_norm, forward: one read for the statistics, one read and one write for the result.
//
// Statistics are those of group_norm_moments.h; which thread does what is chosen for locality.
//
//   contiguous:    a group is one run of memory; a thread owns whole groups, and the second read hits the cache. Few large
//                  groups are shared out chunk by chunk instead.
//   channels-last: a vector holds neighbouring channels; a slab of pixels keeps per-channel moments, which become group
//                  moments at its end. A thread owns whole images where there are enough of them, else slabs.
#include "group_norm_moments.h"

namespace fastgen::group_norm {
namespace {

constexpr std::int64_t kPrefetchBytes = 1 << 18;  // the next group is prefetched if it and this one fit L2
constexpr std::int64_t kPrefetchImageBytes = 1 << 19;  // so is the next channels-last image
constexpr std::int64_t kShortRow = 64;       // rows shorter than this take a and b element by element

template <class A>
struct AffineArrays {
  std::vector<A> m, a, b;

  explicit AffineArrays(std::int64_t count) : m(count), a(count), b(count) {}
  void set(std::int64_t first, std::int64_t count, Affine<A> affine) {
    std::fill_n(m.data() + first, count, affine.m);
    std::fill_n(a.data() + first, count, affine.a);
    std::fill_n(b.data() + first, count, affine.b);
  }
};

// ---- contiguous --------------------------------------------------------------------------------------------------------

// `ahead`: elements from x to what this thread reads next (the same place in the next group), or 0. Reading it early hides
// the memory behind the arithmetic of this row: 4x128x32x32 fp32 NCHW on Sapphire Rapids, see kPrefetchBytes.
template <class T, bool kSilu>
void apply_row(const T* x, T* y, std::int64_t count, Affine<opmath_t<T>> affine, std::int64_t ahead) {
  using A = opmath_t<T>;
  const Vec<A> m(affine.m), a(affine.a), b(affine.b);
  for_vectors<A>(count, [&](std::int64_t i, auto at) {
    prefetch(x + i + ahead);
    prefetch_to_write(y + i + 16 * kWidth<A>);
    Vec<A> v = madd<A>(at.load(x + i) - m, a, b);
    if constexpr (kSilu) v = silu<A, kLowPrecision<T>>(v);
    at.store(y + i, v);
  });
}

// Elements [0, count), each with its own affine map.
template <class T, bool kSilu>
void apply_elements(const T* x, T* y, std::int64_t count, const AffineArrays<opmath_t<T>>& affine, std::int64_t at_map,
                    std::int64_t ahead) {
  using A = opmath_t<T>;
  const A *m = affine.m.data() + at_map, *a = affine.a.data() + at_map, *b = affine.b.data() + at_map;
  for_vectors<A>(count, [&](std::int64_t i, auto at) {
    prefetch(x + i + ahead);
    prefetch_to_write(y + i + 16 * kWidth<A>);
    Vec<A> v = madd<A>(at.load(x + i) - at.load(m + i), at.load(a + i), at.load(b + i));
    if constexpr (kSilu) v = silu<A, kLowPrecision<T>>(v);
    at.store(y + i, v);
  });
}

template <class T, bool kSilu>
void forward_contiguous(const Problem& p, const Pieces<T>& x, T* y, opmath_t<T>* mean, opmath_t<T>* rstd) {
  using A = opmath_t<T>;
  const std::int64_t items = p.n * p.groups, size = p.group_size();
  const auto group_at = [&](std::int64_t item) { return x.run(item / p.groups, item % p.groups * p.per_group, p.per_group); };
  // Few groups, and large: their chunks are shared out instead. The chunks and the order of merging are the same.
  const bool split = items < 2 * static_cast<std::int64_t>(torch::stable::get_num_threads()) && size > 8 * kChunk;
  std::vector<Moments> split_moments(split ? items : 0);
  if (split) {
    const std::int64_t chunks = ContiguousGroup<T>(p, group_at(0)).chunks();
    std::vector<Moments> parts(items * chunks);
    parallel(items * chunks, p.elements(), [&](std::int64_t begin, std::int64_t end) {
      std::vector<A> channel_bias(p.per_group);
      std::int64_t last = -1;
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t item = i / chunks;
        if (item != last) p.channel_bias.read(item / p.groups, item % p.groups * p.per_group, p.per_group, A(0), channel_bias.data());
        last = item;
        parts[i] = ContiguousGroup<T>(p, group_at(item)).moments(i % chunks, channel_bias.data());
      }
    });
    for (std::int64_t i = 0; i < items * chunks; ++i) split_moments[i / chunks].merge(parts[i]);
  }
  const std::int64_t pieces = split ? p.per_group : 1;  // the rows of a split group are shared out too
  parallel(items * pieces, p.elements(), [&](std::int64_t begin, std::int64_t end) {
    Channels<A> channels(p.per_group);
    const std::int64_t ahead = !split && size * static_cast<std::int64_t>(sizeof(T)) <= kPrefetchBytes ? size : 0;
    const bool short_rows = p.pixels < kShortRow && !split;
    AffineArrays<A> elements(short_rows ? size : 0);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t item = i / pieces, n = item / p.groups, g = item % p.groups;
      if (i == begin || i % pieces == 0) channels.read(p, n, g * p.per_group, p.per_group);
      const Run<T> in = group_at(item);
      T* out = y + item * size;
      Moments moments;
      if (split) {
        moments = split_moments[item];
      } else {
        const ContiguousGroup<T> group(p, in);
        for (std::int64_t chunk = 0; chunk < group.chunks(); ++chunk) moments.merge(group.moments(chunk, channels.channel_bias));
      }
      const double r = moments.rstd(p.eps);
      if (mean && i % pieces == 0) mean[item] = static_cast<A>(moments.mean), rstd[item] = static_cast<A>(r);
      if (short_rows) {
        for (std::int64_t c = 0; c < p.per_group; ++c) elements.set(c * p.pixels, p.pixels, channels.affine(c, moments.mean, r));
        if (in.seam > 0) apply_elements<T, kSilu>(in.low, out, in.seam, elements, 0, ahead);
        if (in.seam < size) apply_elements<T, kSilu>(in.high, out + in.seam, size - in.seam, elements, in.seam, ahead);
        continue;
      }
      const std::int64_t first = split ? i % pieces : 0, last = split ? first + 1 : p.per_group;
      for (std::int64_t c = first; c < last; ++c)
        apply_row<T, kSilu>(in.at(c * p.pixels), out + c * p.pixels, p.pixels, channels.affine(c, moments.mean, r), ahead);
    }
  });
}

// ---- channels-last -------------------------------------------------------------------------------------------------------

template <class T, bool kSilu>
void forward_channels_last(const Problem& p, const Pieces<T>& x, T* y, opmath_t<T>* mean, opmath_t<T>* rstd) {
  using A = opmath_t<T>;
  const Slabs slabs(p);
  std::vector<Moments> parts(p.n * slabs.count * p.groups);

  const auto take_moments = [&](SlabMoments<T>& slab_moments, std::int64_t n, std::int64_t slab, const A* channel_bias) {
    const std::int64_t first = slab * slabs.slab;
    slab_moments.run(slabs, x, n, first, std::min(slabs.slab, p.pixels - first), channel_bias,
                     parts.data() + (n * slabs.count + slab) * p.groups);
  };
  // The maps of all channels of sample n, from the slabs' moments merged in order.
  const auto finish = [&](std::int64_t n, const Channels<A>& channels, AffineArrays<A>& affine, std::int64_t at_map) {
    for (std::int64_t g = 0; g < p.groups; ++g) {
      Moments moments;
      for (std::int64_t slab = 0; slab < slabs.count; ++slab) moments.merge(parts[(n * slabs.count + slab) * p.groups + g]);
      const double r = moments.rstd(p.eps);
      if (mean) mean[n * p.groups + g] = static_cast<A>(moments.mean), rstd[n * p.groups + g] = static_cast<A>(r);
      for (std::int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c)
        affine.set(at_map + c, 1, channels.affine(c, moments.mean, r));
    }
  };
  const auto apply = [&](std::int64_t n, std::int64_t slab, const AffineArrays<A>& affine, std::int64_t at_map, bool ahead) {
    const std::int64_t first = slab * slabs.slab, last = std::min(first + slabs.slab, p.pixels);
    for (std::int64_t i = first; i < last; ++i)
      x.each([&](const Piece<T>& of) {
        apply_elements<T, kSilu>(of.pixel(n, i), y + (n * p.pixels + i) * p.channels + of.first, of.channels(), affine, at_map + of.first,
                                 ahead ? of.rows.batch_stride : 0);
      });
  };

  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  if (p.n % threads == 0 || p.n >= 4 * threads || slabs.count == 1) {
    const bool fits = p.channels * p.pixels * static_cast<std::int64_t>(sizeof(T)) <= kPrefetchImageBytes;
    parallel(p.n, p.elements(), [&](std::int64_t begin, std::int64_t end) {
      SlabMoments<T> slab_moments(p);
      Channels<A> channels(p.channels);
      AffineArrays<A> affine(p.channels);
      for (std::int64_t n = begin; n < end; ++n) {
        channels.read(p, n, 0, p.channels);
        for (std::int64_t slab = 0; slab < slabs.count; ++slab) take_moments(slab_moments, n, slab, channels.channel_bias);
        finish(n, channels, affine, 0);
        // Backwards: what the statistics read last is still in the cache.
        for (std::int64_t slab = slabs.count - 1; slab >= 0; --slab) apply(n, slab, affine, 0, fits);
      }
    });
    return;
  }
  const std::int64_t items = p.n * slabs.count;
  std::vector<A> channel_bias(p.n * p.channels);
  AffineArrays<A> affine(p.n * p.channels);
  for (std::int64_t n = 0; n < p.n; ++n) p.channel_bias.read(n, 0, p.channels, A(0), channel_bias.data() + n * p.channels);
  parallel(items, p.elements(), [&](std::int64_t begin, std::int64_t end) {
    SlabMoments<T> slab_moments(p);
    for (std::int64_t i = begin; i < end; ++i)
      take_moments(slab_moments, i / slabs.count, i % slabs.count, channel_bias.data() + i / slabs.count * p.channels);
  });
  Channels<A> channels(p.channels);
  for (std::int64_t n = 0; n < p.n; ++n) {
    channels.read(p, n, 0, p.channels);
    finish(n, channels, affine, n * p.channels);
  }
  parallel(items, p.elements(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = end - 1; i >= begin; --i) apply(i / slabs.count, i % slabs.count, affine, i / slabs.count * p.channels, false);
  });
}

// Fills `output`, and `mean` and `rstd` where they are wanted.
void forward(const Problem& p, const Tensor& input, const OptionalTensor& skip, Tensor& output, Tensor* mean, Tensor* rstd) {
  const Inputs inputs(p, input, skip);
  dispatch_dtype("group_norm", input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    A* m = mean ? static_cast<A*>(mean->mutable_data_ptr()) : nullptr;
    A* r = rstd ? static_cast<A*>(rstd->mutable_data_ptr()) : nullptr;
    if (p.elements() == 0) {  // no element has no mean
      if (m) std::fill_n(m, p.n * p.groups, std::numeric_limits<A>::quiet_NaN());
      if (r) std::fill_n(r, p.n * p.groups, std::numeric_limits<A>::quiet_NaN());
      return;
    }
    const Pieces<T> in = inputs.pieces<T>();
    T* out = static_cast<T*>(output.mutable_data_ptr());
    if (p.channels_last && p.silu) forward_channels_last<T, true>(p, in, out, m, r);
    if (p.channels_last && !p.silu) forward_channels_last<T, false>(p, in, out, m, r);
    if (!p.channels_last && p.silu) forward_contiguous<T, true>(p, in, out, m, r);
    if (!p.channels_last && !p.silu) forward_contiguous<T, false>(p, in, out, m, r);
  });
}

Tensor group_norm(const Tensor& input, OptionalTensor skip, std::int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
                  OptionalTensor channel_bias, OptionalTensor scale, OptionalTensor shift, double eps, std::int64_t activation) {
  const Problem p = make_problem("group_norm", input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, activation);
  Tensor output = empty_output(p, input, input.scalar_type());
  forward(p, input, skip, output, nullptr, nullptr);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& input, OptionalTensor skip, std::int64_t num_groups,
                                                  OptionalTensor weight, OptionalTensor bias, OptionalTensor channel_bias,
                                                  OptionalTensor scale, OptionalTensor shift, double eps, std::int64_t activation) {
  const Problem p = make_problem("group_norm", input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, activation);
  const ScalarType opmath = opmath_type(input.scalar_type());
  Tensor output = empty_output(p, input, input.scalar_type());
  Tensor mean = empty_contiguous({p.n, p.groups}, opmath), rstd = empty_contiguous({p.n, p.groups}, opmath);
  forward(p, input, skip, output, &mean, &rstd);
  return {output, mean, rstd};
}

}  // namespace
}  // namespace fastgen::group_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&fastgen::group_norm::group_norm));
  m.impl("group_norm_fwd", TORCH_BOX(&fastgen::group_norm::group_norm_fwd));
}
