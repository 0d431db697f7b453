// The norm's backward. Blocks stay on their multiprocessor and add up the gradients of weight and bias of their rows in
// registers; a second kernel adds those of the blocks in a fixed order, so that two runs agree in every bit.
#pragma once

#include "../include/reduce.cuh"
#include "../include/vector.cuh"
#include "tensors.cuh"

namespace megatron {

constexpr int kSlotBytes = 16;  // of a vector that waits in shared memory
constexpr int kTensors = 3;     // that backward reads: the stream, and the gradients of its norm and of itself

// Rows on their way, in shared memory. A thread reads what itself has asked for, so that no barrier is needed for that.
template <typename X, typename W, int kSize, int kVectors>
struct Stages {
  const BackwardTensors<X, W>& t;
  char* own;   // this thread's first slot of [stages, kTensors, kVectors, threads, kSlotBytes]
  int plane;   // bytes of the slots of all threads
  int across;  // columns between two vectors of a thread
  int held;    // vectors that this thread has

  __device__ __forceinline__ Stages(const BackwardTensors<X, W>& tensors, char* memory)
      : t(tensors),
        own(memory + (threadIdx.y * blockDim.x + threadIdx.x) * kSlotBytes),
        plane(static_cast<int>(blockDim.x * blockDim.y) * kSlotBytes),
        across(static_cast<int>(blockDim.x) * kSize) {
    const int threads = blockDim.x, vectors = tensors.columns / kSize;
    held = (vectors - static_cast<int>(threadIdx.x) + threads - 1) / threads;
  }

  __device__ __forceinline__ char* stage(int index) const { return own + index * (kTensors * kVectors * plane); }

  // Asks for this thread's part of a row that begins at element `at`, or of none.
  __device__ __forceinline__ void ask(char* to, bool is_row, std::int64_t at) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (is_row && v < held) {
        start_copy<sizeof(X) * kSize>(to + v * plane, t.stream + at + v * across);
        start_copy<sizeof(W) * kSize>(to + (kVectors + v) * plane, t.grad_normed + at + v * across);
        if (t.grad_stream != nullptr) {
          start_copy<sizeof(X) * kSize>(to + (2 * kVectors + v) * plane, t.grad_stream + at + v * across);
        }
      }
    }
    close_copies();
  }

  __device__ __forceinline__ void read(const char* from, int v, float (&x)[kSize], float (&grad)[kSize]) const {
    Packed<X, kSize>::load(reinterpret_cast<const X*>(from + v * plane)).unpack(x);
    Packed<W, kSize>::load(reinterpret_cast<const W*>(from + (kVectors + v) * plane)).unpack(grad);
  }

  __device__ __forceinline__ void read_passed(const char* from, int v, float (&passed)[kSize]) const {
    if (t.grad_stream == nullptr) return;
    Packed<X, kSize>::load(reinterpret_cast<const X*>(from + (2 * kVectors + v) * plane)).unpack(passed);
  }
};

// A thread's part of weight + offset, in fp32 as long as there are registers for that.
template <typename W, int kSize, int kVectors>
struct Weights {
  static constexpr bool kWide = kVectors <= 2;
  Packed<W, kSize> packed[kVectors];
  float wide[kWide ? kVectors : 1][kSize];
  float offset;

  __device__ __forceinline__ Weights(const W* weight, float weight_offset, int vectors) : offset(weight_offset) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * blockDim.x + threadIdx.x;
      packed[v] = vector < vectors ? Packed<W, kSize>::load(weight + vector * kSize) : Packed<W, kSize>::zeros();
      if constexpr (kWide) {
        packed[v].unpack(wide[v]);
#pragma unroll
        for (int i = 0; i < kSize; ++i) wide[v][i] += offset;
      }
    }
  }

  __device__ __forceinline__ void read(int v, float (&weight)[kSize]) const {
    if constexpr (!kWide) packed[v].unpack(weight);
#pragma unroll
    for (int i = 0; i < kSize; ++i) weight[i] = kWide ? wide[kWide ? v : 0][i] : weight[i] + offset;
  }
};

// Mean and inverse deviation of a row, or zeros for none.
template <bool kCentred>
struct RowStatistics {
  float mean, inverse;

  template <typename Tensors>
  static __device__ __forceinline__ RowStatistics load(const Tensors& t, std::int64_t row) {
    const bool is_row = row < t.rows;
    return {kCentred && is_row ? t.mean[row] : 0.0f, is_row ? t.inverse_deviation[row] : 0.0f};
  }
};

// Adds up the accumulators of the rows of a block (threadIdx.y) and writes them as the block's row of `partial`.
template <int kSize, int kVectors>
__device__ __forceinline__ void write_partial(const float (&sums)[kVectors][kSize], float* partial, int columns,
                                              float* shared) {
  float* to = blockDim.y == 1 ? partial + static_cast<std::int64_t>(blockIdx.x) * columns
                              : shared + threadIdx.y * columns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * blockDim.x + threadIdx.x) * kSize;
    if (column < columns) {
#pragma unroll
      for (int i = 0; i < kSize; i += 4) {
        *reinterpret_cast<float4*>(to + column + i) =
            make_float4(sums[v][i], sums[v][i + 1], sums[v][i + 2], sums[v][i + 3]);
      }
    }
  }
  if (blockDim.y == 1) return;
  __syncthreads();
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int column = thread; column < columns; column += threads) {
    float sum = shared[column];
    for (int y = 1; y < blockDim.y; ++y) sum += shared[y * columns + column];
    partial[static_cast<std::int64_t>(blockIdx.x) * columns + column] = sum;
  }
  __syncthreads();
}

// With g = grad_normed (weight + offset) and n the normalised row:
// grad_x = (g - mean(g) - n mean(g n)) / deviation + grad_stream; RMSNorm has no mean to take out.
//
// A block's rows (threadIdx.y) go together: one barrier for all of them, while the next ones are on their way.
template <typename X, typename W, int kSize, int kVectors, int kStages, bool kCentred>
__global__ void __launch_bounds__(kMostThreads, 1) backward_rows(BackwardTensors<X, W> t) {
  constexpr int kSums = kCentred ? 2 : 1;
  __shared__ float scratch[2][2 * kMostWarps];
  char* memory = dynamic_shared<char>();
  wait_for_former_kernel();
  let_next_kernel_come();
  const int warps = blockDim.x / kWarp;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.y, stride = step * t.columns;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  std::int64_t at = row * t.columns + threadIdx.x * kSize;
  const Stages<X, W, kSize, kVectors> stages(t, memory);
#pragma unroll
  for (int n = 0; n < kStages; ++n) stages.ask(stages.stage(n), row + n * step < t.rows, at + n * stride);
  auto next = RowStatistics<kCentred>::load(t, row);
  const Weights<W, kSize, kVectors> weights(t.weight, t.weight_offset, t.columns / kSize);
  float weight_sums[kVectors][kSize] = {}, bias_sums[kCentred ? kVectors : 1][kSize] = {};
  for (int stage = 0, turn = 0; row - threadIdx.y < t.rows; row += step, at += stride, turn ^= 1) {
    char* const here = stages.stage(stage);
    stage = stage + 1 < kStages ? stage + 1 : 0;
    const float mean = next.mean, inverse = next.inverse;
    next = RowStatistics<kCentred>::load(t, row + step);
    wait_for_copies<kStages - 1>();
    float sums[kSums] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (row < t.rows && v < stages.held) {
        float x[kSize], grad[kSize], weight[kSize];
        stages.read(here, v, x, grad);
        weights.read(v, weight);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float normalised = (x[i] - mean) * inverse, scaled = grad[i] * weight[i];
          sums[0] += scaled * normalised;
          if constexpr (kCentred) {
            sums[1] += scaled;
            bias_sums[v][i] += grad[i];
          }
          weight_sums[v][i] += grad[i] * normalised;
        }
      }
    }
    row_sum(sums, scratch[turn] + threadIdx.y * 2 * warps);
    // grad_x = inverse scaled + along (x - mean) + common + passed, with the factors of the row put together.
    const float along = -inverse * inverse * sums[0] / t.columns;
    const float common = kCentred ? -inverse * sums[kSums - 1] / t.columns : 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (row < t.rows && v < stages.held) {
        float x[kSize], grad[kSize], weight[kSize], passed[kSize] = {};
        stages.read(here, v, x, grad);
        weights.read(v, weight);
        stages.read_passed(here, v, passed);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float rest = fmaf(x[i] - mean, along, kCentred ? passed[i] + common : passed[i]);
          passed[i] = fmaf(grad[i] * weight[i], inverse, rest);
        }
        Packed<X, kSize>::pack(passed).store(t.grad_x + at + v * stages.across);
      }
    }
    stages.ask(here, row + kStages * step < t.rows, at + kStages * stride);
  }
  wait_for_copies<0>();
  __syncthreads();
  float* shared = reinterpret_cast<float*>(memory);
  write_partial(weight_sums, t.partial_weight, t.columns, shared);
  if constexpr (kCentred) {
    if (t.partial_bias != nullptr) write_partial(bias_sums, t.partial_bias, t.columns, shared);
  }
}

// As `backward_rows`, element by element: sums of weight and bias are kept in shared memory, each by its one thread.
template <typename X, typename W>
__global__ void __launch_bounds__(kGenericThreads) backward_generic(BackwardTensors<X, W> t) {
  __shared__ float scratch[2][2 * kMostWarps];
  float* weight_sums = dynamic_shared<float>();
  wait_for_former_kernel();
  float* bias_sums = weight_sums + t.columns;
  for (int c = threadIdx.x; c < t.columns; c += blockDim.x) weight_sums[c] = bias_sums[c] = 0.0f;
  const bool centred = t.mean != nullptr;
  int turn = 0;
  for (std::int64_t row = blockIdx.x; row < t.rows; row += gridDim.x, turn ^= 1) {
    const std::int64_t start = row * t.columns;
    const float mean = centred ? t.mean[row] : 0.0f, inverse = t.inverse_deviation[row];
    float sums[2] = {0.0f, 0.0f};
    for (int c = threadIdx.x; c < t.columns; c += blockDim.x) {
      const float normalised = (to_float(t.stream[start + c]) - mean) * inverse;
      const float grad = to_float(t.grad_normed[start + c]);
      const float scaled = grad * (to_float(t.weight[c]) + t.weight_offset);
      sums[0] += scaled * normalised;
      sums[1] += scaled;
      weight_sums[c] += grad * normalised;
      bias_sums[c] += grad;
    }
    row_sum(sums, scratch[turn]);
    const float along = sums[0] / t.columns, common = centred ? sums[1] / t.columns : 0.0f;
    for (int c = threadIdx.x; c < t.columns; c += blockDim.x) {
      const float normalised = (to_float(t.stream[start + c]) - mean) * inverse;
      const float scaled = to_float(t.grad_normed[start + c]) * (to_float(t.weight[c]) + t.weight_offset);
      const float passed = t.grad_stream == nullptr ? 0.0f : to_float(t.grad_stream[start + c]);
      t.grad_x[start + c] = from_float<X>(passed + inverse * (scaled - common - normalised * along));
    }
  }
  const std::int64_t mine = static_cast<std::int64_t>(blockIdx.x) * t.columns;
  for (int c = threadIdx.x; c < t.columns; c += blockDim.x) {
    t.partial_weight[mine + c] = weight_sums[c];
    if (t.partial_bias != nullptr) t.partial_bias[mine + c] = bias_sums[c];
  }
}

// blockIdx.y: 0 sums those of the weight, 1 those of the bias.
template <typename W>
__global__ void __launch_bounds__(kWarp* kSumRows) sum_partials(const float* partial, int partial_rows, int columns,
                                                             W* grad_weight, W* grad_bias) {
  __shared__ float shared[kWarp * kSumRows];
  const int column = blockIdx.x * kWarp + threadIdx.x;
  wait_for_former_kernel();
  partial += static_cast<std::int64_t>(blockIdx.y) * partial_rows * columns;
  const float sum = column_sum(partial, partial_rows, columns, column, shared);
  if (threadIdx.y == 0 && column < columns) (blockIdx.y == 0 ? grad_weight : grad_bias)[column] = from_float<W>(sum);
}

}  // namespace megatron
