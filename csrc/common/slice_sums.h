// Sums over slices, channel by channel: of the slices of a sample, or of all. Blocks of slices, which depend on the shape alone, are
// summed by whoever comes in the dtype of the arithmetic, and the blocks' sums added in fp64 in a fixed order, some columns a thread.
#pragma once

#include <algorithm>
#include <array>

#include "common/slices.h"

namespace fastgen {

inline constexpr std::int64_t kColumns = 64;       // channels that one thread adds up
inline constexpr std::int64_t kBlockSlices = 32;   // at most: so many additions to a sum in fp32
inline constexpr std::int64_t kManyBlocks = 16;    // of few slices blocks are smaller, so that all threads find something

// All slices in `groups`, the samples or one of all, and the groups in blocks of a multiple of `together` slices.
struct SliceBlocks {
  std::int64_t groups, slices, block, a_group;  // the latter: slices and blocks of a group

  SliceBlocks(const SliceSizes& sizes, bool by_sample, std::int64_t together) {
    groups = by_sample ? sizes.n : 1;
    slices = sizes.slices() / std::max<std::int64_t>(groups, 1);
    const std::int64_t share = (sizes.slices() + kManyBlocks - 1) / kManyBlocks;
    block = std::clamp<std::int64_t>((share + together - 1) / together * together, together, kBlockSlices);
    a_group = (slices + block - 1) / block;
  }
  // Blocks of whatever the caller cuts a sample into, `a_sample` of them.
  SliceBlocks(std::int64_t n, std::int64_t a_sample, bool by_sample)
      : groups(by_sample ? n : 1), slices(0), block(0), a_group(by_sample ? a_sample : n * a_sample) {}

  std::int64_t count() const { return groups * a_group; }

  struct Range {
    std::int64_t group, first, last;  // slices [first, last)
  };
  Range operator[](std::int64_t item) const {
    const std::int64_t group = item / a_group, first = group * slices + item % a_group * block;
    return {group, first, std::min(first + block, (group + 1) * slices)};
  }
};

using ColumnTotals = std::array<std::array<double, kColumns>, 3>;

// Calls f(first, columns, totals_of) for all columns [0, size), some at a time; totals_of(group) are the sums of that group, of `parts`
// [blocks, sums, size].
template <class A, class F>
void for_columns(const SliceBlocks& blocks, std::int64_t sums, std::int64_t size, const A* parts, const F& f) {
  parallel((size + kColumns - 1) / kColumns, blocks.count() * sums * size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kColumns; first < std::min(end * kColumns, size); first += kColumns) {
      const std::int64_t columns = std::min(kColumns, size - first);
      f(first, columns, [&](std::int64_t group) {
        ColumnTotals totals{};
        for (std::int64_t block = group * blocks.a_group; block < (group + 1) * blocks.a_group; ++block)
          for (std::int64_t k = 0; k < sums; ++k)
            for (std::int64_t c = 0; c < columns; ++c) totals[k][c] += parts[(block * sums + k) * size + first + c];
        return totals;
      });
    }
  });
}

}  // namespace fastgen
