// Sums over the threads of a warp and of a group of warps, always in the same order.
#pragma once

#include <cuda_runtime.h>

namespace megatron {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;
constexpr int kSumRows = 8;  // threads of a block beside each other in a column of `column_sum`

#ifdef __CUDACC__
// Waits for `threads` threads, whole warps, that name the same `barrier` (1 .. 15; 0 is that of the whole block).
__device__ __forceinline__ void wait_for_group(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The shared memory whose size is chosen at launch.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ float4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
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

// Sums kValues numbers over the threads of one row of the block (threadIdx.y); every thread gets the sums.
// `scratch` holds kValues x warps of the row and must not be written again before all have read it: callers that come
// back alternate between two. A block with several rows of several warps needs a barrier for each row, and named ones
// are scarce: few such blocks fit on a multiprocessor. Others say so with kSharesBlock = false.
template <bool kSharesBlock, int kValues>
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
  if (kSharesBlock && blockDim.y > 1) {
    wait_for_group(1 + threadIdx.y, blockDim.x);
  } else {
    __syncthreads();
  }
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
