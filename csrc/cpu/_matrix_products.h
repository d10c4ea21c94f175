// The two products of attention on a matrix unit (csrc/common/simd/matrix_tiles.h), and factors as it reads them.
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

// The sums of three tiles beside each other, in tiles `at` and following; the factors go through tiles 6 and 7.
template <int at>
struct MatrixSums {
  static constexpr int kRow = TiledPairs::lanes * sizeof(float);

  static void clear() { matrix_tiles::zero<at>(), matrix_tiles::zero<at + 1>(), matrix_tiles::zero<at + 2>(); }
  static void load(const float* from) { load_tile<at>(from), load_tile<at + 1>(from + 16), load_tile<at + 2>(from + 32); }
  static void store(float* to) { store_tile<at>(to), store_tile<at + 1>(to + 16), store_tile<at + 2>(to + 32); }
  static void add_product(const std::uint32_t* a, const std::uint32_t* b) {
    matrix_tiles::load<6>(a, 4 * matrix_tiles::kWords);
    load_tile<7>(b), matrix_tiles::multiply<at, 6, 7>();
    load_tile<7>(b + 16), matrix_tiles::multiply<at + 1, 6, 7>();
    load_tile<7>(b + 32), matrix_tiles::multiply<at + 2, 6, 7>();
  }

 private:
  template <int t>
  FASTGEN_INLINE static void load_tile(const void* from) { matrix_tiles::load<t>(from, kRow); }
  template <int t>
  FASTGEN_INLINE static void store_tile(void* to) { matrix_tiles::store<t>(to, kRow); }
};

// begin(sums, i) for i < count, where sums begin, and end(sums, i), where they are stored: those of i after those of i + 1 have begun, so
// that the unit never waits for memory.
template <class Begin, class End>
FASTGEN_INLINE void alternate(std::int64_t count, const Begin& begin, const End& end) {
  const MatrixSums<0> even;
  const MatrixSums<3> odd;
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

// scores[k][lane] = the sum over `deep` tiles of keys[k][e] queries[e][lane] for `tall` tiles of keys.
inline void multiply_keys_by_tiles(const std::uint32_t* keys, std::int64_t tall, std::int64_t deep, const std::uint32_t* queries, float* scores) {
  constexpr int size = TiledPairs::tile * TiledPairs::lanes;
  const auto begin = [&](auto sums, std::int64_t i) {
    sums.clear();
    for (std::int64_t e = 0; e < deep; ++e) sums.add_product(keys + (i * deep + e) * TiledPairs::words, queries + e * size);
  };
  alternate(tall, begin, [&](auto sums, std::int64_t i) { sums.store(scores + i * size); });
}

// output[e][lane] = (output[e][lane], or 0 if `fresh`) + the sum over `deep` tiles of values[e][k] weights[k][lane], for `tall` tiles of e.
inline void multiply_values_by_tiles(const std::uint32_t* values, std::int64_t tall, std::int64_t deep, const std::uint32_t* weights, bool fresh,
                                     float* output) {
  constexpr int size = TiledPairs::tile * TiledPairs::lanes;
  const auto begin = [&](auto sums, std::int64_t i) {
    if (fresh) sums.clear();
    else sums.load(output + i * size);
    for (std::int64_t k = 0; k < deep; ++k) sums.add_product(values + (k * tall + i) * TiledPairs::words, weights + k * size);
  };
  alternate(tall, begin, [&](auto sums, std::int64_t i) { sums.store(output + i * size); });
}

#endif

}  // namespace fastgen::tiles
