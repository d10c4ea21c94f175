// The products of attention on a matrix unit (csrc/common/simd/matrix_tiles.h), and factors as it reads them.
//
// Like the products of _tiles.h they have query rows in the lanes. What is broadcast from there is the left factor here, in tiles of 16
// rows of 32 numbers along the sum, 1 KB each and one after the other: 16 keys by their depth, 16 columns of values by the keys. The
// right factor are rows of 64 pairs, of queries and of weights. Two tiles of the left are multiplied with two of the right into four sums,
// or two of the right stay for all of the left: what costs is memory, since a product takes 16 cycles, a load eight or, where another
// thread has half of the core, thirty. Whatever pads a tile is zero in both factors, so nothing that is not a number gets out of its row.
#pragma once

#include "_tiles.h"

namespace fastgen::tiles {

// Pairs, as tiles.
struct TiledPairs {
  using Element = std::uint32_t;
  static constexpr int count = 2, tile = matrix_tiles::kRows, words = tile * matrix_tiles::kWords;
  static constexpr int lanes = 4 * matrix_tiles::kWords;
  static constexpr int tall = tile, deep = tile, unit = tile;
};

template <class F>
constexpr bool kTiled = std::is_same_v<F, TiledPairs>;

// Calls f with the number of vectors that hold `lanes` of a panel as a constant; where tiles are multiplied, of one, two or four of them.
template <class F, class A, class G>
void with_vectors(std::int64_t lanes, G&& g) {
  if constexpr (kTiled<F>) {
    constexpr int of_tile = F::tile / kWidth<A>;
    if (lanes > 2 * F::tile) return g(std::integral_constant<int, 4 * of_tile>());
    if (lanes > F::tile) return g(std::integral_constant<int, 2 * of_tile>());
    g(std::integral_constant<int, of_tile>());
  } else {
    with_width<A>(lanes, g);
  }
}

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

template <class F>
FASTGEN_INLINE void stay_awake() {}

#if FASTGEN_HAS_MATRIX_TILES

template <>
struct Unit<TiledPairs> : matrix_tiles::Tiles {};

// An Intel's unit that had no product for 1,000 cycles goes to sleep, and the whole core loses as many when it wakes; a product, of
// whatever is there, keeps it awake. For 200 cycles after each, vectors of fp32 have one port instead of two. So the two kinds of
// arithmetic go in turns of some hundred cycles.
template <>
FASTGEN_INLINE void stay_awake<TiledPairs>() { matrix_tiles::multiply<0, 6, 7>(); }

// Where the tiles of a factor lie, in words: from one to the next across the sum, along it, and between rows of a tile.
struct Lie {
  std::int64_t across, along, row;
};

// `tall` x `wide` tiles of sums, up to two each, in tiles 0 to 3; the factors go through 4 to 7.
template <int tall, int wide>
struct MatrixSums {
  static void clear() {
    each([](auto i, auto j) { matrix_tiles::zero<2 * i + j>(); });
  }
  static void load(const float* from, const Lie& lie) {
    each([&](auto i, auto j) { matrix_tiles::load<2 * i + j>(from + i * lie.across + j * lie.along, 4 * lie.row); });
  }
  static void store(float* to, const Lie& lie) {
    each([&](auto i, auto j) { matrix_tiles::store<2 * i + j>(to + i * lie.across + j * lie.along, 4 * lie.row); });
  }
  static void add_products(const std::uint32_t* a, const Lie& of_a, const std::uint32_t* b, const Lie& of_b, std::int64_t deep) {
    for (std::int64_t k = 0; k < deep; ++k, a += of_a.along, b += of_b.along) {
      matrix_tiles::load<4>(a, 4 * of_a.row), matrix_tiles::load<6>(b, 4 * of_b.row);
      if constexpr (tall > 1) matrix_tiles::load<5>(a + of_a.across, 4 * of_a.row);
      if constexpr (wide > 1) matrix_tiles::load<7>(b + of_b.across, 4 * of_b.row);
      each([](auto i, auto j) { matrix_tiles::multiply<2 * i + j, 4 + i, 6 + j>(); });
    }
  }

 private:
  template <class F>
  FASTGEN_INLINE static void each(const F& f) {
    constexpr std::integral_constant<int, 0> zero;
    constexpr std::integral_constant<int, 1> one;
    f(zero, zero);
    if constexpr (tall > 1) f(one, zero);
    if constexpr (wide > 1) f(zero, one);
    if constexpr (tall > 1 && wide > 1) f(one, one);
  }
};

// to[i][j] = (to[i][j], or 0 if `fresh`) + the sum over `deep` tiles of a[i][k] b[k][j], for `tall` x `wide` tiles; those of sums lie one
// below the other `across`, beside each other `along`.
inline void multiply_tiles(const std::uint32_t* a, const Lie& of_a, const std::uint32_t* b, const Lie& of_b, std::int64_t tall, std::int64_t wide,
                           std::int64_t deep, bool fresh, float* to, const Lie& of_sums) {
  const auto at = [&](auto sums, std::int64_t i, std::int64_t j) {
    float* const place = to + i * of_sums.across + j * of_sums.along;
    if (fresh) sums.clear();
    else sums.load(place, of_sums);
    sums.add_products(a + i * of_a.across, of_a, b + j * of_b.across, of_b, deep);
    sums.store(place, of_sums);
  };
  for (std::int64_t i = 0; i < tall; i += 2)
    for (std::int64_t j = 0; j < wide; j += 2) {
      const bool two_tall = i + 1 < tall, two_wide = j + 1 < wide;
      if (two_tall && two_wide) at(MatrixSums<2, 2>(), i, j);
      else if (two_tall) at(MatrixSums<2, 1>(), i, j);
      else if (two_wide) at(MatrixSums<1, 2>(), i, j);
      else at(MatrixSums<1, 1>(), i, j);
    }
}

// sums[i][j] = the sum over `deep` tiles, one or two, of a[i][k] b[k][j] for `tall` tiles and two of b, which stay: 4 and 5, 6 and 7.
template <int deep>
inline void multiply_by_two_columns(const std::uint32_t* a, const std::uint32_t* b, const Lie& of_b, std::int64_t tall, float* to, const Lie& of_sums) {
  constexpr int words = TiledPairs::words, row = 4 * matrix_tiles::kWords;
  matrix_tiles::load<4>(b, 4 * of_b.row), matrix_tiles::load<5>(b + of_b.across, 4 * of_b.row);
  if constexpr (deep > 1) matrix_tiles::load<6>(b + of_b.along, 4 * of_b.row), matrix_tiles::load<7>(b + of_b.along + of_b.across, 4 * of_b.row);
  for (std::int64_t i = 0; i < tall; ++i, a += deep * words, to += of_sums.across) {
    matrix_tiles::zero<0>(), matrix_tiles::zero<1>();
    matrix_tiles::load<2>(a, row);
    matrix_tiles::multiply<0, 2, 4>(), matrix_tiles::multiply<1, 2, 5>();
    if constexpr (deep > 1) {
      matrix_tiles::load<3>(a + words, row);
      matrix_tiles::multiply<0, 3, 6>(), matrix_tiles::multiply<1, 3, 7>();
    }
    matrix_tiles::store<0>(to, 4 * of_sums.row), matrix_tiles::store<1>(to + of_sums.along, 4 * of_sums.row);
  }
}

// Right factors and sums with rows in the lanes of a panel.
inline constexpr Lie kPanel{TiledPairs::tile, TiledPairs::tile * TiledPairs::lanes, TiledPairs::lanes};
inline constexpr Lie kSumsOfPanel{TiledPairs::tile * TiledPairs::lanes, TiledPairs::tile, TiledPairs::lanes};

// scores[k][lane] = the sum over `deep` tiles of keys[k][e] queries[e][lane] for `tall` tiles of keys and `wide` of lanes.
template <int wide>
inline void multiply_keys_by_tiles(const std::uint32_t* keys, std::int64_t tall, std::int64_t deep, const std::uint32_t* queries, float* scores) {
  if (wide > 1 && (deep == 1 || deep == 2)) {
    for (std::int64_t j = 0; j < wide; j += 2, queries += 2 * kPanel.across, scores += 2 * kSumsOfPanel.along) {
      if (deep == 1) multiply_by_two_columns<1>(keys, queries, kPanel, tall, scores, kSumsOfPanel);
      else multiply_by_two_columns<2>(keys, queries, kPanel, tall, scores, kSumsOfPanel);
    }
    return;
  }
  multiply_tiles(keys, {deep * TiledPairs::words, TiledPairs::words, TiledPairs::tile}, queries, kPanel, tall, wide, deep, true, scores, kSumsOfPanel);
}

// output[e][lane] = (output[e][lane], or 0 if `fresh`) + the sum over `deep` tiles of values[e][k] weights[k][lane], for `tall` tiles of
// e and `wide` of lanes.
template <int wide>
inline void multiply_values_by_tiles(const std::uint32_t* values, std::int64_t tall, std::int64_t deep, const std::uint32_t* weights, bool fresh,
                                     float* output) {
  multiply_tiles(values, {TiledPairs::words, tall * TiledPairs::words, TiledPairs::tile}, weights, kPanel, tall, wide, deep, fresh, output, kSumsOfPanel);
}

// to[i][j] += the sum over `deep` tiles of a[i][r] b[r][j], for `tall` x `wide` tiles: those of a in rows `a_step` words apart, those of b
// in rows of `wide`, sums in tiles too.
inline void multiply_rows_by_tiles(const std::uint32_t* a, std::int64_t a_step, std::int64_t tall, std::int64_t deep, const std::uint32_t* b,
                                   std::int64_t wide, float* to) {
  constexpr std::int64_t words = TiledPairs::words, tile = TiledPairs::tile;
  multiply_tiles(a, {a_step, words, tile}, b, {words, wide * words, tile}, tall, wide, deep, false, to, {wide * words, words, tile});
}

#endif

}  // namespace fastgen::tiles
