// The arithmetic of attention, of whatever kind: one product, by which all of forward and backward are done, and panels for it.
//
//   sum[i][lane] += sum over r of a[i, r] b[r, lane]
//
// a is broadcast element by element from wherever it lies, b comes in vectors. Where the lanes are query rows (scores and outputs
// are computed transposed) keys and values are read as they lie, no reduction crosses lanes, and any head dimension and any number
// of keys is without waste. A tile of sums fills the registers: kTall x kWide vectors, kWide of b and one of a.
#pragma once

#include <algorithm>

#include "common/simd.h"

namespace fastgen::tiles {

inline constexpr double kLog2E = 1.4426950408889634074;

#if defined(__AVX512F__)
inline constexpr int kTall = 8;  // of 32 registers
#else
inline constexpr int kTall = 4;  // of 16
#endif
inline constexpr int kWide = 3;
template <class A>
inline constexpr int kLanes = kWide * kWidth<A>;

// Rows that are broadcast from are padded to this: whole vectors are written, whole tiles read.
template <class A>
inline constexpr int kUnit = std::max<int>(kTall, kWidth<A>);

inline std::int64_t round_up(std::int64_t x, std::int64_t unit) { return (x + unit - 1) / unit * unit; }

// How the factors are stored, and the multiply-add of one broadcast element with a vector.
template <class A>
struct Singles {
  using Element = A;
  static constexpr int count = 1;          // terms in one element
  static constexpr int lanes = kLanes<A>;  // of a panel
  static constexpr int tall = kTall, deep = 1, unit = kUnit<A>;  // keys, terms and columns are padded to
  FASTGEN_INLINE static Vec<A> madd(A a, const A* b, Vec<A> sum) { return fastgen::madd<A>(in_all_lanes(a), load(b), sum); }
};
struct Pairs {
  using Element = std::uint32_t;  // two bfloat16, neighbours in the sum
  static constexpr int count = 2, lanes = kLanes<float>;
  static constexpr int tall = kTall, deep = 1, unit = kUnit<float>;
  FASTGEN_INLINE static VecF madd(std::uint32_t a, const std::uint32_t* b, VecF sum) {
    return dot_pairs(VecU(a), VecU(b, stdx::element_aligned), sum);
  }
};

template <class A, int wide>
using Tile = Vec<A>[kTall][wide];

template <class A, int wide>
FASTGEN_INLINE void clear(Tile<A, wide>& sum) {
  for (auto& row : sum)
    for (auto& v : row) v = in_all_lanes(A(0));
}

// sum += a b over `depth` elements: a[i, r] is at a + i a_row + r a_step, b[r] at b + r b_step.
template <class F, class A, int wide>
FASTGEN_INLINE void multiply(const typename F::Element* a, std::int64_t a_row, std::int64_t a_step, const typename F::Element* b,
                             std::int64_t b_step, std::int64_t depth, Tile<A, wide>& sum) {
  for (std::int64_t r = 0; r < depth; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < wide; ++v) sum[i][v] = F::madd(a[i * a_row], b + v * kWidth<A>, sum[i][v]);
    a += a_step, b += b_step;
  }
}

// Calls f with the number of vectors that hold `lanes`, at most kWide, as a constant.
template <class A, class F>
FASTGEN_INLINE void with_width(std::int64_t lanes, F&& f) {
  static_assert(kWide == 3);
  if (lanes > 2 * kWidth<A>) return f(std::integral_constant<int, 3>());
  if (lanes > kWidth<A>) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 1>());
}

// ---- panels ------------------------------------------------------------------------------------------------------------------

// to[i * to_row + j] = from[i * row + j * column], widened, for i < rows and j < columns; zero from there to the next whole vector.
// Element by element where neither dimension lies in order, or T is not a type that vectors of A are loaded from.
template <class A, class T>
[[gnu::noinline]] void read_panel(const T* from, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, A* to, std::int64_t to_row) {
  constexpr std::int64_t w = kWidth<A>;
  if constexpr (std::is_same_v<opmath_t<T>, A>) {
    if (column == 1) {
      for (std::int64_t i = 0; i < rows; ++i)
        for_vectors<A>(columns, [&](std::int64_t j, auto at) { store(to + i * to_row + j, at.load(from + i * row + j)); });
      return;
    }
  }
  for (std::int64_t j = 0; j < columns; j += w) {
    const std::int64_t across = std::min(w, columns - j);
    std::int64_t i = 0;
    if constexpr (std::is_same_v<opmath_t<T>, A>) {
      for (; row == 1 && i < rows; i += w) {
        const std::int64_t down = std::min(w, rows - i);
        const auto column_of = [&](const T* p) { return down == w ? load(p) : load_part(p, static_cast<int>(down)); };
        Vec<A> square[w];
        for (std::int64_t k = 0; k < w; ++k) square[k] = k < across ? column_of(from + i + (j + k) * column) : Vec<A>(A(0));
        transpose(square);
        for (std::int64_t k = 0; k < down; ++k) store(to + (i + k) * to_row + j, square[k]);
      }
    }
    for (; i < rows; ++i)
      for (std::int64_t k = 0; k < w; ++k)
        to[i * to_row + j + k] = k < across ? static_cast<A>(widen(from[i * row + (j + k) * column])) : A(0);
  }
}

// to[i * row + j * column] = from[i * from_row + j] factor[j], narrowed; from and factor are readable up to the next whole vector.
// Without a factor it is 1.
template <class A, class T>
[[gnu::noinline]] void write_panel(const A* from, std::int64_t from_row, std::int64_t rows, std::int64_t columns, T* to, std::int64_t row,
                                   std::int64_t column, const A* factor = nullptr) {
  constexpr std::int64_t w = kWidth<A>;
  const auto value = [&](std::int64_t i, std::int64_t j) {
    const Vec<A> v = load(from + i * from_row + j);
    return factor != nullptr ? v * load(factor + j) : v;
  };
  if (column == 1) {
    for (std::int64_t i = 0; i < rows; ++i)
      for_vectors<A>(columns, [&](std::int64_t j, auto at) { at.store(to + i * row + j, value(i, j)); });
    return;
  }
  for (std::int64_t j = 0; j < columns; j += w) {
    const std::int64_t across = std::min(w, columns - j);
    std::int64_t i = 0;
    for (; row == 1 && i < rows; i += w) {
      const std::int64_t down = std::min(w, rows - i);
      Vec<A> square[w];
      for (std::int64_t k = 0; k < w; ++k) square[k] = k < down ? value(i + k, j) : Vec<A>(A(0));
      transpose(square);
      for (std::int64_t k = 0; k < across; ++k) {
        T* const at = to + i + (j + k) * column;
        if (down == w) store(at, square[k]);
        else store_part(at, square[k], static_cast<int>(down));
      }
    }
    for (; i < rows; ++i) {
      const Vec<A> rest = value(i, j);
      for (std::int64_t k = 0; k < across; ++k) to[i * row + (j + k) * column] = narrow<T>(static_cast<A>(rest[k]));
    }
  }
}

// The rows of a panel two by two, as pairs: row i of `to` is of rows 2 i and 2 i + 1, up to the next whole vector.
inline void pair_rows(const float* from, std::int64_t row, std::int64_t pairs, std::int64_t columns, std::uint32_t* to) {
  for (std::int64_t i = 0; i < pairs; ++i)
    for (std::int64_t j = 0; j < columns; j += kWidth<float>) {
      const float* low = from + 2 * i * row + j;
      make_pairs(load(low), load(low + row)).copy_to(to + i * row + j, stdx::element_aligned);
    }
}

// The elements of each row of bfloat16 two by two: no arithmetic, pairs lie so in memory.
inline void read_pairs(const BFloat16* from, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns,
                       std::uint32_t* to, std::int64_t to_row) {
  for (std::int64_t i = 0; i < rows; ++i) {
    auto* out = reinterpret_cast<char*>(to + i * to_row);
    if (column == 1) std::memcpy(out, from + i * row, columns * sizeof(BFloat16));
    else for (std::int64_t j = 0; j < columns; ++j) std::memcpy(out + 2 * j, from + i * row + j * column, sizeof(BFloat16));
  }
}

// ---- products ----------------------------------------------------------------------------------------------------------------

// A tile of sums from and to rows of kLanes.
template <class A, int wide>
FASTGEN_INLINE void load_tile(const A* from, Tile<A, wide>& sum) {
  for (int i = 0; i < kTall; ++i)
    for (int v = 0; v < wide; ++v) sum[i][v] = load(from + i * kLanes<A> + v * kWidth<A>);
}
template <class A, int wide>
FASTGEN_INLINE void store_tile(const Tile<A, wide>& sum, A* to) {
  for (int i = 0; i < kTall; ++i)
    for (int v = 0; v < wide; ++v) store(to + i * kLanes<A> + v * kWidth<A>, sum[i][v]);
}

// scores[k][lane] = sum over e < depth of keys[k][e] queries[e][lane] for k < count; keys are readable, and scores written, up to the
// next multiple of kTall. All keys go by for one strip of a large head dimension before the next: a strip of queries is as much of the
// first-level cache as two threads of a core leave each other.
template <class F, class A, int wide>
void multiply_keys(const typename F::Element* keys, std::int64_t key_row, std::int64_t count, const typename F::Element* queries,
                   std::int64_t depth, A* scores) {
  constexpr std::int64_t most = 96;
  const std::int64_t strips = (depth + most - 1) / most, strip = strips == 0 ? 0 : (depth + strips - 1) / strips;
  std::int64_t e = 0;
  do {
    for (std::int64_t k = 0; k < count; k += kTall) {
      Tile<A, wide> sum;
      A* at = scores + k * kLanes<A>;
      if (e == 0) clear<A, wide>(sum);
      else load_tile<A, wide>(at, sum);
      multiply<F, A, wide>(keys + k * key_row + e, key_row, 1, queries + e * kLanes<A>, kLanes<A>, std::min(strip, depth - e), sum);
      store_tile<A, wide>(sum, at);
    }
    e += strip;
  } while (e < depth);
}

// output[e][lane] = (output[e][lane] factor[lane], or 0) + sum over k < count of values[k][e] weights[k][lane] for e < width; values
// are readable, and output written, up to the next multiple of kTall.
template <class F, class A, int wide>
void multiply_values(const typename F::Element* values, std::int64_t value_row, std::int64_t width, const typename F::Element* weights,
                     std::int64_t count, const A* factor, A* output) {
  Vec<A> by[wide];
  for (int v = 0; v < wide; ++v) by[v] = factor != nullptr ? load(factor + v * kWidth<A>) : Vec<A>(A(0));
  for (std::int64_t e = 0; e < width; e += kTall) {
    Tile<A, wide> sum;
    clear<A, wide>(sum);
    multiply<F, A, wide>(values + e, 1, value_row, weights, kLanes<A>, count, sum);
    for (int i = 0; i < kTall; ++i)
      for (int v = 0; v < wide; ++v) {
        A* at = output + (e + i) * kLanes<A> + v * kWidth<A>;
        store(at, factor != nullptr ? madd<A>(load(at), by[v], sum[i][v]) : sum[i][v]);
      }
  }
}

}  // namespace fastgen::tiles
