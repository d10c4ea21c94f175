// Tensors [N, C, *] of which one channel is taken with another of the same position: runs of elements that lie side by side, along the
// positions of a channel (planes) or along the channels of a position (rows: channels-last, or one position).
#pragma once

#include <algorithm>

#include "common/slices.h"

namespace fastgen {

struct Run {
  std::int64_t n, channel, position, count;

  std::int64_t offset(const SliceStrides& s) const { return n * s.sample + channel * s.along + position * s.apart; }
};

struct Runs {
  bool rows;
  std::int64_t n, channels, positions, longest, pieces;  // of a channel: `pieces` runs of at most `longest` positions

  // All runs of `channels` channels of each sample of `like`.
  Runs(const Tensor& like, std::int64_t channels, bool rows, std::int64_t longest)
      : rows(rows), n(like.size(0)), channels(channels), positions(SliceSizes(like, 1).count), longest(longest),
        pieces((positions + longest - 1) / longest) {}

  std::int64_t elements() const { return n * channels * positions; }
  std::int64_t count() const { return rows ? n * positions : n * channels * pieces; }
  Run operator[](std::int64_t i) const {
    if (rows) return positions == 1 ? Run{i, 0, 0, channels} : Run{i / positions, 0, i % positions, channels};  // vectors: no division
    const std::int64_t plane = i / pieces, first = i % pieces * longest;
    return {plane / channels, plane % channels, first, std::min(longest, positions - first)};
  }
};

// Whether tensors laid out like `t` are read along their channels.
inline bool in_rows(const Tensor& t) { return is_channels_last(t) || SliceSizes(t, 1).count == 1; }

// [N, C, *] with another number of channels.
inline std::vector<std::int64_t> with_channels(const Tensor& t, std::int64_t channels) {
  auto sizes = sizes_of(t);
  sizes[1] = channels;
  return sizes;
}

}  // namespace fastgen
