// Philox4x32-10 and the conversion to normals for one block of four, on host and device: what csrc/common/philox.h does for a
// vector of blocks, operation by operation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTGEN_HD __host__ __device__ __forceinline__
#else
#define FASTGEN_HD inline
#endif

namespace fastgen::scalar {

struct Words {
  std::uint32_t w[4];
};

FASTGEN_HD Words philox_4x32(Words c, std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c.w[0], p1 = std::uint64_t{0xCD9E8D57u} * c.w[2];
    c = {{static_cast<std::uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<std::uint32_t>(p0)}};
  }
  return c;
}

template <class To, class From>
FASTGEN_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// sqrt(-2 ln u), u = (r + 1/2) / 2^32, r rounded to fp32 first.
FASTGEN_HD float radius(std::uint32_t r) {
  const std::uint32_t bits = bits_as<std::uint32_t>(static_cast<float>(r) + 0.5f);
  const std::int32_t exponent = static_cast<std::int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = bits_as<float>(bits - (static_cast<std::uint32_t>(exponent) << 23)) - 1.0f;
  const auto e = static_cast<float>(exponent - 32);
  float p = fmaf(7.0376836292e-2f, m, -1.1514610310e-1f);
  p = fmaf(p, m, 1.1676998740e-1f);
  p = fmaf(p, m, -1.2420140846e-1f);
  p = fmaf(p, m, 1.4249322787e-1f);
  p = fmaf(p, m, -1.6668057665e-1f);
  p = fmaf(p, m, 2.0000714765e-1f);
  p = fmaf(p, m, -2.4999993993e-1f);
  p = fmaf(p, m, 3.3333331174e-1f);
  const float square = m * m;
  float log_m = fmaf(p * m, square, e * -2.12194440e-4f);
  log_m = fmaf(square, -0.5f, log_m) + m;
  const float x = fmaf(e, 0.693359375f, log_m) * -2.0f;
  return sqrtf(x > 0.0f ? x : 0.0f);
}

// radius(r0) * (cos, sin)(2 pi r1 / 2^32); the top two bits of r1 choose the quadrant.
FASTGEN_HD void box_muller(std::uint32_t r0, std::uint32_t r1, float* z) {
  const std::uint32_t quadrant = (r1 + 0x20000000u) >> 30;
  const float angle = static_cast<float>(static_cast<std::int32_t>(r1 - (quadrant << 30))) * 1.46291807927e-9f;
  const float square = angle * angle;
  float s = fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f);
  s = fmaf(s, square, -1.6666654611e-1f);
  s = fmaf(s * square, angle, angle);
  float c = fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f);
  c = fmaf(c, square, 4.166664568298827e-2f);
  c = fmaf(c, square * square, fmaf(square, -0.5f, 1.0f));
  const float length = radius(r0), cosine = quadrant & 1u ? s : c, sine = quadrant & 1u ? c : s;
  z[0] = length * ((quadrant + 1u) & 2u ? -cosine : cosine);
  z[1] = length * (quadrant & 2u ? -sine : sine);
}

// The four normals of block `block` of the stream (seed, step).
FASTGEN_HD void normals_4(std::uint64_t block, std::uint32_t step, std::uint64_t seed, float* z) {
  const Words r = philox_4x32({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), step, 0u}},
                              static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  box_muller(r.w[0], r.w[1], z);
  box_muller(r.w[2], r.w[3], z + 2);
}

}  // namespace fastgen::scalar
