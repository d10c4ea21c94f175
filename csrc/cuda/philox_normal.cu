// philox_normal in CUDA C++: a thread makes one Philox block and writes its four normals as one 16-byte store where it can.
//
// It shares its arithmetic with the host through csrc/common/philox_scalar.h. Built against CPU-only torch as well: no symbol
// of libtorch_cuda is linked, the current stream is asked for at run time.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/philox_scalar.h"

namespace fastgen {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(float* out, const std::int64_t* seeds, std::int64_t seed_stride, std::int64_t size,
                         std::int64_t blocks, std::int64_t total, std::uint32_t step) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const std::int64_t n = i / blocks, block = i - n * blocks, first = 4 * block;
    float z[4];
    scalar::normals_4(static_cast<std::uint64_t>(block), step, static_cast<std::uint64_t>(seeds[n * seed_stride]), z);
    float* p = out + n * size + first;
    if (size % 4 == 0) {  // then every block of every sample is aligned
      *reinterpret_cast<float4*>(p) = make_float4(z[0], z[1], z[2], z[3]);
    } else {
      for (int k = 0; k < 4 && first + k < size; ++k) p[k] = z[k];
    }
  }
}

// The stream torch launches on. Looked up in the library that has it, where it is loaded: linking to it would make this file
// unloadable beside a CPU build of torch.
cudaStream_t current_stream(std::int32_t device) {
  using Function = AOTITorchError (*)(std::int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  FASTGEN_CHECK(function != nullptr, "philox_normal: libtorch_cuda.so does not say which stream is current");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor philox_normal(const Tensor& seeds, std::vector<std::int64_t> shape, std::int64_t step) {
  FASTGEN_CHECK(seeds.dim() == 1 && seeds.scalar_type() == torch::headeronly::ScalarType::Long,
                "philox_normal: seeds must be int64 [N]");
  FASTGEN_CHECK(!shape.empty() && shape[0] == seeds.size(0), "philox_normal: shape must begin with the number of seeds");
  for (const std::int64_t length : shape) FASTGEN_CHECK(length >= 0, "philox_normal: shape must not be negative");
  std::int64_t size = 1;
  std::vector<std::int64_t> strides(shape.size());
  for (std::size_t d = shape.size(); d-- > 0;) {
    strides[d] = d + 1 == shape.size() ? 1 : strides[d + 1] * std::max<std::int64_t>(shape[d + 1], 1);
    if (d > 0) size *= shape[d];
  }
  const std::int32_t device = seeds.get_device();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(),
                                                  aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), device, &handle));
  Tensor out(handle);
  const std::int64_t blocks = (size + 3) / 4, total = shape[0] * blocks;
  if (total == 0) return out;
  int before = 0;
  cudaGetDevice(&before);
  if (before != device) cudaSetDevice(device);
  // Enough threads to fill any GPU of today; the loop takes what is left.
  const auto grid = static_cast<unsigned>(std::min<std::int64_t>((total + kThreads - 1) / kThreads, 1 << 16));
  philox_normal_kernel<<<grid, kThreads, 0, current_stream(device)>>>(
      static_cast<float*>(out.mutable_data_ptr()), static_cast<const std::int64_t*>(seeds.data_ptr()), seeds.stride(0), size,
      blocks, total, static_cast<std::uint32_t>(step));
  const cudaError_t error = cudaGetLastError();
  if (before != device) cudaSetDevice(before);
  FASTGEN_CHECK(error == cudaSuccess, "philox_normal: ", cudaGetErrorString(error));
  return out;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) { m.impl("philox_normal", TORCH_BOX(&fastgen::philox_normal)); }
