#!/usr/bin/env bash
# Long sequences with Megatron's sequence parallelism: GPT 13B at 16,384 tokens, and many more.
#
#   SEQ_LENGTH=262144 examples_deepspeed/pretrain_gpt_13B_seq_parallel.sh --recompute-granularity full  # 56 GB
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

seq_length=${SEQ_LENGTH:-16384}
micro_batch=${MICRO_BATCH:-1}
samples=$((2097152 / seq_length)) # two million tokens a step, at any length
options=(
    --num-layers 40
    --hidden-size 5120
    --num-attention-heads 40 # heads of 128 channels
    --seq-length "$seq_length"
    --position-embedding-type rope # no table of positions that grows with the length
    --rotary-base 1000000 # so that the slowest channels turn less than once in a million tokens

    --global-batch-size "$((samples < micro_batch ? micro_batch : samples))"
    --micro-batch-size "$micro_batch" # 43 GB
    --train-iters "$(steps 122547)" # 257 billion tokens, 20 for each weight
    --lr 1e-4
    --min-lr 1e-5
    --init-method-std 0.01

    --tensor-model-parallel-size "${TENSOR_PARALLEL:-$(ranks_within 8)}" # each holds an eighth of weights and activations
    --sequence-parallel # norms, dropout and residuals too
    --loss-chunk-size 4096 # else all logits of a sequence exist at once
    --zero-stage 1
)
pretrain gpt_13B_seq_parallel "${options[@]}" "$@"
