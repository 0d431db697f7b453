// Elements of three types, moved in vectors of up to 16 bytes and computed with in fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace megatron {

using half_t = __half;
using bfloat_t = __nv_bfloat16;

// Names of the types across the language boundary; `megatron/kernels/operator.py` has the same.
enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int vector_size = kVectorBytes / static_cast<int>(sizeof(T));

template <int kBytes>
struct RawOf;
template <>
struct RawOf<2> {
  using type = std::uint16_t;
};
template <>
struct RawOf<4> {
  using type = std::uint32_t;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__host__ __device__ __forceinline__ float to_float(bfloat_t x) { return __bfloat162float(x); }

template <typename T>
__host__ __device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, half_t>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

__device__ __forceinline__ float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#ifdef __CUDACC__
// 2^x to the precision of the special-function unit, in one instruction; tiny results become zero.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// kSize neighbouring elements as one load or store. They stay packed in registers until they are computed with.
template <typename T, int kSize>
struct Packed {
  using Raw = typename RawOf<static_cast<int>(sizeof(T)) * kSize>::type;
  Raw raw;

  static __device__ __forceinline__ Packed load(const T* from) { return {*reinterpret_cast<const Raw*>(from)}; }

  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Raw*>(to) = raw; }

  static __device__ __forceinline__ Packed zeros() { return {Raw{}}; }

  // Makes the compiler unpack once more from here on, where it would keep the floats: twice the registers.
  __device__ __forceinline__ void stay_packed() {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Raw) == 16) asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
#endif
  }

  __device__ __forceinline__ bool is_zero() const {
    if constexpr (sizeof(Raw) == 16) {
      return (raw.x | raw.y | raw.z | raw.w) == 0;
    } else if constexpr (sizeof(Raw) == 8) {
      return (raw.x | raw.y) == 0;
    } else {
      return raw == 0;
    }
  }

  __device__ __forceinline__ void unpack(float (&out)[kSize]) const {
    if constexpr (std::is_same_v<T, bfloat_t> && kSize % 2 == 0) {
      // A bf16 number is the upper half of an fp32 one: an instruction for each, where the compiler takes two.
      const auto* pairs = reinterpret_cast<const std::uint32_t*>(&raw);
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        out[2 * i] = float_of_bits(pairs[i] << 16);
        out[2 * i + 1] = float_of_bits(pairs[i] & 0xffff0000u);
      }
    } else {
      const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int i = 0; i < kSize; ++i) out[i] = to_float(elements[i]);
    }
  }

  static __device__ __forceinline__ Packed pack(const float (&in)[kSize]) {
    Packed packed;
    if constexpr (std::is_same_v<T, bfloat_t> && kSize % 2 == 0) {
      auto* pairs = reinterpret_cast<__nv_bfloat162*>(&packed.raw);
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) pairs[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    } else if constexpr (std::is_same_v<T, half_t> && kSize % 2 == 0) {
      auto* pairs = reinterpret_cast<__half2*>(&packed.raw);
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) pairs[i] = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
    } else {
      auto* elements = reinterpret_cast<T*>(&packed.raw);
#pragma unroll
      for (int i = 0; i < kSize; ++i) elements[i] = from_float<T>(in[i]);
    }
    return packed;
  }
};

template <typename T>
struct Type {
  using type = T;
};

// Calls `function(Type<T>{})` for the type that `dtype` names.
template <typename Function>
void with_type(int dtype, Function&& function) {
  switch (dtype) {
    case kFloat32:
      return function(Type<float>{});
    case kFloat16:
      return function(Type<half_t>{});
    case kBFloat16:
      return function(Type<bfloat_t>{});
    default:
      throw std::invalid_argument("this kernel computes in fp32, fp16 or bf16 only");
  }
}

inline bool is_aligned(std::uintptr_t address) { return address % kVectorBytes == 0; }

}  // namespace megatron
