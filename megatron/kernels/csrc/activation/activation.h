// The nonlinearities of an MLP, with the bias of the product before them added first.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

// `megatron/kernels/activation.py` has the same numbers.
enum Kind : int { kGelu = 0, kGeluTanh = 1, kSquaredRelu = 2, kSwiglu = 3, kGeglu = 4, kGegluTanh = 5 };

// x is [rows, blocks x columns], blocks = 2 for a gated kind: gate, then up. The result is [rows, columns].
struct Activation {
  std::uintptr_t x, bias;  // bias: 0 when there is none
  std::uintptr_t out;      // forward
  std::uintptr_t grad_out, grad_x, grad_bias;  // backward; grad_bias: 0 when it is not wanted
  std::uintptr_t partial;  // fp32 [chunks, blocks x columns] to work in, where grad_bias is
  std::int64_t rows;
  int columns;
  int chunks;  // runs of rows; each block stays within one
};

void activation_forward(const Activation& call, int kind, int type, const Place& place);
void activation_backward(const Activation& call, int kind, int type, const Place& place);

// Runs of rows that fill the device.
int activation_chunks(std::int64_t rows, int columns, int kind, int type, bool is_backward, int device);

}  // namespace megatron
