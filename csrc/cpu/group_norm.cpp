// group_norm, forward: one read for the statistics, one read and one write for the result.
//
// Statistics are taken over chunks small enough for the first-level cache, each in two passes (its mean, then the squared
// deviations from it), and chunks are merged in a fixed order in fp64. Chunks and slabs depend on the shape alone, never on
// the number of threads, so the bits do not either; which thread does what is chosen for locality.
//
//   contiguous:    a group is one run of memory; a thread owns whole groups, and the second read hits the cache. Few large
//                  groups are shared out chunk by chunk instead.
//   channels-last: a vector holds neighbouring channels; a slab of pixels keeps per-channel moments, which become group
//                  moments at its end. A thread owns whole images where there are enough of them, else slabs.
#include "group_norm.h"

namespace fastgen::group_norm {
namespace {

constexpr std::int64_t kChunk = 2048;        // elements of a contiguous chunk: 8 KB in fp32
constexpr std::int64_t kChunkPlane = 4096;   // elements of a channels-last chunk: 16 KB, so that the next one fits L1 too
constexpr std::int64_t kSlab = 65536;        // elements of a channels-last slab
constexpr std::int64_t kPrefetchBytes = 1 << 18;  // the next group is prefetched if it and this one fit L2
constexpr std::int64_t kPrefetchImageBytes = 1 << 19;  // so is the next channels-last image
constexpr std::int64_t kStage = 512;         // rows shorter than this take their channel bias through a staged copy
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

template <class T>
Moments chunk_moments(const T* x, std::int64_t count) {
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

// A group of per_group rows of `pixels` elements as a list of chunks.
template <class T>
class ContiguousGroup {
  using A = opmath_t<T>;

 public:
  ContiguousGroup(const Problem& p, const T* x) : p_(p), x_(x), biased_(p.channel_bias.given()) {
    by_channel_ = biased_ && p.pixels >= kStage;
    per_row_ = (p.pixels + kChunk - 1) / kChunk;
    chunks_ = by_channel_ ? p.per_group * per_row_ : (p.group_size() + kChunk - 1) / kChunk;
  }

  std::int64_t chunks() const { return chunks_; }

  // `channel_bias`: that of the group's channels.
  Moments moments(std::int64_t chunk, const A* channel_bias) const {
    if (by_channel_) {  // the bias only moves the mean of a row
      const std::int64_t channel = chunk / per_row_, first = chunk % per_row_ * kChunk;
      Moments m = chunk_moments(x_ + channel * p_.pixels + first, std::min(kChunk, p_.pixels - first));
      m.mean += channel_bias[channel];
      return m;
    }
    const std::int64_t first = chunk * kChunk, count = std::min(kChunk, p_.group_size() - first);
    if (!biased_) return chunk_moments(x_ + first, count);
    alignas(64) A staged[kChunk];
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t channel = (first + i) / p_.pixels;
      const std::int64_t run = std::min(count - i, (channel + 1) * p_.pixels - (first + i));
      const Vec<A> add(channel_bias[channel]);
      for_vectors<A>(run, [&](std::int64_t k, auto at) { at.store(staged + i + k, at.load(x_ + first + i + k) + add); });
      i += run;
    }
    return chunk_moments(staged, count);
  }

 private:
  const Problem& p_;
  const T* x_;
  bool biased_, by_channel_;
  std::int64_t per_row_, chunks_;
};

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
void forward_contiguous(const Problem& p, const T* x, Rows rows, T* y, opmath_t<T>* mean, opmath_t<T>* rstd) {
  using A = opmath_t<T>;
  const std::int64_t items = p.n * p.groups, size = p.group_size();
  const auto group_at = [&](std::int64_t item) {
    return x + item / p.groups * rows.batch_stride + item % p.groups * size;
  };
  // Few groups, and large: their chunks are shared out instead. The chunks and the order of merging are the same.
  const bool split = items < 2 * static_cast<std::int64_t>(torch::stable::get_num_threads()) && size > 8 * kChunk;
  std::vector<Moments> split_moments(split ? items : 0);
  if (split) {
    const std::int64_t chunks = ContiguousGroup<T>(p, x).chunks();
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
      const T* in = group_at(item);
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
        apply_elements<T, kSilu>(in, out, size, elements, 0, ahead);
        continue;
      }
      const std::int64_t first = split ? i % pieces : 0, last = split ? first + 1 : p.per_group;
      for (std::int64_t c = first; c < last; ++c)
        apply_row<T, kSilu>(in + c * p.pixels, out + c * p.pixels, p.pixels, channels.affine(c, moments.mean, r), ahead);
    }
  });
}

// ---- channels-last -------------------------------------------------------------------------------------------------------

struct Slabs {
  std::int64_t chunk, slab, count;  // pixels of a chunk and of a slab, slabs of an image

  Slabs(const Problem& p) {
    chunk = std::clamp<std::int64_t>(kChunkPlane / p.channels, 4, 256);
    slab = std::max<std::int64_t>(kSlab / (p.channels * chunk), 1) * chunk;
    count = (p.pixels + slab - 1) / slab;
  }
};

// Per-channel moments of one slab, a chunk of pixels at a time, then those of the groups.
template <class T>
class SlabMoments {
  using A = opmath_t<T>;
  using V = Vec<A>;

 public:
  explicit SlabMoments(const Problem& p)
      : p_(p), padded_((p.channels + kWidth<A> - 1) / kWidth<A> * kWidth<A>), pivot_(padded_), offset_(padded_), m2_(padded_) {}

  void run(const Slabs& slabs, const T* x, std::int64_t row_stride, std::int64_t pixels, const A* channel_bias, Moments* groups) {
    std::int64_t seen = 0;
    while (seen < pixels) {
      const std::int64_t take = std::min(slabs.chunk, pixels - seen);
      std::int64_t c = 0;
      for (; c + 4 * kWidth<A> <= p_.channels; c += 4 * kWidth<A>)
        columns<4>(Whole{}, x + seen * row_stride + c, row_stride, take, seen, c);
      for (; c + kWidth<A> <= p_.channels; c += kWidth<A>)
        columns<1>(Whole{}, x + seen * row_stride + c, row_stride, take, seen, c);
      if (c < p_.channels)
        columns<1>(Part{static_cast<int>(p_.channels - c)}, x + seen * row_stride + c, row_stride, take, seen, c);
      seen += take;
    }
    to_groups(static_cast<double>(pixels), channel_bias, groups);
  }

 private:
  // kVectors neighbouring vectors of channels over the pixels of one chunk, merged into the slab's moments.
  template <int kVectors, class At>
  void columns(At at, const T* x, std::int64_t row_stride, std::int64_t pixels, std::int64_t seen, std::int64_t channel) {
    V mean[kVectors], rest[kVectors], square[kVectors];
    for (int j = 0; j < kVectors; ++j) mean[j] = rest[j] = square[j] = V(0);
    for (std::int64_t i = 0; i < pixels; ++i)
      for (int j = 0; j < kVectors; ++j) {
        prefetch(x + (i + pixels) * row_stride + j * kWidth<A>);  // the next chunk
        mean[j] += at.load(x + i * row_stride + j * kWidth<A>);
      }
    const A inverse = A(1) / static_cast<A>(pixels);
    for (int j = 0; j < kVectors; ++j) mean[j] *= inverse;
    for (std::int64_t i = 0; i < pixels; ++i)
      for (int j = 0; j < kVectors; ++j) {
        const V d = at.load(x + i * row_stride + j * kWidth<A>) - mean[j];
        rest[j] += d;
        square[j] = madd<A>(d, d, square[j]);
      }
    const A share = static_cast<A>(pixels) / static_cast<A>(seen + pixels);
    for (int j = 0; j < kVectors; ++j) {
      A* const pivot_at = pivot_.data() + channel + j * kWidth<A>;
      A* const offset_at = offset_.data() + channel + j * kWidth<A>;
      A* const m2_at = m2_.data() + channel + j * kWidth<A>;
      const V missed = rest[j] * inverse;
      V chunk_m2 = square[j] - missed * rest[j];
      stdx::where(chunk_m2 < A(0), chunk_m2) = A(0);
      if (seen == 0) {
        store(pivot_at, mean[j]), store(offset_at, missed), store(m2_at, chunk_m2);
      } else {
        const V old = load(offset_at), delta = (mean[j] - load(pivot_at)) + missed - old;
        store(offset_at, madd<A>(delta, V(share), old));
        store(m2_at, madd<A>(delta * delta, V(share * static_cast<A>(seen)), load(m2_at) + chunk_m2));
      }
    }
  }

  void to_groups(double pixels, const A* channel_bias, Moments* groups) {
    for (std::int64_t g = 0; g < p_.groups; ++g) {
      const std::int64_t first = g * p_.per_group;
      double mean = 0, m2 = 0;
      for (std::int64_t i = first; i < first + p_.per_group; ++i) mean += channel_mean(i) + channel_bias[i];
      mean /= static_cast<double>(p_.per_group);
      for (std::int64_t i = first; i < first + p_.per_group; ++i) {
        const double delta = channel_mean(i) + channel_bias[i] - mean;
        m2 += m2_[i] + pixels * delta * delta;
      }
      groups[g] = {pixels * static_cast<double>(p_.per_group), mean, m2};
    }
  }

  double channel_mean(std::int64_t i) const { return static_cast<double>(pivot_[i]) + static_cast<double>(offset_[i]); }

  const Problem& p_;
  std::int64_t padded_;
  std::vector<A> pivot_, offset_, m2_;  // the mean is pivot + offset: a mean of 1e4 leaves no digits for its changes
};

template <class T, bool kSilu>
void forward_channels_last(const Problem& p, const T* x, Rows rows, T* y, opmath_t<T>* mean, opmath_t<T>* rstd) {
  using A = opmath_t<T>;
  const Slabs slabs(p);
  std::vector<Moments> parts(p.n * slabs.count * p.groups);

  const auto take_moments = [&](SlabMoments<T>& slab_moments, std::int64_t n, std::int64_t slab, const A* channel_bias) {
    const std::int64_t first = slab * slabs.slab;
    slab_moments.run(slabs, x + n * rows.batch_stride + first * rows.row_stride, rows.row_stride,
                     std::min(slabs.slab, p.pixels - first), channel_bias, parts.data() + (n * slabs.count + slab) * p.groups);
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
  const auto apply = [&](std::int64_t n, std::int64_t slab, const AffineArrays<A>& affine, std::int64_t at_map,
                         std::int64_t ahead) {
    const std::int64_t first = slab * slabs.slab, last = std::min(first + slabs.slab, p.pixels);
    for (std::int64_t i = first; i < last; ++i)
      apply_elements<T, kSilu>(x + n * rows.batch_stride + i * rows.row_stride, y + (n * p.pixels + i) * p.channels, p.channels, affine, at_map, ahead);
  };

  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  if (p.n % threads == 0 || p.n >= 4 * threads || slabs.count == 1) {
    const bool fits = p.channels * p.pixels * static_cast<std::int64_t>(sizeof(T)) <= kPrefetchImageBytes;
    const std::int64_t ahead = fits ? rows.batch_stride : 0;
    parallel(p.n, p.elements(), [&](std::int64_t begin, std::int64_t end) {
      SlabMoments<T> slab_moments(p);
      Channels<A> channels(p.channels);
      AffineArrays<A> affine(p.channels);
      for (std::int64_t n = begin; n < end; ++n) {
        channels.read(p, n, 0, p.channels);
        for (std::int64_t slab = 0; slab < slabs.count; ++slab) take_moments(slab_moments, n, slab, channels.channel_bias);
        finish(n, channels, affine, 0);
        // Backwards: what the statistics read last is still in the cache.
        for (std::int64_t slab = slabs.count - 1; slab >= 0; --slab) apply(n, slab, affine, 0, ahead);
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
    for (std::int64_t i = end - 1; i >= begin; --i) apply(i / slabs.count, i % slabs.count, affine, i / slabs.count * p.channels, 0);
  });
}

// Fills `output`, and `mean` and `rstd` where they are wanted.
void forward(const Problem& p, const Tensor& input, Tensor& output, Tensor* mean, Tensor* rstd) {
  Tensor x = input;
  const Rows rows = as_rows(x, p.channels_last);
  dispatch_dtype("group_norm", input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    A* m = mean ? static_cast<A*>(mean->mutable_data_ptr()) : nullptr;
    A* r = rstd ? static_cast<A*>(rstd->mutable_data_ptr()) : nullptr;
    if (p.elements() == 0) {  // no element has no mean
      if (m) std::fill_n(m, p.n * p.groups, std::numeric_limits<A>::quiet_NaN());
      if (r) std::fill_n(r, p.n * p.groups, std::numeric_limits<A>::quiet_NaN());
      return;
    }
    const T* in = static_cast<const T*>(x.data_ptr());
    T* out = static_cast<T*>(output.mutable_data_ptr());
    if (p.channels_last && p.silu) forward_channels_last<T, true>(p, in, rows, out, m, r);
    if (p.channels_last && !p.silu) forward_channels_last<T, false>(p, in, rows, out, m, r);
    if (!p.channels_last && p.silu) forward_contiguous<T, true>(p, in, rows, out, m, r);
    if (!p.channels_last && !p.silu) forward_contiguous<T, false>(p, in, rows, out, m, r);
  });
}

Tensor group_norm(const Tensor& input, std::int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
                  OptionalTensor channel_bias, OptionalTensor scale, OptionalTensor shift, double eps, std::int64_t activation) {
  const Problem p = make_problem("group_norm", input, num_groups, weight, bias, channel_bias, scale, shift, eps, activation);
  Tensor output = empty_dense(input, is_channels_last(input), input.scalar_type());
  forward(p, input, output, nullptr, nullptr);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& input, std::int64_t num_groups, OptionalTensor weight,
                                                  OptionalTensor bias, OptionalTensor channel_bias, OptionalTensor scale,
                                                  OptionalTensor shift, double eps, std::int64_t activation) {
  const Problem p = make_problem("group_norm", input, num_groups, weight, bias, channel_bias, scale, shift, eps, activation);
  const ScalarType opmath = opmath_type(input.scalar_type());
  Tensor output = empty_dense(input, is_channels_last(input), input.scalar_type());
  Tensor mean = empty_contiguous({p.n, p.groups}, opmath), rstd = empty_contiguous({p.n, p.groups}, opmath);
  forward(p, input, output, &mean, &rstd);
  return {output, mean, rstd};
}

}  // namespace
}  // namespace fastgen::group_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&fastgen::group_norm::group_norm));
  m.impl("group_norm_fwd", TORCH_BOX(&fastgen::group_norm::group_norm_fwd));
}
