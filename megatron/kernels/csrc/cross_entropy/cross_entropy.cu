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
constexpr int kReadAtOnce = 3;  // where nothing is written: with a fourth the registers of four blocks do not suffice

// exp(x - shift), exactly one at the shift.
template <bool kExact>
__device__ __forceinline__ float shifted_exponential(float x, float shift) {
  constexpr float kLog2E = 1.4426950408889634f;
  return kExact ? expf(x - shift) : fast_exp2((x - shift) * kLog2E);
}

// The highest of some numbers, and the sum of exp(number - highest) of all others: the highest one's is 1, beside which
// the others of a token that is nearly certain would lose their digits. -inf and 0 of none.
template <bool kExact>
struct Share {
  float highest = -INFINITY, others = 0.0f;

  // Of the highest where it was lower: zero of -inf, also where all are.
  __device__ __forceinline__ float exponential(float lower) const {
    return shifted_exponential<kExact>(lower, highest == -INFINITY ? 0.0f : highest);
  }

  // Of the two highest the lower is one of the others from here on. Which of the two is given makes no difference in
  // any bit, so that all lanes of a warp agree.
  __device__ __forceinline__ void merge(const Share& more) {
    const bool is_higher = highest > more.highest;
    const float lower = is_higher ? more.highest : highest, of_lower = is_higher ? more.others : others;
    if (!is_higher) highest = more.highest, others = more.others;
    const float scale = exponential(lower);
    others = fmaf(scale, of_lower, others) + scale;
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      merge({__shfl_xor_sync(0xffffffffu, highest, step), __shfl_xor_sync(0xffffffffu, others, step)});
    }
  }
};

// What fills a register. The halves of a pair are compared in one instruction.
template <typename T>
constexpr int word_size = 4 / static_cast<int>(sizeof(T));
template <typename T>
using Word = Packed<T, word_size<T>>;

template <typename T>
__device__ __forceinline__ Word<T> word_of(float number) {
  float places[word_size<T>] = {number};
#pragma unroll
  for (int i = 1; i < word_size<T>; ++i) places[i] = -INFINITY;
  return Word<T>::pack(places);
}

// As `unpack`, in one instruction a number.
template <typename T>
__device__ __forceinline__ void spread(const Word<T>& word, float (&places)[word_size<T>]) {
  if constexpr (std::is_same_v<T, bfloat_t>) {
    reinterpret_cast<std::uint32_t&>(places[0]) = word.raw << 16;
    reinterpret_cast<std::uint32_t&>(places[1]) = word.raw & 0xffff0000u;
  } else {
    word.unpack(places);
  }
}

// Leaves in each place of `held` the higher number and returns the lower one; a NaN is returned.
template <typename T>
__device__ __forceinline__ Word<T> exchange(Word<T>& held, const Word<T>& word) {
  Word<T> lower;
  if constexpr (std::is_same_v<T, float>) {
    const float number = reinterpret_cast<const float&>(word.raw);
    float& highest = reinterpret_cast<float&>(held.raw);
    reinterpret_cast<float&>(lower.raw) = number > highest ? highest : number;
    highest = fmaxf(number, highest);
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;
    const Pair pair = reinterpret_cast<const Pair&>(word.raw);
    Pair& highest = reinterpret_cast<Pair&>(held.raw);
    reinterpret_cast<Pair&>(lower.raw) = __hmin2_nan(pair, highest);
    highest = __hmax2(pair, highest);
  }
  return lower;
}

// What a thread has taken so far: for each place in a word the highest number, and the sum of the others' exponentials
// relative to the highest of all.
template <typename T>
struct Running {
  static constexpr int kPlaces = word_size<T>;
  Word<T> held = word_of<T>(-INFINITY);
  Share<std::is_same_v<T, float>> share;

  template <int kCount>
  __device__ __forceinline__ void take(const Word<T> (&words)[kCount]) {
    Word<T> lower[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) lower[n] = exchange(held, words[n]);
    const float before = share.highest;
    float numbers[kPlaces];
    spread<T>(held, numbers);
    share.highest = fmaxf(numbers[0], numbers[kPlaces - 1]);
    share.others *= share.exponential(before);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      spread<T>(lower[n], numbers);
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) share.others += share.exponential(numbers[i]);
    }
  }

  __device__ __forceinline__ void take(const Packed<T, vector_size<T>>& vector) {
    take(reinterpret_cast<const Word<T>(&)[vector_size<T> / kPlaces]>(vector));
  }

  // With what is held in the other place among the others.
  __device__ __forceinline__ Share<std::is_same_v<T, float>> whole() const {
    float numbers[kPlaces];
    spread<T>(held, numbers);
    Share<std::is_same_v<T, float>> result = share;
    if (kPlaces > 1) result.others += share.exponential(fminf(numbers[0], numbers[kPlaces - 1]));
    return result;
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

// 0 where the label is not here.
template <typename T>
__device__ __forceinline__ float label_logit(const T* logits, std::int64_t label, int num_tokens) {
  return label >= 0 && label < num_tokens ? to_float(logits[label]) : 0.0f;
}

// Of a row, with its label's logit; every thread gets the result, or those of the first warp.
template <bool kForAll, typename T>
__device__ __forceinline__ auto over_row(const CrossEntropy& call, std::int64_t row, float& of_label) {
  constexpr int kSize = vector_size<T>;
  __shared__ float highest[kMostWarps], others[kMostWarps];
  const T* __restrict__ logits = reinterpret_cast<const T*>(call.logits) + row * call.row_stride;
  const int num_tokens = call.num_tokens;
  const std::int64_t label = reinterpret_cast<const std::int64_t*>(call.label_columns)[row];
  const Cut parts = cut(logits, num_tokens);
  const int after = parts.head + parts.vectors * kSize;
  Running<T> running;
  const auto take_one = [&](int column) { running.take({word_of<T>(to_float(logits[column]))}); };
  for (int c = threadIdx.x; c < parts.head; c += kThreads) take_one(c);
  for (int c = after + threadIdx.x; c < num_tokens; c += kThreads) take_one(c);
  int start = threadIdx.x;
  for (; start + (kReadAtOnce - 1) * kThreads < parts.vectors; start += kReadAtOnce * kThreads) {
    Packed<T, kSize> packed[kReadAtOnce];
#pragma unroll
    for (int n = 0; n < kReadAtOnce; ++n) {
      packed[n] = Packed<T, kSize>::load(logits + parts.head + (start + n * kThreads) * kSize);
    }
#pragma unroll
    for (int n = 0; n < kReadAtOnce; ++n) running.take(packed[n]);
  }
  for (; start < parts.vectors; start += kThreads) {
    running.take(Packed<T, kSize>::load(logits + parts.head + start * kSize));
  }
  of_label = label_logit(logits, label, num_tokens);  // on its way while the threads' shares are merged
  auto share = running.whole();
  share.merge_warp();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) highest[warp] = share.highest, others[warp] = share.others;
  __syncthreads();
  if (!kForAll && warp > 0) return share;
  share = {};
  if (lane < kThreads / kWarp) share = {highest[lane], others[lane]};
  share.merge_warp();
  return share;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) statistics(CrossEntropy call) {
  wait_for_former_kernel();
  const std::int64_t row = blockIdx.x;
  float of_label;
  const auto share = over_row<false, T>(call, row, of_label);
  if (threadIdx.x == 0) {
    float* out = reinterpret_cast<float*>(call.statistics);
    out[row] = share.highest;
    out[call.rows + row] = share.others;
    out[2 * call.rows + row] = of_label;
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
  float of_label;
  const auto share = over_row<true, T>(call, row, of_label);
  const float log_sum = log1pf(share.others);
  if (threadIdx.x == 0) reinterpret_cast<float*>(call.losses)[row] = log_sum + (share.highest - of_label);
  write_gradient<T>(call, row, share.highest, log_sum);
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
