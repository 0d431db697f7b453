// residual + dropout(x + bias), and its gradient; backward draws the mask anew from its key: it is not kept.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

// All but `bias` are [rows, columns] and contiguous. Without a residual (0) the result is the dropped sum alone. The
// mask of an element follows from the key and the element's index in the whole tensor, of which this may be a part.
struct Dropout {
  std::uintptr_t x, bias, residual, out;       // forward; bias, residual: 0 when there is none
  std::uintptr_t grad_out, grad_x, grad_bias;  // backward; grad_bias: 0 when it is not wanted
  std::uintptr_t partial;                      // fp32 [chunks, columns] to work in, where grad_bias is
  std::uintptr_t key;                          // int64 [1], on the device, so that a graph of launches draws anew
  std::int64_t rows, first;                    // first: index of element 0 in the whole tensor
  int columns, chunks;
  int threshold;  // an element is dropped when its 16 bits are below: probability x 65536
};

void dropout_forward(const Dropout& call, int x_type, int residual_type, const Place& place);
void dropout_backward(const Dropout& call, int x_type, int residual_type, const Place& place);

int dropout_chunks(std::int64_t rows, int columns, int x_type, bool backward, int device);

}  // namespace megatron
