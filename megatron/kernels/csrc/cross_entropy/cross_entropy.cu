// A block a row. Forward keeps, in each thread, the highest logit so far and the sum of exponentials relative to it, so
// that the row is read once; the threads' pairs are then combined in a fixed order.
#include "cross_entropy.h"

#include <algorithm>

#include "../include/reduce.cuh"
#include "../include/vector.cuh"

namespace megatron {
namespace {

constexpr int kThreads = 512;
constexpr int kAtOnce = 4;  // vectors that a thread has on their way

// exp(x - shift), exactly one at the shift.
template <bool kExact>
__device__ __forceinline__ float shifted_exponential(float x, float shift) {
  constexpr float kLog2E = 1.4426950408889634f;
  return kExact ? expf(x - shift) : fast_exp2((x - shift) * kLog2E);
}

// The highest of some numbers and the sum of exp(number - highest); -inf and 0 of none.
template <bool kExact>
struct Running {
  float highest = -INFINITY, sum = 0.0f;

  template <int kCount>
  __device__ __forceinline__ void take(const float (&values)[kCount]) {
    float top = values[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, values[i]);
    if (top > highest) {
      sum *= shifted_exponential<kExact>(highest, top);
      highest = top;
    }
    if (highest == -INFINITY) {  // nothing but -inf so far, whose share is zero; a NaN must not be lost
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += isnan(values[i]) ? values[i] : 0.0f;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += shifted_exponential<kExact>(values[i], highest);
  }

  __device__ __forceinline__ void merge(float other_highest, float other_sum) {
    const float top = fmaxf(highest, other_highest);
    sum = top == -INFINITY ? sum + other_sum
                           : sum * shifted_exponential<kExact>(highest, top) +
                                 other_sum * shifted_exponential<kExact>(other_highest, top);
    highest = top;
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other_highest = __shfl_xor_sync(0xffffffffu, highest, step);
      const float other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
      // The same order in both lanes, so that all lanes agree in every bit.
      if ((threadIdx.x & step) == 0) {
        merge(other_highest, other_sum);
      } else {
        Running lower{other_highest, other_sum};
        lower.merge(highest, sum);
        *this = lower;
      }
    }
  }
};

// A row cut for vectors: elements before the first aligned one, whole vectors, the rest.
struct Cut {
  int head, vectors;
};

template <typename T>
__device__ __forceinline__ Cut cut(const T* row, int count) {
  constexpr int kSize = vector_size<T>;
  const int misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof(T) % kSize);
  const int head = min((kSize - misaligned) % kSize, count);
  return {head, (count - head) / kSize};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) statistics(CrossEntropy call) {
  constexpr int kSize = vector_size<T>;
  constexpr bool kExact = std::is_same_v<T, float>;
  __shared__ float highest[kMostWarps], sums[kMostWarps];
  wait_for_former_kernel();
  const std::int64_t row = blockIdx.x;
  const T* __restrict__ logits = reinterpret_cast<const T*>(call.logits) + row * call.row_stride;
  const Cut parts = cut(logits, call.num_tokens);
  const int after = parts.head + parts.vectors * kSize;
  Running<kExact> running;
  for (int c = threadIdx.x; c < parts.head; c += kThreads) running.take({to_float(logits[c])});
  for (int c = after + threadIdx.x; c < call.num_tokens; c += kThreads) running.take({to_float(logits[c])});
  int start = threadIdx.x;
  for (; start + (kAtOnce - 1) * kThreads < parts.vectors; start += kAtOnce * kThreads) {
    Packed<T, kSize> packed[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      packed[n] = Packed<T, kSize>::load(logits + parts.head + (start + n * kThreads) * kSize);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      float values[kSize];
      packed[n].unpack(values);
      running.take(values);
    }
  }
  for (; start < parts.vectors; start += kThreads) {
    float values[kSize];
    Packed<T, kSize>::load(logits + parts.head + start * kSize).unpack(values);
    running.take(values);
  }
  running.merge_warp();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) highest[warp] = running.highest, sums[warp] = running.sum;
  __syncthreads();
  if (warp > 0) return;
  running = {};
  if (lane < kThreads / kWarp) running = {highest[lane], sums[lane]};
  running.merge_warp();
  if (lane == 0) {
    const std::int64_t label = reinterpret_cast<const std::int64_t*>(call.label_columns)[row];
    float* out = reinterpret_cast<float*>(call.statistics);
    out[row] = running.highest;
    out[call.rows + row] = running.sum;
    out[2 * call.rows + row] = label >= 0 && label < call.num_tokens ? to_float(logits[label]) : 0.0f;
  }
}

// grad = scale (exp(logit - log_sum) - [column is the label's]); a thread reads what it overwrites. The two parts of
// log_sum are taken off one after the other: their sum would be rounded to what large logits leave of its digits.
template <typename T>
__global__ void __launch_bounds__(kThreads) gradient(CrossEntropy call) {
  wait_for_former_kernel();
  constexpr int kSize = vector_size<T>;
  constexpr bool kExact = std::is_same_v<T, float>;
  const std::int64_t row = blockIdx.x;
  const T* logits = reinterpret_cast<const T*>(call.logits) + row * call.row_stride;
  T* grad = reinterpret_cast<T*>(call.grad) + row * call.grad_stride;
  const float highest = reinterpret_cast<const float*>(call.log_sum)[row];
  const float log_sum = reinterpret_cast<const float*>(call.log_sum)[call.rows + row];
  const float scale = reinterpret_cast<const float*>(call.scale)[row];
  const std::int64_t label = reinterpret_cast<const std::int64_t*>(call.label_columns)[row];
  const auto value = [&](float logit, int column) {
    const float share = shifted_exponential<kExact>(logit - highest, log_sum);
    return scale * (column == label ? share - 1.0f : share);
  };
  Cut parts = cut(logits, call.num_tokens);
  const Cut to = cut(grad, call.num_tokens);
  if (parts.head != to.head) parts = {call.num_tokens, 0};  // the two are aligned differently: element by element
  const int after = parts.head + parts.vectors * kSize;
  for (int c = threadIdx.x; c < parts.head; c += kThreads) grad[c] = from_float<T>(value(to_float(logits[c]), c));
  for (int start = threadIdx.x; start < parts.vectors; start += kAtOnce * kThreads) {
    Packed<T, kSize> packed[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int vector = start + n * kThreads;
      if (vector < parts.vectors) packed[n] = Packed<T, kSize>::load(logits + parts.head + vector * kSize);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int vector = start + n * kThreads;
      if (vector < parts.vectors) {
        const int column = parts.head + vector * kSize;
        float values[kSize];
        packed[n].unpack(values);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] = value(values[i], column + i);
        Packed<T, kSize>::pack(values).store(grad + column);
      }
    }
  }
  for (int c = after + threadIdx.x; c < call.num_tokens; c += kThreads) {
    grad[c] = from_float<T>(value(to_float(logits[c]), c));
  }
  for (int c = call.num_tokens + threadIdx.x; c < call.columns; c += kThreads) grad[c] = from_float<T>(0.0f);
}

}  // namespace

void cross_entropy_statistics(const CrossEntropy& call, int type, const Place& place) {
  if (call.rows == 0) return;
  const DeviceGuard guard(place.device);
  with_type(type, [&](auto t) {
    launch("the cross entropy's forward", statistics<typename decltype(t)::type>,
           dim3(static_cast<unsigned>(call.rows)), dim3(kThreads), 0, place, call);
  });
}

void cross_entropy_gradient(const CrossEntropy& call, int type, const Place& place) {
  if (call.rows == 0) return;
  const DeviceGuard guard(place.device);
  with_type(type, [&](auto t) {
    launch("the cross entropy's backward", gradient<typename decltype(t)::type>,
           dim3(static_cast<unsigned>(call.rows)), dim3(kThreads), 0, place, call);
  });
}

}  // namespace megatron
