#!/usr/bin/env bash
# Long sequences with Megatron's sequence parallelism: GPT 30B at 32,768 tokens. Two machines with GPUs of 80 GB, or one
# with 141 GB; on one with 80 GB add --cpu-optimizer, which takes 470 GB of the host instead.
# world size: 16
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

seq_length=${SEQ_LENGTH:-32768}
micro_batch=${MICRO_BATCH:-1}
samples=$((4194304 / seq_length)) # four million tokens a step, at any length
options=(
    --num-layers 64
    --hidden-size 6144
    --num-attention-heads 64 # heads of 96 channels
    --seq-length "$seq_length"
    --position-embedding-type rope # no table of positions that grows with the length
    --rotary-base 1000000 # so that the slowest channels turn less than once in a million tokens

    --global-batch-size "$((samples < micro_batch ? micro_batch : samples))"
    --micro-batch-size "$micro_batch" # 51 GB on two machines, 73 GB on one
    --train-iters "$(steps 139714)" # 586 billion tokens, 20 for each weight
    --lr 1e-4
    --min-lr 1e-5
    --init-method-std 0.008

    --tensor-model-parallel-size "${TENSOR_PARALLEL:-$(ranks_within 8)}" # within a machine, where links are fast
    --sequence-parallel # norms, dropout and residuals too
    --recompute-granularity full # the blocks' inputs alone are kept: a sixteenth
    --loss-chunk-size 4096 # else all logits of a sequence exist at once
    --zero-stage 1 # the machines share the optimizer state
)
pretrain gpt_30B_seq_parallel "${options[@]}" "$@"
