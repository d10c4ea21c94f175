// The last step of a convolution by tiles: products to pixels.
//
// A thread owns chunks of output channels of rows of tiles: transform, bias, embedding, residual and scale, one store.
#pragma once

#include "_convolution_moments.h"
#include "_convolution_values.h"

namespace fastgen::convolution {

// What is added to a chunk of channels of a row of tiles, and where it goes.
template <class T>
struct Finish {
  const Problem& p;
  const Image<T>& output;
  const Image<const T>* residual;  // nullptr where there is none
  alignas(64) float base[kChunk] = {};  // bias + embedding

  void take_channels(std::int64_t sample, std::int64_t first, std::int64_t count) {
    alignas(64) float bias[kChunk];
    p.bias.read(0, first, count, 0.0f, bias);
    p.embedding.read(sample, first, count, 0.0f, base);
    for (std::int64_t c = 0; c < count; ++c) base[c] += bias[c];
  }

  // Neighbours along the innermost dimension: pixels or channels.
  template <class At>
  FASTGEN_INLINE void put(At at, VecF value, VecF added, std::int64_t n, std::int64_t c, std::int64_t y, std::int64_t x) const {
    put(at, value, added, output.at(n, c, y, x), residual ? residual->at(n, c, y, x) : nullptr);
  }
  // To `to`, with what is at `beside` unless that is nullptr.
  template <class At>
  FASTGEN_INLINE void put(At at, VecF value, VecF added, T* to, const T* beside) const {
    value += added;
    if (beside) value += at.load(beside);
    at.store(to, value * p.output_scale);
  }
};

// Chunks of outputs of rows of tiles, by one thread.
template <class G, class T>
class Outputs {
  static constexpr int m = G::outputs, scale = G::scale;

 public:
  // `gathered`: nullptr where no moments are wanted.
  Outputs(const Problem& p, const Groups<G>& g, const Image<T>& output, const Image<const T>* residual, const Gathered* gathered)
      : p_(p), g_(g), finish_{p, output, residual}, gathered_(gathered), columns_(g.tiles_of_row * m * scale),
        staged_(p.channels_last ? 0 : m * scale * columns_ * kChunk) {}

  // The outputs from `first` on of a row of tiles of all samples; `tile`: their products, of its first tile.
  void make(std::int64_t row, std::int64_t first, const float* tile) {
    const std::int64_t sample = row / g_.rows_of_image, top = row % g_.rows_of_image * m, height = std::min<std::int64_t>(m, p_.height - top);
    const std::int64_t count = std::min(kChunk, p_.outputs - first);
    finish_.take_channels(sample, first, count);
    for (std::int64_t t = 0; t < g_.tiles_of_row; ++t, tile += g_.product_stride) {
      const std::int64_t left = t * m, width = std::min<std::int64_t>(m, p_.width - left);
      for_vectors<float>(count, [&](std::int64_t c, auto at) {
        const VecF added = load(finish_.base + c);
        for_phases<G>([&]<int of_y, int of_x>() {
          VecF half[m][G::side];  // [y][point of x]
          for (int j = G::first(of_x); j < G::last(of_x); ++j) {
            VecF points[G::side], values[m];
            for (int k = G::first(of_y); k < G::last(of_y); ++k)
              points[k] = load(tile + kBlocks<G>.at[of_y][of_x][k][j] * g_.products_of_block + c);
            output_values<G, of_y>(points, values);
            for (int y = 0; y < m; ++y) half[y][j] = values[y];
          }
          for (int y = 0; y < height; ++y) {
            VecF values[m];
            output_values<G, of_x>(half[y], values);
            for (int x = 0; x < width; ++x) {
              const std::int64_t of_row = y * scale + of_y, column = (left + x) * scale + of_x;
              if (p_.channels_last) finish_.put(at, values[x], added, sample, first + c, top * scale + of_row, column);
              else store(staged_.get() + (of_row * columns_ + column) * kChunk + c, values[x]);
            }
          }
        });
      });
    }
    if (!p_.channels_last) put_staged(sample, first, count, top, height);
    if (gathered_) gathered_->take(finish_.output.data, sample, row % g_.rows_of_image, first, count);
  }

 private:
  void put_staged(std::int64_t sample, std::int64_t first, std::int64_t count, std::int64_t top, std::int64_t height) const {
    for (std::int64_t c = 0; c < count; c += kWidthF)
      for (std::int64_t y = 0; y < height * scale; ++y)
        for_vectors<float>(p_.width * scale, [&](std::int64_t x, auto at) {
          VecF square[kWidthF];
          for (std::int64_t k = 0; k < kWidthF; ++k)
            square[k] = load(staged_.get() + (y * columns_ + std::min(x + k, p_.width * scale - 1)) * kChunk + c);
          transpose(square);
          for (std::int64_t k = 0; k < std::min(kWidthF, count - c); ++k)
            finish_.put(at, square[k], VecF(finish_.base[c + k]), sample, first + c + k, top * scale + y, x);
        });
  }

  const Problem& p_;
  const Groups<G>& g_;
  Finish<T> finish_;
  const Gathered* gathered_;
  std::int64_t columns_;
  Scratch<float> staged_;  // [rows][columns][kChunk]
};

template <class G, class T>
void make_outputs(const Problem& p, const Groups<G>& g, std::int64_t first_row, std::int64_t rows, const float* products,
                  const Image<T>& output, const Image<const T>* residual, const Gathered* gathered) {
  const std::int64_t chunks = ceil_div(p.outputs, kChunk);
  parallel(rows * chunks, rows * g.tiles_of_row * p.outputs * G::blocks, [&](std::int64_t begin, std::int64_t end) {
    Outputs<G, T> outputs(p, g, output, residual, gathered);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i / chunks, first = i % chunks * kChunk;
      outputs.make(first_row + row, first, products + row * g.tiles_of_row * g.product_stride + first);
    }
  });
}

}  // namespace fastgen::convolution
