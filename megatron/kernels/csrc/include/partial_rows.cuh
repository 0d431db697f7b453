// The second stage of a sum over rows: adds the rows of sums that a kernel's blocks have left, always in the same
// order. They are few and little else hides the latency of their loads: a thread has all of its own on their way
// together, four columns in each.
#pragma once

#include "launch.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace megatron {

constexpr int kSumAcross = 8;  // threads of a block beside each other in a row
constexpr int kSumThreads = kSumAcross * kWarp;

// Sums partial [1 or 2, rows, columns], of a multiple of kSize columns: blockIdx.y is 0 for `first`, 1 for `second`.
// Profiles tell by `Call`, an argument of the first stage, what it belongs to.
template <typename Call, typename T, int kSize>
__global__ void __launch_bounds__(kSumThreads) sum_rows(const float* partial, int rows, int columns, T* first,
                                                        T* second) {
  using Vector = Packed<float, kSize>;
  constexpr int kAtOnce = 5;  // 160 rows for a block, where norms have one for each multiprocessor
  __shared__ float shared[kSumAcross * kSize][kWarp + 1];
  const int across = threadIdx.x % kSumAcross, down = threadIdx.x / kSumAcross;
  const int first_column = blockIdx.x * kSumAcross * kSize, column = first_column + across * kSize;
  wait_for_former_kernel();
  let_next_kernel_come();
  partial += static_cast<std::int64_t>(blockIdx.y) * rows * columns;
  float sums[kSize] = {};
  for (int start = down; column < columns && start < rows; start += kAtOnce * kWarp) {
    Vector some[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const std::int64_t row = start + n * kWarp;
      some[n] = row < rows ? Vector::load(partial + row * columns + column) : Vector::zeros();
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      float values[kSize];
      some[n].unpack(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) shared[across * kSize + i][down] = sums[i];
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float total = warp_sum(shared[warp * kSize + i][lane]);
    if (lane == i) sum = total;
  }
  const int to = first_column + warp * kSize + lane;
  if (lane < kSize && to < columns) (blockIdx.y == 0 ? first : second)[to] = from_float<T>(sum);
}

// Sums partial, fp32 [rows, columns], into `first` and, where `second` is not 0, as many rows behind them into that.
template <typename Call, typename T>
void sum_partial_rows(const char* what, std::uintptr_t partial, int rows, int columns, std::uintptr_t first,
                      std::uintptr_t second, const Place& place) {
  const auto with_size = [&](auto size) {
    const dim3 grid(static_cast<unsigned>(ceil_div(columns, kSumAcross * size())), second == 0 ? 1 : 2);
    launch(what, sum_rows<Call, T, size()>, grid, dim3(kSumThreads), 0, place, reinterpret_cast<const float*>(partial),
           rows, columns, reinterpret_cast<T*>(first), reinterpret_cast<T*>(second));
  };
  if (columns % vector_size<float> == 0 && is_aligned(partial)) {
    with_size(std::integral_constant<int, vector_size<float>>{});
  } else {
    with_size(std::integral_constant<int, 1>{});
  }
}

}  // namespace megatron
