// Laid out as the activations are: a warp takes neighbouring vectors of columns and walks down the rows of a chunk.
// Eight elements share the 128 random bits of one counter, 16 each; the counter is the index of the eight, so that the
// mask depends on the key and the element alone. `megatron/kernels/philox.py` draws the same.
#include "dropout.h"

#include <algorithm>

#include "../include/partial_rows.cuh"
#include "../include/reduce.cuh"
#include "../include/vector.cuh"
#include "philox.cuh"

namespace megatron {
namespace {

constexpr int kAcross = 32;  // threads of a block beside each other
constexpr int kDown = 8;     // and below
constexpr int kForwardBlocks = 4;   // on a multiprocessor
constexpr int kBackwardBlocks = 3;  // with registers for rows that are on their way
constexpr int kSteps = 1 << 16;  // values of an element's 16 bits
constexpr int kDraws = 8;        // elements of one counter

// An element is dropped when its bits are below `threshold`; the others grow by exactly what is lost on average.
struct Drop {
  std::uint32_t threshold;  // in the upper half of a word
  float growth;
};

Drop drop_of(const Dropout& call) {
  return {static_cast<std::uint32_t>(call.threshold) << 16,
          static_cast<float>(kSteps) / static_cast<float>(kSteps - call.threshold)};
}

// factor x value + sum, rounded twice, as plain torch does it: the results are then equal in every bit.
__device__ __forceinline__ float scaled_sum(float factor, float value, float sum) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(factor, value), sum);
#else
  return factor * value + sum;
#endif
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
    // The element's 16 bits go to the upper half of a word. What is below them there changes no comparison.
    is_kept[i] = ((kSize == kDraws ? i : offset + i) % 2 == 0 ? word << 16 : word) >= threshold;
  }
}

struct Rows {
  std::int64_t begin, end;
};

__device__ __forceinline__ Rows rows_of_chunk(const Dropout& call) {
  return {call.rows * blockIdx.y / call.chunks, call.rows * (blockIdx.y + 1) / call.chunks};
}

template <typename X, typename R, int kSize>
__global__ void __launch_bounds__(kAcross* kDown, kForwardBlocks) forward(Dropout call, Drop drop) {
  constexpr int kAtOnce = 2;
  wait_for_former_kernel();
  const X* __restrict__ x = reinterpret_cast<const X*>(call.x);
  const R* __restrict__ residual = reinterpret_cast<const R*>(call.residual);
  R* __restrict__ out = reinterpret_cast<R*>(call.out);
  const std::uint64_t key = *reinterpret_cast<const std::uint64_t*>(call.key);
  const int column = (blockIdx.x * kAcross + threadIdx.x) * kSize;
  if (column >= call.columns) return;
  float bias[kSize] = {};
  if (call.bias != 0) Packed<X, kSize>::load(reinterpret_cast<const X*>(call.bias) + column).unpack(bias);
  const Rows rows = rows_of_chunk(call);
  int left = static_cast<int>(rows.end - rows.begin) - threadIdx.y;  // rows from this thread's next one on
  const std::int64_t below = static_cast<std::int64_t>(kDown) * call.columns;
  std::int64_t at = (rows.begin + threadIdx.y) * call.columns + column;
  std::uint64_t place = static_cast<std::uint64_t>(call.first + at);
  for (; left > 0; left -= kAtOnce * kDown, at += kAtOnce * below, place += kAtOnce * below) {
    Packed<X, kSize> parts[kAtOnce];
    Packed<R, kSize> kept[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (n * kDown < left) {
        parts[n] = Packed<X, kSize>::load(x + at + n * below);
        kept[n] = residual == nullptr ? Packed<R, kSize>::zeros() : Packed<R, kSize>::load(residual + at + n * below);
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (n * kDown < left) {
        float value[kSize], sum[kSize];
        bool is_kept[kSize];
        draw(key, place + n * below, drop.threshold, is_kept);
        parts[n].unpack(value);
        kept[n].unpack(sum);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          // A dropped infinity is zero, not NaN.
          sum[i] = is_kept[i] ? scaled_sum(drop.growth, value[i] + bias[i], sum[i]) : sum[i];
        }
        Packed<R, kSize>::pack(sum).store(out + at + n * below);
      }
    }
  }
}

// A thread's part of its next rows of one tensor.
template <typename T, int kSize, int kRows>
struct RowParts {
  Packed<T, kSize> of[kRows];

  // Loads from element `at` on as many as there are, every kDown-th of the `left` rows.
  __device__ __forceinline__ void load(const T* __restrict__ from, std::int64_t at, std::int64_t below, int left) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      if (n * kDown < left) of[n] = Packed<T, kSize>::load(from + at + n * below);
    }
  }
};

template <typename X, typename R, int kSize>
__global__ void __launch_bounds__(kAcross* kDown, kBackwardBlocks) backward(Dropout call, Drop drop) {
  constexpr int kAtOnce = 2;
  __shared__ float shared[kDown][kAcross * kSize];
  wait_for_former_kernel();
  let_next_kernel_come();
  const R* __restrict__ grad_out = reinterpret_cast<const R*>(call.grad_out);
  X* __restrict__ grad_x = reinterpret_cast<X*>(call.grad_x);
  const int column = (blockIdx.x * kAcross + threadIdx.x) * kSize;
  const Rows rows = rows_of_chunk(call);
  int left = column < call.columns ? static_cast<int>(rows.end - rows.begin) - threadIdx.y : 0;
  const std::int64_t below = static_cast<std::int64_t>(kDown) * call.columns;
  std::int64_t at = (rows.begin + threadIdx.y) * call.columns + column;
  RowParts<R, kSize, kAtOnce> grads, next;
  next.load(grad_out, at, below, left);
  const std::uint64_t key = *reinterpret_cast<const std::uint64_t*>(call.key);
  std::uint64_t place = static_cast<std::uint64_t>(call.first + at);
  float sums[kSize] = {};
  for (; left > 0; left -= kAtOnce * kDown, at += kAtOnce * below, place += kAtOnce * below) {
    grads = next;
    next.load(grad_out, at + kAtOnce * below, below, left - kAtOnce * kDown);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (n * kDown < left) {
        float grad[kSize];
        bool is_kept[kSize];
        draw(key, place + n * below, drop.threshold, is_kept);
        grads.of[n].unpack(grad);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          grad[i] = is_kept[i] ? drop.growth * grad[i] : 0.0f;
          sums[i] += grad[i];
        }
        Packed<X, kSize>::pack(grad).store(grad_x + at + n * below);
      }
    }
  }
  if (call.partial == 0) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) shared[threadIdx.y][i * kAcross + threadIdx.x] = sums[i];
  __syncthreads();
  float* partial = reinterpret_cast<float*>(call.partial) + static_cast<std::int64_t>(blockIdx.y) * call.columns;
  for (int at = threadIdx.y * kAcross + threadIdx.x; at < kAcross * kSize; at += kAcross * kDown) {
    float sum = 0.0f;
#pragma unroll
    for (int y = 0; y < kDown; ++y) sum += shared[y][at];
    const int to = (blockIdx.x * kAcross + at % kAcross) * kSize + at / kAcross;
    if (to < call.columns) partial[to] = sum;
  }
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
      const bool vectors = call.columns % kSize == 0 && call.first % kSize == 0 && is_aligned(call.x) && is_aligned(call.bias) &&
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
  return dim3(static_cast<unsigned>(ceil_div(call.columns, kAcross * size)), call.chunks);
}

}  // namespace

int dropout_chunks(std::int64_t rows, int columns, int x_type, bool backward, int device) {
  int chunks = 1;
  const int blocks = (backward ? kBackwardBlocks : kForwardBlocks) * multiprocessors(device);
  with_type(x_type, [&](auto x) {
    const std::int64_t across = ceil_div(columns, kAcross * vector_size<typename decltype(x)::type>);
    const std::int64_t wanted = std::max<std::int64_t>(1, blocks / across);
    chunks = static_cast<int>(std::clamp<std::int64_t>(ceil_div(rows, kDown), 1, wanted));
  });
  return chunks;
}

void dropout_forward(const Dropout& call, int x_type, int residual_type, const Place& place) {
  if (call.rows == 0) return;
  const DeviceGuard guard(place.device);
  with_types(call, x_type, residual_type, [&](auto x, auto r, auto size) {
    launch("the dropout's forward", forward<typename decltype(x)::type, typename decltype(r)::type, size()>,
           grid_of(call, size()), dim3(kAcross, kDown), 0, place, call, drop_of(call));
  });
}

void dropout_backward(const Dropout& call, int x_type, int residual_type, const Place& place) {
  const DeviceGuard guard(place.device);
  with_types(call, x_type, residual_type, [&](auto x, auto r, auto size) {
    using X = typename decltype(x)::type;
    launch("the dropout's backward", backward<X, typename decltype(r)::type, size()>, grid_of(call, size()),
           dim3(kAcross, kDown), 0, place, call, drop_of(call));
    if (call.grad_bias == 0) return;
    sum_partial_rows<Dropout, X>("the dropout's backward", call.partial, call.chunks, call.columns, call.grad_bias, 0,
                                 place);
  });
}

}  // namespace megatron
