// residual + dropout(x + bias), and its gradient; the mask is drawn anew from its key instead of being kept.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

// All but `bias` are [rows, columns] and contiguous. Without a residual (0) the result is the dropped sum alone.
struct Dropout {
  std::uintptr_t x, bias, residual, out;       // forward; bias, residual: 0 when there is none
  std::uintptr_t grad_out, grad_x, grad_bias;  // backward; grad_bias: 0 when it is not wanted
  std::uintptr_t partial;                      // fp32 [chunks, columns] to work in, where grad_bias is
  std::uintptr_t key;                          // int64 [1]: equal keys draw equal masks
  std::int64_t rows;
  int columns, chunks;
  float probability;
};

void dropout_forward(const Dropout& call, int x_type, int residual_type, const Place& place);
void dropout_backward(const Dropout& call, int x_type, int residual_type, const Place& place);

int dropout_chunks(std::int64_t rows, int columns, int x_type, int device);

}  // namespace megatron
