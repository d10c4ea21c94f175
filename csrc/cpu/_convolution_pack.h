// The weights of a convolution, transformed and packed: done once a weight, kept by the caller. A thread owns panels of output
// channels. All arithmetic is fp64, so that packed weights are rounded once.
#pragma once

#include "_convolution.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgen::convolution {

// Packed weights are read once a call from their first byte to their last, past every cache where a layer is wide: in pages of 2 MB
// prefetching goes on where a page of 4 KB ends. 1280 channels at 16x16 on an EPYC 7xx3: 0.8 of the time. Before the first write.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(data), first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // as it is, where that cannot be had
#endif
}

template <class G, class T>
void pack(const Tensor& weight, float* packed) {
  const std::int64_t outputs = weight.size(0), channels = weight.size(1), panels = ceil_div(outputs, kPanel);
  const std::int64_t stride[] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const T* const w = static_cast<const T*>(weight.data_ptr());
  parallel(panels, weight.numel() * G::blocks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel)
      for (std::int64_t c = 0; c < channels; ++c)
        for (std::int64_t i = 0; i < kPanel; ++i) {
          float* const to = packed + (panel * channels + c) * kPanel + i;
          const std::int64_t block_stride = panels * channels * kPanel, k = panel * kPanel + i;
          if (k >= outputs) {
            for (int b = 0; b < G::blocks; ++b) to[b * block_stride] = 0.0f;
            continue;
          }
          for (int q = 0; q < G::scale; ++q) {
            double rows[G::kernel][G::side];  // [y][point of x]
            for (int y = 0; y < G::kernel; ++y) {
              double g[G::kernel];
              for (int x = 0; x < G::kernel; ++x) g[x] = widen(w[k * stride[0] + c * stride[1] + y * stride[2] + x * stride[3]]);
              phase_kernel<G>(q, g);
              weight_points<G>(g, rows[y]);
            }
            for (int p = 0; p < G::scale; ++p)
              for (int x = G::first(q); x < G::last(q); ++x) {
                double g[G::kernel], points[G::side];
                for (int y = 0; y < G::kernel; ++y) g[y] = rows[y][x];
                phase_kernel<G>(p, g);
                weight_points<G>(g, points);
                for (int y = G::first(p); y < G::last(p); ++y)
                  to[kBlocks<G>.at[p][q][y][x] * block_stride] = static_cast<float>(points[y]);
              }
          }
        }
  });
}

// The op: [blocks, panels, C, kPanel] of weights [K, C, kernel, kernel], for tiles of so many outputs a side.
template <int scale>
Tensor pack_weight(const char* op, const Tensor& weight, std::int64_t outputs) {
  check_floating(op, "weight", weight);
  const bool single = scale == 1 && outputs == 1;
  FASTGEN_CHECK(single || outputs == 2 || outputs == 4, op, ": outputs must be ", scale == 1 ? "1, " : "", "2 or 4, got ", outputs);
  const std::int64_t kernel = single ? 1 : 3;
  FASTGEN_CHECK(weight.dim() == 4 && weight.size(2) == kernel && weight.size(3) == kernel, op, ": weight must be [K, C, ", kernel, ", ",
                kernel, "] for outputs=", outputs);
  FASTGEN_CHECK(weight.numel() > 0, op, ": weight must not be empty");
  return dispatch_tile<scale>(outputs, [&]<class G>() {
    Tensor packed = empty_contiguous({G::blocks, ceil_div(weight.size(0), kPanel), weight.size(1), kPanel}, ScalarType::Float);
    ask_for_huge_pages(packed.mutable_data_ptr(), packed.numel() * sizeof(float));
    dispatch_dtype(op, weight.scalar_type(), [&]<class T>() { pack<G, T>(weight, static_cast<float*>(packed.mutable_data_ptr())); });
    return packed;
  });
}

}  // namespace fastgen::convolution
