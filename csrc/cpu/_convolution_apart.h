// A convolution by tiles whose threads keep their rows of tiles to themselves: from pixels to values, products and pixels again, a few
// rows and output channels at a time, so that nothing but weights comes from beyond the thread's second-level cache.
//
// Where all threads share a group of rows (_convolution_packed.h) half of what each reads was written by the others: on a Xeon, whose
// cores exchange a changed line through a slow mesh, values and outputs of 128 channels took as long as their products. Here every
// part of rows reads all weights, which are the same for all and are asked for ahead (Product::next); so are, a few lines beside each
// product, the pixels of the next part and what is written and added.
#pragma once

#if defined(__linux__)
#include <unistd.h>
#endif

#include "_convolution_outputs.h"

namespace fastgen::convolution {

inline constexpr std::int64_t kPanelsApart = 4;  // panels of outputs at a time

// Bytes of the second-level cache of a core; 1 MB where the system does not say.
inline std::int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const std::int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

// Rows of tiles that a thread takes at once, or 0 where all threads had better share: values of 32 tiles in three fifths of the
// second-level cache; with one of 2 MB (Xeon) up to 64 tiles whose values are read from beyond it, rather than written by others.
template <class G>
std::int64_t rows_apart(const Problem& p) {
  if (G::kernel == 1) return 0;
  const Groups<G> g(p, 1, kPanel);
  const std::int64_t cache = second_level_cache(), bytes = G::points * g.value_stride * 4, threads = torch::stable::get_num_threads();
  const std::int64_t of_thread = ceil_div(g.rows, threads);
  if (of_thread * threads * 4 > g.rows * 5 || of_thread * g.tiles_of_row < 16) return 0;  // shares too unequal, or too small
  if (g.tiles_of_row > 64) return 0;
  if (32 * bytes * 5 <= cache * 3) return ceil_div(32, g.tiles_of_row);
  return cache >= 2 << 20 && of_thread * g.tiles_of_row >= 48 ? 64 / g.tiles_of_row : 0;
}

// Lines of an image that will be wanted: `channels` from `first` on of the pixels of rows of tiles, `side` rows of `width` pixels a tile.
template <class G>
struct Region {
  const Groups<G>& g;
  std::int64_t side, height, width, first_row, rows, first, channels;
  bool channels_last;

  // Calls ask(line) with those of the i-th of so many equal pieces.
  template <class T, class F>
  void for_lines(const Image<T>& image, std::int64_t i, std::int64_t pieces, const F& ask) const {
    const std::int64_t across = channels_last ? width : channels, runs = rows * side * across;
    const std::int64_t bytes = (channels_last ? channels : width) * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t run = i * runs / pieces; run < (i + 1) * runs / pieces; ++run) {
      const std::int64_t r = run / across, at = run % across, row = first_row + r / side, y = row % g.rows_of_image * side + r % side;
      if (y >= height) continue;
      const std::int64_t sample = row / g.rows_of_image;
      const auto* const begin = reinterpret_cast<const char*>(channels_last ? image.at(sample, first, y, at) : image.at(sample, first + at, y, 0));
      for (std::int64_t b = 0; b < bytes; b += 64) ask(begin + b);
    }
  }
};

template <class G, class T, bool kSilu>
void forward_apart(const Problem& p, const Image<const T>& x, const float* weights, const Image<T>& y, const Image<const T>* residual,
                   const Gathered* gathered, std::int64_t rows_at_once) {
  constexpr int m = G::outputs, scale = G::scale;
  const std::int64_t panels = ceil_div(p.outputs, kPanel), block_size = panels * p.channels * kPanel, chunks = ceil_div(p.channels, kChunk);
  const std::int64_t sets = ceil_div(panels, kPanelsApart), all_rows = p.n * ceil_div(p.height, m);
  parallel(all_rows, all_rows * ceil_div(p.width, m) * p.channels * G::points, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t parts = ceil_div(end - begin, rows_at_once), most = ceil_div(end - begin, parts);
    const Groups<G> g(p, most, std::min(kPanelsApart, panels) * kPanel);
    const Scratch<float> memory(G::points * g.values_of_point + G::blocks * g.products_of_block);
    float *const values = memory.get(), *const products = values + G::points * g.values_of_point;
    Outputs<G, T> outputs(p, g, y, residual, gathered);
    const auto row_of = [&](std::int64_t part) { return begin + part * (end - begin) / parts; };
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t first_row = row_of(part), rows = row_of(part + 1) - first_row;
      make_pieces_of_values<G, T, kSilu>(p, g, x, first_row, rows, 0, chunks * rows, values);
      const Region<G> following{g, m, p.height, p.width, first_row + rows, part + 1 < parts ? row_of(part + 2) - first_row - rows : 0, 0,
                                p.channels, p.channels_last};
      for (std::int64_t set = 0; set < sets; ++set) {
        const std::int64_t panel = set * kPanelsApart, count = std::min(kPanelsApart, panels - panel), first = panel * kPanel;
        const std::int64_t of_set = std::min(count * kPanel, p.outputs - first);
        const Region<G> around{g, m * scale, p.height * scale, p.width * scale, first_row, rows, first, of_set, p.channels_last};
        const float* const of_panel = weights + panel * p.channels * kPanel;
        for (std::int64_t block = 0; block < G::blocks; ++block) {
          around.for_lines(y, block, G::blocks, [](const char* line) { prefetch_to_write(line); });
          if (residual) around.for_lines(*residual, block, G::blocks, [](const char* line) { __builtin_prefetch(line, 0, 2); });
          following.for_lines(x, set * G::blocks + block, sets * G::blocks, [](const char* line) { __builtin_prefetch(line, 0, 2); });
          Product product{values + kBlocks<G>.point[block] * g.values_of_point, of_panel + block * block_size,
                          products + block * g.products_of_block, rows * g.tiles_of_row, p.channels, g.value_stride, g.product_stride};
          product.next = block + 1 < G::blocks ? product.weights + block_size : of_panel + count * p.channels * kPanel;
          multiply(product, 0, count);
        }
        for (std::int64_t row = 0; row < rows; ++row)
          for (std::int64_t chunk = 0; chunk < of_set; chunk += kChunk)
            outputs.make(first_row + row, first + chunk, products + row * g.tiles_of_row * g.product_stride + chunk);
      }
    }
  });
}

}  // namespace fastgen::convolution
