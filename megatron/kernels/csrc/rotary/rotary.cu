// A thread takes a unit of a head, two vectors of channels that hold kSize pairs or that are only copied, at several
// neighbouring tokens: it finds its place once and has all their loads on the way.
#include "rotary.h"

#include <algorithm>

#include "../include/vector.cuh"

namespace megatron {
namespace {

constexpr int kMostThreads = 128;  // small blocks: a thread needs many registers

constexpr int kTokens = 4;

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

// Turns the pairs of two vectors: element i of the first with element i of the second, or neighbours in both.
template <typename T, int kSize, bool kInterleaved>
__device__ __forceinline__ void turn(Packed<T, kSize>& first, Packed<T, kSize>& second, const float* cosine,
                                     const float* sine, float direction) {
  float a[kSize], b[kSize], c[kSize], s[kSize];
  first.unpack(a);
  second.unpack(b);
  read_table(cosine, c);
  read_table(sine, s);
  float both[2 * kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    // Neighbours: pair i of this unit is elements 2i and 2i + 1 of a followed by b.
    const float x = !kInterleaved ? a[i] : 2 * i < kSize ? a[2 * i % kSize] : b[2 * i % kSize];
    const float y = !kInterleaved ? b[i] : 2 * i + 1 < kSize ? a[(2 * i + 1) % kSize] : b[(2 * i + 1) % kSize];
    const float turned = s[i] * direction;
    both[kInterleaved ? 2 * i : i] = x * c[i] - y * turned;
    both[kInterleaved ? 2 * i + 1 : kSize + i] = y * c[i] + x * turned;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) a[i] = both[i], b[i] = both[kSize + i];
  first = Packed<T, kSize>::pack(a);
  second = Packed<T, kSize>::pack(b);
}

// Where a head stands relative to its token.
__device__ __forceinline__ std::int64_t offset_of(const Layout& layout, int head, int per_group) {
  const int group = head / per_group;
  return group * layout.group_stride + (head - group * per_group) * layout.head_stride;
}

template <typename T, int kSize, bool kInterleaved>
__global__ void __launch_bounds__(kMostThreads) rotate_tokens(Rotation call) {
  wait_for_former_kernel();
  const int pairs = call.rotated_size / 2, units = call.head_size / (2 * kSize);
  const int first_token = blockIdx.x * kTokens, tokens = min(kTokens, call.sequence * call.batch - first_token);
  int s[kTokens], b[kTokens];
  std::int64_t row[kTokens];  // of the tables
#pragma unroll
  for (int n = 0; n < kTokens; ++n) {
    s[n] = (first_token + n) / call.batch;
    b[n] = first_token + n - s[n] * call.batch;
    row[n] = s[n];
    if (call.position_ids != 0 && n < tokens) {
      row[n] = reinterpret_cast<const std::int64_t*>(call.position_ids)[static_cast<std::int64_t>(b[n]) *
                                                                            call.sequence + s[n]];
    }
    row[n] *= pairs;
  }
  for (int item = threadIdx.x;; item += blockDim.x) {
    int index = 0, rest = item;
    while (index < call.num_segments && rest >= call.segments[index].heads * units) {
      rest -= call.segments[index++].heads * units;
    }
    if (index == call.num_segments) break;
    const Segment& segment = call.segments[index];
    const int head = rest / units, unit = rest - head * units;
    const bool is_turned = segment.is_rotated && unit * kSize < pairs;
    const int pair = unit * kSize;
    // Turned halves stand half of the rotated channels apart; neighbours, and what is only copied, side by side.
    const bool is_apart = is_turned && !kInterleaved;
    const int channel = is_apart ? pair : 2 * pair, distance = is_apart ? pairs : kSize;
    const T* from = reinterpret_cast<const T*>(segment.from.address) + channel +
                    offset_of(segment.from, head, segment.per_group);
    T* to = reinterpret_cast<T*>(segment.to.address) + channel + offset_of(segment.to, head, segment.per_group);
    Packed<T, kSize> first[kTokens], second[kTokens];
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      if (n < tokens) {
        const T* at = from + s[n] * segment.from.sequence_stride + b[n] * segment.from.batch_stride;
        first[n] = Packed<T, kSize>::load(at);
        second[n] = Packed<T, kSize>::load(at + distance);
      }
    }
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      if (n < tokens) {
        if (is_turned) {
          turn<T, kSize, kInterleaved>(first[n], second[n], reinterpret_cast<const float*>(call.cosine) + row[n] + pair,
                                       reinterpret_cast<const float*>(call.sine) + row[n] + pair, call.direction);
        }
        T* at = to + s[n] * segment.to.sequence_stride + b[n] * segment.to.batch_stride;
        first[n].store(at);
        second[n].store(at + distance);
      }
    }
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
  const dim3 grid(static_cast<unsigned>(ceil_div(static_cast<std::int64_t>(call.sequence) * call.batch, kTokens)));
  const dim3 block(std::min(kMostThreads, static_cast<int>(ceil_div(units, 32)) * 32));
  if (call.is_interleaved) {
    launch("the rotation", rotate_tokens<T, kSize, true>, grid, block, 0, place, call);
  } else {
    launch("the rotation", rotate_tokens<T, kSize, false>, grid, block, 0, place, call);
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
