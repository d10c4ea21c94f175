// philox_normal: standard normals [N, *], every sample from its own seed.
//
// A thread makes one Philox block of one sample, four neighbouring normals: nothing is read but the seed, 16 bytes are
// written. The arithmetic (some 200 instructions a block) and the write of 4 TB/s take about the same time on an H100, so one
// block a thread, 256 threads and nothing cleverer; neighbouring threads write neighbouring vectors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <vector>

#include "common/philox_scalar.h"
#include "cuda/launch.h"

namespace fastgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

// kVector: rows are whole vectors of four, else the four are written one by one and the last few not at all.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(float* out, const std::int64_t* seeds, std::int64_t seed_stride, std::int64_t size,
                         std::int64_t tiles, std::uint32_t step) {
  const std::int64_t n = blockIdx.x / tiles, tile = blockIdx.x - n * tiles;
  const std::int64_t block = tile * kThreads + threadIdx.x, first = 4 * block;
  if (first >= size) return;
  const scalar::Normals normals =
      scalar::normal_block(static_cast<std::uint64_t>(block), step, static_cast<std::uint64_t>(seeds[n * seed_stride]));
  float* row = out + n * size + first;
  if constexpr (kVector) {
    *reinterpret_cast<float4*>(row) = make_float4(normals.z[0], normals.z[1], normals.z[2], normals.z[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < size) row[i] = normals.z[i];
  }
}

Tensor philox_normal(const Tensor& seeds, std::vector<std::int64_t> shape, std::int64_t step) {
  STD_TORCH_CHECK(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long, "philox_normal: seeds must be int64 [N]");
  STD_TORCH_CHECK(!shape.empty() && shape[0] == seeds.size(0), "philox_normal: shape must begin with the number of seeds");
  std::int64_t size = 1;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    STD_TORCH_CHECK(shape[d] >= 0, "philox_normal: shape must not be negative");
    if (d > 0) size *= shape[d];
  }
  Tensor out = torch::stable::new_empty(seeds, {shape.data(), shape.size()}, ScalarType::Float);
  if (shape[0] * size == 0) return out;
  const std::int64_t tiles = ((size + 3) / 4 + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(tiles <= std::numeric_limits<std::int32_t>::max() / shape[0], "philox_normal: ", shape[0], " samples of ",
                  size, " elements do not fit one launch");
  const std::int32_t device = seeds.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(shape[0] * tiles), kThreads, 0, current_stream(device)>>>(
        static_cast<float*>(out.mutable_data_ptr()), static_cast<const std::int64_t*>(seeds.data_ptr()), seeds.stride(0),
        size, tiles, static_cast<std::uint32_t>(step));
  };
  size % 4 == 0 ? launch(philox_normal_kernel<true>) : launch(philox_normal_kernel<false>);
  check_launch("philox_normal");
  return out;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) { m.impl("philox_normal", TORCH_BOX(&fastgen::philox_normal)); }
