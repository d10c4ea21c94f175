// The vectors of every kernel: std::experimental::simd (libstdc++; C++26 std::simd) at the native width of the variant being
// compiled; the dtypes as they are stored, and single elements taken between the two.
#pragma once

#include <cstdint>
#include <experimental/simd>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A vector that crosses a call goes through memory, so everything below is inlined whatever the compiler's heuristics say.
#define FASTGEN_INLINE [[gnu::always_inline]] inline

namespace fastgen {

namespace stdx = std::experimental;

template <class A>
using Vec = stdx::native_simd<A>;
using VecF = Vec<float>;
template <class A>
inline constexpr int kWidth = static_cast<int>(Vec<A>::size());
using VecU = stdx::rebind_simd_t<std::uint32_t, VecF>;
using VecI = stdx::rebind_simd_t<std::int32_t, VecF>;

// Storage types of the low-precision dtypes: bits only, arithmetic happens after the load.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// Whether elements of a dtype may be stored here; those of bfloat16 may not in sources whose objects variants share (common/shared.h).
template <class T>
inline constexpr bool kMayBeStored = true;

// The type in which elements of a dtype are computed: fp32, and fp64 for fp64.
template <class T>
using opmath_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
FASTGEN_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

FASTGEN_INLINE float widen(float x) { return x; }
FASTGEN_INLINE double widen(double x) { return x; }
FASTGEN_INLINE float widen(BFloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }
FASTGEN_INLINE float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // Inf, NaN
  // Shifted into place the exponent is 112 too small; a multiplication by 2^112 mends that, denormals included.
  return bits_as<float>(sign | bits_as<std::uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
FASTGEN_INLINE T narrow(opmath_t<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = bits_as<std::uint32_t>(x);
    if (x != x) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};  // to nearest, ties to even
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__F16C__)
    return {static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    const auto bits = bits_as<std::uint32_t>(x);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds past 65504
    if (magnitude < 0x38800000u)  // denormal: adding 1/2 lets the FPU round at the right bit
      return {static_cast<std::uint16_t>(sign | (bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u))};
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
#endif
  } else {
    return x;
  }
}

}  // namespace fastgen
