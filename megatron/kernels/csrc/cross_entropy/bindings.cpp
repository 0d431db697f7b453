#include <pybind11/pybind11.h>

#include "cross_entropy.h"

using megatron::CrossEntropy;
using megatron::Place;

PYBIND11_MODULE(cross_entropy, module) {
  module.doc() = "Cross entropy over a part of the vocabulary; tensors are addresses.";
  module.def("statistics", [](std::uintptr_t logits, std::uintptr_t label_columns, std::uintptr_t statistics,
                              std::int64_t rows, std::int64_t row_stride, int columns, int num_tokens, int type,
                              int device, std::uintptr_t stream) {
    CrossEntropy call{};
    call.logits = logits, call.label_columns = label_columns, call.statistics = statistics;
    call.rows = rows, call.row_stride = row_stride, call.columns = columns, call.num_tokens = num_tokens;
    megatron::cross_entropy_statistics(call, type, Place{device, stream});
  });
  module.def("gradient", [](std::uintptr_t logits, std::uintptr_t label_columns, std::uintptr_t log_sum,
                            std::uintptr_t scale, std::uintptr_t grad, std::int64_t rows, std::int64_t row_stride,
                            std::int64_t grad_stride, int columns, int num_tokens, int type, int device,
                            std::uintptr_t stream) {
    CrossEntropy call{};
    call.logits = logits, call.label_columns = label_columns;
    call.log_sum = log_sum, call.scale = scale, call.grad = grad;
    call.rows = rows, call.row_stride = row_stride, call.grad_stride = grad_stride;
    call.columns = columns, call.num_tokens = num_tokens;
    megatron::cross_entropy_gradient(call, type, Place{device, stream});
  });
  module.def("loss_and_gradient", [](std::uintptr_t logits, std::uintptr_t label_columns, std::uintptr_t scale,
                                     std::uintptr_t losses, std::int64_t rows, std::int64_t row_stride, int columns,
                                     int num_tokens, int type, int device, std::uintptr_t stream) {
    CrossEntropy call{};
    call.logits = call.grad = logits, call.label_columns = label_columns, call.scale = scale, call.losses = losses;
    call.rows = rows, call.row_stride = call.grad_stride = row_stride;
    call.columns = columns, call.num_tokens = num_tokens;
    megatron::cross_entropy_loss_and_gradient(call, type, Place{device, stream});
  });
  module.def("rescale", [](std::uintptr_t from, std::uintptr_t factor, std::uintptr_t to, std::int64_t count, int type,
                           int result_type, int device, std::uintptr_t stream) {
    megatron::rescale_gradient({from, to, factor, count}, type, result_type, Place{device, stream});
  });
}
