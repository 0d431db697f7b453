#!/usr/bin/env bash
# GPT 30B: each layer on the eight GPUs of a machine. Two machines with GPUs of 80 GB, or one with 141 GB; on one with
# 80 GB add --cpu-optimizer, which takes 470 GB of the host instead.
# world size: 16
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # The shape that Megatron-DeepSpeed's own scripts call 30B.
    --num-layers 64
    --hidden-size 6144
    --num-attention-heads 64 # heads of 96 channels
    --seq-length "${SEQ_LENGTH:-2048}"
    --init-method-std 0.008 # about sqrt(2 / 5h), for a width at which 0.02 is too much

    --global-batch-size 1024 # two million tokens a step
    --micro-batch-size "${MICRO_BATCH:-2}" # 51 GB on two machines, 73 GB on one
    --train-iters "$(steps 279427)" # 586 billion tokens, 20 for each weight
    --lr 1e-4
    --min-lr 1e-5

    --tensor-model-parallel-size "${TENSOR_PARALLEL:-$(ranks_within 8)}" # within a machine, where links are fast
    --sequence-parallel
    --zero-stage 1 # the machines share the optimizer state
)
pretrain gpt_30B "${options[@]}" "$@"
