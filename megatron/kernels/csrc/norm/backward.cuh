// The norm's backward. Blocks stay on their multiprocessor and add up the gradients of weight and bias of their rows in
// registers; a second kernel adds those of the blocks in a fixed order, so that two runs agree in every bit.
//
// Memory is not all that limits it: an H200's multiprocessor issues some 40 instructions in the time that the six bytes
// of an element in bf16 take, and waits for sums between them. Hence a thread has few columns and several rows of them,
// so that sums, statistics and addresses serve many elements; it keeps what it has computed while it waits for the sums,
// and knows no special case for rows and columns that are not there: they arrive as zeros.
#pragma once

#include "../include/reduce.cuh"
#include "../include/vector.cuh"
#include "tensors.cuh"

namespace megatron {

constexpr int kSlotBytes = 16;  // of a vector that waits in shared memory

// What a thread of backward has: vectors of each row, neighbouring rows that it works on at once, and stages, each with
// that many rows on their way.
template <int kVectorsOf, int kRowsOf, int kStagesOf, int kThreadsOf>
struct RowShare {
  static constexpr int kVectors = kVectorsOf, kRows = kRowsOf, kStages = kStagesOf;
  static constexpr int kThreads = kThreadsOf;  // of a block, at most
};

// The rows of a block, taken in turns: in each a thread has its next few. All blocks walk down the tensor side by side,
// so that what is read at a time lies together.
struct Turns {
  std::int64_t row;  // this thread's first one
  int left;          // rows from there on; negative where other threads have some, and this one none
  int step;          // rows from one turn to the next
  int count;

  __device__ __forceinline__ Turns(std::int64_t rows, int at_once) {
    const int together = at_once * static_cast<int>(blockDim.y);  // of a block
    const int begin = together * static_cast<int>(blockIdx.x), mine = static_cast<int>(rows) - begin;
    row = begin + static_cast<int>(threadIdx.y) * at_once;
    left = mine - static_cast<int>(threadIdx.y) * at_once;
    step = together * static_cast<int>(gridDim.x);
    count = mine > 0 ? (mine + step - 1) / step : 0;
  }
};

// Rows on their way, in shared memory. A thread reads what itself has asked for, so that no barrier is needed for that.
template <typename X, typename W, int kSize, int kVectors, int kRows>
struct Stages {
  static constexpr int kSlots = kRows * kVectors;
  const BackwardTensors<X, W>& t;
  char* own;    // this thread's first slot of [stages, tensors, kSlots, threads, kSlotBytes]
  int plane;    // bytes of the slots of all threads
  int tensors;  // that are read: the stream, the gradient of its norm and, where there is one, its own
  int across;   // columns between two vectors of a thread
  int held;     // vectors that this thread has

  __device__ __forceinline__ Stages(const BackwardTensors<X, W>& given, char* memory)
      : t(given),
        own(memory + (threadIdx.y * blockDim.x + threadIdx.x) * kSlotBytes),
        plane(static_cast<int>(blockDim.x * blockDim.y) * kSlotBytes),
        tensors(given.grad_stream == nullptr ? 2 : 3),
        across(static_cast<int>(blockDim.x) * kSize) {
    const int threads = blockDim.x, vectors = t.columns / kSize;
    held = (vectors - static_cast<int>(threadIdx.x) + threads - 1) / threads;
  }

  __device__ __forceinline__ char* stage(int index) const { return own + index * (tensors * kSlots * plane); }

  __device__ __forceinline__ char* slot(char* stage, int tensor, int n, int v) const {
    return stage + (tensor * kSlots + n * kVectors + v) * plane;
  }

  // Asks for this thread's part of its rows, of which `left` are there, from element `at` on.
  __device__ __forceinline__ void ask(char* to, int left, std::int64_t at) const {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const bool is_wanted = n < left && v < held;
        const std::int64_t from = at + static_cast<std::int64_t>(n) * t.columns + v * across;
        start_copy<sizeof(X) * kSize>(slot(to, 0, n, v), t.stream + from, is_wanted);
        start_copy<sizeof(W) * kSize>(slot(to, 1, n, v), t.grad_normed + from, is_wanted);
        if (tensors == 3) start_copy<sizeof(X) * kSize>(slot(to, 2, n, v), t.grad_stream + from, is_wanted);
      }
    }
    close_copies();
  }

  __device__ __forceinline__ void read(char* from, int n, int v, float (&x)[kSize], float (&grad)[kSize]) const {
    Packed<X, kSize>::load(reinterpret_cast<const X*>(slot(from, 0, n, v))).unpack(x);
    Packed<W, kSize>::load(reinterpret_cast<const W*>(slot(from, 1, n, v))).unpack(grad);
  }

  __device__ __forceinline__ Packed<X, kSize> passing(char* from, int n, int v) const {
    return Packed<X, kSize>::load(reinterpret_cast<const X*>(slot(from, 2, n, v)));
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

// Mean and inverse deviation of some rows; zeros for those that are not there.
template <int kRows, bool kCentred>
struct RowStatistics {
  float mean[kRows], inverse[kRows];

  template <typename Tensors>
  __device__ __forceinline__ void load(const Tensors& t, std::int64_t row, int left) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      mean[n] = kCentred && n < left ? t.mean[row + n] : 0.0f;
      inverse[n] = n < left ? t.inverse_deviation[row + n] : 0.0f;
    }
  }
};

// Accumulators of a thread's columns, of the weight's gradient and, with kSums = 2, of the bias's.
template <int kSize, int kVectors, int kSums>
struct ColumnSums {
  static constexpr int kQuads = kSize / 4, kParts = kSums * kVectors * kQuads;
  float of[kSums][kVectors][kSize] = {};

  __device__ __forceinline__ float4 part(int index) const {
    const float* from = &of[index / (kVectors * kQuads)][index / kQuads % kVectors][index % kQuads * 4];
    return make_float4(from[0], from[1], from[2], from[3]);
  }

  __device__ __forceinline__ void add(int index, float4 more) {
    float* to = &of[index / (kVectors * kQuads)][index / kQuads % kVectors][index % kQuads * 4];
    to[0] += more.x, to[1] += more.y, to[2] += more.z, to[3] += more.w;
  }

  // Adds those of the block's other rows of threads to those of the first, in their order.
  __device__ __forceinline__ void gather(float4* shared) {
    if (blockDim.y == 1) return;
    __syncthreads();
    if (threadIdx.y > 0) {
#pragma unroll
      for (int n = 0; n < kParts; ++n) shared[((threadIdx.y - 1) * kParts + n) * blockDim.x + threadIdx.x] = part(n);
    }
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
      for (int n = 0; n < kParts; ++n) add(n, shared[((y - 1) * kParts + n) * blockDim.x + threadIdx.x]);
    }
  }

  // Writes one of the two as the block's row of `partial`.
  __device__ __forceinline__ void write(int which, float* partial, int columns) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * blockDim.x + threadIdx.x) * kSize;
      if (column >= columns) continue;
#pragma unroll
      for (int i = 0; i < kSize; i += 4) {
        *reinterpret_cast<float4*>(partial + static_cast<std::int64_t>(blockIdx.x) * columns + column + i) =
            part((which * kVectors + v) * kQuads + i / 4);
      }
    }
  }
};

// A thread's part of its rows in one turn. With g = grad_normed (weight + offset) and n the normalised row:
// grad_x = (g - mean(g) - n mean(g n)) / deviation + grad_stream; RMSNorm has no mean to take out.
template <typename X, typename W, int kSize, int kVectors, int kRows, bool kCentred>
struct RowsAtWork {
  static constexpr int kSums = kCentred ? 2 : 1;
  static constexpr bool kKept = kVectors <= 2;  // in registers between its two halves, or read again
  using RowStages = Stages<X, W, kSize, kVectors, kRows>;
  const RowStages& stages;
  const Weights<W, kSize, kVectors>& weights;
  const RowStatistics<kRows, kCentred>& rows;
  char* here;  // the stage in which they have arrived
  float normalised[kRows][kVectors][kSize], scaled[kRows][kVectors][kSize];
  Packed<X, kSize> passing[kRows][kVectors];

  __device__ __forceinline__ RowsAtWork(const RowStages& from, const Weights<W, kSize, kVectors>& given_weights,
                                        const RowStatistics<kRows, kCentred>& statistics, char* stage)
      : stages(from), weights(given_weights), rows(statistics), here(stage) {}

  __device__ __forceinline__ void read(int n, int v, float (&grad)[kSize]) {
    float weight[kSize];
    stages.read(here, n, v, normalised[n][v], grad);
    weights.read(v, weight);
    if (stages.tensors == 3) passing[n][v] = stages.passing(here, n, v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      normalised[n][v][i] = (normalised[n][v][i] - rows.mean[n]) * rows.inverse[n];
      scaled[n][v][i] = grad[i] * weight[i];
    }
  }

  // Adds to the sums over columns, sum(g n) and sum(g) of each row, and to those over rows.
  __device__ __forceinline__ void add_up(float (&sums)[kSums * kRows], ColumnSums<kSize, kVectors, kSums>& columns) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float grad[kSize];
        read(n, v, grad);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          columns.of[0][v][i] += grad[i] * normalised[n][v][i];
          sums[n] += scaled[n][v][i] * normalised[n][v][i];
          if constexpr (kCentred) {
            columns.of[1][v][i] += grad[i];
            sums[kRows + n] += scaled[n][v][i];
          }
        }
      }
    }
  }

  // Writes the gradient of the rows that are there, `left`, from element `at` of it on.
  __device__ __forceinline__ void write(const float (&sums)[kSums * kRows], int left, std::int64_t at) {
    const float share = 1.0f / stages.t.columns;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const float along = -rows.inverse[n] * (sums[n] * share);
      const float common = kCentred ? -rows.inverse[n] * (sums[(kSums - 1) * kRows + n] * share) : 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float grad[kSize], passed[kSize];
        if constexpr (!kKept) read(n, v, grad);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          grad[i] = fmaf(scaled[n][v][i], rows.inverse[n], fmaf(normalised[n][v][i], along, common));
        }
        if (stages.tensors == 3) {
          passing[n][v].unpack(passed);
#pragma unroll
          for (int i = 0; i < kSize; ++i) grad[i] += passed[i];
        }
        if (n < left && v < stages.held) {
          const std::int64_t to = at + static_cast<std::int64_t>(n) * stages.t.columns + v * stages.across;
          Packed<X, kSize>::pack(grad).store(stages.t.grad_x + to);
        }
      }
    }
  }
};

// Blocks of (threads of a row, rows that are worked on beside each other): all of them wait at one barrier.
template <typename X, typename W, int kSize, typename Share, bool kCentred>
__global__ void __launch_bounds__(Share::kThreads, 1) backward_rows(BackwardTensors<X, W> t, int num_stages) {
  constexpr int kRows = Share::kRows, kVectors = Share::kVectors, kSums = kCentred ? 2 : 1;
  using AtWork = RowsAtWork<X, W, kSize, kVectors, kRows, kCentred>;
  __shared__ float scratch[2][kSums * kRows * Share::kThreads / kWarp];
  char* memory = dynamic_shared<char>();
  Turns turns(t.rows, kRows);
  const Stages<X, W, kSize, kVectors, kRows> stages(t, memory);
  const int warps = blockDim.x / kWarp;
  const std::int64_t stride = static_cast<std::int64_t>(turns.step) * t.columns;
  std::int64_t at = turns.row * t.columns + threadIdx.x * kSize, asked = at;
  wait_for_former_kernel();
  for (int n = 0; n < num_stages; ++n, asked += stride) {
    stages.ask(stages.stage(n), turns.left - n * turns.step, asked);
  }
  RowStatistics<kRows, kCentred> rows, next;
  next.load(t, turns.row, turns.left);
  const Weights<W, kSize, kVectors> weights(t.weight, t.weight_offset, t.columns / kSize);
  ColumnSums<kSize, kVectors, kSums> columns;
  for (int turn = 0, stage = 0; turn < turns.count; ++turn, at += stride, asked += stride) {
    char* const here = stages.stage(stage);
    const int left = turns.left, left_to_ask = left - num_stages * turns.step;
    stage = stage + 1 < num_stages ? stage + 1 : 0;
    rows = next;
    turns.row += turns.step, turns.left -= turns.step;
    next.load(t, turns.row, turns.left);
    num_stages == Share::kStages ? wait_for_copies<Share::kStages - 1>() : wait_for_copies<0>();
    AtWork part(stages, weights, rows, here);
    float sums[kSums * kRows] = {};
    part.add_up(sums, columns);
    if constexpr (AtWork::kKept) stages.ask(here, left_to_ask, asked);
    row_sum<Share::kThreads / kWarp>(sums, scratch[turn % 2] + threadIdx.y * kSums * kRows * warps);
    part.write(sums, left, at);
    if constexpr (!AtWork::kKept) stages.ask(here, left_to_ask, asked);
  }
  wait_for_copies<0>();
  let_next_kernel_come();
  columns.gather(reinterpret_cast<float4*>(memory));
  if (threadIdx.y > 0) return;
  columns.write(0, t.partial_weight, t.columns);
  if constexpr (kCentred) {
    if (t.partial_bias != nullptr) columns.write(1, t.partial_bias, t.columns);
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

}  // namespace megatron
