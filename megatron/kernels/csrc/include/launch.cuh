// How kernels are launched: on the caller's stream and device, with every error turned into an exception.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace megatron {

// Where a launch goes. Both values are those of the framework that owns the memory.
struct Place {
  int device;
  std::uintptr_t stream;
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + " failed on the GPU: " + cudaGetErrorString(status));
  }
}

// Makes a device current and puts the former one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_), "asking for the current device");
    changed_ = former_ != device;
    if (changed_) check(cudaSetDevice(device), "choosing the device");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking for a property of the device");
  return value;
}

inline int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

#ifdef __CUDACC__
// Launches a kernel that calls `wait_for_former_kernel` first of all: where the GPU can (from Hopper on), its blocks come
// into place while the kernel before it on the stream still runs.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            const Place& place, Arguments... arguments) {
  if (shared_bytes > 0) {  // more than 48 KiB, with what the kernel has besides, must be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          what);
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(place.stream);
  config.attrs = &early;
  config.numAttrs = attribute(cudaDevAttrComputeCapabilityMajor, place.device) >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

// Before it returns nothing that the kernels before this one wrote may be read. Every thread calls it, since the kernel
// after this one relies on it too.
__device__ __forceinline__ void wait_for_former_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets the blocks of the next kernel come into place beside those of this one, as soon as all of these are.
__device__ __forceinline__ void let_next_kernel_come() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
#endif

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace megatron
