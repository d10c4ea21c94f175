// Elements from anywhere as one vector, where the hardware has an instruction for it that is worth it.
#pragma once

#include "common/simd/vector.h"

namespace fastgen {

#if defined(__AVX512F__)
inline constexpr bool kGathers = true;
#else
inline constexpr bool kGathers = false;
#endif

// from[at[i]] in lane i, and 0 where at[i] is negative: that is not read.
FASTGEN_INLINE VecF gather(const float* from, VecI at) {
#if defined(__AVX512F__)
  const auto index = static_cast<__m512i>(at);
  return VecF(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), _mm512_cmpge_epi32_mask(index, _mm512_setzero_si512()), index, from, 4));
#else
  return VecF([&](auto i) { return at[i] < 0 ? 0.0f : from[at[i]]; });
#endif
}

}  // namespace fastgen
