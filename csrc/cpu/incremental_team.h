// Threads that go through a program in step: who takes part, and where they wait for one another.
//
// `parallel_for` promises neither how many of its calls run nor that they run at once, so nobody waits for a thread that may never
// come: those that have joined when all are there, or when waiting has taken too long, are the team; who comes later goes home. What
// ends the work of all, members decide at a wait and in one way: of two that saw different things, one would wait for the other for ever.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgen::incremental {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// What the leader says at a wait: go on, stop all together, or leave the rest to the leader alone.
enum class Verdict : std::uint64_t { kGoOn, kStop, kDissolve };

class Team {
 public:
  explicit Team(int size) : size_(size) {}

  // Joins with `weight` of the parts that parallel_for has handed out: the place in the team, or -1 where it has begun without.
  int join(int weight) {
    std::uint64_t state = state_.load();
    do {
      if (state & kClosed) return -1;
    } while (!state_.compare_exchange_weak(state, (state + 1 + (static_cast<std::uint64_t>(weight) << kWeights)) |
                                                      (weight_of(state) + weight >= size_ ? kClosed : 0)));
    const int place = members_of(state);
    const auto begin = std::chrono::steady_clock::now();
    for (int spins = 0; !(state_.load() & kClosed); ++spins) {
      relax();
      if (spins % 1024 == 1023) {
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() - begin > kPatience) state_.fetch_or(kClosed);
      }
    }
    return place;
  }

  int members() const { return members_of(state_.load()); }

  // Until all members have come here, or one has failed; what the leader has said at this very wait, whoever else waits again by now.
  Verdict wait(bool leader = false, Verdict verdict = Verdict::kGoOn) {
    const int members = this->members();
    if (members == 1) return verdict;
    const std::uint64_t turn = turn_.load(std::memory_order_relaxed);
    if (leader && verdict != Verdict::kGoOn) said_.store((turn + 1) << 2 | static_cast<std::uint64_t>(verdict), std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return said(turn);
    }
    auto since = std::chrono::steady_clock::time_point{};
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn && !failed(); ++spins) {
      relax();
      if (spins == kSpins) since = std::chrono::steady_clock::now();
      if (spins > kSpins) std::this_thread::yield();  // more threads than cores: let the others come
    }
    if (since != std::chrono::steady_clock::time_point{} && std::chrono::steady_clock::now() - since > kLateness) late_.fetch_add(1);
    return said(turn);
  }

  // Whether the members have waited too often for one that has no core: one goes on alone, which is sooner.
  bool late() const { return late_.load(std::memory_order_relaxed) >= kLate; }

  // A member that ends by an exception says so: nobody waits for it, and what the others still compute is not used.
  void fail() { failed_.store(true, std::memory_order_relaxed); }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::uint64_t kClosed = std::uint64_t{1} << 63;
  static constexpr int kWeights = 32, kSpins = 1024, kLate = 4;
  static constexpr std::chrono::milliseconds kPatience{10};
  static constexpr std::chrono::microseconds kLateness{300};  // no stage takes so much longer in one thread than in another
  Verdict said(std::uint64_t turn) const {
    const std::uint64_t said = said_.load(std::memory_order_relaxed);
    return failed() ? Verdict::kStop : said >> 2 == turn + 1 ? static_cast<Verdict>(said & 3) : Verdict::kGoOn;
  }
  static int members_of(std::uint64_t state) { return static_cast<int>(state & 0xffffffffu); }
  static int weight_of(std::uint64_t state) { return static_cast<int>((state & ~kClosed) >> kWeights); }

  const int size_;
  std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint64_t> turn_{0};
  std::atomic<std::uint64_t> said_{0};  // a turn and what was said there
  std::atomic<int> late_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace fastgen::incremental
