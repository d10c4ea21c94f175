// SIMD for every kernel: std::experimental::simd (libstdc++; C++26 std::simd) at the native width of the variant being
// compiled, and in this header alone the intrinsics for what it cannot say: scaling by 2^k, the approximate reciprocal, the
// widening 32-bit multiply, half precision and the 4-way interleaved store.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <experimental/simd>
#include <limits>
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

// The type in which elements of a dtype are computed: fp32, and fp64 for fp64.
template <class T>
using opmath_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
FASTGEN_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// ---- scalars ---------------------------------------------------------------------------------------------------------

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

// ---- loads and stores --------------------------------------------------------------------------------------------------

// kWidth elements of any dtype as a vector of its opmath type.
template <class T>
FASTGEN_INLINE Vec<opmath_t<T>> load(const T* p) {
  using V = Vec<opmath_t<T>>;
  if constexpr (std::is_same_v<T, opmath_t<T>>) {
    return V(p, stdx::element_aligned);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const stdx::rebind_simd_t<std::uint16_t, VecF> raw(reinterpret_cast<const std::uint16_t*>(p), stdx::element_aligned);
    return bits_as<V>(VecU(stdx::static_simd_cast<VecU>(raw) << 16));
  } else {
#if defined(__AVX512F__)
    return V(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && defined(__AVX2__)
    return V(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return V([p](auto i) { return widen(p[i]); });
#endif
  }
}

template <class T>
FASTGEN_INLINE void store(T* p, Vec<opmath_t<T>> v) {
  if constexpr (std::is_same_v<T, opmath_t<T>>) {
    v.copy_to(p, stdx::element_aligned);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__AVX512BF16__)
    const __m256bh packed = _mm512_cvtneps_pbh(static_cast<__m512>(v));  // denormals become zero
    std::memcpy(p, &packed, sizeof packed);
#else
    const VecU bits = bits_as<VecU>(v);
    VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto nan = v != v;
    stdx::where(bits_as<VecU::mask_type>(nan), rounded) = (bits >> 16) | 0x40u;
    stdx::static_simd_cast<stdx::rebind_simd_t<std::uint16_t, VecF>>(rounded).copy_to(
        reinterpret_cast<std::uint16_t*>(p), stdx::element_aligned);
#endif
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(static_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(static_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth<float>; ++i) p[i] = narrow<T>(v[i]);
#endif
  }
}

// Ask for the cache line of p early; never faults, whatever p is.
template <class T>
FASTGEN_INLINE void prefetch(const T* p) { __builtin_prefetch(p, 0, 3); }
template <class T>
FASTGEN_INLINE void prefetch_to_write(T* p) { __builtin_prefetch(p, 1, 3); }

// The first `count` < kWidth elements, the other lanes zero; nothing past them is touched.
template <class T>
FASTGEN_INLINE Vec<opmath_t<T>> load_part(const T* p, int count) {
  alignas(64) T buffer[kWidth<opmath_t<T>>] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
FASTGEN_INLINE void store_part(T* p, Vec<opmath_t<T>> v, int count) {
  alignas(64) T buffer[kWidth<opmath_t<T>>];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// How one step of a vector loop touches memory: a whole vector, or the first `count` lanes at the end of a row.
struct Whole {
  template <class T>
  FASTGEN_INLINE Vec<opmath_t<T>> load(const T* p) const { return fastgen::load(p); }
  template <class T>
  FASTGEN_INLINE void store(T* p, Vec<opmath_t<T>> v) const { fastgen::store(p, v); }
  template <class A>
  FASTGEN_INLINE Vec<A> keep(Vec<A> v) const { return v; }
};
// `v` with the lanes from `count` on set to zero.
template <class A>
FASTGEN_INLINE Vec<A> keep_part(Vec<A> v, int count) {
  const Vec<A> lane([](auto i) { return static_cast<A>(static_cast<int>(i)); });
  stdx::where(lane >= static_cast<A>(count), v) = A(0);
  return v;
}

struct Part {
  int count;
  template <class T>
  FASTGEN_INLINE Vec<opmath_t<T>> load(const T* p) const { return load_part(p, count); }
  template <class T>
  FASTGEN_INLINE void store(T* p, Vec<opmath_t<T>> v) const { store_part(p, v, count); }
  template <class A>
  FASTGEN_INLINE Vec<A> keep(Vec<A> v) const { return keep_part<A>(v, count); }
};

// f(i, Whole{}) for every whole vector of [0, count), then f(i, Part{rest}).
template <class A, class F>
FASTGEN_INLINE void for_vectors(std::int64_t count, const F& f) {
  std::int64_t i = 0;
  for (; i + kWidth<A> <= count; i += kWidth<A>) f(i, Whole{});
  if (i < count) f(i, Part{static_cast<int>(count - i)});
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------------

// a * b + c, rounded once where the variant has the instruction (libstdc++'s own fma goes lane by lane).
template <class A>
FASTGEN_INLINE Vec<A> madd(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return VecF(_mm512_fmadd_ps(static_cast<__m512>(a), static_cast<__m512>(b), static_cast<__m512>(c)));
  else
    return Vec<double>(_mm512_fmadd_pd(static_cast<__m512d>(a), static_cast<__m512d>(b), static_cast<__m512d>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<A, float>)
    return VecF(_mm256_fmadd_ps(static_cast<__m256>(a), static_cast<__m256>(b), static_cast<__m256>(c)));
  else
    return Vec<double>(_mm256_fmadd_pd(static_cast<__m256d>(a), static_cast<__m256d>(b), static_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

template <class A>
FASTGEN_INLINE A sum_lanes(Vec<A> v) {
  return stdx::reduce(v);
}

// The sum of f(i, at) over the vectors of [0, count), in an order that depends on nothing but count; f as in for_vectors.
template <class A, class F>
FASTGEN_INLINE A sum_vectors(std::int64_t count, const F& f) {
  constexpr int unroll = 4;  // chains of additions in flight: the latency of one
  Vec<A> sums[unroll];
  for (auto& sum : sums) sum = Vec<A>(A(0));
  std::int64_t i = 0;
  for (; i + unroll * kWidth<A> <= count; i += unroll * kWidth<A>)
    for (int k = 0; k < unroll; ++k) sums[k] += f(i + k * kWidth<A>, Whole{});
  for (; i + kWidth<A> <= count; i += kWidth<A>) sums[0] += f(i, Whole{});
  if (i < count) {
    const Part part{static_cast<int>(count - i)};
    sums[1] += part.keep<A>(f(i, part));
  }
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// p * 2^k for integral k with |k| <= 126 (larger where the hardware can); a NaN in either stays.
FASTGEN_INLINE VecF scale_by_power(VecF p, VecF k) {
#if defined(__AVX512F__)
  return VecF(_mm512_scalef_ps(static_cast<__m512>(p), static_cast<__m512>(k)));
#else
  const VecF magic = k + 12582912.0f;  // 1.5 * 2^23: the integer now stands in the low mantissa bits
  return p * bits_as<VecF>(VecU((bits_as<VecU>(magic) + 127u) << 23));
#endif
}

// Round to the nearest integer for |x| < 2^22.
FASTGEN_INLINE VecF round_near(VecF x) {
#if defined(__AVX512F__)
  return VecF(_mm512_roundscale_ps(static_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecF magic(12582912.0f);
  return (x + magic) - magic;
#endif
}

// 1 / d for normal d with a normal reciprocal, to 1 ulp; `kLow` stops at 14 bits, enough for a bf16 result.
template <bool kLow = false>
FASTGEN_INLINE VecF reciprocal(VecF d) {
#if defined(__AVX512F__)
  const VecF r(_mm512_rcp14_ps(static_cast<__m512>(d)));
  if constexpr (kLow) return r;
  return madd<float>(r, madd<float>(-d, r, VecF(1.0f)), r);
#else
  return 1.0f / d;
#endif
}

// exp(x) = (1 + p) 2^k for x in [-87, 88], to which it is clamped; p = exp(r) - 1 with |r| <= ln(2) / 2, NaN stays.
FASTGEN_INLINE void reduced_exp(VecF x, VecF& p_out, VecF& k_out) {
  stdx::where(x > 88.0f, x) = 88.0f;
  stdx::where(x < -87.0f, x) = -87.0f;
  const VecF k = round_near(x * 1.44269504f);
  VecF r = madd<float>(k, VecF(-0.693359375f), x);
  r = madd<float>(k, VecF(2.12194440e-4f), r);
  VecF p(1.9875691500e-4f);  // Cephes expf
  p = madd<float>(p, r, VecF(1.3981999507e-3f));
  p = madd<float>(p, r, VecF(8.3334519073e-3f));
  p = madd<float>(p, r, VecF(4.1665795894e-2f));
  p = madd<float>(p, r, VecF(1.6666665459e-1f));
  p = madd<float>(p, r, VecF(5.0000001201e-1f));
  p_out = madd<float>(p, r * r, r);
  k_out = k;
}

// exp(x) to 1 ulp in [-87, 88]; saturates to 0-like and Inf-like values outside, NaN stays.
FASTGEN_INLINE VecF exp(VecF x) {
  VecF p, k;
  reduced_exp(x, p, k);
  return scale_by_power(p + 1.0f, k);
}
FASTGEN_INLINE Vec<double> exp(Vec<double> x) {
  return Vec<double>([&](auto i) { return std::exp(static_cast<double>(x[i])); });
}

// exp(x) - 1, without cancellation near 0.
FASTGEN_INLINE VecF expm1(VecF x) {
  VecF p, k;
  reduced_exp(x, p, k);
  const VecF power = scale_by_power(VecF(1.0f), k);
  return madd<float>(p, power, power - 1.0f);
}
FASTGEN_INLINE Vec<double> expm1(Vec<double> x) {
  return Vec<double>([&](auto i) { return std::expm1(static_cast<double>(x[i])); });
}

// ln(x 2^-power) for normal x > 0. Cephes logf on the mantissa.
FASTGEN_INLINE VecF log_scaled(VecF x, int power) {
  const VecU bits = bits_as<VecU>(x);
  // Mantissa to [sqrt(1/2), sqrt(2)): take the exponent relative to the bit pattern of sqrt(1/2).
  const VecI exponent = bits_as<VecI>(VecU(bits - 0x3f3504f3u)) >> 23;
  const VecF m = bits_as<VecF>(VecU(bits - bits_as<VecU>(VecI(exponent << 23)))) - 1.0f;
  const VecF e = stdx::static_simd_cast<VecF>(VecI(exponent - power));
  VecF p(7.0376836292e-2f);
  p = madd<float>(p, m, VecF(-1.1514610310e-1f));
  p = madd<float>(p, m, VecF(1.1676998740e-1f));
  p = madd<float>(p, m, VecF(-1.2420140846e-1f));
  p = madd<float>(p, m, VecF(1.4249322787e-1f));
  p = madd<float>(p, m, VecF(-1.6668057665e-1f));
  p = madd<float>(p, m, VecF(2.0000714765e-1f));
  p = madd<float>(p, m, VecF(-2.4999993993e-1f));
  p = madd<float>(p, m, VecF(3.3333331174e-1f));
  const VecF square = m * m;
  VecF log_m = madd<float>(p * m, square, e * -2.12194440e-4f);
  log_m = madd<float>(square, VecF(-0.5f), log_m) + m;
  return madd<float>(e, VecF(0.693359375f), log_m);
}
// ln(x) for normal x > 0; a NaN stays.
FASTGEN_INLINE VecF log(VecF x) {
  VecF y = log_scaled(x, 0);
  stdx::where(x != x, y) = x;
  return y;
}
FASTGEN_INLINE Vec<double> log(Vec<double> x) {
  return Vec<double>([&](auto i) { return std::log(static_cast<double>(x[i])); });
}

// x within [low, high]; a NaN stays.
FASTGEN_INLINE VecF clamp(VecF x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 floored = _mm512_max_ps(_mm512_set1_ps(low), static_cast<__m512>(x));  // of a NaN the second operand is kept
  return VecF(_mm512_min_ps(_mm512_set1_ps(high), floored));
#else
  stdx::where(x < low, x) = low;
  stdx::where(x > high, x) = high;
  return x;
#endif
}

// s = 1 / (1 + e) and e = exp(-x), which makes 1 - s = e s without cancellation. In fp32 x must lie in [-80, 80], so that e
// and 1 / (1 + e) stay normal; relative error 2e-7, or 2e-4 with `kLow`.
template <class A>
struct Sigmoid {
  Vec<A> s, e;
};
template <bool kLow = false>
FASTGEN_INLINE Sigmoid<float> sigmoid(VecF x) {
  const VecF k = round_near(x * -1.44269504f);
  const VecF r = madd<float>(x, VecF(-1.44269504f), -k);  // the product unrounded
  VecF p;  // 2^r on [-1/2, 1/2], minimax with p(0) = 1: relative error 9e-8, or 1e-4
  if constexpr (kLow) {
    p = madd<float>(VecF(5.50089305e-2f), r, VecF(2.42210961e-1f));
    p = madd<float>(p, r, VecF(6.93282927e-1f));
  } else {
    p = madd<float>(VecF(1.32647271e-3f), r, VecF(9.67151264e-3f));
    p = madd<float>(p, r, VecF(5.55073374e-2f));
    p = madd<float>(p, r, VecF(2.40222421e-1f));
    p = madd<float>(p, r, VecF(6.93146978e-1f));
  }
  const VecF e = scale_by_power(madd<float>(p, r, VecF(1.0f)), k);
  return {reciprocal<kLow>(e + 1.0f), e};
}
template <bool kLow = false>
FASTGEN_INLINE Sigmoid<double> sigmoid(Vec<double> x) {
  const Vec<double> e = exp(-x);
  return {1.0 / (1.0 + e), e};
}

// x * sigmoid(x). Below -80 it is zero to any precision in use, and so is what stands for it here.
template <class A, bool kLow = false>
FASTGEN_INLINE Vec<A> silu(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return x * sigmoid(x).s;
  } else {
    constexpr float largest = std::numeric_limits<float>::max();
    return clamp(x, -80.0f, largest) * sigmoid<kLow>(clamp(x, -80.0f, 80.0f)).s;
  }
}

// d silu(x) / dx = s (1 + x (1 - s)), s = sigmoid(x).
template <class A, bool kLow = false>
FASTGEN_INLINE Vec<A> silu_grad(Vec<A> x) {
  if constexpr (std::is_same_v<A, float>) x = clamp(x, -80.0f, 80.0f);
  const Sigmoid<A> sigma = sigmoid<kLow>(x);
  return madd<A>(x, sigma.e * sigma.s, Vec<A>(A(1))) * sigma.s;
}

// ---- integers ----------------------------------------------------------------------------------------------------------

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

// Where lane `lane` goes among the blocks of four that store_interleaved writes: chosen so that whole 128-bit lanes move.
FASTGEN_INLINE constexpr int interleaved_block(int lane) {
  constexpr int quads = kWidth<float> / 4;
  return (lane % 4) * quads + lane / 4;
}

// Writes 4 * kWidth floats: block interleaved_block(i) of four is (z0[i], z1[i], z2[i], z3[i]).
FASTGEN_INLINE void store_interleaved(float* p, VecF z0, VecF z1, VecF z2, VecF z3) {
#if defined(__AVX512F__)
  const auto a = static_cast<__m512>(z0), b = static_cast<__m512>(z1), c = static_cast<__m512>(z2), d = static_cast<__m512>(z3);
  const auto ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const auto cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  _mm512_storeu_ps(p, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low)));
  _mm512_storeu_ps(p + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low)));
  _mm512_storeu_ps(p + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)));
  _mm512_storeu_ps(p + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)));
#elif defined(__AVX2__)
  const auto a = static_cast<__m256>(z0), b = static_cast<__m256>(z1), c = static_cast<__m256>(z2), d = static_cast<__m256>(z3);
  const auto ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const auto cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  _mm256_storeu_ps(p, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)));
  _mm256_storeu_ps(p + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)));
  _mm256_storeu_ps(p + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)));
  _mm256_storeu_ps(p + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)));
#else
  for (int i = 0; i < kWidth<float>; ++i) {
    float* block = p + 4 * interleaved_block(i);
    block[0] = z0[i], block[1] = z1[i], block[2] = z2[i], block[3] = z3[i];
  }
#endif
}

}  // namespace fastgen
