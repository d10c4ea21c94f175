// Tensors that are normalised along one axis: how their slices lie in memory, and what a channel of a sample is multiplied by and
// gets added afterwards.
#pragma once

#include "common/tensor.h"

namespace fastgen {

// [N, *] as `count` slices a sample, each of `size` elements along `axis`, the last dimension or another behind the first.
struct SliceSizes {
  std::int64_t n = 0, count = 1, size = 0;

  SliceSizes(const Tensor& t, std::int64_t axis) : n(t.size(0)), size(t.size(axis)) {
    for (std::int64_t d = 1; d < t.dim(); ++d)
      if (d != axis) count *= t.size(d);
  }
  std::int64_t slices() const { return n * count; }
  std::int64_t elements() const { return n * count * size; }
};

// Steps from an element of a slice to the next, from a slice to the next, from a sample to the next.
struct SliceStrides {
  std::int64_t along = 1, apart = 0, sample = 0;
};

// The slices of `t`, each a run of memory where `rows`, else neighbours of one another; a tensor that does not lie so is replaced by a
// dense copy. Parts of a larger tensor (chunk, the inputs of a cat) often do lie so.
inline SliceStrides as_slices(Tensor& t, std::int64_t axis, bool rows) {
  const auto lies_so = [&](SliceStrides& s) {
    s = {t.size(axis) > 1 ? t.stride(axis) : 1, 0, t.size(0) > 1 ? t.stride(0) : 0};
    std::int64_t next = -1;  // from the innermost outwards, each dimension continues where the last one ended
    for (std::int64_t d = t.dim() - 1; d >= 1; --d) {
      if (d == axis || t.size(d) == 1) continue;
      if (next == -1) next = s.apart = t.stride(d);
      if (t.stride(d) != next) return false;
      next *= t.size(d);
    }
    return rows ? s.along == 1 : s.apart == 1 || next == -1;
  };
  SliceStrides strides;
  if (t.numel() == 0 || lies_so(strides)) return strides;
  t = copy_dense(t, rows && axis != t.dim() - 1);
  lies_so(strides);
  return strides;
}

// What follows a norm, of the channels of one sample: u -> u k + b with k = weight (1 + scale), b = bias (1 + scale) + shift.
struct Modulation {
  Parameter weight, bias, scale, shift;

  bool by_sample() const { return scale.given() || shift.given(); }

  template <class A>
  void read(std::int64_t n, std::int64_t first, std::int64_t count, A* k, A* b) const {
    weight.read(n, first, count, A(1), k);
    bias.read(n, first, count, A(0), b);
    std::vector<A> values(by_sample() ? count : 0);
    if (scale.given()) {
      scale.read(n, first, count, A(0), values.data());
      for (std::int64_t i = 0; i < count; ++i) k[i] *= A(1) + values[i], b[i] *= A(1) + values[i];
    }
    if (shift.given()) {
      shift.read(n, first, count, A(0), values.data());
      for (std::int64_t i = 0; i < count; ++i) b[i] += values[i];
    }
  }
};

// k and b of one sample at a time, for a thread that goes through the slices in order.
template <class A>
class ModulationOfSample {
 public:
  ModulationOfSample(const Modulation& modulation, std::int64_t size) : modulation_(modulation), k_(size), b_(size) {}

  // Whether there was something new to read.
  bool seek(std::int64_t n) {
    if (sample_ == n || (sample_ >= 0 && !modulation_.by_sample())) return false;
    modulation_.read(n, 0, static_cast<std::int64_t>(k_.size()), k_.data(), b_.data());
    sample_ = n;
    return true;
  }
  const A* k() const { return k_.data(); }
  const A* b() const { return b_.data(); }

 private:
  const Modulation& modulation_;
  std::vector<A> k_, b_;
  std::int64_t sample_ = -1;
};

}  // namespace fastgen
