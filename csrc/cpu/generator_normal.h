// The engine of torch's CPU generators: MT19937 (Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8, 1998), made in vectors,
// and the state that `torch.Generator.get_state()` returns, read and left as torch leaves it.
#pragma once

#include <cstring>

#include "common/check.h"
#include "common/simd/vector.h"

namespace fastgen {

inline constexpr std::int64_t kWords = 624, kFarWord = 397;  // the state's length n, and the m of the recurrence

// The bytes of torch's state. What a draw of 16 or more leaves alone is only carried along: the seed, and the spare normal
// that a draw of fewer keeps for the next.
struct GeneratorState {
  std::uint64_t seed;
  std::int32_t left;  // words to draw before the next twist, and one: left + next = 625, or left = 1
  std::int32_t seeded;
  std::uint64_t next;           // the word drawn next
  std::uint64_t words[kWords];  // of 32 bits
  unsigned char spare[40];
};
inline constexpr std::int64_t kStateBytes = sizeof(GeneratorState);
static_assert(kStateBytes == 5056);

// The stream of untempered words, made some 2,500 at a time into one straight line, which the recurrence
//     x[k] = x[k - 227] ^ twist(x[k - 624], x[k - 623])
// goes along without a seam: the last 624 stay in front of those that are made next.
class MersenneTwister {
 public:
  explicit MersenneTwister(const GeneratorState& state) {
    for (std::int64_t k = 0; k < kWords; ++k) words_[k] = static_cast<std::uint32_t>(state.words[k]);
    position_ = state.left == 1 ? kWords : static_cast<std::int64_t>(state.next);
  }

  static bool takes(const GeneratorState& s) {
    return s.left == 1 || (s.left > 1 && s.next < kWords && static_cast<std::int64_t>(s.next) + s.left == kWords + 1);
  }

  void skip(std::int64_t count) { position_ += count; }

  // The next words, at least `count` <= 624 of them and at most those up to end().
  const std::uint32_t* peek(std::int64_t count) {
    while (position_ + count > end_) refill();
    return words_ + position_;
  }
  std::int64_t available() const { return end_ - position_; }

  // `before` as it is once everything up to here is drawn; after one draw at least.
  void save(const GeneratorState& before, GeneratorState& after) {
    peek(0);
    after = before;
    const std::int64_t first = (position_ - 1) / kWords * kWords;
    after.next = static_cast<std::uint64_t>(position_ - first);
    after.left = static_cast<std::int32_t>(kWords + 1 - (position_ - first));
    for (std::int64_t k = 0; k < kWords; ++k) after.words[k] = words_[first + k];
  }

 private:
  static constexpr std::int64_t kBlocks = 4, kLength = (kBlocks + 1) * kWords;  // 12 KB: the first-level cache holds it

  void refill() {
    std::memmove(words_, words_ + end_ - kWords, kWords * sizeof(words_[0]));
    position_ -= end_ - kWords;
    end_ = kLength;
    const auto load = [this](std::int64_t k) { return VecU(words_ + k, stdx::element_aligned); };
    for (std::int64_t k = kWords; k < kLength; k += kWidth<float>) {  // no vector reaches past the 227 words it may know
      const VecU next = load(k - kWords + 1), mixed = (load(k - kWords) & 0x80000000u) | (next & 0x7fffffffu);
      const VecU word = load(k - kWords + kFarWord) ^ (mixed >> 1) ^ ((VecU(0u) - (next & 1u)) & 0x9908b0dfu);
      word.copy_to(words_ + k, stdx::element_aligned);
    }
  }
  static_assert(kWords % kWidth<float> == 0 && kWidth<float> <= kWords - kFarWord);

  alignas(64) std::uint32_t words_[kLength];
  std::int64_t position_, end_ = kWords;
};

FASTGEN_INLINE VecU tempered(VecU y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

}  // namespace fastgen
