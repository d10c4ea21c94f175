// Rows dealt out to two or four, element by element in turn, and put together again; words of any size, by shuffles of whole vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/simd/vector.h"

namespace fastgen {

namespace dealing {

#if defined(__AVX512BW__)
inline constexpr int kBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kBytes = 32;
#else
inline constexpr int kBytes = 16;
#endif

template <class T, int bytes>
struct Vector {
  typedef T Type __attribute__((vector_size(bytes)));
  static constexpr int count = bytes / static_cast<int>(sizeof(T));
};
template <class T, int bytes>
using Words = typename Vector<T, bytes>::Type;

template <class V, class T>
FASTGEN_INLINE V take(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
FASTGEN_INLINE void put(T* p, const V& v) { std::memcpy(p, &v, sizeof v); }

// Of two vectors as one row of 2 count elements: those at even places, and at odd ones; and back.
template <int odd, class V, int... i>
FASTGEN_INLINE V every_other(V a, V b, std::integer_sequence<int, i...>) { return __builtin_shufflevector(a, b, (2 * i + odd)...); }
template <int high, class V, int... i>
FASTGEN_INLINE V in_turn(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int count = sizeof...(i);
  return __builtin_shufflevector(a, b, (high * count / 2 + i / 2 + i % 2 * count)...);
}
template <class T, int bytes>
FASTGEN_INLINE void apart(Words<T, bytes>& a, Words<T, bytes>& b) {
  using Places = std::make_integer_sequence<int, Vector<T, bytes>::count>;
  const Words<T, bytes> even = every_other<0>(a, b, Places()), odd = every_other<1>(a, b, Places());
  a = even, b = odd;
}
template <class T, int bytes>
FASTGEN_INLINE void together(Words<T, bytes>& a, Words<T, bytes>& b) {
  using Places = std::make_integer_sequence<int, Vector<T, bytes>::count>;
  const Words<T, bytes> low = in_turn<0>(a, b, Places()), high = in_turn<1>(a, b, Places());
  a = low, b = high;
}

// What whole vectors of `bytes`, and of half as many below, are there of [first, count); the rest by `one`.
template <class T, int bytes, class Whole, class One>
FASTGEN_INLINE void for_words(std::int64_t first, std::int64_t count, const Whole& whole, const One& one) {
  constexpr int step = Vector<T, bytes>::count;
  for (; first + step <= count; first += step) whole(first, std::integral_constant<int, bytes>());
  if constexpr (bytes > 16) return for_words<T, bytes / 2>(first, count, whole, one);
  for (; first < count; ++first) one(first);
}

}  // namespace dealing

// a[i], b[i] = row[2 i], row[2 i + 1] for i < count, or back.
template <bool kBack, class T>
FASTGEN_INLINE void deal_two(T* row, T* a, T* b, std::int64_t count) {
  using namespace dealing;
  for_words<T, kBytes>(
      0, count,
      [&](std::int64_t i, auto size) {
        constexpr int bytes = size, step = Vector<T, bytes>::count;
        using V = Words<T, bytes>;
        if constexpr (kBack) {
          V low = take<V>(a + i), high = take<V>(b + i);
          together<T, bytes>(low, high);
          put(row + 2 * i, low), put(row + 2 * i + step, high);
        } else {
          V even = take<V>(row + 2 * i), odd = take<V>(row + 2 * i + step);
          apart<T, bytes>(even, odd);
          put(a + i, even), put(b + i, odd);
        }
      },
      [&](std::int64_t i) {
        if constexpr (kBack) row[2 * i] = a[i], row[2 * i + 1] = b[i];
        else a[i] = row[2 * i], b[i] = row[2 * i + 1];
      });
}

// rows[k][i] = row[4 i + k] for i < count and k < 4, or back.
template <bool kBack, class T>
FASTGEN_INLINE void deal_four(T* row, T* const (&rows)[4], std::int64_t count) {
  using namespace dealing;
  for_words<T, kBytes>(
      0, count,
      [&](std::int64_t i, auto size) {
        constexpr int bytes = size, step = Vector<T, bytes>::count;
        using V = Words<T, bytes>;
        V v[4];
        if constexpr (kBack) {
          v[0] = take<V>(rows[0] + i), v[1] = take<V>(rows[2] + i), v[2] = take<V>(rows[1] + i), v[3] = take<V>(rows[3] + i);
          together<T, bytes>(v[0], v[1]), together<T, bytes>(v[2], v[3]);  // 0 and 2 in turn, 1 and 3
          together<T, bytes>(v[0], v[2]), together<T, bytes>(v[1], v[3]);
          put(row + 4 * i, v[0]), put(row + 4 * i + step, v[2]), put(row + 4 * i + 2 * step, v[1]), put(row + 4 * i + 3 * step, v[3]);
        } else {
          for (int k = 0; k < 4; ++k) v[k] = take<V>(row + 4 * i + k * step);
          apart<T, bytes>(v[0], v[1]), apart<T, bytes>(v[2], v[3]);  // 0 and 2 in turn of each half, 1 and 3
          apart<T, bytes>(v[0], v[2]), apart<T, bytes>(v[1], v[3]);
          put(rows[0] + i, v[0]), put(rows[2] + i, v[2]), put(rows[1] + i, v[1]), put(rows[3] + i, v[3]);
        }
      },
      [&](std::int64_t i) {
        for (int k = 0; k < 4; ++k) {
          if constexpr (kBack) row[4 * i + k] = rows[k][i];
          else rows[k][i] = row[4 * i + k];
        }
      });
}

// A block of 2 x 2 pixels of three channels, of which `a` and `b` are the two rows of six elements, as twelve of one pixel, or back.
// A whole block: elements after what is read are read too, and written after what is written, up to eight of a row and sixteen of
// the twelve.
template <bool kBack, class T>
FASTGEN_INLINE void deal_three_channels(T* a, T* b, T* twelve, [[maybe_unused]] bool whole) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) <= 4) {
    using namespace dealing;
    using Half = Words<T, 8 * sizeof(T)>;
    using Full = Words<T, 16 * sizeof(T)>;
    if (whole) {
      if constexpr (kBack) {
        const Full v = take<Full>(twelve);
        put(a, __builtin_shufflevector(v, v, 0, 4, 8, 1, 5, 9, -1, -1)), put(b, __builtin_shufflevector(v, v, 2, 6, 10, 3, 7, 11, -1, -1));
      } else {
        const Half x = take<Half>(a), y = take<Half>(b);
        const Full both = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        put(twelve, __builtin_shufflevector(both, both, 0, 3, 8, 11, 1, 4, 9, 12, 2, 5, 10, 13, -1, -1, -1, -1));
      }
      return;
    }
  }
#endif
  for (int c = 0; c < 3; ++c)
    for (int k = 0; k < 2; ++k) {
      if constexpr (kBack) a[3 * k + c] = twelve[4 * c + k], b[3 * k + c] = twelve[4 * c + 2 + k];
      else twelve[4 * c + k] = a[3 * k + c], twelve[4 * c + 2 + k] = b[3 * k + c];
    }
}

}  // namespace fastgen
