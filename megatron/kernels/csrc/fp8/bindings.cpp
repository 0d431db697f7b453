#include <pybind11/pybind11.h>

#include "fp8.h"

using megatron::Place;
using megatron::Quantise;

PYBIND11_MODULE(fp8, module) {
  module.doc() = "Matrices in 8 bits; tensors are addresses, 0 for none.";
  module.def("largest", [](std::uintptr_t x, std::uintptr_t largest, std::int64_t count, int parts, int device,
                           std::uintptr_t stream) {
    megatron::fp8_largest(x, largest, count, parts, Place{device, stream});
  });
  module.def("quantise", [](std::uintptr_t x, std::uintptr_t largest, int parts, std::uintptr_t scale,
                            std::uintptr_t by_row, std::uintptr_t by_column, std::uintptr_t sums,
                            std::uintptr_t partial, std::int64_t rows, std::int64_t padded_rows, int columns,
                            int format, int device, std::uintptr_t stream) {
    Quantise call{};
    call.x = x, call.largest = largest, call.parts = parts, call.scale = scale;
    call.by_row = by_row, call.by_column = by_column, call.sums = sums, call.partial = partial;
    call.rows = rows, call.padded_rows = padded_rows, call.columns = columns;
    megatron::fp8_quantise(call, format, Place{device, stream});
  });
  module.def("parts", &megatron::fp8_parts);
  module.def("tiles", &megatron::fp8_tiles);
}
