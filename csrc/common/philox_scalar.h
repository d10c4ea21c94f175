// Philox4x32-10 (Salmon et al., SC 2011) and fastgen's conversion to normals, one block at a time, for host and device.
// csrc/common/philox.h does the same kWidth blocks at a time on a CPU, kernels/_philox.py in Triton. Every multiply-add is
// written as one, so that no compiler flag decides where a rounding falls: a device's normals have the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTGEN_HD __host__ __device__ inline
#else
#define FASTGEN_HD inline
#endif

namespace fastgen::scalar {

struct Words {
  std::uint32_t w[4];
};

struct Normals {
  float z[4];
};

template <class To, class From>
FASTGEN_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Ten rounds: counter (block, block >> 32, step, 0), key = seed.
FASTGEN_HD Words philox_4x32(std::uint64_t block, std::uint32_t step, std::uint64_t seed) {
  std::uint32_t c0 = static_cast<std::uint32_t>(block), c1 = static_cast<std::uint32_t>(block >> 32), c2 = step, c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

// sqrt(-2 ln u) for u = (r + 1/2) / 2^32, r rounded to fp32 first. Cephes logf on the mantissa.
FASTGEN_HD float normal_radius(std::uint32_t r) {
  const std::uint32_t bits = bits_as<std::uint32_t>(static_cast<float>(r) + 0.5f);
  // Mantissa to [sqrt(1/2), sqrt(2)): take the exponent relative to the bit pattern of sqrt(1/2).
  const std::int32_t exponent = static_cast<std::int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = bits_as<float>(bits - (static_cast<std::uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent - 32);
  float p = 7.0376836292e-2f;
  p = fmaf(p, m, -1.1514610310e-1f);
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
  return sqrtf(fmaf(e, 0.693359375f, log_m) * -2.0f);
}

// radius(r0) * (cos, sin)(2 pi r1 / 2^32): the top two bits choose the quadrant, the rest is an angle in [-pi/4, pi/4].
FASTGEN_HD void box_muller(std::uint32_t r0, std::uint32_t r1, float& z0, float& z1) {
  const float radius = normal_radius(r0);
  const std::uint32_t quadrant = (r1 + 0x20000000u) >> 30;
  const float angle = static_cast<float>(static_cast<std::int32_t>(r1 - (quadrant << 30))) * 1.46291807927e-9f;
  const float square = angle * angle;
  float s = fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f);  // Cephes sinf, cosf
  s = fmaf(s, square, -1.6666654611e-1f);
  s = fmaf(s * square, angle, angle);
  float c = fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f);
  c = fmaf(c, square, 4.166664568298827e-2f);
  c = fmaf(c, square * square, fmaf(square, -0.5f, 1.0f));
  // Quadrants 1 and 3 exchange sine and cosine; the cosine is negative in 1 and 2, the sine in 2 and 3.
  const float cosine = quadrant & 1u ? s : c, sine = quadrant & 1u ? c : s;
  z0 = radius * ((quadrant + 1u) & 2u ? -cosine : cosine);
  z1 = radius * (quadrant & 2u ? -sine : sine);
}

// Normals 4 * block to 4 * block + 3 of the stream (seed, step).
FASTGEN_HD Normals normal_block(std::uint64_t block, std::uint32_t step, std::uint64_t seed) {
  const Words r = philox_4x32(block, step, seed);
  Normals n;
  box_muller(r.w[0], r.w[1], n.z[0], n.z[1]);
  box_muller(r.w[2], r.w[3], n.z[2], n.z[3]);
  return n;
}

}  // namespace fastgen::scalar
