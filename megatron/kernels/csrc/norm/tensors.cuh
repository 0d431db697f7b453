// What the kernels of the norm are given, with types.
#pragma once

#include "norm.h"

namespace megatron {

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

}  // namespace megatron
