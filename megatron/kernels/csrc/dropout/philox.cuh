// Random numbers as a function of a key and a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3", Philox4x32 with 10 rounds).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace megatron {

struct FourWords {
  std::uint32_t word[4];
};

// In one instruction, where the compiler adds zero to the upper half in another.
__host__ __device__ __forceinline__ std::uint64_t product(std::uint32_t a, std::uint32_t b) {
#ifdef __CUDA_ARCH__
  std::uint64_t result;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(result) : "r"(a), "r"(b));
  return result;
#else
  return static_cast<std::uint64_t>(a) * b;
#endif
}

__host__ __device__ __forceinline__ FourWords philox(std::uint64_t key, std::uint64_t counter) {
  constexpr std::uint32_t kFirstFactor = 0xD2511F53u, kSecondFactor = 0xCD9E8D57u;
  constexpr std::uint32_t kFirstStep = 0x9E3779B9u, kSecondStep = 0xBB67AE85u;
  constexpr int kRounds = 10;
  std::uint32_t a = static_cast<std::uint32_t>(counter), b = static_cast<std::uint32_t>(counter >> 32), c = 0, d = 0;
  std::uint32_t first = static_cast<std::uint32_t>(key), second = static_cast<std::uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t x = product(kFirstFactor, a), y = product(kSecondFactor, c);
    a = static_cast<std::uint32_t>(y >> 32) ^ b ^ first;
    c = static_cast<std::uint32_t>(x >> 32) ^ d ^ second;
    b = static_cast<std::uint32_t>(y);
    d = static_cast<std::uint32_t>(x);
    first += kFirstStep;
    second += kSecondStep;
  }
  return {{a, b, c, d}};
}

}  // namespace megatron
