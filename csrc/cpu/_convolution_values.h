// The first step of a convolution by Winograd's tiles: pixels to values.
//
// A thread owns chunks of kChunk channels of rows of tiles. The rows of pixels below a row of tiles are staged once
// (_convolution_problem.h), in fp32, with zeros around the image; the transform runs over vectors of channels.
#pragma once

#include "_convolution.h"
#include "_convolution_problem.h"

namespace fastgen::convolution {

// Values and products of a group of rows that all threads share: half as much again as the packed weights, which each group reads once,
// within these. On an EPYC 7xx3 128 channels want 2 to 4 MiB (second-level caches), 320 channels at 64x64 24 MiB (one group: 0.8 of the
// time of three).
inline constexpr std::int64_t kLeastGroup = 2 << 20, kMostGroup = 64 << 20;

// Rows of tiles of all samples, one after the other, in groups; values [points][tiles][C] and products [blocks][tiles][product_stride] of
// one.
template <class G>
struct Groups {
  std::int64_t rows_of_image, tiles_of_row, rows, rows_of_group, value_stride, product_stride, values_of_point, products_of_block;

  // Groups that all threads share.
  explicit Groups(const Problem& p) : Groups(p, 0, round_up(p.outputs, kPanel)) {
    const std::int64_t bytes_of_row = tiles_of_row * (G::points * value_stride + G::blocks * product_stride) * 4;
    const std::int64_t weight_bytes = G::blocks * p.channels * product_stride * 4;
    const std::int64_t groups = ceil_div(rows * bytes_of_row, std::clamp(weight_bytes * 3 / 2, kLeastGroup, kMostGroup));
    take_rows(ceil_div(rows, std::min(groups, rows)));
  }

  // Groups of so many rows at most, with products of `stride` outputs at a time.
  Groups(const Problem& p, std::int64_t most, std::int64_t stride)
      : rows_of_image(ceil_div(p.height, G::outputs)), tiles_of_row(ceil_div(p.width, G::outputs)), rows(p.n * rows_of_image),
        value_stride(round_up(p.channels, kPanel)), product_stride(stride) {
    take_rows(most);
  }

 private:
  static std::int64_t round_up(std::int64_t x, std::int64_t unit) { return ceil_div(x, unit) * unit; }
  void take_rows(std::int64_t count) {
    rows_of_group = count;
    values_of_point = spread(count * tiles_of_row * value_stride), products_of_block = spread(count * tiles_of_row * product_stride);
  }
  // An odd number of cache lines, so that the points of a tile fall into different sets of a cache.
  static std::int64_t spread(std::int64_t floats) { return (floats / 16 | 1) * 16; }
};

// The rows of pixels below a row of tiles, channels [first, first + count) of them: [side][columns][kChunk] in fp32.
template <class G, class T, bool kSilu>
class Stage {
  static constexpr int m = G::outputs;

 public:
  Stage(const Problem& p, const Image<const T>& x, std::int64_t tiles_of_row)
      : p_(p), source_(p, x), row_((tiles_of_row * m + 2 * G::halo) * kChunk), memory_(G::side * row_) {}

  const float* row(int i) const { return memory_.get() + i * row_; }

  void take_channels(std::int64_t sample, std::int64_t first, std::int64_t count) { source_.take_channels(sample, first, count); }

  // The rows of pixels of a row of tiles; `next`: it lies below the last one, whose lowest rows are its first.
  void fill(std::int64_t row_of_tiles, bool next) {
    constexpr int shared = G::side - m;
    if (next && shared) std::memcpy(memory_.get(), row(m), shared * row_ * sizeof(float));
    for (int i = next ? shared : 0; i < G::side; ++i) fill_row(row_of_tiles * m + i - G::halo, memory_.get() + i * row_);
  }

 private:
  void fill_row(std::int64_t y, float* out) const {
    if (y < 0 || y >= p_.height) {
      std::memset(out, 0, row_ * sizeof(float));
      return;
    }
    float* const inside = out + G::halo * kChunk;
    std::memset(out, 0, G::halo * kChunk * sizeof(float));
    std::memset(inside + p_.width * kChunk, 0, (row_ - (p_.width + G::halo) * kChunk) * sizeof(float));
    source_.read_row(y, inside);
  }

  const Problem& p_;
  Source<T, kSilu> source_;
  std::int64_t row_;
  Scratch<float> memory_;
};

// A row of tiles, `count` channels: the columns are transformed once and shared by neighbouring tiles, then each tile's rows.
template <class G, class S>
void transform_values(const S& stage, std::int64_t tiles, std::int64_t count, float* values, std::int64_t value_stride,
                      std::int64_t values_of_point) {
  constexpr int m = G::outputs;
  alignas(64) float memory[G::side][G::side][kChunk];  // [column][point of y]
  float(*columns[G::side])[kChunk];
  for (int j = 0; j < G::side; ++j) columns[j] = memory[j];
  const auto take_column = [&](std::int64_t x, float(*column)[kChunk]) {
    for (std::int64_t c = 0; c < count; c += kWidthF) {
      VecF d[G::side], p[G::side];
      for (int i = 0; i < G::side; ++i) d[i] = load(stage.row(i) + x * kChunk + c);
      input_points<G>(d, p);
      for (int i = 0; i < G::side; ++i) store(column[i] + c, p[i]);
    }
  };
  for (int j = 0; j < G::side - m; ++j) take_column(j, columns[m + j]);
  for (std::int64_t t = 0; t < tiles; ++t, values += value_stride) {
    std::rotate(columns, columns + m, columns + G::side);
    for (int j = G::side - m; j < G::side; ++j) take_column(t * m + j, columns[j]);
    for (int i = 0; i < G::side; ++i)
      for (std::int64_t c = 0; c < count; c += kWidthF) {
        VecF d[G::side], p[G::side];
        for (int j = 0; j < G::side; ++j) d[j] = load(columns[j][i] + c);
        input_points<G>(d, p);
        for (int j = 0; j < G::side; ++j) store(values + (i * G::side + j) * values_of_point + c, p[j]);
      }
  }
}

// The pieces [begin, end) of chunks x rows, the rows from `first_row` on: their values, each point's [tiles][C].
template <class G, class T, bool kSilu>
void make_pieces_of_values(const Problem& p, const Groups<G>& g, const Image<const T>& x, std::int64_t first_row, std::int64_t rows,
                           std::int64_t begin, std::int64_t end, float* values) {
  Stage<G, T, kSilu> stage(p, x, g.tiles_of_row);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t chunk = i / rows, row = i % rows, sample = (first_row + row) / g.rows_of_image;
    const std::int64_t row_of_tiles = (first_row + row) % g.rows_of_image, first = chunk * kChunk;
    const std::int64_t count = std::min(kChunk, p.channels - first);
    const bool next = i > begin && row > 0 && row_of_tiles > 0;
    if (!next) stage.take_channels(sample, first, count);
    stage.fill(row_of_tiles, next);
    transform_values<G>(stage, g.tiles_of_row, count, values + row * g.tiles_of_row * g.value_stride + first, g.value_stride,
                        g.values_of_point);
  }
}

template <class G, class T, bool kSilu>
void make_values(const Problem& p, const Groups<G>& g, const Image<const T>& x, std::int64_t first_row, std::int64_t rows, float* values) {
  const std::int64_t chunks = ceil_div(p.channels, kChunk);
  parallel(chunks * rows, rows * g.tiles_of_row * p.channels * G::points, [&](std::int64_t begin, std::int64_t end) {
    make_pieces_of_values<G, T, kSilu>(p, g, x, first_row, rows, begin, end, values);
  });
}

}  // namespace fastgen::convolution
