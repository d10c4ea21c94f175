// The products of attention on a matrix unit (csrc/common/simd/matrix_tiles.h), and factors as it reads them.
//
// Like the products of _tiles.h they have query rows in the lanes. What is broadcast from there is the left factor here, in tiles of 16
// rows of 32 numbers along the sum, 1 KB each and one after the other: 16 keys by their depth, 16 columns of values by the keys. The
// right factor are rows of 48 pairs, of queries and of weights. One tile of the left is multiplied with three of the right into three
// sums; six tiles hold the sums of two such rows in turns, since what is waited for is memory: 16 cycles a product, ten a load, twenty
// a store. Whatever pads a tile is zero in both factors, so nothing that is not a number gets out of its row.
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

template <class F>
constexpr bool kTiled = std::is_same_v<F, TiledPairs>;

// Calls f with the number of vectors that hold `lanes` of a panel as a constant; in whole tiles where those are multiplied.
template <class F, class A, class G>
void with_vectors(std::int64_t lanes, G&& g) {
  if constexpr (kTiled<F>) {
    constexpr int of_tile = F::tile / kWidth<A>;
    if (lanes > 2 * F::tile) return g(std::integral_constant<int, 3 * of_tile>());
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

// The sums of up to three tiles beside each other, in tiles `at` and following; the factors go through tiles 6 and 7.
template <int at, int wide>
struct MatrixSums {
  static constexpr int kRow = TiledPairs::lanes * sizeof(float);

  static void clear() {
    matrix_tiles::zero<at>();
    if constexpr (wide > 1) matrix_tiles::zero<at + 1>();
    if constexpr (wide > 2) matrix_tiles::zero<at + 2>();
  }
  static void load(const float* from) {
    load_tile<at>(from);
    if constexpr (wide > 1) load_tile<at + 1>(from + 16);
    if constexpr (wide > 2) load_tile<at + 2>(from + 32);
  }
  static void store(float* to) {
    store_tile<at>(to);
    if constexpr (wide > 1) store_tile<at + 1>(to + 16);
    if constexpr (wide > 2) store_tile<at + 2>(to + 32);
  }
  static void add_product(const std::uint32_t* a, const std::uint32_t* b) {
    matrix_tiles::load<6>(a, 4 * matrix_tiles::kWords);
    load_tile<7>(b), matrix_tiles::multiply<at, 6, 7>();
    if constexpr (wide > 1) load_tile<7>(b + 16), matrix_tiles::multiply<at + 1, 6, 7>();
    if constexpr (wide > 2) load_tile<7>(b + 32), matrix_tiles::multiply<at + 2, 6, 7>();
  }

 private:
  template <int t>
  FASTGEN_INLINE static void load_tile(const void* from) { matrix_tiles::load<t>(from, kRow); }
  template <int t>
  FASTGEN_INLINE static void store_tile(void* to) { matrix_tiles::store<t>(to, kRow); }
};

// begin(sums, i) for i < count, where sums begin, and end(sums, i), where they are stored: those of i after those of i + 1 have begun, so
// that the unit never waits for memory.
template <int wide, class Begin, class End>
FASTGEN_INLINE void alternate(std::int64_t count, const Begin& begin, const End& end) {
  const MatrixSums<0, wide> even;
  const MatrixSums<3, wide> odd;
  begin(even, 0);
  for (std::int64_t i = 1; i < count; i += 2) {
    begin(odd, i);
    end(even, i - 1);
    if (i + 1 == count) return end(odd, i);
    begin(even, i + 1);
    end(odd, i);
  }
  end(even, count - 1);
}

// scores[k][lane] = the sum over `deep` tiles of keys[k][e] queries[e][lane] for `tall` tiles of keys and `wide` of lanes.
template <int wide>
inline void multiply_keys_by_tiles(const std::uint32_t* keys, std::int64_t tall, std::int64_t deep, const std::uint32_t* queries, float* scores) {
  constexpr int size = TiledPairs::tile * TiledPairs::lanes;
  const auto begin = [&](auto sums, std::int64_t i) {
    sums.clear();
    for (std::int64_t e = 0; e < deep; ++e) sums.add_product(keys + (i * deep + e) * TiledPairs::words, queries + e * size);
  };
  alternate<wide>(tall, begin, [&](auto sums, std::int64_t i) { sums.store(scores + i * size); });
}

// output[e][lane] = (output[e][lane], or 0 if `fresh`) + the sum over `deep` tiles of values[e][k] weights[k][lane], for `tall` tiles of
// e and `wide` of lanes.
template <int wide>
inline void multiply_values_by_tiles(const std::uint32_t* values, std::int64_t tall, std::int64_t deep, const std::uint32_t* weights, bool fresh,
                                     float* output) {
  constexpr int size = TiledPairs::tile * TiledPairs::lanes;
  const auto begin = [&](auto sums, std::int64_t i) {
    if (fresh) sums.clear();
    else sums.load(output + i * size);
    for (std::int64_t k = 0; k < deep; ++k) sums.add_product(values + (k * tall + i) * TiledPairs::words, weights + k * size);
  };
  alternate<wide>(tall, begin, [&](auto sums, std::int64_t i) { sums.store(output + i * size); });
}

// A column of up to four tiles of sums, and how they are multiplied: one tile of the right with one of the left for each sum.
template <int tall>
struct MatrixColumn {
  template <int i>
  FASTGEN_INLINE static void load(const float* from, std::int64_t step) {
    matrix_tiles::load<i>(from + i * step, 4 * matrix_tiles::kWords);
    if constexpr (i + 1 < tall) load<i + 1>(from, step);
  }
  template <int i>
  FASTGEN_INLINE static void store(float* to, std::int64_t step) {
    matrix_tiles::store<i>(to + i * step, 4 * matrix_tiles::kWords);
    if constexpr (i + 1 < tall) store<i + 1>(to, step);
  }
  template <int i>
  FASTGEN_INLINE static void add_product(const std::uint32_t* a, std::int64_t a_step) {
    matrix_tiles::load<5 + i % 2>(a + i * a_step, 4 * matrix_tiles::kWords);
    matrix_tiles::multiply<i, 5 + i % 2, 7>();
    if constexpr (i + 1 < tall) add_product<i + 1>(a, a_step);
  }

  // For each of `wide` columns.
  static void multiply(const std::uint32_t* a, std::int64_t a_step, std::int64_t deep, const std::uint32_t* b, std::int64_t wide, float* to) {
    constexpr int words = TiledPairs::words;
    for (std::int64_t j = 0; j < wide; ++j) {
      load<0>(to + j * words, wide * words);
      for (std::int64_t r = 0; r < deep; ++r) {
        matrix_tiles::load<7>(b + (r * wide + j) * words, 4 * matrix_tiles::kWords);
        add_product<0>(a + r * words, a_step);
      }
      store<0>(to + j * words, wide * words);
    }
  }
};

// to[i][j] += the sum over `deep` tiles of a[i][r] b[r][j], for `tall` x `wide` tiles: those of a in rows `a_step` words apart, those of b
// in rows of `wide`, sums in tiles too.
inline void multiply_rows_by_tiles(const std::uint32_t* a, std::int64_t a_step, std::int64_t tall, std::int64_t deep, const std::uint32_t* b,
                                   std::int64_t wide, float* to) {
  for (std::int64_t i = 0; i < tall; i += 4, a += 4 * a_step, to += 4 * wide * TiledPairs::words) {
    if (tall - i >= 4) MatrixColumn<4>::multiply(a, a_step, deep, b, wide, to);
    else if (tall - i == 3) MatrixColumn<3>::multiply(a, a_step, deep, b, wide, to);
    else if (tall - i == 2) MatrixColumn<2>::multiply(a, a_step, deep, b, wide, to);
    else MatrixColumn<1>::multiply(a, a_step, deep, b, wide, to);
  }
}

#endif

}  // namespace fastgen::tiles
