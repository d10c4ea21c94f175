// The last step of a convolution by tiles: products to pixels.
//
// A thread owns chunks of output channels of rows of tiles: transform, bias, embedding, residual and scale, one store.
#pragma once

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

template <class G, class T>
void make_outputs(const Problem& p, const Groups<G>& g, std::int64_t first_row, std::int64_t rows, const float* products,
                  const Image<T>& output, const Image<const T>* residual) {
  constexpr int m = G::outputs, scale = G::scale;
  const std::int64_t chunks = ceil_div(p.outputs, kChunk), columns = g.tiles_of_row * m * scale;
  parallel(rows * chunks, rows * g.tiles_of_row * p.outputs * G::blocks, [&](std::int64_t begin, std::int64_t end) {
    Finish<T> finish{p, output, residual};
    const Scratch<float> staged(p.channels_last ? 0 : m * scale * columns * kChunk);  // [rows][columns][kChunk]
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i / chunks, first = i % chunks * kChunk, count = std::min(kChunk, p.outputs - first);
      const std::int64_t sample = (first_row + row) / g.rows_of_image, top = (first_row + row) % g.rows_of_image * m;
      const std::int64_t height = std::min<std::int64_t>(m, p.height - top);
      finish.take_channels(sample, first, count);
      for (std::int64_t t = 0; t < g.tiles_of_row; ++t) {
        const float* const tile = products + (row * g.tiles_of_row + t) * g.product_stride + first;
        const std::int64_t left = t * m, width = std::min<std::int64_t>(m, p.width - left);
        for_vectors<float>(count, [&](std::int64_t c, auto at) {
          const VecF added = load(finish.base + c);
          for_phases<G>([&]<int of_y, int of_x>() {
            VecF half[m][G::side];  // [y][point of x]
            for (int j = G::first(of_x); j < G::last(of_x); ++j) {
              VecF points[G::side], values[m];
              for (int k = G::first(of_y); k < G::last(of_y); ++k)
                points[k] = load(tile + kBlocks<G>.at[of_y][of_x][k][j] * g.products_of_block + c);
              output_values<G, of_y>(points, values);
              for (int y = 0; y < m; ++y) half[y][j] = values[y];
            }
            for (int y = 0; y < height; ++y) {
              VecF values[m];
              output_values<G, of_x>(half[y], values);
              for (int x = 0; x < width; ++x) {
                const std::int64_t of_row = y * scale + of_y, column = (left + x) * scale + of_x;
                if (p.channels_last) finish.put(at, values[x], added, sample, first + c, top * scale + of_row, column);
                else store(staged.get() + (of_row * columns + column) * kChunk + c, values[x]);
              }
            }
          });
        });
      }
      if (p.channels_last) continue;
      for (std::int64_t c = 0; c < count; c += kWidthF)
        for (std::int64_t y = 0; y < height * scale; ++y)
          for_vectors<float>(p.width * scale, [&](std::int64_t x, auto at) {
            VecF square[kWidthF];
            for (std::int64_t k = 0; k < kWidthF; ++k)
              square[k] = load(staged.get() + (y * columns + std::min(x + k, p.width * scale - 1)) * kChunk + c);
            transpose(square);
            for (std::int64_t k = 0; k < std::min(kWidthF, count - c); ++k)
              finish.put(at, square[k], VecF(finish.base[c + k]), sample, first + c + k, top * scale + y, x);
          });
    }
  });
}

}  // namespace fastgen::convolution
