// Two bfloat16 in each lane of 32 bits, the first in its low half, and their dot product: AVX-512-BF16 has an instruction for it.
// Elsewhere the same by shifts, which is no faster than fp32.
#pragma once

#include "common/simd/arithmetic.h"

namespace fastgen {

// sum + the low half of a times that of b + the high half of a times that of b.
FASTGEN_INLINE VecF dot_pairs(VecU a, VecU b, VecF sum) {
#if defined(__AVX512BF16__)
  return VecF(_mm512_dpbf16_ps(static_cast<__m512>(sum), bits_as<__m512bh>(a), bits_as<__m512bh>(b)));
#else
  const auto low = [](VecU pair) { return bits_as<VecF>(VecU(pair << 16)); };
  const auto high = [](VecU pair) { return bits_as<VecF>(VecU(pair & 0xffff0000u)); };
  return madd<float>(high(a), high(b), madd<float>(low(a), low(b), sum));
#endif
}

// The first `count` of 2 kWidth numbers as they lie, as pairs; the others are zero, and nothing past them is touched.
FASTGEN_INLINE VecU load_pairs(const BFloat16* p, std::int64_t count) {
#if defined(__AVX512F__)
  return VecU(_mm512_maskz_loadu_epi16(first_lanes(static_cast<int>(count)), p));
#else
  alignas(64) std::uint16_t buffer[2 * kWidth<float>] = {};
  std::memcpy(buffer, p, std::min<std::int64_t>(count, 2 * kWidth<float>) * sizeof(BFloat16));
  return bits_as<VecU>(buffer);
#endif
}

// Lane by lane the pair of `low` and `high`, each rounded to the nearest bfloat16, of two the even one.
FASTGEN_INLINE VecU make_pairs(VecF low, VecF high) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto packed = bits_as<__m512i>(_mm512_cvtne2ps_pbh(static_cast<__m512>(high), static_cast<__m512>(low)));
  return VecU(_mm512_permutexvar_epi16(_mm512_load_si512(order), packed));
#else
  const auto rounded = [](VecF x) {
    const VecU bits = bits_as<VecU>(x);
    VecU y = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    stdx::where(bits_as<VecU::mask_type>(x != x), y) = (bits >> 16) | 0x40u;
    return y;
  };
  return rounded(low) | (rounded(high) << 16);
#endif
}

// The same for positive numbers, of two nearest the larger one: three instructions where an Intel's conversion takes five.
FASTGEN_INLINE VecU make_positive_pairs(VecF low, VecF high) {
#if defined(__AVX512BF16__)
  const auto rounded = [](VecF x) { return static_cast<__m512i>(VecU(bits_as<VecU>(x) + 0x8000u)); };
  const __m512i high_halves = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);  // of each lane, to both
  return VecU(_mm512_mask_shuffle_epi8(rounded(high), 0x3333333333333333u, rounded(low), high_halves));
#else
  return make_pairs(low, high);
#endif
}

}  // namespace fastgen
