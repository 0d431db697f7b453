#!/usr/bin/env bash
# Long sequences with DeepSpeed's Ulysses: GPT 1.3B at 32,768 tokens, and up to a million.
#
#   SEQ_LENGTH=262144 examples_deepspeed/pretrain_gpt_1.3B_ulysses.sh                                # 63 GB
#   SEQ_LENGTH=1048576 examples_deepspeed/pretrain_gpt_1.3B_ulysses.sh --recompute-granularity full  # 37 GB
#
# Each rank has a part of every sequence and all weights; before attention they exchange it for whole sequences of some
# heads. The exchange shrinks as ranks are added, unlike that of sequence parallelism; the weights do not.
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

seq_length=${SEQ_LENGTH:-32768}
micro_batch=${MICRO_BATCH:-1}
samples=$((1048576 / seq_length)) # a million tokens a step, at any length
options=(
    --num-layers 24
    --hidden-size 2048
    --num-attention-heads 16 # a multiple of the ranks that exchange them
    --seq-length "$seq_length"
    --position-embedding-type rope # no table of positions that grows with the length
    --rotary-base 1000000 # so that the slowest channels turn less than once in a million tokens

    --global-batch-size "$((samples < micro_batch ? micro_batch : samples))"
    --micro-batch-size "$micro_batch" # 17 GB
    --train-iters "$(steps 25081)" # 26 billion tokens, 20 for each weight
    --lr 2e-4
    --min-lr 2e-5
    --init-method-std 0.013

    --ds-sequence-parallel-size "${ULYSSES:-$(ranks_within 8)}"
    --loss-chunk-size 4096 # else all logits of a rank's part exist at once
    --zero-stage 1 # shares the optimizer state over the ranks of a sequence as well
)
pretrain gpt_1.3B_ulysses "${options[@]}" "$@"
