#include <pybind11/pybind11.h>

#include "norm.h"

namespace py = pybind11;
using megatron::NormBackward;
using megatron::NormForward;
using megatron::Place;

PYBIND11_MODULE(norm, module) {
  module.doc() = "LayerNorm and RMSNorm; tensors are addresses, 0 for none.";
  module.def(
      "forward",
      [](std::uintptr_t x, std::uintptr_t delta, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t stream,
         std::uintptr_t normed, std::uintptr_t mean, std::uintptr_t inverse_deviation, std::int64_t rows, int columns,
         double epsilon, double weight_offset, int x_type, int w_type, int device, std::uintptr_t cuda_stream) {
        const NormForward call{x,    delta,   weight, bias, stream, normed, mean, inverse_deviation, rows,
                               columns, static_cast<float>(epsilon), static_cast<float>(weight_offset)};
        megatron::norm_forward(call, x_type, w_type, Place{device, cuda_stream});
      });
  module.def(
      "backward",
      [](std::uintptr_t grad_normed, std::uintptr_t grad_stream, std::uintptr_t stream, std::uintptr_t weight,
         std::uintptr_t mean, std::uintptr_t inverse_deviation, std::uintptr_t grad_x, std::uintptr_t grad_weight,
         std::uintptr_t grad_bias, std::uintptr_t partial, int partial_rows, std::int64_t rows, int columns,
         double weight_offset, int x_type, int w_type, int device, std::uintptr_t cuda_stream) {
        const NormBackward call{grad_normed, grad_stream, stream,       weight, mean,    inverse_deviation,
                                grad_x,      grad_weight, grad_bias,    partial, partial_rows, rows,
                                columns,     static_cast<float>(weight_offset)};
        megatron::norm_backward(call, x_type, w_type, Place{device, cuda_stream});
      });
  module.def("partial_rows", &megatron::norm_partial_rows);
}
