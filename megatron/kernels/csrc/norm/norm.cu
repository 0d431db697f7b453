// LayerNorm and RMSNorm: which kernel serves which rows.
#include "norm.h"

#include <algorithm>
#include <string>

#include "../include/partial_rows.cuh"
#include "backward.cuh"
#include "forward.cuh"

namespace megatron {
namespace {

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

// Shared memory that a block can ask for, besides the little that kernels have without asking.
std::size_t shared_room(const Place& place) {
  return static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device)) - 1024;
}

// Launches with one stage where the shared memory of a block does not hold all; false if it does not hold one.
template <typename X, typename W, typename Share>
bool backward_with(const NormBackward& call, const Place& place) {
  constexpr int kSize = vector_size<X>, kVectors = Share::kVectors;
  const int threads = row_threads(call.columns / kSize, kVectors);
  const dim3 block(threads, std::max(1, Share::kThreads / threads));
  const std::size_t slots = (call.grad_stream == 0 ? 2 : 3) * Share::kRows * kVectors;
  const std::size_t stage = slots * block.x * block.y * kSlotBytes, room = shared_room(place);
  const std::size_t sums = sizeof(float) * (call.mean == 0 ? 1 : 2) * kVectors * kSize * block.x * (block.y - 1);
  const int stages = Share::kStages * stage <= room ? Share::kStages : 1;
  const std::size_t bytes = std::max(stages * stage, sums);
  if (bytes > room) return false;
  const auto start = [&](auto kernel) {
    launch("the norm's backward", kernel, dim3(call.partial_rows), block, bytes, place, BackwardTensors<X, W>(call),
           stages);
  };
  if (call.mean != 0) {
    start(backward_rows<X, W, kSize, Share, true>);
  } else {
    start(backward_rows<X, W, kSize, Share, false>);
  }
  return true;
}

// Wide rows leave a thread registers for few rows at once. Up to 16 KiB a row, 64 KiB of two tensors are on their way
// to a block, and those of three fit into the 99 KiB that smaller GPUs have.
template <typename X, typename W>
bool backward_in_vectors(const NormBackward& call, const Place& place) {
  constexpr int kSize = vector_size<X>;
  constexpr std::int64_t kMostRows = 1 << 30;
  const int vectors = call.columns / kSize;
  const bool fits = call.columns % kSize == 0 && vectors <= 4 * kMostThreads && call.rows <= kMostRows &&
                    all_aligned(call.grad_normed, call.grad_stream, call.stream, call.weight, call.grad_x);
  if (!fits) return false;
  if (vectors <= kMostThreads / 2) return backward_with<X, W, RowShare<1, 4, 2, kMostThreads / 2>>(call, place);
  if (vectors <= kMostThreads) return backward_with<X, W, RowShare<1, 2, 2, kMostThreads>>(call, place);
  if (vectors <= 2 * kMostThreads) return backward_with<X, W, RowShare<2, 1, 2, kMostThreads>>(call, place);
  return backward_with<X, W, RowShare<4, 1, 2, kMostThreads>>(call, place);
}

template <typename X, typename W>
void backward_typed(const NormBackward& call, const Place& place) {
  if (!backward_in_vectors<X, W>(call, place)) {
    const int threads = std::min(kGenericThreads, row_threads(call.columns, 1));
    const std::size_t sums = 2 * sizeof(float) * call.columns;
    if (sums > shared_room(place)) {
      throw std::invalid_argument("this GPU has too little shared memory for a norm over " +
                                  std::to_string(call.columns) + " columns: run with --no-norm-fusion");
    }
    launch("the norm's backward", backward_generic<X, W>, dim3(call.partial_rows), dim3(threads), sums, place,
           BackwardTensors<X, W>(call));
  }
  sum_partial_rows<NormBackward, W>("the norm's backward", call.partial, call.partial_rows, call.columns,
                                    call.grad_weight, call.grad_bias, place);
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
