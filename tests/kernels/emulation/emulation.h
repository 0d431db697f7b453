// Runs CUDA kernels on the CPU, thread by thread: each is a fiber that yields where it waits for others. Slow, but the
// sources of the kernels are tested as they are, out-of-bounds accesses and missing barriers included.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulated {

constexpr int kWarpSize = 32;
constexpr int kStackBytes = 96 * 1024;
constexpr int kSharedBytes = 227 * 1024;

struct Barrier {
  int arrived = 0;
  long long generation = 0;
};

struct Copy {
  void* to;
  const void* from;  // none: zeros
  int bytes;

  void arrive() const {
    if (from == nullptr) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  int linear;
  bool is_done;
  std::deque<std::vector<Copy>> copies;  // groups that are on their way; the last one is open
};

inline uint3 thread, block;
inline dim3 block_size, grid_size;
inline std::vector<Fiber> fibers;
inline Barrier barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<float> exchanged;
inline std::vector<char> dynamic;
inline ucontext_t scheduler;
inline Fiber* running;
inline int alive;
inline bool has_moved;  // whether anything but waiting happened in this round
inline std::function<void()> body;

// Shared memory of a block; tests make it less.
inline int shared_bytes() {
  const char* given = std::getenv("EMULATED_SHARED_BYTES");
  return given == nullptr ? kSharedBytes : std::atoi(given);
}

inline std::uint32_t random_number() {
  static std::uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 16;
}

inline void yield_now() {
  Fiber* self = running;
  swapcontext(&self->context, &scheduler);
  thread = self->index;
}

inline int alive_in_warp(int warp) {
  int count = 0;
  for (int i = warp * kWarpSize; i < std::min<int>((warp + 1) * kWarpSize, fibers.size()); ++i) count += !fibers[i].is_done;
  return count;
}

template <typename Expected>
void arrive(Barrier& barrier, Expected expected) {
  const long long generation = barrier.generation;
  ++barrier.arrived;
  has_moved = true;
  while (barrier.generation == generation) {
    if (barrier.arrived >= expected()) {
      barrier.arrived = 0;
      ++barrier.generation;
      has_moved = true;
    } else {
      yield_now();
    }
  }
}

inline void wait_for_warp() {
  const int warp = running->linear / kWarpSize;
  arrive(warp_barriers[warp], [warp] { return alive_in_warp(warp); });
}

// The value that the thread of this number in the block has.
template <typename T>
T value_of(int other_thread, T value) {
  std::memcpy(&exchanged[running->linear], &value, sizeof value);
  wait_for_warp();
  T other;
  std::memcpy(&other, &exchanged[other_thread], sizeof other);
  wait_for_warp();
  return other;
}

template <typename T>
T shuffle_xor(T value, int step) {
  return value_of(running->linear ^ step, value);
}

inline float shuffle(float value, int lane) {
  return value_of(running->linear / kWarpSize * kWarpSize + lane, value);
}

// Bytes of `low` (0 .. 3) and `high` (4 .. 7), as the digits of `selector` name them.
inline unsigned chosen_bytes(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t all = std::uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (all >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline void enter() {
  body();
  running->is_done = true;
  --alive;
  has_moved = true;
  swapcontext(&running->context, &scheduler);
}

inline void start_block() {
  const int count = block_size.x * block_size.y * block_size.z;
  fibers.resize(count);
  exchanged.assign(count + kWarpSize, 0.0f);
  warp_barriers.assign((count + kWarpSize - 1) / kWarpSize, Barrier{});
  barrier = Barrier{};
  alive = count;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    fiber.linear = i;
    fiber.is_done = false;
    fiber.copies.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 0);
  }
}

inline void run_block() {
  start_block();
  while (alive > 0) {
    has_moved = false;
    // In another order each time, so that what depends on it differs between two runs.
    const std::size_t count = fibers.size(), first = random_number() % count;
    const bool is_reversed = random_number() % 2;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t place = (first + i) % count;
      Fiber& fiber = fibers[is_reversed ? count - 1 - place : place];
      if (fiber.is_done) continue;
      running = &fiber;
      thread = fiber.index;
      swapcontext(&scheduler, &fiber.context);
    }
    if (!has_moved) throw std::runtime_error("the threads of a block wait for each other for ever");
  }
}

}  // namespace emulated

#define threadIdx (emulated::thread)
#define blockIdx (emulated::block)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

inline float __shfl_xor_sync(unsigned, float value, int step) { return emulated::shuffle_xor(value, step); }
inline unsigned __shfl_xor_sync(unsigned, unsigned value, int step) { return emulated::shuffle_xor(value, step); }
inline float __shfl_sync(unsigned, float value, int lane) { return emulated::shuffle(value, lane); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  return emulated::chosen_bytes(low, high, selector);
}
inline void __syncwarp() { emulated::wait_for_warp(); }
inline void __syncthreads() {
  emulated::arrive(emulated::barrier, [] { return emulated::alive; });
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::isnan;
using std::max;
using std::min;

extern "C" {
__attribute__((weak)) cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
__attribute__((weak)) cudaError_t cudaSetDevice(int) { return cudaSuccess; }
__attribute__((weak)) cudaError_t cudaGetLastError() { return cudaSuccess; }
__attribute__((weak)) const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
__attribute__((weak)) cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  constexpr int kMultiprocessors = 3;  // few, so that blocks take several turns
  *value = name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulated::shared_bytes() : kMultiprocessors;
  return cudaSuccess;
}
}

namespace megatron {

inline float fast_exp2(float x) { return std::exp2(x); }

// Copies arrive when they are waited for, no earlier.
template <int kBytes>
void start_copy(void* shared, const void* global, bool is_wanted) {
  emulated::running->copies.back().push_back({shared, is_wanted ? global : nullptr, kBytes});
}

inline void close_copies() { emulated::running->copies.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = emulated::running->copies;
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const auto& copy : groups.front()) copy.arrive();
  }
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulated::dynamic.data());
}

struct Place;

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, const Place&,
            Arguments... arguments) {
  if (shared_bytes > static_cast<std::size_t>(emulated::shared_bytes())) {
    throw std::runtime_error("a block has no such shared memory");
  }
  emulated::grid_size = grid;
  emulated::block_size = block;
  emulated::dynamic.assign(shared_bytes, '\x7f');
  emulated::body = [=] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      emulated::block = {x, y, 0};
      emulated::run_block();
    }
  }
}

inline void wait_for_former_kernel() {}
inline void let_next_kernel_come() {}

}  // namespace megatron
