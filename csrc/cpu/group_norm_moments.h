// Statistics of groups of channels, for group_norm and group_norm_affine.
//
// They are taken over chunks small enough for the first-level cache, each in two passes (its mean, then the squared deviations from
// it), and chunks are merged in a fixed order in fp64. Chunks and slabs depend on the shape alone, never on the number of threads, so
// the bits do not either.
#pragma once

#include "group_norm.h"

namespace fastgen::group_norm {

inline constexpr std::int64_t kChunk = 2048;        // elements of a contiguous chunk: 8 KB in fp32
inline constexpr std::int64_t kChunkPlane = 4096;   // elements of a channels-last chunk: 16 KB, so that the next one fits L1 too
inline constexpr std::int64_t kSlab = 65536;        // elements of a channels-last slab
inline constexpr std::int64_t kStage = 512;         // rows shorter than this take their channel bias through a staged copy

// A group of per_group rows of `pixels` elements as a list of chunks.
template <class T>
class ContiguousGroup {
  using A = opmath_t<T>;

 public:
  ContiguousGroup(const Problem& p, Run<T> x) : p_(p), x_(x), biased_(p.channel_bias.given()) {
    by_channel_ = biased_ && p.pixels >= kStage;
    per_row_ = (p.pixels + kChunk - 1) / kChunk;
    chunks_ = by_channel_ ? p.per_group * per_row_ : (p.group_size() + kChunk - 1) / kChunk;
  }

  std::int64_t chunks() const { return chunks_; }

  // `channel_bias`: that of the group's channels.
  Moments moments(std::int64_t chunk, const A* channel_bias) const {
    if (by_channel_) {  // the bias only moves the mean of a row
      const std::int64_t channel = chunk / per_row_, first = chunk % per_row_ * kChunk;
      Moments m = chunk_moments(x_.at(channel * p_.pixels + first), std::min(kChunk, p_.pixels - first));
      m.mean += channel_bias[channel];
      return m;
    }
    const std::int64_t first = chunk * kChunk, count = std::min(kChunk, p_.group_size() - first);
    const bool two = first < x_.seam && x_.seam < first + count;  // a piece of either input
    if (!biased_ && !two) return chunk_moments(x_.at(first), count);
    alignas(64) A staged[kChunk];
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t channel = (first + i) / p_.pixels;
      const std::int64_t run = std::min(count - i, (channel + 1) * p_.pixels - (first + i));
      const Vec<A> add(channel_bias[channel]);
      const T* const x = x_.at(first + i);
      for_vectors<A>(run, [&](std::int64_t k, auto at) { at.store(staged + i + k, at.load(x + k) + add); });
      i += run;
    }
    return chunk_moments(staged, count);
  }

 private:
  const Problem& p_;
  Run<T> x_;
  bool biased_, by_channel_;
  std::int64_t per_row_, chunks_;
};

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
      : p_(p), second_(padded(p.seam) - p.seam), padded_(padded(p.seam) + padded(p.channels - p.seam)), pivot_(padded_), offset_(padded_),
        m2_(padded_) {}

  // Of pixels [first, first + pixels) of sample n.
  void run(const Slabs& slabs, const Pieces<T>& pieces, std::int64_t n, std::int64_t first, std::int64_t pixels, const A* channel_bias,
           Moments* groups) {
    std::int64_t seen = 0;
    while (seen < pixels) {
      const std::int64_t take = std::min(slabs.chunk, pixels - seen);
      pieces.each([&](const Piece<T>& of) { chunk(of.pixel(n, first + seen), of.rows.row_stride, take, seen, of.channels(), at(of.first)); });
      seen += take;
    }
    to_groups(static_cast<double>(pixels), channel_bias, groups);
  }

 private:
  static std::int64_t padded(std::int64_t channels) { return (channels + kWidth<A> - 1) / kWidth<A> * kWidth<A>; }
  // Where channel i is kept: those of the second input begin a vector.
  std::int64_t at(std::int64_t i) const { return i < p_.seam ? i : i + second_; }

  // `channels` of the pixels of one chunk, kept from `to` on.
  void chunk(const T* x, std::int64_t row_stride, std::int64_t pixels, std::int64_t seen, std::int64_t channels, std::int64_t to) {
    std::int64_t c = 0;
    for (; c + 4 * kWidth<A> <= channels; c += 4 * kWidth<A>) columns<4>(Whole{}, x + c, row_stride, pixels, seen, to + c);
    for (; c + kWidth<A> <= channels; c += kWidth<A>) columns<1>(Whole{}, x + c, row_stride, pixels, seen, to + c);
    if (c < channels) columns<1>(Part{static_cast<int>(channels - c)}, x + c, row_stride, pixels, seen, to + c);
  }

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
        m2 += m2_[at(i)] + pixels * delta * delta;
      }
      groups[g] = {pixels * static_cast<double>(p_.per_group), mean, m2};
    }
  }

  double channel_mean(std::int64_t i) const { return static_cast<double>(pivot_[at(i)]) + static_cast<double>(offset_[at(i)]); }

  const Problem& p_;
  std::int64_t second_, padded_;
  std::vector<A> pivot_, offset_, m2_;  // the mean is pivot + offset: a mean of 1e4 leaves no digits for its changes
};

}  // namespace fastgen::group_norm
