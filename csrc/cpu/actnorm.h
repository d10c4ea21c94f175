// What the kernels of actnorm share: how the input lies, and the three numbers of a channel.
//
// Planes: a channel after the other, runs of positions with numbers held in registers. Rows: the channels of a position side by side;
// short rows that follow each other without gaps are taken several at a time, beside as many copies of the numbers, so that few
// channels fill vectors too. Samples without positions, [N, C], are positions of one sample.
#pragma once

#include <cmath>

#include "common/runs.h"

namespace fastgen::actnorm {

inline constexpr std::int64_t kLongest = 1024;  // positions of a run of planes: 64 additions to each lane of a sum in fp32
inline constexpr std::int64_t kRow = 512;       // elements of a row of several positions, at most
inline constexpr std::int64_t kRows = 32;       // such rows a block: so many additions to a sum in fp32

struct Problem {
  const char* op;
  bool channels_last, vectors, rows;
  std::int64_t channels, n, positions;

  Problem(const char* op, const Tensor& input) : op(op), channels_last(is_channels_last(input)) {
    check_floating(op, "input", input);
    FASTGEN_CHECK(input.dim() >= 2, op, ": input must be [N, C, *]");
    channels = input.size(1), n = input.size(0), positions = SliceSizes(input, 1).count;
    rows = in_rows(input), vectors = positions == 1;
    if (vectors) positions = n, n = 1;
  }
  std::int64_t elements() const { return n * channels * positions; }

  // Replaces `t` by a copy where it does not lie as the input is read.
  SliceStrides strides(Tensor& t) const {
    const SliceStrides s = as_slices(t, 1, rows);
    return vectors ? SliceStrides{1, s.sample, 0} : s;
  }
};

// Rows in blocks, each of one sample: what a thread takes, and what is summed alone.
struct RowBlocks {
  std::int64_t positions, together, block, a_sample;  // positions of a row, and of a block; blocks of a sample

  RowBlocks(const Problem& p, std::initializer_list<const SliceStrides*> all) : positions(p.positions), together(1) {
    const auto dense = [&](const SliceStrides* s) { return s->apart == p.channels || p.positions == 1; };
    if (std::all_of(all.begin(), all.end(), dense)) together = std::max<std::int64_t>(kRow / std::max<std::int64_t>(p.channels, 1), 1);
    block = together * kRows;
    a_sample = (positions + block - 1) / block;
  }

  // Calls f(position, positions) for the rows of block `item`.
  template <class F>
  void for_rows(std::int64_t item, const F& f) const {
    const std::int64_t first = item % a_sample * block, last = std::min(first + block, positions);
    for (std::int64_t at = first; at < last; at += together) f(at, std::min(together, last - at));
  }
};

// y = (x + before) slope + after, a number each a channel, `copies` times over.
template <class A>
struct Affine {
  std::vector<A> before, slope, after;
  double log_slopes = 0;  // the sum of their logarithms

  Affine(const char* op, std::int64_t channels, const OptionalTensor& scale, const OptionalTensor& shift, bool log_scale, bool shift_first,
         bool inverse)
      : before(channels), slope(channels), after(channels) {
    std::vector<double> s(channels), t(channels);
    Parameter(op, "scale", scale, false, 0, channels).read(0, 0, channels, 1.0, s.data());
    Parameter(op, "shift", shift, false, 0, channels).read(0, 0, channels, 0.0, t.data());
    for (std::int64_t c = 0; c < channels; ++c) {
      FASTGEN_CHECK(log_scale || s[c] != 0, "actnorm: scale must not be 0, got scale[", c, "] = 0");
      log_slopes += (log_scale ? s[c] : std::log(std::abs(s[c]))) * (inverse ? -1 : 1);
      slope[c] = static_cast<A>(log_scale ? std::exp(inverse ? -s[c] : s[c]) : inverse ? 1 / s[c] : s[c]);
      (shift_first != inverse ? before : after)[c] = static_cast<A>(inverse ? -t[c] : t[c]);
    }
  }
  void repeat(std::int64_t copies) {
    for (auto* v : {&before, &slope, &after}) {
      const std::vector<A> once = *v;
      for (std::int64_t i = 1; i < copies; ++i) v->insert(v->end(), once.begin(), once.end());
    }
  }
};

}  // namespace fastgen::actnorm
