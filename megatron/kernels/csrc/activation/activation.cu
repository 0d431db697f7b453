// A warp takes 32 neighbouring vectors of columns and walks down the rows of one chunk, so that the bias is read once
// and the bias's gradient is summed in registers, in the same order every time.
#include "activation.h"

#include <algorithm>

#include "../include/partial_rows.cuh"
#include "../include/reduce.cuh"
#include "../include/vector.cuh"

namespace megatron {
namespace {

constexpr int kWarps = 8;
constexpr int kBlocksEach = 4;  // blocks that a multiprocessor works on at once

struct Point {
  float value, slope;
};

// The standard normal distribution at x, and its density.
struct Normal {
  float below, density;
};

template <bool kExact>
__device__ __forceinline__ Normal normal(float x) {
  constexpr float kHalfRoot = 0.70710678118654752f, kInverseRootTau = 0.39894228040143268f;
  if constexpr (kExact) {
    return {0.5f * erfcf(-x * kHalfRoot), kInverseRootTau * expf(-0.5f * x * x)};
  } else {
    // The tail is exp(-x^2 / 2) times a polynomial in t = 1 / (1 + 0.45 |x|), fitted here to a relative error below
    // 8e-6, far below the half types' own; one exponential serves the density too.
    constexpr float kHalfLog2E = 0.72134752044448170f;
    const float exponential = fast_exp2(-kHalfLog2E * x * x), t = __fdividef(1.0f, fmaf(0.45f, fabsf(x), 1.0f));
    float sum = 0.06816192f;
    sum = fmaf(sum, t, -0.23557858f);
    sum = fmaf(sum, t, 0.19633586f);
    sum = fmaf(sum, t, 0.10725089f);
    sum = fmaf(sum, t, 0.18454504f);
    sum = fmaf(sum, t, 0.17925303f);
    const float tail = exponential * t * sum;
    return {x < 0.0f ? tail : 1.0f - tail, kInverseRootTau * exponential};
  }
}

template <bool kExact>
__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return kExact ? 1.0f / (1.0f + expf(-x)) : __fdividef(1.0f, 1.0f + fast_exp2(-kLog2E * x));
}

template <int kKind, bool kExact>
__device__ __forceinline__ Point curve(float x) {
  if constexpr (kKind == kGelu || kKind == kGeglu) {
    const Normal n = normal<kExact>(x);
    return {x * n.below, n.below + x * n.density};
  } else if constexpr (kKind == kGeluTanh || kKind == kGegluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u). Beyond the limit it is 0 or 1, and the square may overflow: infinity is right for
    // the value, not for the slope.
    constexpr float kTwoRoot = 2.0f * 0.79788456080286536f, kCubic = 0.044715f, kLimit = 20.0f;
    const float share = sigmoid<kExact>(x * fmaf(kTwoRoot * kCubic, x * x, kTwoRoot));
    const float y = fminf(fmaxf(x, -kLimit), kLimit);
    const float growth = y * fmaf(3.0f * kTwoRoot * kCubic, y * y, kTwoRoot);
    return {x * share, fmaf(share * (1.0f - share), growth, share)};
  } else if constexpr (kKind == kSwiglu) {
    const float share = sigmoid<kExact>(x);
    return {x * share, share * (1.0f + x * (1.0f - share))};
  } else {
    const float positive = fmaxf(x, 0.0f);
    return {positive * positive, 2.0f * positive};
  }
}

__host__ __device__ constexpr bool is_gated(int kind) { return kind >= kSwiglu; }

// Blocks of backward that a multiprocessor works on at once: those of gated kinds need more registers.
__host__ __device__ constexpr int backward_blocks(int kind) { return is_gated(kind) ? 3 : kBlocksEach; }

struct Rows {
  std::int64_t begin, end;
};

__device__ __forceinline__ Rows rows_of_chunk(std::int64_t rows, int chunks) {
  return {rows * blockIdx.y / chunks, rows * (blockIdx.y + 1) / chunks};
}

// What a thread holds of kRows rows, kWarps apart: its vectors of x, one in each block of columns.
template <typename T, int kSize, int kBlocks, int kRows>
struct Part {
  Packed<T, kSize> x[kRows][kBlocks];

  __device__ __forceinline__ void load(const T* from, std::int64_t first, std::int64_t end, int columns, int column) {
    const std::int64_t width = static_cast<std::int64_t>(kBlocks) * columns;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const std::int64_t row = first + n * kWarps;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (row < end) x[n][block] = Packed<T, kSize>::load(from + row * width + block * columns + column);
      }
    }
  }
};

template <typename T, int kSize, int kBlocks>
__device__ __forceinline__ void load_bias(const T* bias, int columns, int column, Packed<T, kSize> (&out)[kBlocks]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    out[block] = bias == nullptr ? Packed<T, kSize>::zeros() : Packed<T, kSize>::load(bias + block * columns + column);
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void unpack_sum(const Packed<T, kSize>& x, const Packed<T, kSize>& bias,
                                           float (&out)[kSize]) {
  float more[kSize];
  x.unpack(out);
  bias.unpack(more);
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] += more[i];
}

template <typename T, int kSize, int kKind>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocksEach) forward(Activation call) {
  constexpr int kBlocks = is_gated(kKind) ? 2 : 1, kRows = kBlocks == 2 ? 2 : 3;
  constexpr bool kExact = std::is_same_v<T, float>;
  wait_for_former_kernel();
  const T* __restrict__ x = reinterpret_cast<const T*>(call.x);
  T* __restrict__ out = reinterpret_cast<T*>(call.out);
  const int column = (blockIdx.x * kWarp + threadIdx.x) * kSize;
  if (column >= call.columns) return;
  Packed<T, kSize> bias[kBlocks];
  load_bias<T, kSize, kBlocks>(reinterpret_cast<const T*>(call.bias), call.columns, column, bias);
  const Rows rows = rows_of_chunk(call.rows, call.chunks);
  Part<T, kSize, kBlocks, kRows> part, next;
  next.load(x, rows.begin + threadIdx.y, rows.end, call.columns, column);
  for (std::int64_t start = rows.begin + threadIdx.y; start < rows.end; start += kRows * kWarps) {
    part = next;
    next.load(x, start + kRows * kWarps, rows.end, call.columns, column);  // on its way while this one is computed
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const std::int64_t row = start + n * kWarps;
      if (row < rows.end) {
        float result[kSize], up[kSize];
        unpack_sum(part.x[n][0], bias[0], result);
        if constexpr (kBlocks == 2) unpack_sum(part.x[n][1], bias[1], up);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          result[i] = curve<kKind, kExact>(result[i]).value;
          if constexpr (kBlocks == 2) result[i] *= up[i];
        }
        Packed<T, kSize>::pack(result).store(out + row * call.columns + column);
      }
    }
  }
}

template <typename T, int kSize, int kKind>
__global__ void __launch_bounds__(kWarp* kWarps, backward_blocks(kKind)) backward(Activation call) {
  constexpr int kBlocks = is_gated(kKind) ? 2 : 1, kRows = 2 / kBlocks;
  constexpr bool kExact = std::is_same_v<T, float>, kAhead = kBlocks == 2;
  __shared__ float shared[kWarps][kWarp * kSize];
  wait_for_former_kernel();
  const T* __restrict__ x = reinterpret_cast<const T*>(call.x);
  const T* __restrict__ grad_out = reinterpret_cast<const T*>(call.grad_out);
  T* __restrict__ grad_x = reinterpret_cast<T*>(call.grad_x);
  const int column = (blockIdx.x * kWarp + threadIdx.x) * kSize;
  const bool is_here = column < call.columns;
  Packed<T, kSize> bias[kBlocks];
  float sums[kBlocks][kSize] = {};
  if (is_here) load_bias<T, kSize, kBlocks>(reinterpret_cast<const T*>(call.bias), call.columns, column, bias);
  const Rows rows = rows_of_chunk(call.rows, call.chunks);
  const std::int64_t width = static_cast<std::int64_t>(kBlocks) * call.columns;
  Part<T, kSize, kBlocks, kRows> part, next;
  Part<T, kSize, 1, kRows> grads, next_grads;
  const auto load_next = [&](std::int64_t first) {
    next.load(x, first, rows.end, call.columns, column);
    next_grads.load(grad_out, first, rows.end, call.columns, column);
  };
  if (kAhead && is_here) load_next(rows.begin + threadIdx.y);
  for (std::int64_t start = rows.begin + threadIdx.y; is_here && start < rows.end; start += kRows * kWarps) {
    if constexpr (!kAhead) load_next(start);
    part = next;
    grads = next_grads;
    if constexpr (kAhead) load_next(start + kRows * kWarps);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const std::int64_t row = start + n * kWarps;
      if (row < rows.end) {
        float gate[kSize], up[kSize], grad[kSize];
        unpack_sum(part.x[n][0], bias[0], gate);
        grads.x[n][0].unpack(grad);
        if constexpr (kBlocks == 2) unpack_sum(part.x[n][1], bias[1], up);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const Point point = curve<kKind, kExact>(gate[i]);
          if constexpr (kBlocks == 2) {
            gate[i] = grad[i] * up[i] * point.slope;
            up[i] = grad[i] * point.value;
            sums[1][i] += up[i];
          } else {
            gate[i] = grad[i] * point.slope;
          }
          sums[0][i] += gate[i];
        }
        Packed<T, kSize>::pack(gate).store(grad_x + row * width + column);
        if constexpr (kBlocks == 2) Packed<T, kSize>::pack(up).store(grad_x + row * width + call.columns + column);
      }
    }
  }
  let_next_kernel_come();
  if (call.partial == 0) return;
  float* partial = reinterpret_cast<float*>(call.partial) + blockIdx.y * width;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSize; ++i) shared[threadIdx.y][i * kWarp + threadIdx.x] = sums[block][i];
    __syncthreads();
    const int thread = threadIdx.y * kWarp + threadIdx.x;
    // Element i of vector j stands at i kWarp + j.
    for (int at = thread; at < kWarp * kSize; at += kWarp * kWarps) {
      float sum = 0.0f;
#pragma unroll
      for (int y = 0; y < kWarps; ++y) sum += shared[y][at];
      const int to = (blockIdx.x * kWarp + at % kWarp) * kSize + at / kWarp;
      if (to < call.columns) partial[block * call.columns + to] = sum;
    }
  }
}

template <typename Function>
void with_kind(int kind, Function&& function) {
  switch (kind) {
    case kGelu:
      return function(std::integral_constant<int, kGelu>{});
    case kGeluTanh:
      return function(std::integral_constant<int, kGeluTanh>{});
    case kSquaredRelu:
      return function(std::integral_constant<int, kSquaredRelu>{});
    case kSwiglu:
      return function(std::integral_constant<int, kSwiglu>{});
    case kGeglu:
      return function(std::integral_constant<int, kGeglu>{});
    case kGegluTanh:
      return function(std::integral_constant<int, kGegluTanh>{});
    default:
      throw std::invalid_argument("there is no such activation");
  }
}

// Calls `function(Type<T>{}, size, kind)` with the widest vectors that the columns allow.
template <typename Function>
void with_vectors(const Activation& call, int kind, int type, Function&& function) {
  with_type(type, [&](auto t) {
    constexpr int kSize = vector_size<typename decltype(t)::type>;
    const bool vectors = call.columns % kSize == 0 && is_aligned(call.x) && is_aligned(call.bias) &&
                         is_aligned(call.out) && is_aligned(call.grad_out) && is_aligned(call.grad_x);
    with_kind(kind, [&](auto k) {
      if (vectors) {
        function(t, std::integral_constant<int, kSize>{}, k);
      } else {
        function(t, std::integral_constant<int, 1>{}, k);
      }
    });
  });
}

dim3 grid_of(const Activation& call, int size) {
  return dim3(static_cast<unsigned>(ceil_div(call.columns, kWarp * size)), call.chunks);
}

}  // namespace

int activation_chunks(std::int64_t rows, int columns, int kind, int type, bool is_backward, int device) {
  const int each = is_backward ? backward_blocks(kind) : kBlocksEach;
  int chunks = 1;
  with_type(type, [&](auto t) {
    const std::int64_t across = ceil_div(columns, kWarp * vector_size<typename decltype(t)::type>);
    const std::int64_t wanted = std::max<std::int64_t>(1, each * multiprocessors(device) / across);
    chunks = static_cast<int>(std::clamp<std::int64_t>(ceil_div(rows, kWarps), 1, wanted));
  });
  return chunks;
}

void activation_forward(const Activation& call, int kind, int type, const Place& place) {
  if (call.rows == 0) return;
  const DeviceGuard guard(place.device);
  with_vectors(call, kind, type, [&](auto t, auto size, auto k) {
    launch("the activation's forward", forward<typename decltype(t)::type, size(), k()>, grid_of(call, size()),
           dim3(kWarp, kWarps), 0, place, call);
  });
}

void activation_backward(const Activation& call, int kind, int type, const Place& place) {
  const DeviceGuard guard(place.device);
  with_vectors(call, kind, type, [&](auto t, auto size, auto k) {
    using T = typename decltype(t)::type;
    launch("the activation's backward", backward<T, size(), k()>, grid_of(call, size()), dim3(kWarp, kWarps), 0,
           place, call);
    if (call.grad_bias == 0) return;
    const int columns = call.columns * (is_gated(k()) ? 2 : 1);
    sum_partial_rows<Activation, T>("the activation's backward", call.partial, call.chunks, columns, call.grad_bias, 0,
                                    place);
  });
}

}  // namespace megatron
