// Sums over the threads of a warp and of a group of warps, always in the same order.
#pragma once

#include <cuda_runtime.h>

namespace megatron {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;

#ifdef __CUDACC__
// The shared memory whose size is chosen at launch.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ float4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Copies kBytes, 4, 8 or 16, from global to shared memory, or writes as many zeros and reads nothing: in the background
// where the GPU can (from Ampere on). Only the thread that asked may rely on them, once it has waited.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* shared, const void* global, bool is_wanted) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int given = is_wanted ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the first cache, which smaller ones cannot go
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(given) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(given)
                 : "memory");
  }
#else
  if (is_wanted) {
    memcpy(__builtin_assume_aligned(shared, kBytes), __builtin_assume_aligned(global, kBytes), kBytes);
  } else {
    memset(__builtin_assume_aligned(shared, kBytes), 0, kBytes);
  }
#endif
}

// Closes a group of copies, which may be empty.
__device__ __forceinline__ void close_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the last kPending.
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

// Sums kValues numbers, a power of two, over the threads of a block with the same threadIdx.y, of at most kMostRowWarps
// warps; every thread gets the sums. All threads of the block come here together. `scratch` holds kValues x warps and
// must not be written again before all have read it: callers that come back alternate between two.
template <int kMostRowWarps = 16, int kValues>
__device__ __forceinline__ void row_sum(float (&values)[kValues], float* scratch) {
  static_assert(kMostRowWarps >= 1 && kMostRowWarps <= kMostWarps && (kValues & (kValues - 1)) == 0);
  constexpr int kWidth = kWarp / kValues;  // lanes that end up with the same sum
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int own = lane / kWidth;  // which one
#pragma unroll
  for (int step = kWarp / 2, count = kValues; step > 0; step /= 2) {
    if (count > 1) {  // each half of the lanes takes half of the sums: few exchanges for all of them
      count /= 2;
      const bool is_upper = lane & step;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float kept = is_upper ? values[i + count] : values[i], given = is_upper ? values[i] : values[i + count];
        values[i] = kept + __shfl_xor_sync(0xffffffffu, given, step);
      }
    } else {
      values[0] += __shfl_xor_sync(0xffffffffu, values[0], step);
    }
  }
  float sum = values[0];
  if (warps > 1) {
    if (lane % kWidth == 0) scratch[own * warps + warp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int some = 0; some < kMostRowWarps; some += kWidth) {
      const int other = some + lane % kWidth;
      if (other < warps) sum += scratch[own * warps + other];
    }
#pragma unroll
    for (int step = kWidth / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = kValues == 1 ? sum : __shfl_sync(0xffffffffu, sum, i * kWidth);
}

}  // namespace megatron
