#include <pybind11/pybind11.h>

#include "activation.h"

using megatron::Activation;
using megatron::Place;

PYBIND11_MODULE(activation, module) {
  module.doc() = "Nonlinearities of the MLP; tensors are addresses, 0 for none.";
  module.def("forward", [](std::uintptr_t x, std::uintptr_t bias, std::uintptr_t out, std::int64_t rows, int columns,
                           int chunks, int kind, int type, int device, std::uintptr_t stream) {
    Activation call{};
    call.x = x, call.bias = bias, call.out = out;
    call.rows = rows, call.columns = columns, call.chunks = chunks;
    megatron::activation_forward(call, kind, type, Place{device, stream});
  });
  module.def("backward", [](std::uintptr_t x, std::uintptr_t bias, std::uintptr_t grad_out, std::uintptr_t grad_x,
                            std::uintptr_t grad_bias, std::uintptr_t partial, std::int64_t rows, int columns,
                            int chunks, int kind, int type, int device, std::uintptr_t stream) {
    Activation call{};
    call.x = x, call.bias = bias;
    call.grad_out = grad_out, call.grad_x = grad_x, call.grad_bias = grad_bias, call.partial = partial;
    call.rows = rows, call.columns = columns, call.chunks = chunks;
    megatron::activation_backward(call, kind, type, Place{device, stream});
  });
  module.def("chunks", &megatron::activation_chunks);
}
