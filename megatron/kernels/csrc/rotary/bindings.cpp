#include <pybind11/pybind11.h>

#include <stdexcept>

#include "rotary.h"

namespace py = pybind11;
using megatron::Layout;
using megatron::Rotation;

namespace {

// (address, sequence stride, batch stride, group stride, head stride)
Layout layout_of(const py::handle& given) {
  const auto five = py::cast<py::tuple>(given);
  return {py::cast<std::uintptr_t>(five[0]), py::cast<std::int64_t>(five[1]), py::cast<std::int64_t>(five[2]),
          py::cast<std::int64_t>(five[3]), py::cast<std::int64_t>(five[4])};
}

}  // namespace

PYBIND11_MODULE(rotary, module) {
  module.doc() = "Rotation of heads by position. A segment is (from, to, heads, heads per group, whether rotated).";
  module.def("rotate", [](const py::tuple& segments, std::uintptr_t cosine, std::uintptr_t sine,
                          std::uintptr_t position_ids, int sequence, int batch, int head_size, int rotated_size,
                          bool is_interleaved, double direction, int type, int device, std::uintptr_t stream) {
    if (segments.size() > megatron::kMostSegments) throw std::invalid_argument("a rotation has at most 3 segments");
    Rotation call{};
    for (const auto& given : segments) {
      const auto five = py::cast<py::tuple>(given);
      call.segments[call.num_segments++] = {layout_of(five[0]), layout_of(five[1]), py::cast<int>(five[2]),
                                            py::cast<int>(five[3]), py::cast<bool>(five[4])};
    }
    call.cosine = cosine, call.sine = sine, call.position_ids = position_ids;
    call.sequence = sequence, call.batch = batch;
    call.head_size = head_size, call.rotated_size = rotated_size;
    call.is_interleaved = is_interleaved, call.direction = static_cast<float>(direction);
    megatron::rotate(call, type, megatron::Place{device, stream});
  });
}
