// What forward and backward of invertible_conv1x1 share: one product by which all is done, and tiles of positions as it reads them.
//
//   sum[i][lane] += sum over r of a[i, r] b[r, lane]
//
// a is broadcast element by element, b comes in vectors. A tile of positions is read once, made z = x scale + shift on the way, and kept
// in the first-level cache as [C, kTile], whichever way the image lies: what is broadcast stands side by side, at offsets that are
// constants. Planes: the lanes are positions and i output channels; rows (channels-last, or vectors): the lanes are output channels and
// i positions, so that what is written is not turned over. Samples too small to fill a tile lie in one side by side; rows of samples
// that follow each other are those of one sample. Without positions, [N, C], samples are positions.
#pragma once

#include <algorithm>

#include "_tiles.h"
#include "common/runs.h"

namespace fastgen::invertible_conv1x1 {

// Sums that fill the registers: kTall<wide> x wide vectors, wide of b and one of a. Twelve and six divide the channels of a Glow, 12 2^k.
#if defined(__AVX512F__)
inline constexpr int kWide = 4;
template <int wide>
inline constexpr int kTall = wide <= 2 ? 12 : wide == 3 ? 8 : 6;
inline constexpr std::int64_t kPadding = 48;  // a multiple of all
#else
inline constexpr int kWide = 2;
template <int wide>
inline constexpr int kTall = wide == 1 ? 12 : 6;
inline constexpr std::int64_t kPadding = 48;
#endif

// Positions of a tile, and tiles of a block, whose sums over positions the backward takes alone: 1536 additions in fp32.
inline constexpr std::int64_t kTile = 192, kTiles = 8;
inline constexpr std::int64_t kUnit = 16;      // columns of a sample among others are padded to this, whole vectors of any dtype
inline constexpr std::int64_t kBlocks = 8;     // so many blocks there shall be before they are of several tiles

template <class A, int wide>
using Sums = Vec<A>[kTall<wide>][wide];

// a[i, r] is at a + i kRow + r a_step, b[r] at b + r b_step.
template <class A, int wide, std::int64_t kRow>
FASTGEN_INLINE void multiply(const A* a, std::int64_t a_step, const A* b, std::int64_t b_step, std::int64_t depth,
                             Sums<A, wide>& sum) {
  for (std::int64_t r = 0; r < depth; ++r, a += a_step, b += b_step) {
    Vec<A> right[wide];
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) right[v] = load(b + v * kWidth<A>);
#pragma GCC unroll 16
    for (int i = 0; i < kTall<wide>; ++i) {
      const Vec<A> left = in_all_lanes(a[i * kRow]);
#pragma GCC unroll 4
      for (int v = 0; v < wide; ++v) sum[i][v] = madd<A>(left, right[v], sum[i][v]);
    }
  }
}

// Calls f(first, wide) for all lanes [0, lanes), at most kWide vectors at a time, `wide` a constant.
template <class A, class F>
FASTGEN_INLINE void for_lanes(std::int64_t lanes, const F& f) {
  constexpr std::int64_t w = kWidth<A>;
  std::int64_t first = 0;
  for (; lanes - first >= kWide * w; first += kWide * w) f(first, std::integral_constant<int, kWide>());
  const std::int64_t rest = lanes - first;
  if constexpr (kWide > 2) {
    if (rest > 3 * w) return f(first, std::integral_constant<int, 4>());
    if (rest > 2 * w) return f(first, std::integral_constant<int, 3>());
  }
  if (rest > w) return f(first, std::integral_constant<int, 2>());
  if (rest > 0) f(first, std::integral_constant<int, 1>());
}

struct Problem {
  std::int64_t channels, n, positions, padded;  // padded: channels as tiles have them
  bool channels_last, vectors, rows;
  std::int64_t together = 1, pitch = kTile;  // samples of a tile, each in so many of its columns

  explicit Problem(const Tensor& input) : channels_last(is_channels_last(input)) {
    check_floating("invertible_conv1x1", "input", input);
    FASTGEN_CHECK(input.dim() >= 2, "invertible_conv1x1: input must be [N, C, *]");
    channels = input.size(1), n = input.size(0), positions = SliceSizes(input, 1).count;
    rows = in_rows(input), vectors = positions == 1, padded = tiles::round_up(channels, kPadding);
    if (vectors) positions = n, n = 1;
    if (rows || positions == 0 || 2 * positions > kTile) return;
    pitch = tiles::round_up(positions, kUnit), together = kTile / pitch;
  }
  std::int64_t elements() const { return n * channels * positions; }
  std::int64_t tiles_of_sample() const { return (positions + kTile - 1) / kTile; }
  std::int64_t tiles() const { return elements() == 0 ? 0 : together > 1 ? (n + together - 1) / together : n * tiles_of_sample(); }

  // Takes rows of samples that follow each other, in all of these, for those of one.
  void merge(std::initializer_list<SliceStrides*> all) {
    const auto follow = [&](const SliceStrides* s) { return s->sample == positions * s->apart; };
    if (!rows || n < 2 || !std::all_of(all.begin(), all.end(), follow)) return;
    positions *= n, n = 1;
  }

  // Replaces `t` by a copy where it does not lie as the input is read.
  SliceStrides strides(Tensor& t) const {
    const SliceStrides s = as_slices(t, 1, rows);
    return vectors ? SliceStrides{1, s.sample, 0} : s;
  }
};

inline void check_weight(const Problem& p, const Tensor& weight) {
  check_floating("invertible_conv1x1", "weight", weight);
  FASTGEN_CHECK(weight.dim() == 2 && weight.size(0) == p.channels && weight.size(1) == p.channels,
                "invertible_conv1x1: weight must be [C, C] with C = ", p.channels);
}

// The matrix as the product reads it, transposed: [C, padded outputs], zero beyond the last output.
template <class A>
struct Matrix {
  std::vector<A> values;
  std::int64_t row;

  template <class F>
  Matrix(const Problem& p, const F& element) : values(p.padded * p.channels), row(p.padded) {
    for (std::int64_t o = 0; o < p.channels; ++o)
      for (std::int64_t c = 0; c < p.channels; ++c) values[c * row + o] = element(o, c);
  }
};

// The numbers of [C, C] in the dtype of the arithmetic.
template <class A>
std::vector<A> read_weight(const Problem& p, const Tensor& weight) {
  std::vector<A> values(p.channels * p.channels);
  const Parameter rows("invertible_conv1x1", "weight", weight, true, p.channels, p.channels);
  for (std::int64_t o = 0; o < p.channels; ++o) rows.read(o, 0, p.channels, A(0), values.data() + o * p.channels);
  return values;
}

// x -> (x + before) slope + after, channel by channel; nothing where there is no `slope`.
template <class A>
struct Affine {
  const A *before = nullptr, *slope = nullptr, *after = nullptr;
};

// What a tile is of: `count` positions of each of `samples` samples, in columns of the tile that begin `pitch` apart.
struct Piece {
  std::int64_t n, first, count, samples, columns;

  Piece(const Problem& p, std::int64_t tile) {
    const std::int64_t of_sample = p.tiles_of_sample();
    n = p.together > 1 ? tile * p.together : tile / of_sample, first = p.together > 1 ? 0 : tile % of_sample * kTile;
    samples = std::min(p.together, p.n - n), count = std::min(kTile, p.positions - first);
    columns = p.together > 1 ? samples * p.pitch : count;
  }

  // Where it begins.
  template <class T>
  T* in(T* data, const SliceStrides& s) const { return data + n * s.sample + first * s.apart; }
};

// z [C, kTile] of a part; zero to the next whole vector of each sample, where there is no affine.
template <class A, class T>
void read_tile(const Problem& p, const Piece& part, const T* data, const SliceStrides& strides, const Affine<A>& affine, A* z) {
  using V = Vec<A>;
  const T* x = part.in(data, strides);
  for (std::int64_t sample = 0; sample < part.samples; ++sample, x += strides.sample, z += p.pitch) {
    const auto take = [&](std::int64_t c, const auto* from) {
      const V before(affine.before[c]), slope(affine.slope[c]), after(affine.after[c]);
      for_vectors<A>(part.count, [&](std::int64_t i, auto at) { store(z + c * kTile + i, madd<A>(at.load(from + i) + before, slope, after)); });
    };
    if (p.rows || affine.slope == nullptr)
      tiles::read_panel<A>(x, strides.along, p.rows ? strides.apart : 1, p.channels, part.count, z, kTile);
    if (affine.slope == nullptr) continue;
    for (std::int64_t c = 0; c < p.channels; ++c) {
      if (p.rows) take(c, z + c * kTile);
      else take(c, x + c * strides.along);
    }
  }
}

// y = matrix z + bias for the positions of a part.
template <class A, class T>
void write_product(const Problem& p, const Piece& part, const Matrix<A>& matrix, const A* bias, const A* z, T* data, const SliceStrides& strides) {
  using V = Vec<A>;
  constexpr std::int64_t w = kWidth<A>;
  T* const y = part.in(data, strides);
  const std::int64_t lanes = p.rows ? p.channels : part.columns, tall_all = p.rows ? part.count : p.channels;
  for_lanes<A>(lanes, [&](std::int64_t first, auto wide) {
    constexpr int kVectors = wide, tall = kTall<kVectors>;
    T* to[kVectors];  // of each vector: where it goes, in the first of what is `across`, and how many elements of it
    std::int64_t rest[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t lane = first + v * w, sample = p.rows ? 0 : lane / p.pitch, offset = lane - sample * p.pitch;
      to[v] = y + sample * strides.sample + offset, rest[v] = std::min(p.rows ? lanes - lane : part.count - offset, lanes - lane);
    }
    for (std::int64_t top = 0; top < tall_all; top += tall) {
      Sums<A, kVectors> sum;
      for (int i = 0; i < tall; ++i)
        for (int v = 0; v < kVectors; ++v)
          sum[i][v] = bias == nullptr ? V(A(0)) : p.rows ? load(bias + first + v * w) : in_all_lanes(bias[top + i]);
      if (p.rows) multiply<A, kVectors, 1>(z + top, kTile, matrix.values.data() + first, matrix.row, p.channels, sum);
      else multiply<A, kVectors, 1>(matrix.values.data() + top, matrix.row, z + first, kTile, p.channels, sum);
      const std::int64_t across = p.rows ? strides.apart : strides.along;
      for (int i = 0; i < std::min<std::int64_t>(tall, tall_all - top); ++i)
        for (int v = 0; v < kVectors; ++v) {
          if (rest[v] >= w) store(to[v] + (top + i) * across, sum[i][v]);
          else if (rest[v] > 0) store_part(to[v] + (top + i) * across, sum[i][v], static_cast<int>(rest[v]));
        }
    }
  });
}

}  // namespace fastgen::invertible_conv1x1
