// Philox4x32-10 (Salmon et al., SC 2011) and fastgen's one conversion to normals, kWidth blocks of four at a time.
// The same arithmetic stands in fastgen/reference/philox_normal.py (what it means) and kernels/_philox.py (Triton).
#pragma once

#include <algorithm>

#include "common/simd/integer.h"
#include "common/simd/load_store.h"
#include "common/simd/transcendental.h"

namespace fastgen {

inline constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

// The keys of all rounds, two words each, worked out once: from memory a broadcast costs no shuffle.
struct PhiloxKeys {
  std::uint64_t words[2 * kPhiloxRounds];
  explicit PhiloxKeys(std::uint64_t seed) {
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1)
      words[2 * round] = k0, words[2 * round + 1] = k1;
  }
};

// One 64-bit lane per block, the 32-bit word in its low half. The high halves hold rubbish between rounds: the widening
// multiply does not read them, and leaving them spares a mask or a shuffle a word.
struct PhiloxBlocks {
  VecU64 c0, c1, c2, c3;

  FASTGEN_INLINE void run(const PhiloxKeys& keys) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const VecU64 p0 = multiply_low_words(c0, VecU64(kPhiloxMultiplier0));
      const VecU64 p1 = multiply_low_words(c2, VecU64(kPhiloxMultiplier1));
      c0 = high_words(p1) ^ c1 ^ VecU64(keys.words[2 * round]);
      c1 = p1;
      c2 = high_words(p0) ^ c3 ^ VecU64(keys.words[2 * round + 1]);
      c3 = p0;
    }
  }
};

// -2 ln(u) for u = (r + 1/2) / 2^32, r rounded to fp32 first.
FASTGEN_INLINE VecF minus_two_log_uniform(VecU r) { return log_scaled(stdx::static_simd_cast<VecF>(r) + 0.5f, 32) * -2.0f; }

// radius * (cos, sin)(2 pi r1 / 2^32): the nearest quarter turn and the rest, an angle in [-pi/4, pi/4].
FASTGEN_INLINE void box_muller(VecU r0, VecU r1, VecF& z0, VecF& z1) {
  const VecF radius = root(minus_two_log_uniform(r0));
  const VecF angle = stdx::static_simd_cast<VecF>(bits_as<VecI>(VecU(r1 << 2))) * 3.657295198175e-10f;
  const VecF square = angle * angle;
  VecF s(-1.9515295891e-4f);  // Cephes sinf, cosf
  s = madd<float>(s, square, VecF(8.3321608736e-3f));
  s = madd<float>(s, square, VecF(-1.6666654611e-1f));
  s = madd<float>(s * square, angle, angle);
  VecF c(2.443315711809948e-5f);
  c = madd<float>(c, square, VecF(-1.388731625493765e-3f));
  c = madd<float>(c, square, VecF(4.166664568298827e-2f));
  c = madd<float>(c, square * square, madd<float>(square, VecF(-0.5f), VecF(1.0f)));
  // Odd quarter turns exchange sine and cosine; the cosine is negative after 1 and 2 of them, the sine after 2 and 3.
  const VecU turned = r1 + 0x20000000u;  // its top two bits count the quarter turns
  const auto odd = bits_as<VecF::mask_type>((turned & 0x40000000u) != 0u);
  VecF cosine = c, sine = s;
  stdx::where(odd, cosine) = s;
  stdx::where(odd, sine) = c;
  const VecU cosine_sign = (turned + 0x40000000u) & 0x80000000u, sine_sign = turned & 0x80000000u;
  z0 = radius * bits_as<VecF>(VecU(bits_as<VecU>(cosine) ^ cosine_sign));
  z1 = radius * bits_as<VecF>(VecU(bits_as<VecU>(sine) ^ sine_sign));
}

// Drawing a normal is as much work as some four elements of a light operation: when is a second thread worth it?
inline constexpr std::int64_t kNormalWork = 4;

inline constexpr int kNormalsPerBatch = 4 * kWidth<float>;

// kNormalsPerBatch normals of a sample's stream, from block `block` on.
FASTGEN_INLINE void normal_batch(float* out, const PhiloxKeys& keys, std::uint32_t step, std::uint64_t block) {
  const auto lanes = [](int first) {
    return VecU64([first](auto i) { return static_cast<std::uint64_t>(interleaved_block(first + static_cast<int>(i))); });
  };
  static const VecU64 low_lanes = lanes(0), high_lanes = lanes(kWidth<float> / 2);
  PhiloxBlocks a{low_lanes + block, (low_lanes + block) >> 32, VecU64(step), VecU64(0)};
  PhiloxBlocks b{high_lanes + block, (high_lanes + block) >> 32, VecU64(step), VecU64(0)};
  a.run(keys);
  b.run(keys);
  VecF z0, z1, z2, z3;
  box_muller(low_words(a.c0, b.c0), low_words(a.c1, b.c1), z0, z1);
  box_muller(low_words(a.c2, b.c2), low_words(a.c3, b.c3), z2, z3);
  store_interleaved(out, z0, z1, z2, z3);
}

// Normals `first` to `first + count` of a sample's stream.
inline void fill_normals(float* out, std::uint64_t seed, std::uint32_t step, std::int64_t first, std::int64_t count) {
  const PhiloxKeys keys(seed);
  std::int64_t block = first / 4, skip = first % 4;
  alignas(64) float buffer[kNormalsPerBatch];
  while (count > 0) {
    if (skip == 0 && count >= kNormalsPerBatch) {
      normal_batch(out, keys, step, static_cast<std::uint64_t>(block));
      out += kNormalsPerBatch, count -= kNormalsPerBatch;
    } else {
      normal_batch(buffer, keys, step, static_cast<std::uint64_t>(block));
      const std::int64_t take = std::min<std::int64_t>(count, kNormalsPerBatch - skip);
      std::memcpy(out, buffer + skip, take * sizeof(float));
      out += take, count -= take, skip = 0;
    }
    block += kWidth<float>;
  }
}

}  // namespace fastgen
