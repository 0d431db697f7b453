// A row is held in registers from its one read to its one write: by a warp when it is short, else by as many warps as it
// takes. Rows that are too long for that, or not aligned for vectors, are read twice. Of causal rows only the keys that
// the query sees are read.
#include "softmax.h"

#include <algorithm>

#include "row.cuh"

namespace megatron {
namespace {

constexpr int kMostThreads = 512;
constexpr int kShortThreads = 128;  // of a block whose warps have a row each
constexpr int kMostVectors = 4;     // of a thread, in registers

// kVectors vectors a thread hold the row. The mask, which many rows share, is read first; scores that it hides from a
// whole vector are not.
template <typename T, int kVectors, bool kMasked>
__global__ void __launch_bounds__(kMostThreads) forward(Softmax call) {
  constexpr int kSize = vector_size<T>;
  constexpr bool kExact = std::is_same_v<T, float>;
  using Bytes = Packed<std::uint8_t, kSize>;
  __shared__ float maxima[kMostWarps], totals[kMostWarps];
  wait_for_former_kernel();
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= call.rows) return;  // a whole warp, or the whole block
  const Row row = row_of(call, index);
  const T* __restrict__ scores = reinterpret_cast<const T*>(call.scores) + row.first;
  T* __restrict__ weights = reinterpret_cast<T*>(call.weights) + row.first;
  Packed<T, kSize> packed[kVectors];
  Bytes may[kMasked ? kVectors : 1];
  bool is_seen[kVectors];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int key = (n * blockDim.x + threadIdx.x) * kSize;
    is_seen[n] = key < row.visible;
    if constexpr (kMasked) may[n] = is_seen[n] ? Bytes::load(row.mask + key) : Bytes::zeros();
  }
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int key = (n * blockDim.x + threadIdx.x) * kSize;
    if constexpr (kMasked) is_seen[n] = !may[n].is_zero();
    packed[n] = is_seen[n] ? Packed<T, kSize>::load(scores + key) : Packed<T, kSize>::zeros();
  }
  const float factor = factor_of<kExact>(call);
  float values[kVectors][kSize], highest = -INFINITY;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int key = (n * blockDim.x + threadIdx.x) * kSize;
    if (is_seen[n]) {
      packed[n].unpack(values[n]);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[n][i] = scaled(factor, values[n][i]);
      if constexpr (kMasked) {
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(&may[n].raw);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[n][i] = bytes[i] != 0 ? values[n][i] : -INFINITY;
      }
      if (key + kSize > row.visible) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[n][i] = key + i < row.visible ? values[n][i] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) highest = fmaxf(highest, values[n][i]);
    }
  }
  highest = row_maximum(highest, maxima);
  if (highest == -INFINITY) highest = 0.0f;  // nothing to attend to: every share below is zero
  float total = 0.0f;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    if (is_seen[n]) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        values[n][i] = exponential<kExact>(values[n][i] - highest);
        total += values[n][i];
      }
    }
  }
  total = row_total(total, totals);
  const float share = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int key = (n * blockDim.x + threadIdx.x) * kSize;
    if (key < call.keys) {
      Packed<T, kSize> out = Packed<T, kSize>::zeros();
      if (is_seen[n]) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[n][i] *= share;
        out = Packed<T, kSize>::pack(values[n]);
      }
      out.store(weights + key);
    }
  }
}

// grad of scores = scale x weights x (grad of weights - sum of weights x grad of weights), which is the same where a
// number is taken off all gradients: here the one of the weight above a half, of which a row has one at most. Near 1
// the difference of its gradient and the sum would cancel, and leave the weight's rounding. Less itself its gradient is
// zero and has no part in the sum, the others' summands keep their digits, and 1 less the others is more exact than the
// weight, which is rounded.
struct Centred {
  static constexpr int kTotals = 4;  // three, and a zero for `row_sum`
  float centre = 0.0f, others = 0.0f, sum = 0.0f;  // the others' weights, and these times their gradients

  __device__ __forceinline__ void take(float weight, float grad) {
    const bool is_most = weight > 0.5f;
    centre = is_most ? grad : centre;
    weight = is_most ? 0.0f : weight;
    others += weight;
    sum += weight * grad;
  }

  // Over all threads of a row, of which one at most has a centre.
  __device__ __forceinline__ void finish(float* scratch) {
    float totals[kTotals] = {centre, others, sum};
    row_sum<kMostThreads / kWarp>(totals, scratch);
    centre = totals[0], others = totals[1], sum = totals[2] - totals[0] * totals[1];
  }

  __device__ __forceinline__ float gradient(float weight, float grad) const {
    return (weight > 0.5f ? 1.0f - others : weight) * (grad - centre - sum);
  }
};

template <typename T, int kVectors>
__global__ void __launch_bounds__(kMostThreads) backward(Softmax call) {
  constexpr int kSize = vector_size<T>;
  __shared__ float totals[Centred::kTotals * kMostWarps];
  wait_for_former_kernel();
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= call.rows) return;
  const Row row = row_of(call, index);
  const T* __restrict__ weights = reinterpret_cast<const T*>(call.weights) + row.first;
  const T* __restrict__ grad_weights = reinterpret_cast<const T*>(call.grad_weights) + row.first;
  T* __restrict__ grad_scores = reinterpret_cast<T*>(call.grad_scores) + row.first;
  Packed<T, kSize> packed[kVectors], grads[kVectors];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int key = (n * blockDim.x + threadIdx.x) * kSize;
    if (key < row.visible) {
      packed[n] = Packed<T, kSize>::load(weights + key);
      grads[n] = Packed<T, kSize>::load(grad_weights + key);
    } else {
      packed[n] = grads[n] = Packed<T, kSize>::zeros();
    }
  }
  // What stands in the weights where causality hides a key is read by nobody, whatever it is.
  const auto unpack = [&](int n, int key, float (&weight)[kSize], float (&grad)[kSize]) {
    packed[n].unpack(weight);
    grads[n].unpack(grad);
    if (key + kSize > row.visible) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (key + i >= row.visible) weight[i] = grad[i] = 0.0f;
      }
    }
  };
  Centred centred;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int key = (n * blockDim.x + threadIdx.x) * kSize;
    if (key < row.visible) {
      float weight[kSize], grad[kSize];
      unpack(n, key, weight, grad);
#pragma unroll
      for (int i = 0; i < kSize; ++i) centred.take(weight[i], grad[i]);
    }
  }
  centred.finish(totals);
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int key = (n * blockDim.x + threadIdx.x) * kSize;
    if (key < call.keys) {
      packed[n].stay_packed();
      grads[n].stay_packed();
      Packed<T, kSize> out = Packed<T, kSize>::zeros();
      if (key < row.visible) {
        float weight[kSize], grad[kSize];
        unpack(n, key, weight, grad);
#pragma unroll
        for (int i = 0; i < kSize; ++i) grad[i] = call.scale * centred.gradient(weight[i], grad[i]);
        out = Packed<T, kSize>::pack(grad);
      }
      out.store(grad_scores + key);
    }
  }
}

// The highest of some numbers and the sum of exp(number - highest).
template <bool kExact>
struct Running {
  float highest = -INFINITY, sum = 0.0f;

  __device__ __forceinline__ void take(float value) {
    if (value > highest) {
      sum *= exponential<kExact>(highest - value);
      highest = value;
    }
    if (value != -INFINITY) sum += exponential<kExact>(value - highest);  // a NaN is not lost
  }
};

// Rows of any length and alignment, kSize elements at a time; a block has one row.
template <typename T, int kSize>
__global__ void __launch_bounds__(kMostThreads) long_forward(Softmax call) {
  constexpr bool kExact = std::is_same_v<T, float>;
  __shared__ float maxima[kMostWarps], totals[kMostWarps];
  wait_for_former_kernel();
  const Row row = row_of(call, blockIdx.x);
  const T* scores = reinterpret_cast<const T*>(call.scores) + row.first;
  T* weights = reinterpret_cast<T*>(call.weights) + row.first;
  const float factor = factor_of<kExact>(call);
  const auto load = [&](int key, float (&values)[kSize]) {
    bool may[kSize];
    row.allows(key, may);
    Packed<T, kSize>::load(scores + key).unpack(values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = may[i] ? scaled(factor, values[i]) : -INFINITY;
  };
  Running<kExact> running;
  for (int key = threadIdx.x * kSize; key < row.visible; key += blockDim.x * kSize) {
    float values[kSize];
    load(key, values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) running.take(values[i]);
  }
  float highest = row_maximum(running.highest, maxima);
  if (highest == -INFINITY) highest = 0.0f;
  const float total = row_total(running.sum * exponential<kExact>(running.highest - highest), totals);
  const float share = total == 0.0f ? 0.0f : 1.0f / total;
  for (int key = threadIdx.x * kSize; key < call.keys; key += blockDim.x * kSize) {
    float values[kSize] = {};
    if (key < row.visible) {
      load(key, values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = share * exponential<kExact>(values[i] - highest);
    }
    Packed<T, kSize>::pack(values).store(weights + key);
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kMostThreads) long_backward(Softmax call) {
  __shared__ float totals[Centred::kTotals * kMostWarps];
  wait_for_former_kernel();
  const Row row = row_of(call, blockIdx.x);
  const T* weights = reinterpret_cast<const T*>(call.weights) + row.first;
  const T* grad_weights = reinterpret_cast<const T*>(call.grad_weights) + row.first;
  T* grad_scores = reinterpret_cast<T*>(call.grad_scores) + row.first;
  Centred centred;
  for (int key = threadIdx.x * kSize; key < row.visible; key += blockDim.x * kSize) {
    float weight[kSize], grad[kSize];
    Packed<T, kSize>::load(weights + key).unpack(weight);
    Packed<T, kSize>::load(grad_weights + key).unpack(grad);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (key + i < row.visible) centred.take(weight[i], grad[i]);
    }
  }
  centred.finish(totals);
  for (int key = threadIdx.x * kSize; key < call.keys; key += blockDim.x * kSize) {
    float weight[kSize] = {}, grad[kSize] = {};
    if (key < row.visible) {
      Packed<T, kSize>::load(weights + key).unpack(weight);
      Packed<T, kSize>::load(grad_weights + key).unpack(grad);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      grad[i] = key + i < row.visible ? call.scale * centred.gradient(weight[i], grad[i]) : 0.0f;
    }
    Packed<T, kSize>::pack(grad).store(grad_scores + key);
  }
}

int whole_warps(std::int64_t threads) { return static_cast<int>(ceil_div(threads, kWarp)) * kWarp; }

bool is_aligned_for_vectors(const Softmax& call, int size) {
  const bool has_mask_aligned = call.mask % size == 0 && call.mask_batch % size == 0 && call.mask_query % size == 0;
  return has_mask_aligned && call.keys % size == 0 && is_aligned(call.scores) && is_aligned(call.weights) &&
         is_aligned(call.grad_weights) && is_aligned(call.grad_scores);
}

// Calls `function(type, vectors, grid, block)` for rows that registers hold.
template <typename X, typename Function>
void with_registers(const Softmax& call, X type, Function&& function) {
  constexpr int kSize = vector_size<typename X::type>;
  const std::int64_t vectors = call.keys / kSize;
  const int threads = std::max(kWarp, whole_warps(ceil_div(vectors, kMostVectors)));
  const dim3 block(threads, threads == kWarp ? kShortThreads / kWarp : 1);
  const dim3 grid(static_cast<unsigned>(ceil_div(call.rows, block.y)));
  if (vectors <= kWarp) return function(type, std::integral_constant<int, 1>{}, grid, block);
  if (vectors <= 2 * kWarp) return function(type, std::integral_constant<int, 2>{}, grid, block);
  function(type, std::integral_constant<int, kMostVectors>{}, grid, block);
}

// Calls one of the two functions, of them the one whose kernel takes rows such as these.
template <typename InRegisters, typename Long>
void with_rows(const Softmax& call, int type, InRegisters&& in_registers, Long&& longer) {
  if (call.rows == 0 || call.keys == 0) return;
  with_type(type, [&](auto t) {
    constexpr int kSize = vector_size<typename decltype(t)::type>;
    const dim3 grid(static_cast<unsigned>(call.rows));
    if (!is_aligned_for_vectors(call, kSize)) {
      longer(t, std::integral_constant<int, 1>{}, grid, dim3(std::min(whole_warps(call.keys), kMostThreads)));
    } else if (call.keys <= kMostThreads * kMostVectors * kSize) {
      with_registers(call, t, in_registers);
    } else {
      longer(t, std::integral_constant<int, kSize>{}, grid, dim3(kMostThreads));
    }
  });
}

}  // namespace

void softmax_forward(const Softmax& call, int type, const Place& place) {
  const DeviceGuard guard(place.device);
  with_rows(
      call, type,
      [&](auto t, auto vectors, dim3 grid, dim3 block) {
        using T = typename decltype(t)::type;
        if (call.mask != 0) {
          launch("the softmax's forward", forward<T, vectors(), true>, grid, block, 0, place, call);
        } else {
          launch("the softmax's forward", forward<T, vectors(), false>, grid, block, 0, place, call);
        }
      },
      [&](auto t, auto size, dim3 grid, dim3 block) {
        launch("the softmax's forward", long_forward<typename decltype(t)::type, size()>, grid, block, 0, place, call);
      });
}

void softmax_backward(const Softmax& call, int type, const Place& place) {
  const DeviceGuard guard(place.device);
  with_rows(
      call, type,
      [&](auto t, auto vectors, dim3 grid, dim3 block) {
        launch("the softmax's backward", backward<typename decltype(t)::type, vectors()>, grid, block, 0, place, call);
      },
      [&](auto t, auto size, dim3 grid, dim3 block) {
        launch("the softmax's backward", long_backward<typename decltype(t)::type, size()>, grid, block, 0, place,
               call);
      });
}

}  // namespace megatron
