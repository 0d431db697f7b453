#!/usr/bin/env bash
# GPT 2.7B, on any number of GPUs: all of it fits on each.
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # Shape and rates of GPT-3's Table 2.1 (Brown et al. 2020).
    --num-layers 32
    --hidden-size 2560
    --num-attention-heads 32 # heads of 80 channels
    --seq-length "${SEQ_LENGTH:-2048}"

    --global-batch-size 512 # a million tokens a step
    --micro-batch-size "${MICRO_BATCH:-4}" # 43 GB
    --train-iters "$(steps 50545)" # 53 billion tokens, 20 for each weight
    --lr 1.6e-4
    --min-lr 1.6e-5

    --zero-stage 1 # less traffic than 2 or 3, and what it leaves whole, weights and gradients, fits
)
pretrain gpt_2.7B "${options[@]}" "$@"
