// A square of kWidth vectors turned over: element j of vector i goes to element i of vector j. By intrinsics where the variant has
// shuffles for it, through memory elsewhere.
#pragma once

#include "common/simd/vector.h"

namespace fastgen {

template <class A>
FASTGEN_INLINE void transpose_through_memory(Vec<A> (&v)[kWidth<A>]) {
  constexpr int width = kWidth<A>;
  alignas(64) A square[width][width];
  for (int i = 0; i < width; ++i) v[i].copy_to(square[i], stdx::element_aligned);
  for (int j = 0; j < width; ++j) v[j] = Vec<A>([&](auto i) { return square[i][j]; });
}

FASTGEN_INLINE void transpose(Vec<double> (&v)[kWidth<double>]) { transpose_through_memory<double>(v); }
FASTGEN_INLINE void transpose(VecF (&v)[kWidth<float>]) {
#if defined(__AVX512F__)
  // Pairs of rows, then of pairs, leave 4x4 squares in lanes of 128 bits; two rounds of shuffles put the squares in their places.
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    const auto a = static_cast<__m512>(v[i]), b = static_cast<__m512>(v[i + 1]);
    t[i] = _mm512_unpacklo_ps(a, b), t[i + 1] = _mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int j = 0; j < 4; ++j) {  // u[4 q + j]: rows 4 q to 4 q + 3 of columns j, j + 4, j + 8, j + 12
    const __m512 even_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), odd_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88), odd_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    v[j] = VecF(_mm512_shuffle_f32x4(even_low, even_high, 0x88)), v[j + 8] = VecF(_mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    v[j + 4] = VecF(_mm512_shuffle_f32x4(odd_low, odd_high, 0x88)), v[j + 12] = VecF(_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
#elif defined(__AVX2__)
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    const auto a = static_cast<__m256>(v[i]), b = static_cast<__m256>(v[i + 1]);
    t[i] = _mm256_unpacklo_ps(a, b), t[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  for (int j = 0; j < 4; ++j) {
    v[j] = VecF(_mm256_permute2f128_ps(u[j], u[4 + j], 0x20));
    v[j + 4] = VecF(_mm256_permute2f128_ps(u[j], u[4 + j], 0x31));
  }
#else
  transpose_through_memory<float>(v);
#endif
}

}  // namespace fastgen
