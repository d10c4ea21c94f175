// What kernels need of tensors over the LibTorch stable ABI: layouts, allocation, dtype dispatch, small parameters, threads; and what
// they ask of them before the first element is read: a raw op can be called with anything.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/simd.h"

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Up to this many elements a second thread costs more than it brings: a parallel region costs 2 to 5 us on an idle machine,
// and milliseconds on one whose cores are taken.
inline constexpr std::int64_t kSerialElements = 16384;

// Calls f(begin, end) over [0, count), in parallel if `elements` of work in all are worth it. f must not care how.
template <class F>
inline void parallel(std::int64_t count, std::int64_t elements, const F& f) {
  if (count <= 0) return;
  if (count == 1 || elements <= kSerialElements) return f(0, count);
  torch::stable::parallel_for(0, count, 1, f);
}

// Calls f with a value of the storage type of `dtype`: f.template operator()<T>().
template <class F>
inline auto dispatch_dtype(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::BFloat16: return f.template operator()<BFloat16>();
    case ScalarType::Half: return f.template operator()<Float16>();
    case ScalarType::Double: return f.template operator()<double>();
    default: fail(op, ": the CPU kernels take float64, float32, bfloat16 and float16");
  }
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  FASTGEN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Double,
                op, ": ", name, " must be float64, float32, bfloat16 or float16");
}

inline ScalarType opmath_type(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Tensor empty_strided(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides, ScalarType dtype) {
  static const std::int32_t codes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                       aoti_torch_dtype_float16(), aoti_torch_dtype_uint8()};
  const int index = dtype == ScalarType::Double     ? 0
                    : dtype == ScalarType::Float    ? 1
                    : dtype == ScalarType::BFloat16 ? 2
                    : dtype == ScalarType::Half     ? 3
                                                    : 4;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  codes[index], aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::vector<std::int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// The rule of fastgen/reference/_layout.py: an output is channels-last if the input is and is not plainly contiguous.
inline bool is_channels_last(const Tensor& t) {
  return t.dim() >= 3 && t.size(1) > 1 && t.stride(1) == 1 && !t.is_contiguous();
}

inline std::vector<std::int64_t> dense_strides(const std::vector<std::int64_t>& sizes, bool channels_last) {
  const auto dim = static_cast<std::int64_t>(sizes.size());
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  const auto take = [&](std::int64_t d) { strides[d] = step, step *= std::max<std::int64_t>(sizes[d], 1); };
  if (channels_last) take(1);
  for (std::int64_t d = dim - 1; d >= 0; --d)
    if (!channels_last || d != 1) take(d);
  return strides;
}

inline Tensor empty_dense(const Tensor& like, bool channels_last, ScalarType dtype) {
  const auto sizes = sizes_of(like);
  return empty_strided(sizes, dense_strides(sizes, channels_last), dtype);
}

inline Tensor empty_contiguous(const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  return empty_strided(sizes, dense_strides(sizes, false), dtype);
}

// A copy in the dense strides of a layout.
inline Tensor copy_dense(const Tensor& t, bool channels_last) {
  Tensor copy = empty_dense(t, channels_last, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

inline bool is_dense(const Tensor& t, bool channels_last) {
  const auto sizes = sizes_of(t);
  const auto strides = dense_strides(sizes, channels_last);
  for (std::size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && t.stride(static_cast<std::int64_t>(d)) != strides[d]) return t.numel() == 0;
  return true;
}

inline Tensor as_dense(const Tensor& t, bool channels_last) { return is_dense(t, channels_last) ? t : copy_dense(t, channels_last); }

// An optional parameter of any of the four dtypes and any strides, read a row at a time into opmath: [C], or [N, C] if there is one
// `per_sample`.
class Parameter {
 public:
  Parameter(const char* op, const char* name, const OptionalTensor& t, bool per_sample, std::int64_t n, std::int64_t c) {
    if (!t.has_value()) return;
    check_floating(op, name, *t);
    const bool fits = per_sample ? t->dim() == 2 && t->size(0) == n && t->size(1) == c : t->dim() == 1 && t->size(0) == c;
    FASTGEN_CHECK(fits, op, ": ", name, per_sample ? " must be [N, C]" : " must be [C]", " with N = ", n, " and C = ", c);
    data_ = t->data_ptr();
    dtype_ = t->scalar_type();
    row_stride_ = per_sample ? t->stride(0) : 0;
    stride_ = t->stride(per_sample ? 1 : 0);
  }

  bool given() const { return data_ != nullptr; }

  // Channels [first, first + count) of sample n, or `absent` where the parameter was not given.
  template <class A>
  void read(std::int64_t n, std::int64_t first, std::int64_t count, A absent, A* out) const {
    if (!given()) {
      for (std::int64_t i = 0; i < count; ++i) out[i] = absent;
      return;
    }
    dispatch_dtype("read", dtype_, [&]<class T>() {
      const T* p = static_cast<const T*>(data_) + n * row_stride_ + first * stride_;
      for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<A>(widen(p[i * stride_]));
    });
  }

 private:
  const void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  std::int64_t row_stride_ = 0, stride_ = 0;
};

}  // namespace fastgen
