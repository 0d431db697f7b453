// One block turns all heads of a token, so that its cosines and sines are read from memory once. A thread takes a unit:
// two vectors of channels that hold kSize pairs, or that are only copied.
#include "rotary.h"

#include <algorithm>

#include "../include/vector.cuh"

namespace megatron {
namespace {

constexpr int kMostThreads = 512;

template <typename T>
struct Unit {
  const T* from;
  T* to;
};

template <typename T>
__device__ __forceinline__ Unit<T> locate(const Segment& segment, int head, int s, int b) {
  const int group = head / segment.per_group, member = head - group * segment.per_group;
  const auto at = [&](const Layout& layout) {
    return s * layout.sequence_stride + b * layout.batch_stride + group * layout.group_stride +
           member * layout.head_stride;
  };
  return {reinterpret_cast<const T*>(segment.from.address) + at(segment.from),
          reinterpret_cast<T*>(segment.to.address) + at(segment.to)};
}

template <int kSize>
__device__ __forceinline__ void read_table(const float* table, float (&out)[kSize]) {
  if constexpr (kSize % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(table + i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = table[i];
  }
}

template <typename T, int kSize, bool kInterleaved>
__device__ __forceinline__ void turn(const Unit<T>& unit, int pair, int distance, const float* cosine,
                                     const float* sine, float direction) {
  const int first = kInterleaved ? 2 * pair : pair, second = first + (kInterleaved ? kSize : distance);
  float a[kSize], b[kSize], c[kSize], s[kSize];
  Packed<T, kSize>::load(unit.from + first).unpack(a);
  Packed<T, kSize>::load(unit.from + second).unpack(b);
  read_table(cosine + pair, c);
  read_table(sine + pair, s);
  float both[2 * kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    // Neighbours: pair i of this unit is elements 2i and 2i + 1 of a followed by b.
    const float x = !kInterleaved ? a[i] : 2 * i < kSize ? a[2 * i % kSize] : b[2 * i % kSize];
    const float y = !kInterleaved ? b[i] : 2 * i + 1 < kSize ? a[(2 * i + 1) % kSize] : b[(2 * i + 1) % kSize];
    const float turn = s[i] * direction;
    both[kInterleaved ? 2 * i : i] = x * c[i] - y * turn;
    both[kInterleaved ? 2 * i + 1 : kSize + i] = y * c[i] + x * turn;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) a[i] = both[i], b[i] = both[kSize + i];
  Packed<T, kSize>::pack(a).store(unit.to + first);
  Packed<T, kSize>::pack(b).store(unit.to + second);
}

template <typename T, int kSize, bool kInterleaved>
__global__ void __launch_bounds__(kMostThreads) rotate_token(Rotation call) {
  const int s = blockIdx.x, b = blockIdx.y;
  const std::int64_t position =
      call.position_ids == 0
          ? s
          : reinterpret_cast<const std::int64_t*>(call.position_ids)[static_cast<std::int64_t>(b) * call.sequence + s];
  const int pairs = call.rotated_size / 2;
  const float* cosine = reinterpret_cast<const float*>(call.cosine) + position * pairs;
  const float* sine = reinterpret_cast<const float*>(call.sine) + position * pairs;
  const int units = call.head_size / (2 * kSize), rotated_units = pairs / kSize;
  int start = 0;
#pragma unroll
  for (int index = 0; index < kMostSegments; ++index) {
    if (index >= call.num_segments) break;
    const Segment& segment = call.segments[index];
    const int count = segment.heads * units;
    // Threads that one segment leaves idle start on the next.
    for (int i = (threadIdx.x + blockDim.x - start % blockDim.x) % blockDim.x; i < count; i += blockDim.x) {
      const int head = i / units, unit_index = i - head * units;
      const Unit<T> unit = locate<T>(segment, head, s, b);
      if (segment.is_rotated && unit_index < rotated_units) {
        turn<T, kSize, kInterleaved>(unit, unit_index * kSize, pairs, cosine, sine, call.direction);
      } else {
        const int channel = unit_index * 2 * kSize;
        const auto first = Packed<T, kSize>::load(unit.from + channel);
        const auto second = Packed<T, kSize>::load(unit.from + channel + kSize);
        first.store(unit.to + channel);
        second.store(unit.to + channel + kSize);
      }
    }
    start += count;
  }
}

bool takes_vectors(const Layout& layout, int size) {
  return is_aligned(layout.address) && layout.sequence_stride % size == 0 && layout.batch_stride % size == 0 &&
         layout.group_stride % size == 0 && layout.head_stride % size == 0;
}

template <typename T, int kSize>
void rotate_with(const Rotation& call, const Place& place) {
  int units = 0;
  for (int i = 0; i < call.num_segments; ++i) units += call.segments[i].heads * (call.head_size / (2 * kSize));
  const dim3 grid(call.sequence, call.batch);
  const dim3 block(std::min(kMostThreads, static_cast<int>(ceil_div(units, 32)) * 32));
  if (call.is_interleaved) {
    launch("the rotation", rotate_token<T, kSize, true>, grid, block, 0, place, call);
  } else {
    launch("the rotation", rotate_token<T, kSize, false>, grid, block, 0, place, call);
  }
}

}  // namespace

void rotate(const Rotation& call, int type, const Place& place) {
  if (call.sequence == 0 || call.batch == 0) return;
  const DeviceGuard guard(place.device);
  with_type(type, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int kSize = vector_size<T>;
    bool vectors = call.head_size % (2 * kSize) == 0 && call.rotated_size % (2 * kSize) == 0 &&
                   is_aligned(call.cosine) && is_aligned(call.sine);
    for (int i = 0; i < call.num_segments; ++i) {
      vectors = vectors && takes_vectors(call.segments[i].from, kSize) && takes_vectors(call.segments[i].to, kSize);
    }
    vectors ? rotate_with<T, kSize>(call, place) : rotate_with<T, 1>(call, place);
  });
}

}  // namespace megatron
