// Loads and stores: vectors of any dtype, widened and narrowed on the way, whole or part of one at the end of a row; loops over
// a row; the 4-way interleaved store, halves of two vectors. Half precision by intrinsics, which std::experimental::simd has not.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd/vector.h"

namespace fastgen {

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
  static_assert(kMayBeStored<T>, "setup.py: a source that stores bfloat16 is not one of SHARED");
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

#if defined(__AVX512F__)
FASTGEN_INLINE __mmask32 first_lanes(int count) { return count >= 32 ? ~0u : (1u << count) - 1u; }
#endif

// The first `count` < kWidth elements, the other lanes zero; nothing past them is touched.
template <class T>
FASTGEN_INLINE Vec<opmath_t<T>> load_part(const T* p, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return VecF(_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(count)), p));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(count)), p);
    return bits_as<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
#endif
  alignas(64) T buffer[kWidth<opmath_t<T>>] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
FASTGEN_INLINE void store_part(T* p, Vec<opmath_t<T>> v, int count) {
  alignas(64) T buffer[kWidth<opmath_t<T>>];
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(count)), static_cast<__m512>(v));
#endif
  store(buffer, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first_lanes(count)), _mm256_load_si256(reinterpret_cast<__m256i*>(buffer)));
#endif
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

// The low halves of the lanes of a and of b, one after the other; the high halves.
template <class V>
FASTGEN_INLINE V low_halves(const V& a, const V& b) {
#if defined(__AVX512F__)
  return bits_as<V>(_mm512_shuffle_i64x2(bits_as<__m512i>(a), bits_as<__m512i>(b), 0x44));
#else
  constexpr int half = static_cast<int>(V::size()) / 2;
  return V([&](auto i) { return i < half ? a[i] : b[i - half]; });
#endif
}
template <class V>
FASTGEN_INLINE V high_halves(const V& a, const V& b) {
#if defined(__AVX512F__)
  return bits_as<V>(_mm512_shuffle_i64x2(bits_as<__m512i>(a), bits_as<__m512i>(b), 0xee));
#else
  constexpr int half = static_cast<int>(V::size()) / 2;
  return V([&](auto i) { return i < half ? a[i + half] : b[i]; });
#endif
}

}  // namespace fastgen
