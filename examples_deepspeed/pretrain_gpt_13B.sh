#!/usr/bin/env bash
# GPT 13B: each layer on four GPUs of a machine.
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # Shape and rates of GPT-3's Table 2.1 (Brown et al. 2020), its width rounded to whole heads.
    --num-layers 40
    --hidden-size 5120
    --num-attention-heads 40 # heads of 128 channels
    --seq-length "${SEQ_LENGTH:-2048}"

    --global-batch-size 1024 # two million tokens a step
    --micro-batch-size "${MICRO_BATCH:-4}" # 53 GB on one machine, less on more: more ranks share the optimizer state
    --train-iters "$(steps 122547)" # 257 billion tokens, 20 for each weight
    --lr 1e-4
    --min-lr 1e-5

    --tensor-model-parallel-size "${TENSOR_PARALLEL:-$(ranks_within 4)}" # within a machine, where links are fast
    --sequence-parallel
    --zero-stage 1
)
pretrain gpt_13B "${options[@]}" "$@"
