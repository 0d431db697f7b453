// A block brings a tile of 128 x 128 elements into 8 bits. Rows are written as they are read; for the transposed copy
// the bytes wait in shared memory, four rows of a column in a word, so that it is written in whole lines too.
//
// Scales are powers of two: a number is then rounded to the same digits whatever the largest one beside it, and ranks
// or chunks with scales of their own compute with the numbers that a single scale would give.
#include "fp8.h"

#include <cuda_fp8.h>

#include <algorithm>
#include <stdexcept>

#include "../include/partial_rows.cuh"
#include "../include/reduce.cuh"
#include "../include/vector.cuh"

namespace megatron {
namespace {

constexpr int kSize = vector_size<bfloat_t>;
constexpr int kTile = 128;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kQuad = 4;                     // rows whose bytes of a column make a word
constexpr int kLanesAcross = 8;              // lanes of a warp beside each other in a row; the others are quads below
constexpr int kSteps = kTile / (kLanesAcross * kSize);
constexpr int kColumnWords = kTile / kQuad + 1;
constexpr int kMostRowTiles = 65535;

constexpr int kLargestThreads = 512, kLargestBlocksEach = 4, kAtOnce = 8;

using Vector = Packed<bfloat_t, kSize>;
using Word = std::uint32_t;

union FloatBits {
  float value;
  Word bits;
};

// Integers, so that what is not a number is the largest of all.
__device__ __forceinline__ Word warp_max(Word value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// The largest over a block; every thread gets it. `scratch` holds a word for each warp.
template <int kBlockWarps>
__device__ __forceinline__ Word block_max(Word value, Word* scratch) {
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kBlockWarps; ++warp) value = max(value, scratch[warp]);
  return value;
}

__device__ __forceinline__ Word largest_of(const Vector& vector, Word so_far) {
  const Word words[4] = {vector.raw.x, vector.raw.y, vector.raw.z, vector.raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) so_far = max(so_far, max(words[i] & 0x7fff0000u, words[i] << 16 & 0x7fff0000u));
  return so_far;  // the bits of a float: a bf16 number is its upper half
}

__global__ void __launch_bounds__(kLargestThreads) find_largest(std::uintptr_t from, std::int64_t count, Word* parts) {
  __shared__ Word scratch[kLargestThreads / kWarp];
  wait_for_former_kernel();
  const bfloat_t* __restrict__ x = reinterpret_cast<const bfloat_t*>(from);
  const std::int64_t vectors = count / kSize, stride = static_cast<std::int64_t>(gridDim.x) * kLargestThreads;
  Word largest = 0;
  std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kLargestThreads + threadIdx.x;
  for (; at + (kAtOnce - 1) * stride < vectors; at += kAtOnce * stride) {
    Vector some[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) some[n] = Vector::load(x + (at + n * stride) * kSize);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) largest = largest_of(some[n], largest);
  }
  for (; at < vectors; at += stride) largest = largest_of(Vector::load(x + at * kSize), largest);
  largest = block_max<kLargestThreads / kWarp>(largest, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = largest;
}

struct Scale {
  float up, down;  // to 8 bits and back; each is a power of two, or not a number
};

// The smallest power of two that brings the largest number into the format's range: 1.75 x 2^8 or 1.75 x 2^15. What is
// not finite makes everything not a number, so that it is noticed wherever it comes to.
__device__ __forceinline__ Scale scale_for(Word largest, int format) {
  constexpr Word kMantissa = 0x7fffff, kThreeQuarters = 0x600000, kNoNumber = 0x7fc00000;
  const int exponent = static_cast<int>(largest >> 23);
  const int top = format == kE4M3 ? 8 : 15;
  const int down = min(max(exponent - top + ((largest & kMantissa) > kThreeQuarters ? 1 : 0), 1), 252);
  FloatBits both[2];
  both[0].bits = exponent == 255 ? kNoNumber : static_cast<Word>(254 - down) << 23;
  both[1].bits = exponent == 255 ? kNoNumber : static_cast<Word>(down) << 23;
  return {both[0].value, both[1].value};
}

template <int kFormat>
__device__ __forceinline__ Word to_bytes(float a, float b, float c, float d) {
  constexpr __nv_fp8_interpretation_t kKind = kFormat == kE4M3 ? __NV_E4M3 : __NV_E5M2;
  const Word low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kKind);
  const Word high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kKind);
  return low | high << 16;
}

// Four rows of four bytes become four columns.
__device__ __forceinline__ void transpose(const Word (&rows)[4], Word (&columns)[4]) {
  const Word a = __byte_perm(rows[0], rows[1], 0x5140), b = __byte_perm(rows[2], rows[3], 0x5140);
  const Word c = __byte_perm(rows[0], rows[1], 0x7362), d = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(a, b, 0x5410), columns[1] = __byte_perm(a, b, 0x7632);
  columns[2] = __byte_perm(c, d, 0x5410), columns[3] = __byte_perm(c, d, 0x7632);
}

// Where the word of four rows of a column waits: neither those who write nor those who read meet in a bank.
__device__ __forceinline__ int word_at(int column, int quad) {
  return column * kColumnWords + quad + kQuad * (column / kWarp);
}

template <int kFormat>
__global__ void __launch_bounds__(kThreads) quantise(Quantise call) {
  __shared__ Word words[kTile * kColumnWords + kQuad * (kTile / kWarp)];
  __shared__ float warp_sums[kWarps][kTile];
  __shared__ Word scratch[kWarps];
  wait_for_former_kernel();
  const bfloat_t* __restrict__ x = reinterpret_cast<const bfloat_t*>(call.x);
  // Last rows first: `find_largest` has read them last, and the cache may still hold them.
  const std::int64_t tile = gridDim.y - 1 - blockIdx.y, first_row = tile * kTile;
  const int first_column = blockIdx.x * kTile;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int quad = warp * (kWarp / kLanesAcross) + lane / kLanesAcross;
  const int across = lane % kLanesAcross * kSize;
  Vector part[kSteps][kQuad];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = first_column + step * kLanesAcross * kSize + across;
#pragma unroll
    for (int n = 0; n < kQuad; ++n) {
      const std::int64_t row = first_row + quad * kQuad + n;
      const bool is_here = row < call.rows && column < call.columns;
      part[step][n] = is_here ? Vector::load(x + row * call.columns + column) : Vector::zeros();
    }
  }
  Word largest = 0;
  for (int i = threadIdx.x; i < call.parts; i += kThreads) {
    largest = max(largest, reinterpret_cast<const Word*>(call.largest)[i]);
  }
  const Scale scale = scale_for(block_max<kWarps>(largest, scratch), kFormat);
  if (tile == 0 && blockIdx.x == 0 && threadIdx.x == 0) *reinterpret_cast<float*>(call.scale) = scale.down;

  std::uint8_t* by_row = reinterpret_cast<std::uint8_t*>(call.by_row);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int in_tile = step * kLanesAcross * kSize + across, column = first_column + in_tile;
    Word bytes[2][kQuad];
    float sums[kSize] = {};
#pragma unroll
    for (int n = 0; n < kQuad; ++n) {
      float v[kSize];
      part[step][n].unpack(v);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] += v[i], v[i] *= scale.up;
      bytes[0][n] = to_bytes<kFormat>(v[0], v[1], v[2], v[3]);
      bytes[1][n] = to_bytes<kFormat>(v[4], v[5], v[6], v[7]);
      const std::int64_t row = first_row + quad * kQuad + n;
      if (by_row != nullptr && row < call.rows && column < call.columns) {
        *reinterpret_cast<uint2*>(by_row + row * call.columns + column) = make_uint2(bytes[0][n], bytes[1][n]);
      }
    }
    if (call.by_column != 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Word columns[4];
        transpose(bytes[half], columns);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[word_at(in_tile + 4 * half + i, quad)] = columns[i];
      }
    }
    if (call.partial != 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        for (int below = kLanesAcross; below < kWarp; below *= 2) {
          sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], below);
        }
        if (lane < kLanesAcross) warp_sums[warp][in_tile + i] = sums[i];
      }
    }
  }
  __syncthreads();
  if (call.by_column != 0) {
    constexpr int kLanesDown = kTile / 16, kAcross = kWarp / kLanesDown;  // a lane writes 16 rows of a column
    std::uint8_t* by_column = reinterpret_cast<std::uint8_t*>(call.by_column);
    const int down = lane % kLanesDown;
    const std::int64_t row = first_row + 16 * down;
#pragma unroll
    for (int start = 0; start < kTile; start += kWarps * kAcross) {
      const int in_tile = start + warp * kAcross + lane / kLanesDown, column = first_column + in_tile;
      if (column >= call.columns || row >= call.padded_rows) continue;
      const int at = word_at(in_tile, 4 * down);
      *reinterpret_cast<uint4*>(by_column + column * call.padded_rows + row) =
          make_uint4(words[at], words[at + 1], words[at + 2], words[at + 3]);
    }
  }
  if (call.partial != 0 && threadIdx.x < kTile && first_column + threadIdx.x < call.columns) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w][threadIdx.x];
    reinterpret_cast<float*>(call.partial)[tile * call.columns + first_column + threadIdx.x] = sum;
  }
}

void check_quantise(const Quantise& call) {
  if (call.columns % 16 != 0 || call.padded_rows % 16 != 0) {
    throw std::invalid_argument("a matrix in 8 bits has multiples of 16 columns and of padded rows");
  }
  if (!is_aligned(call.x) || !is_aligned(call.by_row) || !is_aligned(call.by_column)) {
    throw std::invalid_argument("a matrix in 8 bits and what it is made of start at multiples of 16 bytes");
  }
  if (fp8_tiles(call.rows) > kMostRowTiles) throw std::invalid_argument("a matrix in 8 bits has too many rows");
}

}  // namespace

int fp8_parts(std::int64_t count, int device) {
  const std::int64_t wanted = kLargestBlocksEach * multiprocessors(device);
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(count, kSize * kLargestThreads), 1, wanted));
}

std::int64_t fp8_tiles(std::int64_t rows) { return std::max<std::int64_t>(1, ceil_div(rows, kTile)); }

void fp8_largest(std::uintptr_t x, std::uintptr_t largest, std::int64_t count, int parts, const Place& place) {
  if (count % kSize != 0 || !is_aligned(x)) throw std::invalid_argument("a matrix of whole, aligned vectors is needed");
  const DeviceGuard guard(place.device);
  launch("the largest of a matrix", find_largest, dim3(parts), dim3(kLargestThreads), 0, place, x, count,
         reinterpret_cast<Word*>(largest));
}

void fp8_quantise(const Quantise& call, int format, const Place& place) {
  check_quantise(call);
  const DeviceGuard guard(place.device);
  const auto tiles = static_cast<unsigned>(fp8_tiles(call.rows));
  const dim3 grid(static_cast<unsigned>(ceil_div(call.columns, kTile)), tiles);
  const char* what = "bringing a matrix into 8 bits";
  launch(what, format == kE4M3 ? quantise<kE4M3> : quantise<kE5M2>, grid, dim3(kThreads), 0, place, call);
  if (call.sums == 0) return;
  sum_partial_rows<Quantise, bfloat_t>(what, call.partial, static_cast<int>(tiles), call.columns, call.sums, 0, place);
}

}  // namespace megatron
