// A row is read once, kept in registers, and reduced by the warps that hold it. Backward blocks stay on their
// multiprocessor and add up the gradients of weight and bias of their rows in registers; a second kernel adds those of
// the blocks in a fixed order, so that two runs agree in every bit.
#include "norm.h"

#include <algorithm>

#include "../include/reduce.cuh"
#include "../include/vector.cuh"

namespace megatron {
namespace {

constexpr int kMostThreads = 512;
constexpr int kGenericThreads = 512;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename X, typename W>
struct ForwardTensors {
  const X* __restrict__ x;
  const W* __restrict__ delta;
  const W* __restrict__ weight;
  const W* __restrict__ bias;
  X* __restrict__ stream;
  W* __restrict__ normed;
  float* __restrict__ mean;
  float* __restrict__ inverse_deviation;
  std::int64_t rows;
  int columns;
  float epsilon, weight_offset;

  explicit ForwardTensors(const NormForward& call)
      : x(pointer<X>(call.x)),
        delta(pointer<W>(call.delta)),
        weight(pointer<W>(call.weight)),
        bias(pointer<W>(call.bias)),
        stream(pointer<X>(call.stream)),
        normed(pointer<W>(call.normed)),
        mean(pointer<float>(call.mean)),
        inverse_deviation(pointer<float>(call.inverse_deviation)),
        rows(call.rows),
        columns(call.columns),
        epsilon(call.epsilon),
        weight_offset(call.weight_offset) {}
};

template <typename X, typename W>
struct BackwardTensors {
  const W* __restrict__ grad_normed;
  const X* __restrict__ grad_stream;
  const X* __restrict__ stream;
  const W* __restrict__ weight;
  const float* __restrict__ mean;
  const float* __restrict__ inverse_deviation;
  X* __restrict__ grad_x;
  float* __restrict__ partial_weight;
  float* __restrict__ partial_bias;
  std::int64_t rows;
  int columns;
  float weight_offset;

  explicit BackwardTensors(const NormBackward& call)
      : grad_normed(pointer<W>(call.grad_normed)),
        grad_stream(pointer<X>(call.grad_stream)),
        stream(pointer<X>(call.stream)),
        weight(pointer<W>(call.weight)),
        mean(pointer<float>(call.mean)),
        inverse_deviation(pointer<float>(call.inverse_deviation)),
        grad_x(pointer<X>(call.grad_x)),
        partial_weight(pointer<float>(call.partial)),
        partial_bias(call.grad_bias == 0 ? nullptr
                                         : pointer<float>(call.partial) +
                                               static_cast<std::int64_t>(call.partial_rows) * call.columns),
        rows(call.rows),
        columns(call.columns),
        weight_offset(call.weight_offset) {}
};

// From the sums of x - mean and of its square: corrects the mean of LayerNorm, returns 1 / deviation.
template <typename Tensors>
__device__ __forceinline__ float settle(const float (&powers)[2], const Tensors& t, float& mean) {
  const float square = powers[1] / t.columns;
  if (t.mean == nullptr) return rsqrtf(square + t.epsilon);
  const float rest = powers[0] / t.columns;
  mean += rest;
  return rsqrtf(square - rest * rest + t.epsilon);
}

// The mean of the first vector of a row of the stream, which all threads of the row load.
template <int kSize, typename X, typename W>
__device__ __forceinline__ float origin_of(const ForwardTensors<X, W>& t, std::int64_t row) {
  float sum = 0.0f, first[kSize];
  Packed<X, kSize>::load(t.x + row * t.columns).unpack(first);
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum += first[i];
  if (t.delta != nullptr) {
    Packed<W, kSize>::load(t.delta + row * t.columns).unpack(first);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += first[i];
  }
  return sum / kSize;
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
//
// The variance is that of the distances from `origin`, the mean of the row's first vector: one pass takes their sum and
// their squares'. Where the difference of the two cancels too much, since an element of the first vector is far from the
// others, a second pass takes the distances from the mean that the first one found.
template <typename X, typename W, int kSize, int kVectors, bool kCentred>
__global__ void __launch_bounds__(kMostThreads) forward_rows(ForwardTensors<X, W> t) {
  __shared__ float scratch[2][2 * kMostWarps];
  wait_for_former_kernel();
  constexpr float kMostCancelled = 4.0f;  // squared distance of mean and origin, in variances
  const int warps = blockDim.x / kWarp, vectors = t.columns / kSize;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= t.rows) return;  // a whole warp, or the whole block
  ForwardPart<X, W, kSize, kVectors> part;
  part.load(t, row, vectors);
  float origin = kCentred ? origin_of<kSize>(t, row) : 0.0f, mean = 0.0f, variance = 0.0f;
  part.add(t, row, vectors);
#pragma unroll 1
  for (int pass = 0; pass < (kCentred ? 2 : 1); ++pass) {
    float sums[kCentred ? 2 : 1] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v * blockDim.x + threadIdx.x < vectors) {
        float x[kSize];
        part.x[v].stay_packed();
        part.x[v].unpack(x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float distance = x[i] - origin;
          sums[0] += distance * distance;
          if constexpr (kCentred) sums[kCentred] += distance;
        }
      }
    }
    row_sum(sums, scratch[pass] + threadIdx.y * 2 * warps);
    variance = sums[0] / t.columns;
    if constexpr (kCentred) {
      const float distance = sums[kCentred] / t.columns, square = distance * distance;
      mean = origin + distance;
      variance = fmaxf(variance - square, 0.0f);
      if (!(square > kMostCancelled * variance)) break;  // all threads of the row have the same sums
      origin = mean;
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) part.x[v].stay_packed();
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
      if (t.weight_offset != 0.0f) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) weight[i] += t.weight_offset;
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = fmaf((x[i] - mean) * inverse, weight[i], bias[i]);
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
template <typename X, typename W, int kSize, int kVectors, int kStages, bool kCentred>
__global__ void __launch_bounds__(kMostThreads, 1) backward_rows(BackwardTensors<X, W> t) {
  __shared__ float scratch[2][2 * kMostWarps];
  char* memory = dynamic_shared<char>();
  wait_for_former_kernel();
  let_next_kernel_come();
  const int warps = blockDim.x / kWarp, vectors = t.columns / kSize;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.y, stride = step * t.columns;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, free = vectors - static_cast<int>(threadIdx.x);
  const Stages<X, W, kSize, kVectors> stages{t, memory + thread * kSlotBytes,
                                             static_cast<int>(blockDim.x * blockDim.y) * kSlotBytes,
                                             static_cast<int>(blockDim.x) * kSize,
                                             (free + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x)};
  float weight_sums[kVectors][kSize] = {}, bias_sums[kCentred ? kVectors : 1][kSize] = {};
  std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.y;  // of the block's rows, which go together
  std::int64_t at = (first + threadIdx.y) * t.columns + threadIdx.x * kSize;
  const auto statistics = [&](std::int64_t row, float& mean, float& inverse) {
    const bool is_row = row < t.rows;
    if constexpr (kCentred) mean = is_row ? t.mean[row] : 0.0f;
    inverse = is_row ? t.inverse_deviation[row] : 0.0f;
  };
  float mean = 0.0f, inverse, next_mean = 0.0f, next_inverse;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    stages.ask(stages.stage(stage), first + threadIdx.y + stage * step < t.rows, at + stage * stride);
  }
  statistics(first + threadIdx.y, next_mean, next_inverse);
  // In fp32 as long as there are registers for that.
  constexpr bool kWide = kVectors <= 2;
  Packed<W, kSize> weights[kVectors];
  float wide_weights[kWide ? kVectors : 1][kSize];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int vector = v * blockDim.x + threadIdx.x;
    weights[v] = vector < vectors ? Packed<W, kSize>::load(t.weight + vector * kSize) : Packed<W, kSize>::zeros();
    if constexpr (kWide) {
      weights[v].unpack(wide_weights[v]);
#pragma unroll
      for (int i = 0; i < kSize; ++i) wide_weights[v][i] += t.weight_offset;
    }
  }
  const auto read_weights = [&](int v, float (&weight)[kSize]) {
    if constexpr (!kWide) weights[v].unpack(weight);
#pragma unroll
    for (int i = 0; i < kSize; ++i) weight[i] = kWide ? wide_weights[kWide ? v : 0][i] : weight[i] + t.weight_offset;
  };
  for (int stage = 0, turn = 0; first < t.rows; first += step, at += stride, turn ^= 1) {
    const std::int64_t row = first + threadIdx.y;
    char* const here = stages.stage(stage);
    stage = stage + 1 < kStages ? stage + 1 : 0;
    mean = next_mean;
    inverse = next_inverse;
    statistics(row + step, next_mean, next_inverse);
    wait_for_copies<kStages - 1>();
    const auto read = [&](int v, float (&x)[kSize], float (&grad)[kSize]) {
      Packed<X, kSize>::load(reinterpret_cast<const X*>(here + v * stages.plane)).unpack(x);
      Packed<W, kSize>::load(reinterpret_cast<const W*>(here + (kVectors + v) * stages.plane)).unpack(grad);
    };
    float sums[kCentred ? 2 : 1] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (row < t.rows && v < stages.held) {
        float x[kSize], grad[kSize], weight[kSize];
        read(v, x, grad);
        read_weights(v, weight);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float normalised = (x[i] - mean) * inverse, scaled = grad[i] * weight[i];
          sums[0] += scaled * normalised;
          if constexpr (kCentred) {
            sums[kCentred] += scaled;
            bias_sums[v][i] += grad[i];
          }
          weight_sums[v][i] += grad[i] * normalised;
        }
      }
    }
    row_sum(sums, scratch[turn] + threadIdx.y * 2 * warps);
    // grad_x = inverse scaled + along (x - mean) + common + passed, with the factors of the row put together.
    const float along = -inverse * inverse * sums[0] / t.columns;
    const float common = kCentred ? -inverse * sums[kCentred] / t.columns : 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (row < t.rows && v < stages.held) {
        float x[kSize], grad[kSize], weight[kSize], passed[kSize] = {};
        read(v, x, grad);
        read_weights(v, weight);
        if (t.grad_stream != nullptr) {
          Packed<X, kSize>::load(reinterpret_cast<const X*>(here + (2 * kVectors + v) * stages.plane)).unpack(passed);
        }
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

// Threads that share a row when each holds `per_thread` vectors: whole warps.
int row_threads(int vectors, int per_thread) {
  return static_cast<int>(ceil_div(ceil_div(vectors, per_thread), kWarp)) * kWarp;
}

template <typename... Types>
bool all_aligned(Types... addresses) {
  return (is_aligned(addresses) && ...);
}

template <typename X, typename W, int kVectors>
void forward_with(const NormForward& call, const Place& place) {
  constexpr int kSize = vector_size<X>;
  constexpr int kUsualThreads = 128;
  const int threads = row_threads(call.columns / kSize, kVectors);
  const dim3 block(threads, threads == kWarp ? kUsualThreads / kWarp : 1);  // a row a warp, or a row a block
  const dim3 grid(static_cast<unsigned>(ceil_div(call.rows, block.y)));
  const ForwardTensors<X, W> tensors(call);
  if (call.mean != 0) {
    launch("the norm's forward", forward_rows<X, W, kSize, kVectors, true>, grid, block, 0, place, tensors);
  } else {
    launch("the norm's forward", forward_rows<X, W, kSize, kVectors, false>, grid, block, 0, place, tensors);
  }
}

template <typename X, typename W>
void forward_typed(const NormForward& call, const Place& place) {
  constexpr int kSize = vector_size<X>;
  const int vectors = call.columns / kSize;
  const bool fits = call.columns % kSize == 0 && vectors <= 8 * kMostThreads &&
                    all_aligned(call.x, call.delta, call.weight, call.bias, call.stream, call.normed);
  if (!fits) {
    const int threads = std::min(kGenericThreads, row_threads(call.columns, 1));
    launch("the norm's forward", forward_generic<X, W>, dim3(static_cast<unsigned>(call.rows)), dim3(threads), 0,
           place, ForwardTensors<X, W>(call));
  } else if (vectors <= kWarp) {
    forward_with<X, W, 1>(call, place);
  } else if (vectors <= kMostThreads) {
    forward_with<X, W, 2>(call, place);
  } else if (vectors <= 4 * kMostThreads) {
    forward_with<X, W, 4>(call, place);
  } else {
    forward_with<X, W, 8>(call, place);
  }
}

template <typename X, typename W, int kVectors, int kStages>
void backward_staged(const NormBackward& call, const dim3& block, std::size_t shared_bytes, const Place& place) {
  constexpr int kSize = vector_size<X>;
  const dim3 grid(call.partial_rows);
  const BackwardTensors<X, W> tensors(call);
  if (call.mean != 0) {
    launch("the norm's backward", backward_rows<X, W, kSize, kVectors, kStages, true>, grid, block, shared_bytes,
           place, tensors);
  } else {
    launch("the norm's backward", backward_rows<X, W, kSize, kVectors, kStages, false>, grid, block, shared_bytes,
           place, tensors);
  }
}

// As many stages as the shared memory of a block holds.
template <typename X, typename W, int kVectors>
void backward_with(const NormBackward& call, const Place& place) {
  constexpr int kSize = vector_size<X>;
  const int threads = row_threads(call.columns / kSize, kVectors);
  const dim3 block(threads, std::max(1, kMostThreads / threads));
  const std::size_t stage = static_cast<std::size_t>(kTensors) * kVectors * block.x * block.y * kSlotBytes;
  const std::size_t sums = block.y == 1 ? 0 : sizeof(float) * block.y * call.columns;
  const auto room = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device)) - 1024;
  const auto bytes = [&](int stages) { return std::max(stages * stage, sums); };
  constexpr int kMost = kVectors == 4 ? 2 : 3;
  if (bytes(kMost) <= room) {
    backward_staged<X, W, kVectors, kMost>(call, block, bytes(kMost), place);
  } else {
    backward_staged<X, W, kVectors, 1>(call, block, bytes(1), place);
  }
}

template <typename X, typename W>
void backward_typed(const NormBackward& call, const Place& place) {
  constexpr int kSize = vector_size<X>;
  const int vectors = call.columns / kSize;
  const bool fits = call.columns % kSize == 0 && vectors <= 4 * kMostThreads &&
                    all_aligned(call.grad_normed, call.grad_stream, call.stream, call.weight, call.grad_x);
  const BackwardTensors<X, W> tensors(call);
  if (!fits) {
    const int threads = std::min(kGenericThreads, row_threads(call.columns, 1));
    launch("the norm's backward", backward_generic<X, W>, dim3(call.partial_rows), dim3(threads),
           2 * sizeof(float) * call.columns, place, tensors);
  } else if (vectors <= kWarp) {
    backward_with<X, W, 1>(call, place);
  } else if (vectors <= 2 * kMostThreads) {
    backward_with<X, W, 2>(call, place);
  } else {
    backward_with<X, W, 4>(call, place);
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(call.columns, kWarp)), call.grad_bias == 0 ? 1 : 2);
  launch("the norm's backward", sum_partials<W>, grid, dim3(kWarp, kSumRows), 0, place,
         static_cast<const float*>(tensors.partial_weight), call.partial_rows, call.columns,
         pointer<W>(call.grad_weight), pointer<W>(call.grad_bias));
}

// Calls `function(Type<X>{}, Type<W>{})`.
template <typename Function>
void with_types(int x_type, int w_type, Function&& function) {
  with_type(w_type, [&](auto w) {
    if (x_type == w_type) {
      function(w, w);
    } else if (x_type == kFloat32) {
      function(Type<float>{}, w);
    } else {
      throw std::invalid_argument("the norm takes a residual stream of the weight's type or in fp32");
    }
  });
}

}  // namespace

int norm_partial_rows(std::int64_t rows, int device) {
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(rows, multiprocessors(device))));
}

void norm_forward(const NormForward& call, int x_type, int w_type, const Place& place) {
  if (call.rows == 0) return;
  const DeviceGuard guard(place.device);
  with_types(x_type, w_type, [&](auto x, auto w) {
    forward_typed<typename decltype(x)::type, typename decltype(w)::type>(call, place);
  });
}

void norm_backward(const NormBackward& call, int x_type, int w_type, const Place& place) {
  const DeviceGuard guard(place.device);
  with_types(x_type, w_type, [&](auto x, auto w) {
    backward_typed<typename decltype(x)::type, typename decltype(w)::type>(call, place);
  });
}

}  // namespace megatron
