// Rotation of pairs of channels by the angle of a token's position, between tensors of any strides.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

constexpr int kMostSegments = 3;

// Heads [s, b, heads, head_size] that are read at one place and written at another. Head i stands at
// (i / per_group) group_stride + (i % per_group) head_stride; all strides are in elements, channels are neighbours.
struct Layout {
  std::uintptr_t address;
  std::int64_t sequence_stride, batch_stride, group_stride, head_stride;
};

struct Segment {
  Layout from, to;
  int heads, per_group;
  bool is_rotated;  // or copied
};

struct Rotation {
  Segment segments[kMostSegments];
  int num_segments;
  std::uintptr_t cosine, sine;   // fp32 [positions, rotated_size / 2]
  std::uintptr_t position_ids;   // int64 [b, s]; 0: position = sequence index
  int sequence, batch, head_size, rotated_size;
  bool is_interleaved;  // pairs (2i, 2i + 1) instead of (i, i + rotated_size / 2)
  float direction;      // 1, or -1 for the inverse
};

void rotate(const Rotation& call, int type, const Place& place);

}  // namespace megatron
