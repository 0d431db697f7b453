// A row of scores: its place, which keys its query sees, and what its threads compute together.
#pragma once

#include "softmax.h"

#include "../include/reduce.cuh"
#include "../include/vector.cuh"

namespace megatron {
namespace {

// Scores are taken times a factor that suits `exponential`: for small types it is 2^x.
template <bool kExact>
__device__ __forceinline__ float exponential(float x) {
  return kExact ? expf(x) : fast_exp2(x);
}

template <bool kExact>
__device__ __forceinline__ float factor_of(const Softmax& call) {
  constexpr float kLog2E = 1.4426950408889634f;
  return kExact ? call.scale : call.scale * kLog2E;
}

// Rounded before anything is taken off it: fused with a subtraction, the highest score would differ from itself.
__device__ __forceinline__ float scaled(float factor, float score) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(factor, score);
#else
  return factor * score;
#endif
}

// One row, as its threads see it.
struct Row {
  std::int64_t first;        // index of its first element
  int visible;               // keys before the first that causality hides
  const std::uint8_t* mask;  // of this query, or null

  // Whether the query may attend to kSize keys from `key`, which kSize divides.
  template <int kSize>
  __device__ __forceinline__ void allows(int key, bool (&may)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) may[i] = key + i < visible;
    if (mask == nullptr) return;
    if constexpr (kSize > 1) {
      if (reinterpret_cast<std::uintptr_t>(mask) % kSize == 0) {
        const auto raw = *reinterpret_cast<const typename RawOf<kSize>::type*>(mask + key);
#pragma unroll
        for (int i = 0; i < kSize; ++i) may[i] = may[i] && reinterpret_cast<const std::uint8_t*>(&raw)[i] != 0;
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) may[i] = may[i] && mask[key + i] != 0;
  }
};

__device__ __forceinline__ Row row_of(const Softmax& call, std::int64_t index) {
  // Divisions of 64 bits are long.
  const bool is_short = call.rows <= 0xffffffffll;
  const std::int64_t head = is_short ? static_cast<std::uint32_t>(index) / static_cast<std::uint32_t>(call.queries)
                                     : index / call.queries;
  const int query = static_cast<int>(index - head * call.queries);
  Row row{index * call.keys, call.keys, nullptr};
  if (call.causal) row.visible = min(max(call.keys - call.queries + query + 1, 0), call.keys);
  if (call.mask != 0) {
    const std::int64_t batch = is_short ? static_cast<std::uint32_t>(head) / static_cast<std::uint32_t>(call.heads)
                                        : head / call.heads;
    row.mask = reinterpret_cast<const std::uint8_t*>(call.mask) + batch * call.mask_batch + query * call.mask_query;
  }
  return row;
}

// Combines a number of each thread of a row, which all threads of it get. A block has one row or a warp for each row.
// `scratch` is not written again before all have read it: the sum and the maximum have one each.
template <typename Combine>
__device__ __forceinline__ float over_row(float value, float neutral, float* scratch, Combine combine) {
  value = combine(value);
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (warps == 1) return value;
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return combine(lane < warps ? scratch[lane] : neutral);
}

__device__ __forceinline__ float row_maximum(float value, float* scratch) {
  return over_row(value, -INFINITY, scratch, [](float x) { return warp_max(x); });
}

__device__ __forceinline__ float row_total(float value, float* scratch) {
  return over_row(value, 0.0f, scratch, [](float x) { return warp_sum(x); });
}

}  // namespace
}  // namespace megatron
