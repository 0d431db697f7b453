// Sums over the threads of a warp and of a group of warps, always in the same order.
#pragma once

#include <cuda_runtime.h>

namespace megatron {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;
constexpr int kSumRows = 8;  // threads of a block beside each other in a column of `column_sum`

#ifdef __CUDACC__
// The shared memory whose size is chosen at launch.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ float4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Copies 8 or 16 bytes from global to shared memory, in the background where the GPU can (from Ampere on); only the
// thread that asked may rely on them, once it has waited.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
#else
  memcpy(__builtin_assume_aligned(shared, kBytes), __builtin_assume_aligned(global, kBytes), kBytes);
#endif
}

// Closes a group of copies, which may be empty.
__device__ __forceinline__ void close_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}
#endif

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Sums kValues numbers over the threads of one row of the block (threadIdx.y); every thread gets the sums. All rows of
// the block come here together. `scratch` holds kValues x warps of the row and must not be written again before all
// have read it: callers that come back alternate between two.
template <int kValues>
__device__ __forceinline__ void row_sum(float (&values)[kValues], float* scratch) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(values[i]);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) scratch[i * warps + warp] = values[i];
  }
  __syncthreads();
  // One more warp sum instead of a serial one: all warps read the same few words.
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(lane < warps ? scratch[i * warps + lane] : 0.0f);
}

// Sums the rows of partial [rows, columns] for one column; blocks of (kWarp, kSumRows) threads, whose sums `shared`
// collects.
// Returns the sum to the threads with threadIdx.y == 0.
__device__ __forceinline__ float column_sum(const float* partial, int rows, int columns, int column, float* shared) {
  constexpr int kAtOnce = 17;  // loads on their way together: there is little else to hide their latency
  float sum = 0.0f;
  for (int start = threadIdx.y; column < columns && start < rows; start += kAtOnce * blockDim.y) {
    float some[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int row = start + n * blockDim.y;
      some[n] = row < rows ? partial[static_cast<long long>(row) * columns + column] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) sum += some[n];
  }
  __syncthreads();
  shared[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0) {
    for (int y = 1; y < blockDim.y; ++y) sum += shared[y * kWarp + threadIdx.x];
  }
  return sum;
}

}  // namespace megatron
