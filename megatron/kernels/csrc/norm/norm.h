// LayerNorm and RMSNorm over rows of contiguous columns, with the sum of the residual stream folded in.
//
// The stream has type X, everything else type W: X is W, or fp32. Statistics and arithmetic are fp32.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

// stream = x + delta, rounded to X; normed = (stream - mean) / sqrt(variance + epsilon) (weight + offset) + bias.
struct NormForward {
  std::uintptr_t x, delta, weight, bias;    // delta, bias: 0 when there is none
  std::uintptr_t stream, normed;            // stream: 0 without delta
  std::uintptr_t mean, inverse_deviation;   // fp32 [rows]; mean: 0 for RMSNorm, which takes it for zero
  std::int64_t rows;
  int columns;
  float epsilon, weight_offset;
};

// grad_x = d loss / d stream, that of the normed rows plus grad_stream.
struct NormBackward {
  std::uintptr_t grad_normed, grad_stream, stream, weight;  // grad_stream: 0 when there is none
  std::uintptr_t mean, inverse_deviation;
  std::uintptr_t grad_x, grad_weight, grad_bias;            // grad_bias: 0 when there is no bias
  std::uintptr_t partial;  // fp32 [2, partial_rows, columns] to work in
  int partial_rows;
  std::int64_t rows;
  int columns;
  float weight_offset;
};

void norm_forward(const NormForward& call, int x_type, int w_type, const Place& place);
void norm_backward(const NormBackward& call, int x_type, int w_type, const Place& place);

// Blocks of `norm_backward`, each of which sums gradients of weight and bias over rows of its own.
int norm_partial_rows(std::int64_t rows, int device);

}  // namespace megatron
