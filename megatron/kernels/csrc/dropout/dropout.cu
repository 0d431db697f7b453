// Laid out as the activations are: a warp takes neighbouring vectors of columns and walks down the rows of a chunk.
// Eight elements share the 128 random bits of one counter, 16 each; the counter is the index of the eight, so that the
// mask depends on the key and the element alone.
#include "dropout.h"

#include <algorithm>
#include <cmath>

#include "../include/reduce.cuh"
#include "../include/vector.cuh"
#include "philox.cuh"

namespace megatron {
namespace {

constexpr int kWarps = 8;
constexpr int kBlocksEach = 4;
constexpr int kSteps = 1 << 16;  // values of an element's 16 bits
constexpr int kDraws = 8;        // elements of one counter

// An element is dropped when its bits, as the upper half of a word, are below `threshold`; the others grow by exactly
// what is lost on average.
struct Drop {
  std::uint32_t threshold;
  float growth;
};

Drop drop_of(float probability) {
  const int threshold = std::clamp(static_cast<int>(std::lround(probability * kSteps)), 0, kSteps - 1);
  return {static_cast<std::uint32_t>(threshold) << 16, static_cast<float>(kSteps) / static_cast<float>(kSteps - threshold)};
}

// Which of kSize elements from `first`, which kSize divides, are kept.
template <int kSize>
__device__ __forceinline__ void draw(std::uint64_t key, std::uint64_t first, std::uint32_t threshold,
                                     bool (&is_kept)[kSize]) {
  const FourWords words = philox(key, first / kDraws);
  const int offset = static_cast<int>(first % kDraws);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    std::uint32_t word;
    if constexpr (kSize == kDraws) {
      word = words.word[i / 2];
    } else {
      const int at = (offset + i) / 2;
      word = at == 0 ? words.word[0] : at == 1 ? words.word[1] : at == 2 ? words.word[2] : words.word[3];
    }
    // The element's 16 bits are brought to the upper half of a word, where the threshold is.
    is_kept[i] = ((offset + i) % 2 == 0 ? word << 16 : word) >= threshold;
  }
}

struct Rows {
  std::int64_t begin, end;
};

__device__ __forceinline__ Rows rows_of_chunk(const Dropout& call) {
  return {call.rows * blockIdx.y / call.chunks, call.rows * (blockIdx.y + 1) / call.chunks};
}

template <typename X, typename R, int kSize>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocksEach) forward(Dropout call, Drop drop) {
  constexpr int kAtOnce = 2;
  const X* __restrict__ x = reinterpret_cast<const X*>(call.x);
  const R* __restrict__ residual = reinterpret_cast<const R*>(call.residual);
  R* __restrict__ out = reinterpret_cast<R*>(call.out);
  const std::uint64_t key = *reinterpret_cast<const std::uint64_t*>(call.key);
  const int column = (blockIdx.x * kWarp + threadIdx.x) * kSize;
  if (column >= call.columns) return;
  float bias[kSize] = {};
  if (call.bias != 0) Packed<X, kSize>::load(reinterpret_cast<const X*>(call.bias) + column).unpack(bias);
  const Rows rows = rows_of_chunk(call);
  for (std::int64_t start = rows.begin + threadIdx.y; start < rows.end; start += kAtOnce * kWarps) {
    Packed<X, kSize> parts[kAtOnce];
    Packed<R, kSize> kept[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const std::int64_t row = start + n * kWarps, at = row * call.columns + column;
      if (row < rows.end) {
        parts[n] = Packed<X, kSize>::load(x + at);
        kept[n] = residual == nullptr ? Packed<R, kSize>::zeros() : Packed<R, kSize>::load(residual + at);
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const std::int64_t row = start + n * kWarps, at = row * call.columns + column;
      if (row < rows.end) {
        float value[kSize], sum[kSize];
        bool is_kept[kSize];
        parts[n].unpack(value);
        kept[n].unpack(sum);
        draw(key, static_cast<std::uint64_t>(at), drop.threshold, is_kept);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          if (is_kept[i]) sum[i] = fmaf(drop.growth, value[i] + bias[i], sum[i]);
        }
        Packed<R, kSize>::pack(sum).store(out + at);
      }
    }
  }
}

template <typename X, typename R, int kSize>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocksEach) backward(Dropout call, Drop drop) {
  constexpr int kAtOnce = 4;
  __shared__ float shared[kWarps][kWarp * kSize];
  const R* __restrict__ grad_out = reinterpret_cast<const R*>(call.grad_out);
  X* __restrict__ grad_x = reinterpret_cast<X*>(call.grad_x);
  const std::uint64_t key = *reinterpret_cast<const std::uint64_t*>(call.key);
  const int column = (blockIdx.x * kWarp + threadIdx.x) * kSize;
  const bool is_here = column < call.columns;
  float sums[kSize] = {};
  const Rows rows = rows_of_chunk(call);
  for (std::int64_t start = rows.begin + threadIdx.y; is_here && start < rows.end; start += kAtOnce * kWarps) {
    Packed<R, kSize> grads[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const std::int64_t row = start + n * kWarps;
      if (row < rows.end) grads[n] = Packed<R, kSize>::load(grad_out + row * call.columns + column);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const std::int64_t row = start + n * kWarps, at = row * call.columns + column;
      if (row < rows.end) {
        float grad[kSize];
        bool is_kept[kSize];
        grads[n].unpack(grad);
        draw(key, static_cast<std::uint64_t>(at), drop.threshold, is_kept);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          grad[i] = is_kept[i] ? drop.growth * grad[i] : 0.0f;
          sums[i] += grad[i];
        }
        Packed<X, kSize>::pack(grad).store(grad_x + at);
      }
    }
  }
  if (call.partial == 0) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) shared[threadIdx.y][i * kWarp + threadIdx.x] = sums[i];
  __syncthreads();
  float* partial = reinterpret_cast<float*>(call.partial) + static_cast<std::int64_t>(blockIdx.y) * call.columns;
  for (int at = threadIdx.y * kWarp + threadIdx.x; at < kWarp * kSize; at += kWarp * kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int y = 0; y < kWarps; ++y) sum += shared[y][at];
    const int to = (blockIdx.x * kWarp + at % kWarp) * kSize + at / kWarp;
    if (to < call.columns) partial[to] = sum;
  }
}

template <typename T>
__global__ void sum_chunks(const float* partial, int chunks, int columns, T* grad_bias) {
  __shared__ float shared[kWarp * kWarp];
  const int column = blockIdx.x * kWarp + threadIdx.x;
  wait_for_former_kernel();
  const float sum = column_sum(partial, chunks, columns, column, shared);
  if (threadIdx.y == 0 && column < columns) grad_bias[column] = from_float<T>(sum);
}

// Calls `function(Type<X>{}, Type<R>{}, size)`: the residual is of x's type or in fp32.
template <typename Function>
void with_types(const Dropout& call, int x_type, int residual_type, Function&& function) {
  if (residual_type != x_type && residual_type != kFloat32) {
    throw std::invalid_argument("dropout takes a residual stream of the type of what is added to it or in fp32");
  }
  with_type(x_type, [&](auto x) {
    const auto with_residual = [&](auto r) {
      constexpr int kSize = vector_size<typename decltype(r)::type>;
      const bool vectors = call.columns % kSize == 0 && is_aligned(call.x) && is_aligned(call.bias) &&
                           is_aligned(call.residual) && is_aligned(call.out) && is_aligned(call.grad_out) &&
                           is_aligned(call.grad_x);
      if (vectors) {
        function(x, r, std::integral_constant<int, kSize>{});
      } else {
        function(x, r, std::integral_constant<int, 1>{});
      }
    };
    residual_type == x_type ? with_residual(x) : with_residual(Type<float>{});
  });
}

dim3 grid_of(const Dropout& call, int size) {
  return dim3(static_cast<unsigned>(ceil_div(call.columns, kWarp * size)), call.chunks);
}

}  // namespace

int dropout_chunks(std::int64_t rows, int columns, int x_type, int device) {
  int chunks = 1;
  with_type(x_type, [&](auto x) {
    const std::int64_t across = ceil_div(columns, kWarp * vector_size<typename decltype(x)::type>);
    const std::int64_t wanted = std::max<std::int64_t>(1, kBlocksEach * multiprocessors(device) / across);
    chunks = static_cast<int>(std::clamp<std::int64_t>(ceil_div(rows, kWarps), 1, wanted));
  });
  return chunks;
}

void dropout_forward(const Dropout& call, int x_type, int residual_type, const Place& place) {
  if (call.rows == 0) return;
  const DeviceGuard guard(place.device);
  with_types(call, x_type, residual_type, [&](auto x, auto r, auto size) {
    launch("the dropout's forward", forward<typename decltype(x)::type, typename decltype(r)::type, size()>,
           grid_of(call, size()), dim3(kWarp, kWarps), 0, place, call, drop_of(call.probability));
  });
}

void dropout_backward(const Dropout& call, int x_type, int residual_type, const Place& place) {
  const DeviceGuard guard(place.device);
  with_types(call, x_type, residual_type, [&](auto x, auto r, auto size) {
    using X = typename decltype(x)::type;
    launch("the dropout's backward", backward<X, typename decltype(r)::type, size()>, grid_of(call, size()),
           dim3(kWarp, kWarps), 0, place, call, drop_of(call.probability));
    if (call.grad_bias == 0) return;
    launch_early("the dropout's backward", sum_chunks<X>, dim3(static_cast<unsigned>(ceil_div(call.columns, kWarp))),
                 dim3(kWarp, kWarp), place, reinterpret_cast<const float*>(call.partial), call.chunks, call.columns,
                 reinterpret_cast<X*>(call.grad_bias));
  });
}

}  // namespace megatron
