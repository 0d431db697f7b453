// Brings bf16 matrices into 8 bits: their largest absolute value, then both copies that products need, in one pass.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

// `megatron/kernels/fp8.py` has the same numbers.
enum Format : int { kE4M3 = 0, kE5M2 = 1 };

// x is bf16 [rows, columns], a multiple of 16 columns.
struct Quantise {
  std::uintptr_t x;
  std::uintptr_t largest;    // fp32 [parts]: the largest absolute value of x is the largest of these
  std::uintptr_t scale;      // fp32 [1]: what an 8-bit number is to be multiplied with
  std::uintptr_t by_row;     // 8 bits [rows, columns]; 0 when it is not wanted
  std::uintptr_t by_column;  // 8 bits [columns, padded_rows], zeros behind the rows; 0 when it is not wanted
  std::uintptr_t sums;       // bf16 [columns], sums over the rows; 0 when they are not wanted
  std::uintptr_t partial;    // fp32 [tiles, columns] to work in, where sums are
  std::int64_t rows, padded_rows;
  int columns;
  int parts;
};

// Writes fp32 [parts]; `parts` from `fp8_parts`.
void fp8_largest(std::uintptr_t x, std::uintptr_t largest, std::int64_t count, int parts, const Place& place);
void fp8_quantise(const Quantise& call, int format, const Place& place);

// Parts that fill the device.
int fp8_parts(std::int64_t count, int device);

// Runs of rows whose sums are kept apart.
std::int64_t fp8_tiles(std::int64_t rows);

}  // namespace megatron
