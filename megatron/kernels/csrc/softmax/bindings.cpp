#include <pybind11/pybind11.h>

#include "softmax.h"

using megatron::Place;
using megatron::Softmax;

PYBIND11_MODULE(softmax, module) {
  module.doc() = "Scaled softmax of attention scores; tensors are addresses, 0 for none.";
  module.def("forward", [](std::uintptr_t scores, std::uintptr_t mask, std::int64_t mask_batch,
                           std::int64_t mask_query, std::uintptr_t weights, std::int64_t rows, int heads, int queries,
                           int keys, bool causal, double scale, int type, int device, std::uintptr_t stream) {
    Softmax call{};
    call.scores = scores, call.weights = weights;
    call.mask = mask, call.mask_batch = mask_batch, call.mask_query = mask_query;
    call.rows = rows, call.heads = heads, call.queries = queries, call.keys = keys;
    call.causal = causal, call.scale = static_cast<float>(scale);
    megatron::softmax_forward(call, type, Place{device, stream});
  });
  module.def("backward", [](std::uintptr_t weights, std::uintptr_t grad_weights, std::uintptr_t grad_scores,
                            std::int64_t rows, int queries, int keys, bool causal, double scale, int type, int device,
                            std::uintptr_t stream) {
    Softmax call{};
    call.weights = weights, call.grad_weights = grad_weights, call.grad_scores = grad_scores;
    call.rows = rows, call.heads = 1, call.queries = queries, call.keys = keys;
    call.causal = causal, call.scale = static_cast<float>(scale);
    megatron::softmax_backward(call, type, Place{device, stream});
  });
}
