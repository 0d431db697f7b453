// Scaled softmax of attention scores, with a mask, causality or both, and its gradient.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

// Scores and all else of their shape are [batch, heads, queries, keys] and contiguous. A row without any key that it may
// attend to has weights of zero.
struct Softmax {
  std::uintptr_t scores;                     // forward
  std::uintptr_t mask;                       // forward, bool, its keys side by side, true: may attend; 0: there is none
  std::int64_t mask_batch, mask_query;       // elements between its batches and its queries
  std::uintptr_t weights;                    // forward's result, which backward reads
  std::uintptr_t grad_weights, grad_scores;  // backward
  std::int64_t rows;                         // batch x heads x queries
  int heads, queries, keys;
  int causal;  // 1: query i sees the keys up to keys - queries + i
  float scale;
};

void softmax_forward(const Softmax& call, int type, const Place& place);
void softmax_backward(const Softmax& call, int type, const Place& place);

}  // namespace megatron
