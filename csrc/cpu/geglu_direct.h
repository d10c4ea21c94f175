// geglu in bfloat16 by the tiles of a matrix unit (common/simd/matrix_tiles.h), sums in fp32 and rounded once.
//
// The rows of the input are laid out once as tiles of 16 rows by 32 channels, 1 KB each and those of a row of tiles one after the
// other. Packed weights hold a panel of kPanel features of h and the panel of their gates in turn. A thread owns blocks of rows that stay
// in its second-level cache and a few pairs of panels: two tiles of rows by the two panels of a pair are four tiles of sums. Beside
// the products of one such square the one before gets its bias, GELU and multiplication, a row at a time, and is stored; the weights
// of the next pair are asked for on the way. The order of every sum is that of the channels: the bits are the same on any number of
// threads.
#pragma once

#include <memory>

#include "_product.h"
#include "common/scratch.h"
#include "common/simd/gelu.h"
#include "common/simd/matrix_tiles.h"
#include "common/tensor.h"

#if FASTGEN_HAS_MATRIX_TILES

namespace fastgen::geglu {

inline constexpr std::int64_t kTileRows = matrix_tiles::kRows, kTileChannels = 2 * matrix_tiles::kWords;
inline constexpr std::int64_t kTileSize = kTileRows * kTileChannels, kTileBytes = kTileChannels * sizeof(BFloat16);
inline constexpr std::int64_t kInputBytes = 1 << 19;  // of a block of rows: a quarter of a second-level cache of 2 MB
inline constexpr std::int64_t kTiledPairs = 8;        // of panels that a thread takes at once

// [2 panels][blocks of channels][16 pairs of channels][kPanel features][2]: h and gates in turn, zero beyond the last. A thread owns panels.
template <class T>
void pack_direct(const Tensor& weight, BFloat16* packed) {
  const std::int64_t features = weight.size(0) / 2, channels = weight.size(1), blocks = ceil_div(channels, kTileChannels);
  const T* const w = static_cast<const T*>(weight.data_ptr());
  const std::int64_t row = weight.stride(0), column = weight.stride(1), panels = 2 * ceil_div(features, kPanel);
  parallel(panels, weight.numel(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel)
      for (std::int64_t k = 0; k < kPanel; ++k) {
        const std::int64_t feature = panel / 2 * kPanel + k;
        const T* const from = w + (panel % 2 * features + feature) * row;
        BFloat16* const to = packed + panel * blocks * kTileSize + 2 * k;
        for (std::int64_t c = 0; c < blocks * kTileChannels; ++c) {
          const bool there = feature < features && c < channels;
          to[c / 2 * 2 * kPanel + c % 2] = narrow<BFloat16>(there ? static_cast<float>(widen(from[c * column])) : 0.0f);
        }
      }
  });
}

// Rows in tiles, zero beyond the last row and channel: [tiles][blocks][16][32].
inline void lay_out(const BFloat16* x, std::int64_t stride, std::int64_t count, std::int64_t channels, BFloat16* tiles) {
  const std::int64_t blocks = ceil_div(channels, kTileChannels), tall = ceil_div(count, kTileRows);
  parallel(tall, count * channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t block = 0; block < blocks; ++block)
        for (std::int64_t r = 0; r < kTileRows; ++r) {
          const std::int64_t row = t * kTileRows + r, c = block * kTileChannels, there = row < count ? std::min(kTileChannels, channels - c) : 0;
          BFloat16* const to = tiles + (t * blocks + block) * kTileSize + r * kTileChannels;
          if (there > 0) std::memcpy(to, x + row * stride + c, there * sizeof(BFloat16));
          if (there < kTileChannels) std::memset(to + there, 0, (kTileChannels - there) * sizeof(BFloat16));
        }
  });
}

// A square of sums, and where what becomes of it goes: `rows` rows of `count` features.
struct Square {
  alignas(64) float sums[2 * kTileRows][2 * kPanel];
  alignas(64) float bias[2 * kPanel];
  BFloat16* out = nullptr;
  std::int64_t stride = 0, count = 0, rows = 0, done = 0;

  // The next row, if one is left.
  template <Gelu kind>
  FASTGEN_INLINE bool step() {
    if (done == rows) return false;
    const float* const h = sums[done];
    BFloat16* const to = out + done++ * stride;
    for_vectors<float>(count, [&](std::int64_t i, auto at) {
      const VecF gate = load(h + kPanel + i) + load(bias + kPanel + i);
      at.store(to + i, (load(h + i) + load(bias + i)) * gelu<float, kind>(gate));
    });
    return true;
  }
};

// `tall` tiles of rows by a pair of panels over all blocks of channels. After each step, while the matrix unit works, beside(block).
template <int tall, class F>
void multiply_square(const BFloat16* above, const BFloat16* weights, std::int64_t blocks, float* sums, const F& beside) {
  namespace mt = matrix_tiles;
  const BFloat16 *const below = above + blocks * kTileSize, *const gates = weights + blocks * kTileSize;
  constexpr std::int64_t sum_bytes = 2 * kPanel * sizeof(float);
  mt::zero<0>(), mt::zero<1>(), mt::zero<2>(), mt::zero<3>();
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t at = block * kTileSize;
    mt::load<4>(above + at, kTileBytes);
    mt::load<6>(weights + at, kTileBytes);
    mt::multiply<0, 4, 6>();
    mt::load<7>(gates + at, kTileBytes);
    mt::multiply<1, 4, 7>();
    if constexpr (tall == 2) {
      mt::load<5>(below + at, kTileBytes);
      mt::multiply<2, 5, 6>();
      mt::multiply<3, 5, 7>();
    }
    beside(block);
  }
  mt::store<0>(sums, sum_bytes), mt::store<1>(sums + kPanel, sum_bytes);
  if constexpr (tall == 2) mt::store<2>(sums + kTileRows * 2 * kPanel, sum_bytes), mt::store<3>(sums + kTileRows * 2 * kPanel + kPanel, sum_bytes);
}

template <Gelu kind>
void forward_direct(const BFloat16* x, std::int64_t stride, std::int64_t count, std::int64_t channels, const BFloat16* weights,
                    std::int64_t features, const Parameter& bias, BFloat16* out) {
  const std::int64_t blocks = ceil_div(channels, kTileChannels), tall = ceil_div(count, kTileRows), panels = ceil_div(features, kPanel);
  const Scratch<BFloat16> memory(tall * blocks * kTileSize);
  BFloat16* const tiles = memory.get();
  lay_out(x, stride, count, channels, tiles);
  // Two tiles of rows a square, so many squares a block of rows.
  const std::int64_t squares = ceil_div(tall, 2), most = std::max<std::int64_t>(kInputBytes / (2 * blocks * kTileSize * sizeof(BFloat16)), 1);
  const std::int64_t parts = ceil_div(squares, most), shares = ceil_div(panels, kTiledPairs), pair_size = 2 * blocks * kTileSize;
  parallel(shares * parts, count * channels * features, [&](std::int64_t begin, std::int64_t end) {
    const matrix_tiles::Tiles registers;
    const auto one = std::make_unique<Square>(), other = std::make_unique<Square>();
    Square *now = one.get(), *before = other.get();
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t part = item % parts, top = part * squares / parts, bottom = (part + 1) * squares / parts;
      const std::int64_t first = item / parts * kTiledPairs, last = std::min(first + kTiledPairs, panels);
      for (std::int64_t pair = first; pair < last; ++pair) {
        const BFloat16* const of_pair = weights + pair * pair_size;
        const std::int64_t feature = pair * kPanel, of_panel = std::min(kPanel, features - feature);
        const std::int64_t steps = (bottom - top) * blocks, lines = ceil_div(pair_size * 2 / 64, steps);
        const char* ahead = reinterpret_cast<const char*>(of_pair + pair_size);
        for (std::int64_t square = top; square < bottom; ++square) {
          const std::int64_t row = square * 2 * kTileRows;
          for (std::int64_t half = 0; half < 2; ++half) bias.read(0, half * features + feature, of_panel, 0.0f, now->bias + half * kPanel);
          now->out = out + row * features + feature, now->stride = features, now->count = of_panel;
          now->rows = std::min(2 * kTileRows, count - row), now->done = 0;
          const std::int64_t at_once = ceil_div(before->rows, blocks);
          const auto beside = [&](std::int64_t) {
            for (std::int64_t k = 0; k < lines; ++k, ahead += 64) prefetch(ahead);
            for (std::int64_t k = 0; k < at_once && before->template step<kind>(); ++k) continue;
          };
          const BFloat16* const above = tiles + square * 2 * blocks * kTileSize;
          if (2 * square + 1 < tall) multiply_square<2>(above, of_pair, blocks, now->sums[0], beside);
          else multiply_square<1>(above, of_pair, blocks, now->sums[0], beside);
          std::swap(now, before);
        }
      }
    }
    while (before->template step<kind>()) continue;
  });
}

}  // namespace fastgen::geglu

#endif
