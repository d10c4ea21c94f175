// What element-wise kernels read: inputs of any dtype in one memory order, and the normals of one seed a sample.
#pragma once

#include <memory>

#include "common/philox.h"
#include "common/tensor.h"

namespace fastgen {

// One input in the memory order of the kernel's main tensor, of any dtype.
struct Operand {
  const char* op = "";
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  // `count` elements from `offset` on in opmath: in place if they are stored so, else widened into `buffer`.
  template <class A>
  const A* tile(std::int64_t offset, std::int64_t count, A* buffer) const {
    return dispatch_dtype(op, dtype, [&]<class T>() -> const A* {
      const T* p = static_cast<const T*>(data) + offset;
      if constexpr (std::is_same_v<T, A>) {
        return p;
      } else if constexpr (std::is_same_v<opmath_t<T>, A>) {
        for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(buffer + i, at.load(p + i)); });
      } else {
        for (std::int64_t i = 0; i < count; ++i) buffer[i] = static_cast<A>(widen(p[i]));
      }
      return buffer;
    });
  }
};

// Makes operands in one memory order; dense copies of those that have another live as long as this.
class Operands {
 public:
  Operands(const char* op, bool channels_last) : op_(op), channels_last_(channels_last) { kept_.reserve(16); }

  // `like` is the name of the argument whose sizes these are.
  Operand operator()(const char* name, const Tensor& t, const char* like, const std::vector<std::int64_t>& sizes) {
    FASTGEN_CHECK(sizes_of(t) == sizes, op_, ": ", name, " must have the shape of ", like);
    check_floating(op_, name, t);
    kept_.push_back(as_dense(t, channels_last_));
    return {op_, kept_.back().data_ptr(), t.scalar_type()};
  }

 private:
  const char* op_;
  bool channels_last_;
  std::vector<Tensor> kept_;
};

// Memory of one thread's tiles, not set to zero, unlike a vector's.
template <class A>
class Scratch {
 public:
  Scratch(int tiles, std::int64_t size) : memory_(new A[tiles * size]), size_(size) {}
  A* operator[](int tile) { return memory_.get() + tile * size_; }

 private:
  std::unique_ptr<A[]> memory_;
  std::int64_t size_;
};

// One seed a sample. The normals are indexed by logical (contiguous) element in either layout.
struct SeededNormals {
  const std::int64_t* seeds = nullptr;  // null: nothing is drawn
  std::int64_t seed_stride = 0, step = 0;
  bool channels_last = false;
  std::int64_t channels = 1, pixels = 0;

  SeededNormals() = default;
  SeededNormals(const char* op, const Tensor& seeds, std::int64_t step, const Tensor& like, bool channels_last)
      : seed_stride(seeds.dim() == 1 ? seeds.stride(0) : 0), step(step), channels_last(channels_last) {
    FASTGEN_CHECK(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long && like.dim() >= 1 && seeds.size(0) == like.size(0),
                  op, ": seeds must be int64, one per sample");
    this->seeds = static_cast<const std::int64_t*>(seeds.data_ptr());
    if (channels_last) channels = like.size(1);
    pixels = like.size(0) == 0 || channels == 0 ? 0 : like.numel() / (like.size(0) * channels);
  }

  // The largest tile of at most `size` elements that `tile` can fill: whole pixels where channels lie innermost.
  std::int64_t tile_size(std::int64_t size) const { return std::max<std::int64_t>(size / channels, 1) * channels; }

  // The normals of elements [offset, offset + count) of sample n, in memory order; `normals` is room for `count` of them.
  template <class A>
  const A* tile(std::int64_t n, std::int64_t offset, std::int64_t count, float* normals, A* out) const {
    const auto seed = static_cast<std::uint64_t>(seeds[n * seed_stride]);
    const auto low_step = static_cast<std::uint32_t>(step);
    if (!channels_last) {
      fill_normals(normals, seed, low_step, offset, count);
      if constexpr (std::is_same_v<A, float>) return normals;
      for (std::int64_t i = 0; i < count; ++i) out[i] = normals[i];
      return out;
    }
    const std::int64_t first = offset / channels, count_pixels = count / channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      fill_normals(normals, seed, low_step, c * pixels + first, count_pixels);
      for (std::int64_t i = 0; i < count_pixels; ++i) out[i * channels + c] = normals[i];
    }
    return out;
  }
};

}  // namespace fastgen
