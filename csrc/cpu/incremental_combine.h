// Sums of products of a program: for some rows, each a place of an image, bias + segments x weights + addends, and the activation.
//
// Weights are packed [panels, total, 16], 16 outputs side by side and all segments of a phase one after the other. A block of registers
// holds some rows times some panels: one row (a pixel of one image) reads each weight once and keeps several panels in flight, which
// hides the latency of a multiply-add; many rows (a row of an image, a pixel of many) use each weight for all of them. Sums run over the
// segments in order, whoever computes them and however many rows go together.
#pragma once

#include <array>

#include "common/simd.h"
#include "incremental_program.h"
#include "incremental_values.h"

namespace fastgen::incremental {

// A segment where the rows of a tile find it: row r at data + r * stride.
template <class T>
struct Run {
  const T* data;
  std::int64_t stride, length, offset;  // of its weights among the phase's
};

template <class T>
struct Term {
  const T* data;
  std::int64_t stride;
  T scale;
};

template <class T>
struct Tile {
  std::int64_t rows, channels, total, out_stride;
  const void* weights;
  const T* bias;  // or null
  T* out;
  Activation activation;
  std::vector<Run<T>> runs;
  std::vector<Term<T>> terms;
};

inline constexpr std::int64_t kPanel = kPanelOutputs;
template <class T>
inline constexpr int kVectors = static_cast<int>(kPanel) / kWidth<T>;
#if defined(__AVX512F__)
inline constexpr int kSums = 28;  // of 32 registers
#else
inline constexpr int kSums = 12;  // of 16
#endif
template <class T>
inline constexpr int kMostRows = std::max(1, kSums / kVectors<T>);
template <class T>
constexpr int panels_beside(int rows) { return std::clamp(kSums / (kVectors<T> * rows), 1, 4); }

// The sums of `rows` rows and `panels` panels into [rows][panels * 16].
template <class T, class W, int rows, int panels>
void multiply(const Tile<T>& tile, std::int64_t row, const W* weights, T* sums) {
  constexpr int vectors = panels * kVectors<T>;
  const std::int64_t panel_stride = tile.total * kPanel;
  Vec<T> sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[r][v] = Vec<T>(T(0));
  for (const Run<T>& run : tile.runs) {
    const T* const x = run.data + row * run.stride;
    const W* const from = weights + run.offset * kPanel;
    for (std::int64_t k = 0; k < run.length; ++k) {
      Vec<T> w[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) w[v] = load_weights<T>(from + v / kVectors<T> * panel_stride + k * kPanel + v % kVectors<T> * kWidth<T>);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<T> value(x[r * run.stride + k]);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[r][v] = madd<T>(value, w[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[r][v].copy_to(sums + r * panels * kPanel + v * kWidth<T>, stdx::vector_aligned);
}

// Bias, addends and activation of channels [first, first + count) of a row, into the output.
template <class T>
void finish(const Tile<T>& tile, std::int64_t row, std::int64_t first, std::int64_t count, const T* sums) {
  T* const out = tile.out + row * tile.out_stride + first;
  for_vectors<T>(count, [&](std::int64_t i, auto at) {
    Vec<T> x = at.load(sums + i);
    if (tile.bias != nullptr) x += at.load(tile.bias + first + i);
    for (const Term<T>& term : tile.terms)
      x = madd<T>(Vec<T>(term.scale), at.load(term.data + row * term.stride + first + i), x);
    at.store(out + i, activated<T>(tile.activation, x));
  });
}

template <class T, class W, int rows, int panels>
void block(const Tile<T>& tile, std::int64_t row, std::int64_t panel) {
  alignas(64) T sums[rows * panels * kPanel];
  multiply<T, W, rows, panels>(tile, row, static_cast<const W*>(tile.weights) + panel * tile.total * kPanel, sums);
  const std::int64_t first = panel * kPanel, count = std::min<std::int64_t>(panels * kPanel, tile.channels - first);
  for (int r = 0; r < rows; ++r) finish(tile, row + r, first, count, sums + r * panels * kPanel);
}

template <class T>
using Block = void (*)(const Tile<T>&, std::int64_t, std::int64_t);
template <class T, class W, int... r>
constexpr auto wide_blocks(std::integer_sequence<int, r...>) {
  return std::array<Block<T>, sizeof...(r)>{block<T, W, r + 1, panels_beside<T>(r + 1)>...};
}
template <class T, class W, int... r>
constexpr auto narrow_blocks(std::integer_sequence<int, r...>) {
  return std::array<Block<T>, sizeof...(r)>{block<T, W, r + 1, 1>...};
}

// The panels [first, last) of all rows of a tile, whose weights are of type W.
template <class T, class W>
void combine(const Tile<T>& tile, std::int64_t first, std::int64_t last) {
  static constexpr auto wide = wide_blocks<T, W>(std::make_integer_sequence<int, kMostRows<T>>{});
  static constexpr auto narrow = narrow_blocks<T, W>(std::make_integer_sequence<int, kMostRows<T>>{});
  const std::int64_t groups = (tile.rows + kMostRows<T> - 1) / kMostRows<T>, most = (tile.rows + groups - 1) / groups;
  const std::int64_t beside = panels_beside<T>(static_cast<int>(most));
  for (std::int64_t panel = first; panel < last;) {
    const std::int64_t panels = panel + beside <= last ? beside : 1;
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t row = g * tile.rows / groups, rows = (g + 1) * tile.rows / groups - row;
      // The smallest groups may have room for more panels beside one another than the largest: they take as many all the same.
      if (panels == 1) narrow[static_cast<std::size_t>(rows - 1)](tile, row, panel);
      else if (panels_beside<T>(static_cast<int>(rows)) == panels) wide[static_cast<std::size_t>(rows - 1)](tile, row, panel);
      else for (std::int64_t p = 0; p < panels; ++p) narrow[static_cast<std::size_t>(rows - 1)](tile, row, panel + p);
    }
    panel += panels;
  }
}

}  // namespace fastgen::incremental
