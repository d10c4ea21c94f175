// geglu: h * gelu(gate) with (h, gate) = input weight^T + bias, and the gate alone with its backward.
//
// With packed weights the product is ours (_product.h): a thread owns a block of rows and a few pairs of panels, 16 features of h and
// their 16 gates side by side; their products stay in its second-level cache, where bias, GELU and the multiplication are done, and
// [M, 2 D] is never in memory. Rows of bf16 or fp16 are widened once. Which thread does what changes no sum.
// In bfloat16 on a processor with a matrix unit the same by its tiles (geglu_direct.h).
// With the library's product so many rows are taken at a time that what it returns stays in the last-level cache.
#include <memory>

#include "_product.h"
#include "common/simd/gelu.h"
#include "common/tensor.h"
#include "geglu_direct.h"

namespace fastgen::geglu {
namespace {

constexpr std::int64_t kRows = 128;    // of a block: of 256 channels 128 KB, a quarter of the second-level cache
constexpr std::int64_t kPairs = 4;     // of panels at a time: 64 KB of products
constexpr std::int64_t kWork = 8;      // a GELU is as much work as so many elements of a light operation
constexpr std::int64_t kChunkBytes = 16 << 20;  // of the library's product at a time: half of a last-level cache
// but no fewer rows, each chunk of which reads the weights again: 512 rows by 1280 channels in two chunks took 1.1 times as long as whole.
constexpr std::int64_t kChunkRows = 1024;

void check_approximate(const char* op, std::int64_t approximate) {
  FASTGEN_CHECK(approximate == 0 || approximate == 1, op, ": approximate must be 0 (none) or 1 (tanh), got ", approximate);
}

// Calls f with the kind of GELU: f.template operator()<kind>().
template <class F>
auto dispatch_gelu(std::int64_t approximate, F&& f) {
  return approximate == 1 ? f.template operator()<Gelu::kTanh>() : f.template operator()<Gelu::kNone>();
}

// A matrix whose rows are dense; a copy where they were not.
struct Rows {
  Tensor tensor;
  std::int64_t stride;

  explicit Rows(const Tensor& t) : tensor(t.size(1) <= 1 || t.stride(1) == 1 ? t : copy_dense(t, false)), stride(tensor.stride(0)) {}
  template <class T>
  const T* data() const { return static_cast<const T*>(tensor.data_ptr()); }
};

// ---- the gate ------------------------------------------------------------------------------------------------------------------

// out = h * gelu(gate) of rows [first, last) of projected.
template <class T, Gelu kind>
void gate_rows(const T* projected, std::int64_t stride, std::int64_t features, std::int64_t first, std::int64_t last, T* out) {
  using A = opmath_t<T>;
  for (std::int64_t r = first; r < last; ++r) {
    const T *const h = projected + r * stride, *const gate = h + features;
    T* const to = out + r * features;
    for_vectors<A>(features, [&](std::int64_t i, auto at) { at.store(to + i, at.load(h + i) * gelu<A, kind>(at.load(gate + i))); });
  }
}

// All rows, into `out`, which is dense.
void gate(const char* op, const Tensor& projected, std::int64_t approximate, void* out) {
  const Rows rows(projected);
  const std::int64_t count = projected.size(0), features = projected.size(1) / 2;
  dispatch_dtype(op, projected.scalar_type(), [&]<class T>() {
    dispatch_gelu(approximate, [&]<Gelu kind>() {
      parallel(count, count * features * kWork, [&](std::int64_t first, std::int64_t last) {
        gate_rows<T, kind>(rows.data<T>(), rows.stride, features, first, last, static_cast<T*>(out));
      });
    });
  });
}

void check_projected(const char* op, const Tensor& projected, std::int64_t approximate) {
  check_floating(op, "projected", projected);
  FASTGEN_CHECK(projected.dim() == 2 && projected.size(1) % 2 == 0 && projected.size(1) >= 2, op, ": projected must be [M, 2 D] with D >= 1");
  check_approximate(op, approximate);
}

Tensor geglu_gate(const Tensor& projected, std::int64_t approximate) {
  const char* const op = "geglu_gate";
  check_projected(op, projected, approximate);
  Tensor output = empty_contiguous({projected.size(0), projected.size(1) / 2}, projected.scalar_type());
  gate(op, projected, approximate, output.mutable_data_ptr());
  return output;
}

template <class T, Gelu kind>
void gate_grads(const Rows& grads, const Rows& projected, std::int64_t features, std::int64_t first, std::int64_t last, T* out) {
  using A = opmath_t<T>;
  for (std::int64_t r = first; r < last; ++r) {
    const T *const grad = grads.data<T>() + r * grads.stride, *const h = projected.data<T>() + r * projected.stride;
    T* const to = out + r * 2 * features;
    for_vectors<A>(features, [&](std::int64_t i, auto at) {
      const auto parts = gelu_with_slope<A, kind>(at.load(h + features + i));
      const Vec<A> g = at.load(grad + i);
      const Vec<A> by_gate = g * at.load(h + i) * parts.slope;
      at.store(to + i, g * parts.value);
      at.store(to + features + i, by_gate);
    });
  }
}

Tensor geglu_gate_bwd(const Tensor& grad_output, const Tensor& projected, std::int64_t approximate) {
  const char* const op = "geglu_gate_bwd";
  check_projected(op, projected, approximate);
  check_floating(op, "grad_output", grad_output);
  const std::int64_t count = projected.size(0), features = projected.size(1) / 2;
  FASTGEN_CHECK((sizes_of(grad_output) == std::vector{count, features}) && grad_output.scalar_type() == projected.scalar_type(), op,
                ": grad_output must be [M, D] in the dtype of projected");
  Tensor output = empty_contiguous({count, 2 * features}, projected.scalar_type());
  const Rows grads(grad_output), rows(projected);
  dispatch_dtype(op, projected.scalar_type(), [&]<class T>() {
    T* const out = static_cast<T*>(output.mutable_data_ptr());
    dispatch_gelu(approximate, [&]<Gelu kind>() {
      parallel(count, count * features * kWork,
               [&](std::int64_t first, std::int64_t last) { gate_grads<T, kind>(grads, rows, features, first, last, out); });
    });
  });
  return output;
}

// ---- the product ---------------------------------------------------------------------------------------------------------------

void check_call(const char* op, const Tensor& input, std::int64_t approximate) {
  check_floating(op, "input", input);
  FASTGEN_CHECK(input.dim() == 2, op, ": input must be [M, C]");
  check_approximate(op, approximate);
}

void check_weight(const char* op, const Tensor& weight) {
  check_floating(op, "weight", weight);
  FASTGEN_CHECK(weight.dim() == 2 && weight.size(0) % 2 == 0 && weight.numel() > 0, op, ": weight must be [2 D, C] and not empty");
}

Tensor geglu_chunked(const Tensor& input, const Tensor& weight, OptionalTensor bias, std::int64_t approximate) {
  const char* const op = "geglu_chunked";
  check_call(op, input, approximate);
  check_weight(op, weight);
  const ScalarType dtype = input.scalar_type();
  const std::int64_t count = input.size(0), outputs = weight.size(0);
  FASTGEN_CHECK(weight.size(1) == input.size(1) && weight.scalar_type() == dtype, op, ": weight must be [2 D, C] in the dtype of input");
  FASTGEN_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == dtype), op,
                ": bias must be [2 D] in the dtype of input");
  Tensor output = empty_contiguous({count, outputs / 2}, dtype);
  const std::int64_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  const std::int64_t chunks = std::max<std::int64_t>(std::min(ceil_div(count * outputs * size, kChunkBytes), count / kChunkRows), 1);
  for (std::int64_t i = 0; i < chunks; ++i) {
    const std::int64_t first = i * count / chunks, rows = (i + 1) * count / chunks - first;
    if (rows == 0) continue;
    Tensor part = input;
    StableIValue stack[] = {torch::stable::detail::from(torch::stable::narrow(part, 0, first, rows)), torch::stable::detail::from(weight),
                            torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
    gate(op, torch::stable::detail::to<Tensor>(stack[0]), approximate,
         static_cast<char*>(output.mutable_data_ptr()) + first * outputs / 2 * size);
  }
  return output;
}

// A thread owns pairs of panels.
template <class T>
void pack(const Tensor& weight, float* packed) {
  const std::int64_t features = weight.size(0) / 2, channels = weight.size(1), panels = 2 * ceil_div(features, kPanel);
  const T* const w = static_cast<const T*>(weight.data_ptr());
  const std::int64_t row = weight.stride(0), column = weight.stride(1);
  parallel(panels, weight.numel(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel)
      for (std::int64_t k = 0; k < kPanel; ++k) {
        const std::int64_t feature = panel / 2 * kPanel + k;
        float* const to = packed + panel * channels * kPanel + k;
        const T* const from = w + (panel % 2 * features + feature) * row;
        for (std::int64_t c = 0; c < channels; ++c) to[c * kPanel] = feature < features ? static_cast<float>(widen(from[c * column])) : 0.0f;
      }
  });
}

Tensor geglu_pack(const Tensor& weight) {
  check_weight("geglu_pack", weight);
  Tensor packed = empty_contiguous({2 * ceil_div(weight.size(0) / 2, kPanel), weight.size(1), kPanel}, ScalarType::Float);
  dispatch_dtype("geglu_pack", weight.scalar_type(),
                 [&]<class T>() { pack<T>(weight, static_cast<float*>(packed.mutable_data_ptr())); });
  return packed;
}

// The rows of the input in fp32: its own, or a copy.
Tensor widened(const Tensor& input) {
  if (input.scalar_type() == ScalarType::Float) return input;
  const std::int64_t count = input.size(0), channels = input.size(1);
  Tensor wide = empty_contiguous({count, channels}, ScalarType::Float);
  float* const to = static_cast<float*>(wide.mutable_data_ptr());
  const Rows rows(input);
  dispatch_dtype("geglu_packed", input.scalar_type(), [&]<class T>() {
    if constexpr (std::is_same_v<opmath_t<T>, float>)
      parallel(count, count * channels, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t r = first; r < last; ++r) {
          const T* const from = rows.data<T>() + r * rows.stride;
          for_vectors<float>(channels, [&](std::int64_t c, auto at) { at.store(to + r * channels + c, at.load(from + c)); });
        }
      });
  });
  return wide;
}

// Rows [first, first + rows) of `count` features, from products as the packed weights lie, [rows][2 kPanel ceil(count / kPanel)].
template <class T, Gelu kind>
void finish(const float* products, const float* bias, std::int64_t rows, std::int64_t count, T* out, std::int64_t out_stride) {
  const std::int64_t stride = 2 * kPanel * ceil_div(count, kPanel);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t panel = 0; panel < count; panel += kPanel) {
      const float *const h = products + r * stride + 2 * panel, *const b = bias + 2 * panel;
      for_vectors<float>(std::min(kPanel, count - panel), [&](std::int64_t i, auto at) {
        const VecF gate = load(h + kPanel + i) + load(b + kPanel + i);
        at.store(out + r * out_stride + panel + i, (load(h + i) + load(b + i)) * gelu<float, kind>(gate));
      });
    }
}

template <class T>
void forward(const Tensor& input, const float* weights, std::int64_t features, const Parameter& bias, std::int64_t approximate, T* out) {
  const Rows x(widened(input));
  const std::int64_t count = input.size(0), channels = input.size(1), panels = ceil_div(features, kPanel);
  const std::int64_t blocks = ceil_div(count, kRows), shares = ceil_div(panels, kPairs);
  parallel(shares * blocks, count * channels * features, [&](std::int64_t begin, std::int64_t end) {
    const std::unique_ptr<float[]> products(new float[kRows * 2 * kPairs * kPanel]), biases(new float[2 * kPairs * kPanel]());
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t block = item % blocks, row = block * count / blocks, rows = (block + 1) * count / blocks - row;
      const std::int64_t share = item / blocks, pairs = std::min(kPairs, panels - share * kPairs), first = share * kPairs * kPanel;
      const std::int64_t of_share = std::min(pairs * kPanel, features - first);
      for (std::int64_t panel = 0; panel < of_share; panel += kPanel)
        for (std::int64_t half = 0; half < 2; ++half)
          bias.read(0, half * features + first + panel, std::min(kPanel, of_share - panel), 0.0f, biases.get() + 2 * panel + half * kPanel);
      multiply({x.data<float>() + row * x.stride, weights + share * kPairs * 2 * channels * kPanel, products.get(), rows, channels, x.stride,
                2 * pairs * kPanel},
               0, 2 * pairs);
      dispatch_gelu(approximate, [&]<Gelu kind>() {
        finish<T, kind>(products.get(), biases.get(), rows, of_share, out + row * features + first, features);
      });
    }
  });
}

Tensor geglu_packed(const Tensor& input, const Tensor& packed, std::int64_t features, OptionalTensor bias, std::int64_t approximate) {
  const char* const op = "geglu_packed";
  check_call(op, input, approximate);
  FASTGEN_CHECK(input.scalar_type() != ScalarType::Double, op, ": input must be float32, bfloat16 or float16");
  const std::int64_t channels = input.size(1);
  FASTGEN_CHECK(features >= 1 && channels >= 1 && packed.scalar_type() == ScalarType::Float && packed.dim() == 3 && packed.is_contiguous() &&
                    (sizes_of(packed) == std::vector{2 * ceil_div(features, kPanel), channels, kPanel}),
                op, ": packed must be what geglu_pack returns, for ", channels, " channels and features=", features);
  const Parameter parameter(op, "bias", bias, false, 1, 2 * features);
  Tensor output = empty_contiguous({input.size(0), features}, input.scalar_type());
  dispatch_dtype(op, input.scalar_type(), [&]<class T>() {
    if constexpr (std::is_same_v<opmath_t<T>, float>)
      forward<T>(input, static_cast<const float*>(packed.data_ptr()), features, parameter, approximate, static_cast<T*>(output.mutable_data_ptr()));
  });
  return output;
}

#if FASTGEN_HAS_MATRIX_TILES
Tensor geglu_direct_pack(const Tensor& weight) {
  check_weight("geglu_direct_pack", weight);
  const std::int64_t panels = 2 * ceil_div(weight.size(0) / 2, kPanel), blocks = ceil_div(weight.size(1), kTileChannels);
  Tensor packed = empty_contiguous({panels, blocks, kTileRows, kTileChannels}, ScalarType::BFloat16);
  dispatch_dtype("geglu_direct_pack", weight.scalar_type(),
                 [&]<class T>() { pack_direct<T>(weight, static_cast<BFloat16*>(packed.mutable_data_ptr())); });
  return packed;
}

Tensor geglu_direct(const Tensor& input, const Tensor& packed, std::int64_t features, OptionalTensor bias, std::int64_t approximate) {
  const char* const op = "geglu_direct";
  check_call(op, input, approximate);
  FASTGEN_CHECK(input.scalar_type() == ScalarType::BFloat16, op, ": input must be bfloat16");
  const std::int64_t count = input.size(0), channels = input.size(1);
  FASTGEN_CHECK(features >= 1 && channels >= 1 && packed.scalar_type() == ScalarType::BFloat16 && packed.dim() == 4 && packed.is_contiguous() &&
                    (sizes_of(packed) == std::vector{2 * ceil_div(features, kPanel), ceil_div(channels, kTileChannels), kTileRows, kTileChannels}),
                op, ": packed must be what geglu_direct_pack returns, for ", channels, " channels and features=", features);
  const Parameter parameter(op, "bias", bias, false, 1, 2 * features);
  Tensor output = empty_contiguous({count, features}, ScalarType::BFloat16);
  if (count == 0) return output;
  const Rows rows(input);
  dispatch_gelu(approximate, [&]<Gelu kind>() {
    forward_direct<kind>(rows.data<BFloat16>(), rows.stride, count, channels, static_cast<const BFloat16*>(packed.data_ptr()), features, parameter,
                         static_cast<BFloat16*>(output.mutable_data_ptr()));
  });
  return output;
}
#endif

}  // namespace
}  // namespace fastgen::geglu

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("geglu_chunked", TORCH_BOX(&fastgen::geglu::geglu_chunked));
  m.impl("geglu_pack", TORCH_BOX(&fastgen::geglu::geglu_pack));
  m.impl("geglu_packed", TORCH_BOX(&fastgen::geglu::geglu_packed));
#if FASTGEN_HAS_MATRIX_TILES
  m.impl("geglu_direct_pack", TORCH_BOX(&fastgen::geglu::geglu_direct_pack));
  m.impl("geglu_direct", TORCH_BOX(&fastgen::geglu::geglu_direct));
#endif
  m.impl("geglu_gate", TORCH_BOX(&fastgen::geglu::geglu_gate));
  m.impl("geglu_gate_bwd", TORCH_BOX(&fastgen::geglu::geglu_gate_bwd));
}
