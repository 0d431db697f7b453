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
    row_sum<false>(sum, scratch[0] + threadIdx.y * warps);
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
  row_sum<false>(powers, scratch[1] + threadIdx.y * 2 * warps);
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
    row_sum<false>(sum, scratch[0]);
    mean = sum[0] / t.columns;
  }
  float powers[2] = {0.0f, 0.0f};
  for (int c = threadIdx.x; c < t.columns; c += blockDim.x) {
    const float centred = to_float(x[c]) - mean;
    powers[0] += centred;
    powers[1] += centred * centred;
  }
  row_sum<false>(powers, scratch[1]);
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

// What one thread holds of one row, packed.
template <typename X, typename W, int kSize, int kVectors>
struct RowPart {
  Packed<X, kSize> stream[kVectors];
  Packed<W, kSize> grad[kVectors];
  float mean, inverse;

  __device__ __forceinline__ void load(const BackwardTensors<X, W>& t, std::int64_t row, int vectors) {
    if (row >= t.rows) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * blockDim.x + threadIdx.x;
      if (vector < vectors) {
        stream[v] = Packed<X, kSize>::load(t.stream + row * t.columns + vector * kSize);
        grad[v] = Packed<W, kSize>::load(t.grad_normed + row * t.columns + vector * kSize);
      }
    }
    mean = t.mean == nullptr ? 0.0f : t.mean[row];
    inverse = t.inverse_deviation[row];
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
template <typename X, typename W, int kSize, int kVectors, bool kCentred>
__global__ void __launch_bounds__(kMostThreads, 1) backward_rows(BackwardTensors<X, W> t) {
  __shared__ float scratch[2][2 * kMostWarps];
  alignas(16) __shared__ float shared[kMostThreads * kSize * (kVectors > 2 ? 1 : kVectors)];
  wait_for_former_kernel();
  let_next_kernel_come();
  const int warps = blockDim.x / kWarp, vectors = t.columns / kSize;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  float weight_sums[kVectors][kSize] = {}, bias_sums[kCentred ? kVectors : 1][kSize] = {};
  constexpr bool kHasRegisters = kVectors <= 2;  // for the weight, and for the next row while this one is summed
  Packed<W, kSize> weights[kVectors];
  const auto load_weights = [&] {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * blockDim.x + threadIdx.x;
      if (vector < vectors) weights[v] = Packed<W, kSize>::load(t.weight + vector * kSize);
    }
  };

  RowPart<X, W, kSize, kVectors> part, next;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if constexpr (kHasRegisters) {
    load_weights();
    next.load(t, row, vectors);
  }
  for (int turn = 0; row < t.rows; row += step, turn ^= 1) {
    if constexpr (kHasRegisters) {
      part = next;
      next.load(t, row + step, vectors);
    } else {
      part.load(t, row, vectors);
      load_weights();
    }
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v * blockDim.x + threadIdx.x < vectors) {
        float x[kSize], grad[kSize], weight[kSize];
        part.stream[v].unpack(x);
        part.grad[v].unpack(grad);
        weights[v].unpack(weight);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float normalised = (x[i] - part.mean) * part.inverse, scaled = grad[i] * (weight[i] + t.weight_offset);
          sums[0] += scaled * normalised;
          if constexpr (kCentred) {
            sums[1] += scaled;
            bias_sums[v][i] += grad[i];
          }
          weight_sums[v][i] += grad[i] * normalised;
        }
      }
    }
    Packed<X, kSize> passing[kVectors];
    const auto load_passing = [&](int v) {
      const int vector = v * blockDim.x + threadIdx.x;
      if (vector < vectors) passing[v] = Packed<X, kSize>::load(t.grad_stream + row * t.columns + vector * kSize);
    };
    if (kHasRegisters && t.grad_stream != nullptr) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) load_passing(v);
    }
    row_sum<true>(sums, scratch[turn] + threadIdx.y * 2 * warps);
    const float along = sums[0] / t.columns, common = kCentred ? sums[1] / t.columns : 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * blockDim.x + threadIdx.x;
      if (vector < vectors) {
        float x[kSize], grad[kSize], weight[kSize], passed[kSize] = {};
        part.stream[v].unpack(x);
        part.grad[v].unpack(grad);
        if constexpr (kHasRegisters) {
          weights[v].unpack(weight);
        } else {
          Packed<W, kSize>::load(t.weight + vector * kSize).unpack(weight);
          if (t.grad_stream != nullptr) load_passing(v);
        }
        if (t.grad_stream != nullptr) passing[v].unpack(passed);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float normalised = (x[i] - part.mean) * part.inverse, scaled = grad[i] * (weight[i] + t.weight_offset);
          passed[i] += part.inverse * (scaled - common - normalised * along);
        }
        Packed<X, kSize>::pack(passed).store(t.grad_x + row * t.columns + vector * kSize);
      }
    }
  }
  __syncthreads();
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
    row_sum<false>(sums, scratch[turn]);
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
  } else if (vectors <= kMostThreads && (call.mean == 0 || call.delta != 0)) {
    forward_with<X, W, 2>(call, place);  // LayerNorm alone is faster with fewer warps to sum over
  } else if (vectors <= 4 * kMostThreads) {
    forward_with<X, W, 4>(call, place);
  } else {
    forward_with<X, W, 8>(call, place);
  }
}

template <typename X, typename W, int kVectors>
void backward_with(const NormBackward& call, const Place& place) {
  constexpr int kSize = vector_size<X>;
  const int threads = row_threads(call.columns / kSize, kVectors);
  const dim3 block(threads, std::max(1, kMostThreads / threads));
  const dim3 grid(call.partial_rows);
  const BackwardTensors<X, W> tensors(call);
  if (call.mean != 0) {
    launch("the norm's backward", backward_rows<X, W, kSize, kVectors, true>, grid, block, 0, place, tensors);
  } else {
    launch("the norm's backward", backward_rows<X, W, kSize, kVectors, false>, grid, block, 0, place, tensors);
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
