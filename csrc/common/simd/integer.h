// Integers for Philox: the widening 32-bit multiply, and 32-bit words taken out of 64-bit lanes.
#pragma once

#include "common/simd/vector.h"

namespace fastgen {

using VecU64 = stdx::native_simd<std::uint64_t>;  // half as many lanes as VecU

// The 64-bit product of the low 32 bits of every lane; what stands in the high 32 bits is ignored.
FASTGEN_INLINE VecU64 multiply_low_words(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return VecU64(_mm512_mul_epu32(static_cast<__m512i>(a), static_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return VecU64(_mm256_mul_epu32(static_cast<__m256i>(a), static_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return VecU64(_mm_mul_epu32(static_cast<__m128i>(a), static_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The high 32 bits of every lane, moved down; what then stands above them is not said. A shuffle, since the port that
// shifts is the one that multiplies.
FASTGEN_INLINE VecU64 high_words(VecU64 a) {
#if defined(__AVX512F__)
  return VecU64(_mm512_shuffle_epi32(static_cast<__m512i>(a), _MM_PERM_DDBB));
#elif defined(__AVX2__)
  return VecU64(_mm256_shuffle_epi32(static_cast<__m256i>(a), 0xf5));
#else
  return a >> 32;
#endif
}

// The low words of the lanes of a, then of b.
FASTGEN_INLINE VecU low_words(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return VecU(_mm512_permutex2var_epi32(static_cast<__m512i>(a), index, static_cast<__m512i>(b)));
#elif defined(__AVX2__)
  const __m256 low = _mm256_castsi256_ps(static_cast<__m256i>(a)), high = _mm256_castsi256_ps(static_cast<__m256i>(b));
  const __m256i pairs = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88));  // a0 a1 b0 b1 a2 a3 b2 b3
  return VecU(_mm256_permute4x64_epi64(pairs, 0xd8));
#else
  return VecU([&](auto i) {
    constexpr int half = kWidth<float> / 2;
    return static_cast<std::uint32_t>(i < half ? a[i] : b[i - half]);
  });
#endif
}

}  // namespace fastgen
