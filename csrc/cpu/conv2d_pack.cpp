// The weights of conv2d, transformed and packed: done once a weight, kept by the caller. A thread owns panels of output channels.
#include "conv2d.h"

namespace fastgen::conv2d {
namespace {

template <int m, class T>
void pack(const Tensor& weight, float* packed) {
  using G = Tile<m>;
  const std::int64_t outputs = weight.size(0), channels = weight.size(1), panels = ceil_div(outputs, kPanel);
  const std::int64_t stride[] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const T* const w = static_cast<const T*>(weight.data_ptr());
  parallel(panels, weight.numel() * G::points, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel)
      for (std::int64_t c = 0; c < channels; ++c)
        for (std::int64_t i = 0; i < kPanel; ++i) {
          float* const to = packed + (panel * channels + c) * kPanel + i;
          const std::int64_t point_stride = panels * channels * kPanel, k = panel * kPanel + i;
          if (k >= outputs) {
            for (int e = 0; e < G::points; ++e) to[e * point_stride] = 0.0f;
            continue;
          }
          double rows[G::kernel][G::side];  // [y][point of x]
          for (int y = 0; y < G::kernel; ++y) {
            double g[G::kernel];
            for (int x = 0; x < G::kernel; ++x) g[x] = widen(w[k * stride[0] + c * stride[1] + y * stride[2] + x * stride[3]]);
            weight_points<m>(g, rows[y]);
          }
          for (int x = 0; x < G::side; ++x) {
            double g[G::kernel], p[G::side];
            for (int y = 0; y < G::kernel; ++y) g[y] = rows[y][x];
            weight_points<m>(g, p);
            for (int y = 0; y < G::side; ++y) to[(y * G::side + x) * point_stride] = static_cast<float>(p[y]);
          }
        }
  });
}

Tensor conv2d_pack(const Tensor& weight, std::int64_t outputs) {
  check_floating("conv2d_pack", "weight", weight);
  FASTGEN_CHECK(outputs == 1 || outputs == 2 || outputs == 4, "conv2d_pack: outputs must be 1, 2 or 4, got ", outputs);
  const std::int64_t kernel = outputs == 1 ? 1 : 3, side = outputs + kernel - 1;
  FASTGEN_CHECK(weight.dim() == 4 && weight.size(2) == kernel && weight.size(3) == kernel, "conv2d_pack: weight must be [K, C, ",
                kernel, ", ", kernel, "] for outputs=", outputs);
  FASTGEN_CHECK(weight.numel() > 0, "conv2d_pack: weight must not be empty");
  Tensor packed = empty_contiguous({side * side, ceil_div(weight.size(0), kPanel), weight.size(1), kPanel}, ScalarType::Float);
  dispatch_tile(static_cast<int>(outputs), [&]<int m>() {
    dispatch_dtype("conv2d_pack", weight.scalar_type(),
                   [&]<class T>() { pack<m, T>(weight, static_cast<float*>(packed.mutable_data_ptr())); });
  });
  return packed;
}

}  // namespace
}  // namespace fastgen::conv2d

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("conv2d_pack", TORCH_BOX(&fastgen::conv2d::conv2d_pack)); }
