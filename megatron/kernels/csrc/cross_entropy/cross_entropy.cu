// A block a row. Forward keeps, in each thread, the highest logit so far and the sum of the others' exponentials
// relative to it, so that the row is read once; the threads' pairs are then combined in a fixed order.
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

// The highest of some numbers, and the sum of exp(number - highest) of all others: the highest one's is 1, beside which
// the others of a token that is nearly certain would lose their digits. -inf and 0 of none.
template <bool kExact>
struct Running {
  float highest = -INFINITY, others = 0.0f;

  template <int kCount>
  __device__ __forceinline__ void take(const float (&values)[kCount]) {
    const float before = highest;
    float lower[kCount];  // the values but for the highest, in whose place stands the one before; a NaN stays
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      lower[i] = values[i] > highest ? highest : values[i];
      highest = fmaxf(highest, values[i]);
    }
    if (highest > before) others *= shifted_exponential<kExact>(before, highest);
    if (highest == -INFINITY) {  // nothing but -inf so far, whose share is zero; a NaN must not be lost
#pragma unroll
      for (int i = 0; i < kCount; ++i) others += isnan(lower[i]) ? lower[i] : 0.0f;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) others += shifted_exponential<kExact>(lower[i], highest);
  }

  // Of the two highest the lower is one of the others from here on.
  __device__ __forceinline__ void merge(const Running& more) {
    const float top = fmaxf(highest, more.highest), lower = fminf(highest, more.highest);
    others = top == -INFINITY ? others + more.others
                              : others * shifted_exponential<kExact>(highest, top) +
                                    more.others * shifted_exponential<kExact>(more.highest, top) +
                                    shifted_exponential<kExact>(lower, top);
    highest = top;
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Running own = *this;
      const Running other{__shfl_xor_sync(0xffffffffu, highest, step), __shfl_xor_sync(0xffffffffu, others, step)};
      const bool is_first = (threadIdx.x & step) == 0;
      // The same order in both lanes, so that all lanes agree in every bit.
      *this = is_first ? own : other;
      merge(is_first ? other : own);
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

// Of a row; every thread gets the result, or those of the first warp.
template <bool kForAll, typename T>
__device__ __forceinline__ Running<std::is_same_v<T, float>> over_row(const T* logits, int num_tokens) {
  constexpr int kSize = vector_size<T>;
  __shared__ float highest[kMostWarps], others[kMostWarps];
  const Cut parts = cut(logits, num_tokens);
  const int after = parts.head + parts.vectors * kSize;
  Running<std::is_same_v<T, float>> running;
  for (int c = threadIdx.x; c < parts.head; c += kThreads) running.take({to_float(logits[c])});
  for (int c = after + threadIdx.x; c < num_tokens; c += kThreads) running.take({to_float(logits[c])});
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
  if (lane == 0) highest[warp] = running.highest, others[warp] = running.others;
  __syncthreads();
  if (!kForAll && warp > 0) return running;
  running = {};
  if (lane < kThreads / kWarp) running = {highest[lane], others[lane]};
  running.merge_warp();
  return running;
}

// 0 where the label is not here.
template <typename T>
__device__ __forceinline__ float label_logit(const T* logits, std::int64_t label, int num_tokens) {
  return label >= 0 && label < num_tokens ? to_float(logits[label]) : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) statistics(CrossEntropy call) {
  wait_for_former_kernel();
  const std::int64_t row = blockIdx.x;
  const T* __restrict__ logits = reinterpret_cast<const T*>(call.logits) + row * call.row_stride;
  const auto running = over_row<false>(logits, call.num_tokens);
  if (threadIdx.x == 0) {
    const std::int64_t label = reinterpret_cast<const std::int64_t*>(call.label_columns)[row];
    float* out = reinterpret_cast<float*>(call.statistics);
    out[row] = running.highest;
    out[call.rows + row] = running.others;
    out[2 * call.rows + row] = label_logit(logits, label, call.num_tokens);
  }
}

// grad of a row = scale (exp(logit - log_sum) - [column is the label's]); a thread reads what it overwrites. The two
// parts of log_sum are taken off one after the other: their sum would be rounded to what large logits leave of its
// digits. So would the label's share be in its difference from 1.
template <typename T>
__device__ __forceinline__ void write_gradient(const CrossEntropy& call, std::int64_t row, float highest,
                                               float log_sum) {
  constexpr int kSize = vector_size<T>;
  constexpr bool kExact = std::is_same_v<T, float>;
  const T* logits = reinterpret_cast<const T*>(call.logits) + row * call.row_stride;
  T* grad = reinterpret_cast<T*>(call.grad) + row * call.grad_stride;
  const float scale = reinterpret_cast<const float*>(call.scale)[row];
  const std::int64_t label = reinterpret_cast<const std::int64_t*>(call.label_columns)[row];
  const auto value = [&](float logit) { return scale * shifted_exponential<kExact>(logit - highest, log_sum); };
  Cut parts = cut(logits, call.num_tokens);
  const Cut to = cut(grad, call.num_tokens);
  if (parts.head != to.head) parts = {call.num_tokens, 0};  // the two are aligned differently: element by element
  const int after = parts.head + parts.vectors * kSize;
  // The thread that comes past the label's column writes it once more.
  const std::int64_t step = label < parts.head ? label : label < after ? (label - parts.head) / kSize : label - after;
  const bool is_mine = label >= 0 && label < call.num_tokens && step % kThreads == threadIdx.x;
  const float of_label = is_mine ? scale * expm1f(to_float(logits[label]) - highest - log_sum) : 0.0f;
  for (int c = threadIdx.x; c < parts.head; c += kThreads) grad[c] = from_float<T>(value(to_float(logits[c])));
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
        float values[kSize];
        packed[n].unpack(values);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] = value(values[i]);
        Packed<T, kSize>::pack(values).store(grad + parts.head + vector * kSize);
      }
    }
  }
  for (int c = after + threadIdx.x; c < call.num_tokens; c += kThreads) {
    grad[c] = from_float<T>(value(to_float(logits[c])));
  }
  for (int c = call.num_tokens + threadIdx.x; c < call.columns; c += kThreads) grad[c] = from_float<T>(0.0f);
  if (is_mine) grad[label] = from_float<T>(of_label);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) gradient(CrossEntropy call) {
  wait_for_former_kernel();
  const std::int64_t row = blockIdx.x;
  const float* log_sum = reinterpret_cast<const float*>(call.log_sum);
  write_gradient<T>(call, row, log_sum[row], log_sum[call.rows + row]);
}

// Loss and gradient of rows that hold the whole vocabulary: what is read again is in the cache still.
template <typename T>
__global__ void __launch_bounds__(kThreads) loss_and_gradient(CrossEntropy call) {
  wait_for_former_kernel();
  const std::int64_t row = blockIdx.x;
  const T* logits = reinterpret_cast<const T*>(call.logits) + row * call.row_stride;
  const std::int64_t label = reinterpret_cast<const std::int64_t*>(call.label_columns)[row];
  const float of_label = label_logit(logits, label, call.num_tokens);  // before any thread can overwrite it
  const auto running = over_row<true>(logits, call.num_tokens);
  const float log_sum = log1pf(running.others);
  if (threadIdx.x == 0) reinterpret_cast<float*>(call.losses)[row] = log_sum + (running.highest - of_label);
  write_gradient<T>(call, row, running.highest, log_sum);
}

// To a type from another, times a number, kSize elements at a time but for the last ones.
template <typename From, typename To, int kSize>
__global__ void __launch_bounds__(kThreads) rescale(Rescaling call) {
  wait_for_former_kernel();
  const float factor = *reinterpret_cast<const float*>(call.factor);
  const From* from = reinterpret_cast<const From*>(call.from);
  To* to = reinterpret_cast<To*>(call.to);
  const std::int64_t vectors = call.count / kSize;
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * kAtOnce * kThreads + threadIdx.x;
  Packed<From, kSize> packed[kAtOnce];
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) {
    const std::int64_t vector = start + n * kThreads;
    if (vector < vectors) packed[n] = Packed<From, kSize>::load(from + vector * kSize);
  }
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) {
    const std::int64_t vector = start + n * kThreads;
    if (vector < vectors) {
      float values[kSize];
      packed[n].unpack(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] *= factor;
      Packed<To, kSize>::pack(values).store(to + vector * kSize);
    }
  }
  const std::int64_t last = vectors * kSize + threadIdx.x;
  if (blockIdx.x == 0 && last < call.count) to[last] = from_float<To>(factor * to_float(from[last]));
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

void cross_entropy_loss_and_gradient(const CrossEntropy& call, int type, const Place& place) {
  if (call.rows == 0) return;
  const DeviceGuard guard(place.device);
  with_type(type, [&](auto t) {
    launch("the cross entropy with its gradient", loss_and_gradient<typename decltype(t)::type>,
           dim3(static_cast<unsigned>(call.rows)), dim3(kThreads), 0, place, call);
  });
}

void rescale_gradient(const Rescaling& call, int from, int to, const Place& place) {
  if (call.count == 0) return;
  const DeviceGuard guard(place.device);
  const bool in_vectors = is_aligned(call.from) && is_aligned(call.to);
  with_type(from, [&](auto f) {
    with_type(to, [&](auto t) {
      using From = typename decltype(f)::type;
      using To = typename decltype(t)::type;
      constexpr int kSize = std::min(vector_size<From>, vector_size<To>);
      const std::int64_t of_block = kAtOnce * kThreads * (in_vectors ? kSize : 1);
      const dim3 grid(static_cast<unsigned>(ceil_div(call.count, of_block)));
      const auto kernel = in_vectors ? rescale<From, To, kSize> : rescale<From, To, 1>;
      launch("the gradient's scaling", kernel, grid, dim3(kThreads), 0, place, call);
    });
  });
}

}  // namespace megatron
