// Tensors of heads [N, H, rows, columns] as they lie, outputs that lie alike, and the memory that a thread works in.
#pragma once

#include <algorithm>
#include <limits>

#include "_tiles.h"
#include "common/scratch.h"
#include "common/tensor.h"

namespace fastgen::tiles {

// [N, H, rows, columns] through strides of any kind; the type of the elements is the caller's to know.
struct View {
  void* data = nullptr;
  std::int64_t batch = 0, head = 0, row = 0, column = 0;

  View() = default;
  explicit View(const Tensor& t)
      : data(const_cast<void*>(t.data_ptr())), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)), column(t.stride(3)) {}

  template <class T>
  T* at(std::int64_t n, std::int64_t h, std::int64_t r) const {
    return static_cast<T*>(data) + n * batch + h * head + r * row;
  }
};

// Dense strides for `sizes` with the dimensions in the order in which they lie in `like`, an expanded one outermost; the rule of
// fastgen/reference/_layout.py.
inline std::vector<std::int64_t> strides_in_order_of(const Tensor& like, const std::vector<std::int64_t>& sizes) {
  std::vector<std::size_t> order(sizes.size());
  for (std::size_t d = 0; d < order.size(); ++d) order[d] = d;
  const auto key = [&](std::size_t d) {
    const std::int64_t stride = like.stride(static_cast<std::int64_t>(d));
    return stride == 0 ? std::numeric_limits<std::int64_t>::max() : stride;
  };
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return key(a) > key(b); });
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) strides[*d] = step, step *= std::max<std::int64_t>(sizes[*d], 1);
  return strides;
}

inline Tensor empty_in_order_of(const Tensor& like, const std::vector<std::int64_t>& sizes) {
  return empty_strided(sizes, strides_in_order_of(like, sizes), like.scalar_type());
}

// Memory of one call or thread.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (const scratch::Block& block : kept_) scratch::pool().give_back(block);
  }

  // All zero at first: what pads a panel stays zero, since nobody writes there.
  template <class X>
  X* take(std::int64_t count) {
    X* p = take_as_it_is<X>(count);
    std::memset(static_cast<void*>(p), 0, static_cast<std::size_t>(count) * sizeof(X) + kMore);
    return p;
  }
  template <class X>
  X* take_as_it_is(std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(X) + kMore;
    kept_.push_back(scratch::pool().take(bytes));
    return static_cast<X*>(kept_.back().memory);
  }

 private:
  static constexpr std::size_t kMore = 64;  // a vector: the last row of a panel may be read as whole ones
  std::vector<scratch::Block> kept_;
};

}  // namespace fastgen::tiles
