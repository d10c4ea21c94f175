// The tiles of a matrix unit (Intel AMX): eight registers of 16 rows of 64 bytes, and the product of two tiles of bfloat16 pairs, added
// to one of fp32. The variant `amx` has them. FASTGEN_EMULATED_TILES computes the same in plain C++, for a test on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd/vector.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define FASTGEN_HAS_MATRIX_TILES 1
#elif defined(FASTGEN_EMULATED_TILES)
#define FASTGEN_HAS_MATRIX_TILES 1
#else
#define FASTGEN_HAS_MATRIX_TILES 0
#endif

namespace fastgen::matrix_tiles {

inline constexpr int kRows = 16;   // of a tile
inline constexpr int kWords = 16;  // of 32 bits in a row: fp32, or pairs of bfloat16
inline constexpr bool kAvailable = FASTGEN_HAS_MATRIX_TILES;

#if FASTGEN_HAS_MATRIX_TILES

#if defined(__AMX_TILE__)

// A thread's tiles, all eight of them whole, while this lives. Whoever calls a library meanwhile may find them changed.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof configuration == 64);
    for (int t = 0; t < 8; ++t) configuration.row_bytes[t] = 4 * kWords, configuration.rows[t] = kRows;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int t>
FASTGEN_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}

// 16 rows of 64 bytes, `row` bytes apart.
template <int t>
FASTGEN_INLINE void load(const void* from, std::int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row), "i"(t) : "memory");
}
template <int t>
FASTGEN_INLINE void store(void* to, std::int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row), "i"(t) : "memory");
}

// sum[m][n] += the dot products of a[m][k] and b[k][n] over k < 16, each a pair of bfloat16: a holds rows of 32 numbers along the sum,
// b pairs of neighbours along it. Denormals count as zero.
template <int sum, int a, int b>
FASTGEN_INLINE void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#else

struct Emulated {
  std::uint32_t words[kRows][kWords];
};
inline thread_local Emulated emulated[8];

class Tiles {
 public:
  Tiles() { std::memset(emulated, 0, sizeof emulated); }
  ~Tiles() { std::memset(emulated, 0xff, sizeof emulated); }  // NaN: nobody may count on what stood there
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int t>
inline void zero() {
  std::memset(&emulated[t], 0, sizeof(Emulated));
}
template <int t>
inline void load(const void* from, std::int64_t row) {
  for (int m = 0; m < kRows; ++m) std::memcpy(emulated[t].words[m], static_cast<const char*>(from) + m * row, 4 * kWords);
}
template <int t>
inline void store(void* to, std::int64_t row) {
  for (int m = 0; m < kRows; ++m) std::memcpy(static_cast<char*>(to) + m * row, emulated[t].words[m], 4 * kWords);
}
template <int sum, int a, int b>
inline void multiply() {
  const auto half = [](std::uint32_t pair, int which) { return bits_as<float>(which == 0 ? pair << 16 : pair & 0xffff0000u); };
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kWords; ++n) {
      float total = bits_as<float>(emulated[sum].words[m][n]);
      for (int k = 0; k < kWords; ++k)
        for (int which = 0; which < 2; ++which)
          total += half(emulated[a].words[m][k], which) * half(emulated[b].words[k][n], which);
      emulated[sum].words[m][n] = bits_as<std::uint32_t>(total);
    }
}

#endif
#endif

}  // namespace fastgen::matrix_tiles
