// Which memory the elements of a tensor lie in, and what an op that writes into the caller's memory refuses. The same in Python:
// fastgen/reference/_memory.py.
#pragma once

#include <algorithm>

#include "common/tensor.h"

namespace fastgen {

// The addresses of a tensor, from its first byte to past its last, whatever lies between its elements; and how it goes through
// them: (stride, length) of the dimensions along which there is more than one element.
struct Extent {
  std::uintptr_t first = 0, end = 0;
  ScalarType dtype = ScalarType::Float;
  std::vector<std::pair<std::int64_t, std::int64_t>> steps;

  explicit Extent(const Tensor& t) : first(reinterpret_cast<std::uintptr_t>(t.data_ptr())), end(first), dtype(t.scalar_type()) {
    if (t.numel() == 0) return;
    const auto sizes = t.sizes(), strides = t.strides();
    std::int64_t last = 0;
    steps.reserve(sizes.size());
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 1) continue;
      steps.emplace_back(strides[d], sizes[d]);
      last += (sizes[d] - 1) * strides[d];
    }
    const bool wide = dtype == ScalarType::Double || dtype == ScalarType::Long;
    end = first + static_cast<std::uintptr_t>(last + 1) * (wide ? 8 : dtype == ScalarType::Float ? 4 : 2);
  }

  bool overlaps(const Extent& other) const { return std::max(first, other.first) < std::min(end, other.end); }

  // Element by element, for tensors of one shape.
  bool is(const Extent& other) const { return first == other.first && dtype == other.dtype && steps == other.steps; }

  // Whether two elements may be one: `expand`, a window that slides. Where it is hard to say, true.
  bool overlaps_itself() const {
    auto sorted = steps;
    std::sort(sorted.begin(), sorted.end());
    std::int64_t reach = 0;  // of the dimensions of smaller strides
    for (const auto& [stride, length] : sorted) {
      if (stride <= reach) return first < end;
      reach += (length - 1) * stride;
    }
    return false;
  }
};

// Outputs, told one by one, which may overlap neither each other nor themselves, nor an argument, but for one that is read before
// it is written over, element by element.
class Written {
 public:
  explicit Written(const char* op) : op_(op) {}

  void add(const char* name, const Tensor& t) {
    const Extent extent(t);
    FASTGEN_CHECK(!extent.overlaps_itself(), op_, ": ", name, " overlaps itself: two of its elements share memory");
    for (const auto& [other, written] : outputs_) FASTGEN_CHECK(!extent.overlaps(written), op_, ": ", name, " shares memory with ", other);
    last_ = std::max(last_, extent.end);
    outputs_.emplace_back(name, extent);
  }
  void read_first(const char* name, const Tensor& t) const { refuse(name, t, true, ""); }
  void read_later(const char* name, const Tensor& t) const { refuse(name, t, false, ""); }
  void read_later(const char* name, const std::vector<Tensor>& list) const {
    for (std::size_t k = 0; k < list.size(); ++k) refuse(name, list[k], false, "[", k, "]");
  }

 private:
  template <class... Index>
  void refuse(const char* name, const Tensor& t, bool first, const Index&... index) const {
    if (reinterpret_cast<std::uintptr_t>(t.data_ptr()) >= last_) return;  // half of all cases, at no further cost
    const Extent extent(t);
    for (const auto& [output, written] : outputs_)
      FASTGEN_CHECK(!extent.overlaps(written) || (first && extent.is(written)), op_, ": ", output, " shares memory with ", name, index...);
  }

  const char* op_;
  std::uintptr_t last_ = 0;  // past the last byte of all outputs
  std::vector<std::pair<const char*, Extent>> outputs_;
};

}  // namespace fastgen
