// What forward and backward of attention share: the problem, its tensors as they lie, masks, and how a block of rows is read into the
// panels of attention_tiles.h and written back.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "attention_tiles.h"
#include "common/tensor.h"

namespace fastgen::attention {

inline constexpr double kLog2E = 1.4426950408889634074;

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

struct Problem {
  std::int64_t n, heads, kv_heads, rows, keys, depth, width;  // depth: of queries and keys; width: of values
  bool causal;
  double scale;
  std::optional<View> mask;
  ScalarType mask_dtype = ScalarType::Bool;

  std::int64_t group() const { return heads / kv_heads; }  // query heads for one head of keys
  std::int64_t work() const { return n * heads * rows * keys * (depth + width) / 16; }
  // Keys that the rows before `row` may look at.
  std::int64_t visible(std::int64_t row) const { return causal ? std::min(row, keys) : keys; }
};

inline Problem make_problem(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                            bool causal, double scale) {
  const ScalarType dtype = query.scalar_type();
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"query", query}, {"key", key}, {"value", value}}) {
    check_floating(op, name, t);
    FASTGEN_CHECK(t.dim() == 4, op, ": ", name, " must be [N, H, L, E]");
    FASTGEN_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype of query");
    FASTGEN_CHECK(t.size(0) == query.size(0), op, ": ", name, " must have the batch of query");
  }
  FASTGEN_CHECK(key.size(3) == query.size(3), op, ": key must have the head dimension of query");
  FASTGEN_CHECK(value.size(1) == key.size(1) && value.size(2) == key.size(2), op, ": value must have the heads and length of key");
  FASTGEN_CHECK(key.size(1) >= 1 ? query.size(1) % key.size(1) == 0 : query.size(1) == 0, op,
                ": the heads of key must divide those of query, got ", key.size(1), " and ", query.size(1));
  Problem p{query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3), causal, scale, {}};
  if (mask.has_value()) {
    p.mask_dtype = mask->scalar_type();
    if (p.mask_dtype != ScalarType::Bool) check_floating(op, "attn_mask", *mask);
    FASTGEN_CHECK((sizes_of(*mask) == std::vector{p.n, p.heads, p.rows, p.keys}), op, ": attn_mask must be [N, H, L, S]");
    p.mask = View(*mask);
  }
  return p;
}

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

// Memory of one thread, all zero at first: what pads a panel stays zero, since nobody writes there.
class Arena {
 public:
  template <class X>
  X* take(std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(X) + 64;  // a vector more: the last row of a panel may be read as whole ones
    kept_.emplace_back(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
    std::memset(kept_.back().get(), 0, bytes);
    return reinterpret_cast<X*>(kept_.back().get());
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<char, Free>> kept_;
};

// What is added to the scores of keys [first, first + count) and rows [row, row + rows), as bias[key][row]: the mask, and -Inf where
// the row comes before the key.
template <class A>
void read_bias(const Problem& p, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, std::int64_t first,
               std::int64_t count, A* bias) {
  constexpr A never = -std::numeric_limits<A>::infinity();
  if (!p.mask) {
    std::fill_n(bias, count * kLanes<A>, A(0));
  } else if (p.mask_dtype == ScalarType::Bool) {
    const bool* mask = p.mask->at<const bool>(n, h, row) + first * p.mask->column;
    for (std::int64_t k = 0; k < count; ++k)
      for (std::int64_t r = 0; r < kLanes<A>; ++r)
        bias[k * kLanes<A> + r] = r >= rows || mask[k * p.mask->column + r * p.mask->row] ? A(0) : never;
  } else {
    dispatch_dtype("attention", p.mask_dtype, [&]<class M>() {
      const M* mask = p.mask->at<const M>(n, h, row) + first * p.mask->column;
      read_panel<A>(mask, p.mask->column, p.mask->row, count, rows, bias, kLanes<A>);
    });
  }
  if (!p.causal) return;
  for (std::int64_t k = 0; k < count; ++k)
    for (std::int64_t r = 0; r < std::clamp<std::int64_t>(first + k - row, 0, rows); ++r) bias[k * kLanes<A> + r] = never;
}

}  // namespace fastgen::attention
