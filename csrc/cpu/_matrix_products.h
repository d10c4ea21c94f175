// The two products of attention on a matrix unit (csrc/common/simd/matrix_tiles.h), and factors as it reads them.
//
// Like the products of _tiles.h they have query rows in the lanes. What is broadcast from there is the left factor here, in tiles of 16
// rows of 32 numbers along the sum, 1 KB each and one after the other: 16 keys by their depth, 16 columns of values by the keys. The
// right factor are rows of kLanes pairs, of queries and of weights. One tile of the left is multiplied with three of the right, which
// keeps three sums in flight; a product takes 16 cycles, its loads ten. Whatever pads a tile is zero in both factors, so nothing that
// is not a number gets out of its row.
#pragma once

#include "_tiles.h"

namespace fastgen::tiles {

// Pairs, as tiles.
struct TiledPairs {
  using Element = std::uint32_t;
  static constexpr int count = 2, tile = matrix_tiles::kRows, words = tile * matrix_tiles::kWords;
  static constexpr int lanes = 3 * matrix_tiles::kWords;
  static constexpr int tall = tile, deep = tile, unit = tile;
};

// Word [i][j] of a tile is the pair x[i][2 j], x[i][2 j + 1] of a matrix x[i][j] at from + i row + j column; zero from `rows` and
// `columns` on. `turned`: word [j][i]. Rows of words are to_row apart.
template <bool turned>
[[gnu::noinline]] inline void read_tile(const BFloat16* from, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns,
                                        std::uint32_t* to, std::int64_t to_row) {
  constexpr int w = kWidth<float>, tile = TiledPairs::tile;
  const auto down = [&](std::int64_t i, std::int64_t j) {  // numbers i, i + 1, ... of column j, in the high halves
    if (i >= rows || j >= columns) return VecU(0u);
    const BFloat16* p = from + i * row + j * column;
    if (row == 1) return bits_as<VecU>(load_part(p, static_cast<int>(std::min<std::int64_t>(rows - i, w))));
    return VecU([&](int k) { return i + k < rows ? std::uint32_t{p[k * row].bits} << 16 : 0u; });
  };
  for (int i = 0; i < tile; i += w)
    for (int j = 0; j < tile; j += w) {
      VecF square[w];  // of words, only moved
      for (int k = 0; k < w; ++k) {
        if (column == 1) {
          const bool inside = i + k < rows && 2 * j < columns;
          square[k] = bits_as<VecF>(inside ? load_pairs(from + (i + k) * row + 2 * j, columns - 2 * j) : VecU(0u));
        } else {
          square[k] = bits_as<VecF>(VecU((down(i, 2 * (j + k)) >> 16) | down(i, 2 * (j + k) + 1)));
        }
      }
      if ((column == 1) == turned) transpose(square);
      for (int k = 0; k < w; ++k) store(reinterpret_cast<float*>(to) + (turned ? j + k : i + k) * to_row + (turned ? i : j), square[k]);
    }
}

// What a thread holds while it multiplies.
template <class F>
struct Unit {};

#if FASTGEN_HAS_MATRIX_TILES

template <>
struct Unit<TiledPairs> : matrix_tiles::Tiles {};

// The sums of `columns` tiles beside each other, in tiles 0, 1, ...; a of one tile, b of `columns`.
template <int columns>
struct MatrixSums {
  static constexpr int kRow = TiledPairs::lanes * sizeof(float);

  static void clear() { each([]<int c>() { matrix_tiles::zero<c>(); }); }
  static void load(const float* from) {
    each([&]<int c>() { matrix_tiles::load<c>(from + c * matrix_tiles::kWords, kRow); });
  }
  static void store(float* to) {
    each([&]<int c>() { matrix_tiles::store<c>(to + c * matrix_tiles::kWords, kRow); });
  }
  static void add_product(const std::uint32_t* a, const std::uint32_t* b) {
    matrix_tiles::load<columns>(a, 4 * matrix_tiles::kWords);
    each([&]<int c>() {
      matrix_tiles::load<columns + 1 + c>(b + c * matrix_tiles::kWords, kRow);
      matrix_tiles::multiply<c, columns, columns + 1 + c>();
    });
  }

 private:
  template <class F>
  FASTGEN_INLINE static void each(const F& f) {
    [&]<int... c>(std::integer_sequence<int, c...>) { (f.template operator()<c>(), ...); }(std::make_integer_sequence<int, columns>());
  }
};

// scores[k][lane] = the sum over `deep` tiles of keys[k][e] queries[e][lane] for k < count, in whole tiles; then done(first, last) for
// the scores of each tile's keys.
template <int columns, class Done>
void multiply_keys_by_tiles(const std::uint32_t* keys, std::int64_t deep, std::int64_t count, const std::uint32_t* queries, float* scores,
                            const Done& done) {
  using Sums = MatrixSums<columns>;
  constexpr int tile = TiledPairs::tile, lanes = TiledPairs::lanes;
  for (std::int64_t k = 0; k < count; k += tile) {
    Sums::clear();
    for (std::int64_t e = 0; e < deep; ++e, keys += TiledPairs::words) Sums::add_product(keys, queries + e * tile * lanes);
    Sums::store(scores + k * lanes);
    if (k > 0) done(k - tile, k);  // not yet for those on their way to memory
  }
  done((count - 1) / tile * tile, count);
}

// output[e][lane] = (output[e][lane], or 0 if `fresh`) + the sum over `deep` tiles of values[e][k] weights[k][lane], for `tall` tiles of e.
template <int columns>
void multiply_values_by_tiles(const std::uint32_t* values, std::int64_t tall, std::int64_t deep, const std::uint32_t* weights, bool fresh,
                              float* output) {
  using Sums = MatrixSums<columns>;
  constexpr int tile = TiledPairs::tile, lanes = TiledPairs::lanes;
  for (std::int64_t e = 0; e < tall; ++e, output += tile * lanes) {
    if (fresh) Sums::clear();
    else Sums::load(output);
    for (std::int64_t k = 0; k < deep; ++k) Sums::add_product(values + (k * tall + e) * TiledPairs::words, weights + k * tile * lanes);
    Sums::store(output);
  }
}

#endif

}  // namespace fastgen::tiles
