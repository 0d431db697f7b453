#include <pybind11/pybind11.h>

#include "dropout.h"

using megatron::Dropout;
using megatron::Place;

PYBIND11_MODULE(dropout, module) {
  module.doc() = "Bias, dropout and the residual sum; tensors are addresses, 0 for none.";
  module.def("forward", [](std::uintptr_t x, std::uintptr_t bias, std::uintptr_t residual, std::uintptr_t out,
                           std::uintptr_t key, std::int64_t rows, std::int64_t first, int columns, int chunks,
                           int threshold, int x_type, int residual_type, int device, std::uintptr_t stream) {
    Dropout call{};
    call.x = x, call.bias = bias, call.residual = residual, call.out = out, call.key = key;
    call.rows = rows, call.first = first, call.columns = columns, call.chunks = chunks;
    call.threshold = threshold;
    megatron::dropout_forward(call, x_type, residual_type, Place{device, stream});
  });
  module.def("backward", [](std::uintptr_t grad_out, std::uintptr_t grad_x, std::uintptr_t grad_bias,
                            std::uintptr_t partial, std::uintptr_t key, std::int64_t rows, std::int64_t first,
                            int columns, int chunks, int threshold, int x_type, int residual_type, int device,
                            std::uintptr_t stream) {
    Dropout call{};
    call.grad_out = grad_out, call.grad_x = grad_x, call.grad_bias = grad_bias, call.partial = partial;
    call.key = key, call.rows = rows, call.first = first, call.columns = columns, call.chunks = chunks;
    call.threshold = threshold;
    megatron::dropout_backward(call, x_type, residual_type, Place{device, stream});
  });
  module.def("chunks", &megatron::dropout_chunks);
}
