// What CUDA kernels need of torch beyond the stable ABI of 2.11: the current stream, and a check of the launch.
//
// The library must load where torch has no CUDA, so it refers to no symbol of libtorch_cuda. Torch's libraries are loaded
// RTLD_LOCAL, where a weak reference to one that is not linked stays null: symbols are looked up by name, once, in the
// libraries that are already there.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

namespace fastgen {

template <class Function>
Function* find_loaded(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(handle, symbol));
}

// Torch's current stream on `device`.
inline cudaStream_t current_stream(std::int32_t device) {
  using NativeHandle = AOTITorchError(StreamHandle, void**);        // torch 2.13 and later
  using CurrentCudaStream = AOTITorchError(std::int32_t, void**);  // before
  static auto* const native_handle = find_loaded<NativeHandle>("libtorch_cpu.so", "torch_stream_native_handle");
  static auto* const cuda_stream = find_loaded<CurrentCudaStream>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  if (native_handle != nullptr) {
    StreamHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const torch::stable::accelerator::Stream owner(handle);
    TORCH_ERROR_CODE_CHECK(native_handle(handle, &stream));
  } else {
    STD_TORCH_CHECK(cuda_stream != nullptr, "fastgen: this torch offers no way to ask for its current CUDA stream");
    TORCH_ERROR_CODE_CHECK(cuda_stream(device, &stream));
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace fastgen
