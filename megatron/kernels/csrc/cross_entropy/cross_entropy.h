// Cross entropy over this rank's columns of a vocabulary: what forward must know of them in one pass, and the gradient.
#pragma once

#include <cstdint>

#include "../include/launch.cuh"

namespace megatron {

// Rows of `logits` are `row_stride` elements apart; the columns from `num_tokens` to `columns` are padding.
struct CrossEntropy {
  std::uintptr_t logits;
  std::uintptr_t label_columns;  // int64 [rows]; outside of 0 .. num_tokens - 1: the label is not here
  std::uintptr_t statistics;     // forward, fp32 [3, rows]: highest logit, the others' sum of exp(logit - it), label's
  std::uintptr_t losses;         // both at once, fp32 [rows]
  std::uintptr_t log_sum;        // backward, fp32 [2, rows]: highest logit, log of the sum of exp(logit - highest)
  std::uintptr_t scale;          // backward, fp32 [rows]
  std::uintptr_t grad;           // backward, may be `logits`; rows are `columns` apart unless it is
  std::int64_t rows, row_stride, grad_stride;
  int columns, num_tokens;
};

// `count` numbers side by side.
struct Rescaling {
  std::uintptr_t from, to;
  std::uintptr_t factor;  // one fp32 number
  std::int64_t count;
};

void cross_entropy_statistics(const CrossEntropy& call, int type, const Place& place);
void cross_entropy_gradient(const CrossEntropy& call, int type, const Place& place);
void cross_entropy_loss_and_gradient(const CrossEntropy& call, int type, const Place& place);
void rescale_gradient(const Rescaling& call, int from, int to, const Place& place);

}  // namespace megatron
