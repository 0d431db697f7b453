// The norm's forward: a row is read once, kept in registers, and reduced by the warps that hold it.
#pragma once

#include "../include/reduce.cuh"
#include "../include/vector.cuh"
#include "tensors.cuh"

namespace megatron {

// From the sums of x - mean and of its square: corrects the mean of LayerNorm, returns 1 / deviation.
template <typename Tensors>
__device__ __forceinline__ float settle(const float (&powers)[2], const Tensors& t, float& mean) {
  const float square = powers[1] / t.columns;
  if (t.mean == nullptr) return rsqrtf(square + t.epsilon);
  const float rest = powers[0] / t.columns;
  mean += rest;
  return rsqrtf(square - rest * rest + t.epsilon);
}

// What a thread holds of a row: vectors that are neighbours of its neighbours', packed.
template <typename X, typename W, int kSize, int kVectors>
struct ForwardPart {
  Packed<X, kSize> x[kVectors];
  Packed<W, kSize> delta[kVectors];

  __device__ __forceinline__ void load(const ForwardTensors<X, W>& t, std::int64_t row, int vectors) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * blockDim.x + threadIdx.x;
      const bool is_here = row < t.rows && vector < vectors;
      x[v] = is_here ? Packed<X, kSize>::load(t.x + row * t.columns + vector * kSize) : Packed<X, kSize>::zeros();
      if (t.delta != nullptr && is_here) {
        delta[v] = Packed<W, kSize>::load(t.delta + row * t.columns + vector * kSize);
      }
    }
  }

  // Adds delta and writes the stream.
  __device__ __forceinline__ void add(const ForwardTensors<X, W>& t, std::int64_t row, int vectors) {
    if (t.delta == nullptr) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * blockDim.x + threadIdx.x;
      if (vector < vectors) {
        float sum[kSize], more[kSize];
        x[v].unpack(sum);
        delta[v].unpack(more);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += more[i];
        x[v] = Packed<X, kSize>::pack(sum);
        x[v].store(t.stream + row * t.columns + vector * kSize);
      }
    }
  }
};

// Blocks of (threads of a row, rows); several rows are of one warp each.
template <typename X, typename W, int kSize, int kVectors, bool kCentred>
__global__ void __launch_bounds__(kMostThreads) forward_rows(ForwardTensors<X, W> t) {
  __shared__ float scratch[2][2 * kMostWarps];
  wait_for_former_kernel();
  const int warps = blockDim.x / kWarp, vectors = t.columns / kSize;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= t.rows) return;  // a whole warp, or the whole block
  ForwardPart<X, W, kSize, kVectors> part;
  part.load(t, row, vectors);
  part.add(t, row, vectors);
  float mean = 0.0f;
  if constexpr (kCentred) {
    float sum[1] = {0.0f};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float x[kSize];
      part.x[v].unpack(x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum[0] += x[i];
    }
    row_sum(sum, scratch[0] + threadIdx.y * warps);
    mean = sum[0] / t.columns;
  }
  // What is left of the mean after rounding is taken out as well: it matters where the mean is large.
  float powers[kCentred ? 2 : 1] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v * blockDim.x + threadIdx.x < vectors) {
      float x[kSize];
      part.x[v].unpack(x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float centred = x[i] - mean;
        powers[0] += centred * centred;
        if constexpr (kCentred) powers[kCentred] += centred;
      }
    }
  }
  row_sum(powers, scratch[1] + threadIdx.y * 2 * warps);
  float variance = powers[0] / t.columns;
  if constexpr (kCentred) {
    const float rest = powers[kCentred] / t.columns;
    mean += rest;
    variance -= rest * rest;
  }
  const float inverse = rsqrtf(variance + t.epsilon);
  if (threadIdx.x == 0) {
    if constexpr (kCentred) t.mean[row] = mean;
    t.inverse_deviation[row] = inverse;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int vector = v * blockDim.x + threadIdx.x;
    if (vector < vectors) {
      float x[kSize], weight[kSize], bias[kSize] = {};
      part.x[v].unpack(x);
      Packed<W, kSize>::load(t.weight + vector * kSize).unpack(weight);
      if (t.bias != nullptr) Packed<W, kSize>::load(t.bias + vector * kSize).unpack(bias);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        x[i] = fmaf((x[i] - mean) * inverse, weight[i] + t.weight_offset, bias[i]);
      }
      Packed<W, kSize>::pack(x).store(t.normed + row * t.columns + vector * kSize);
    }
  }
}

// A block a row, element by element, the row read again from the caches: for columns that vectors do not divide.
template <typename X, typename W>
__global__ void __launch_bounds__(kGenericThreads) forward_generic(ForwardTensors<X, W> t) {
  __shared__ float scratch[2][2 * kMostWarps];
  wait_for_former_kernel();
  const std::int64_t row = blockIdx.x, start = row * t.columns;
  const X* x = t.x + start;
  if (t.delta != nullptr) {
    for (int c = threadIdx.x; c < t.columns; c += blockDim.x) {
      t.stream[start + c] = from_float<X>(to_float(x[c]) + to_float(t.delta[start + c]));
    }
    x = t.stream + start;  // each thread reads what itself wrote
  }
  float mean = 0.0f;
  if (t.mean != nullptr) {
    float sum[1] = {0.0f};
    for (int c = threadIdx.x; c < t.columns; c += blockDim.x) sum[0] += to_float(x[c]);
    row_sum(sum, scratch[0]);
    mean = sum[0] / t.columns;
  }
  float powers[2] = {0.0f, 0.0f};
  for (int c = threadIdx.x; c < t.columns; c += blockDim.x) {
    const float centred = to_float(x[c]) - mean;
    powers[0] += centred;
    powers[1] += centred * centred;
  }
  row_sum(powers, scratch[1]);
  const float inverse = settle(powers, t, mean);
  if (threadIdx.x == 0) {
    if (t.mean != nullptr) t.mean[row] = mean;
    t.inverse_deviation[row] = inverse;
  }
  for (int c = threadIdx.x; c < t.columns; c += blockDim.x) {
    const float normed = (to_float(x[c]) - mean) * inverse * (to_float(t.weight[c]) + t.weight_offset);
    t.normed[start + c] = from_float<W>(normed + (t.bias == nullptr ? 0.0f : to_float(t.bias[c])));
  }
}

}  // namespace megatron
