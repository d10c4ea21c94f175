// Memory for the length of a call, kept by its thread for the next one.
//
// A block of megabytes that is returned to the system after every call costs a page fault for each 4 KB of the next one, some
// thousands in a forward of a U-Net. So a thread keeps what it was given, up to kKept in all; what it has kept longest goes first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgen {

namespace scratch {

#if defined(__SANITIZE_ADDRESS__)  // which sees the ends of blocks, not of what was asked for
inline constexpr std::size_t kKept = 0, kUnit = 1;
#else
inline constexpr std::size_t kKept = 64 << 20;  // bytes of a thread
inline constexpr std::size_t kUnit = 4096;      // sizes are multiples of it, so that one block serves many shapes
#endif
inline constexpr std::size_t kLoose = 4;        // a block may be so many times as large as what is asked for
inline constexpr std::size_t kLarge = 1 << 20;  // so much takes the largest block there is: all layers of a model share one

struct Block {
  void* memory = nullptr;
  std::size_t bytes = 0;
};

// The blocks of a thread that nobody uses, those kept longest first.
class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (const Block& block : free_) release(block);
  }

  Block take(std::size_t bytes) {
    bytes = (bytes + kUnit - 1) / kUnit * kUnit;
    auto best = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i) {
      const bool fits = i->bytes >= bytes && (i->bytes <= kLoose * bytes || bytes >= kLarge);
      if (fits && (best == free_.end() || (bytes >= kLarge ? i->bytes > best->bytes : i->bytes < best->bytes))) best = i;
    }
    if (best == free_.end()) return allocate(bytes);
    const Block found = *best;
    kept_ -= found.bytes;
    free_.erase(best);
    return found;
  }

  void give_back(const Block& block) {
    if (block.bytes > kKept) return release(block);
    free_.push_back(block);
    kept_ += block.bytes;
    while (kept_ > kKept) {
      kept_ -= free_.front().bytes;
      release(free_.front());
      free_.erase(free_.begin());
    }
  }

 private:
  // Large blocks begin where a large page does, and the system is asked for such: values of a tile lie in 36 places far apart.
  static constexpr std::size_t kPage = 2 << 20;
  static std::align_val_t alignment(std::size_t bytes) { return std::align_val_t(bytes >= kPage ? kPage : 64); }
  static Block allocate(std::size_t bytes) {
    void* const memory = ::operator new(bytes, alignment(bytes));
#if defined(__linux__)
    if (bytes >= kPage) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: what comes of it does not matter
#endif
    return {memory, bytes};
  }
  static void release(const Block& block) { ::operator delete(block.memory, alignment(block.bytes)); }

  std::vector<Block> free_;
  std::size_t kept_ = 0;
};

inline Pool& pool() {
  thread_local Pool of_thread;
  return of_thread;
}

}  // namespace scratch

// `count` elements, as the last user left them. To be destroyed by the thread that made it.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t count) : block_(scratch::pool().take(static_cast<std::size_t>(count) * sizeof(T))) {}
  ~Scratch() { scratch::pool().give_back(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return static_cast<T*>(block_.memory); }
  T& operator[](std::int64_t i) const { return get()[i]; }

 private:
  scratch::Block block_;
};

}  // namespace fastgen
