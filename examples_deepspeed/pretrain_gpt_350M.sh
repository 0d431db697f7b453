#!/usr/bin/env bash
# GPT 350M (GPT-3 Medium), on any number of GPUs.
# world size: 8
#
# With --cuda-graph at the end a GPU repeats the blocks as recorded: their kernels are shorter than their launches.
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # Shape and rates of GPT-3's Table 2.1 (Brown et al. 2020).
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16 # heads of 64 channels
    --seq-length "${SEQ_LENGTH:-2048}"

    --global-batch-size 256 # half a million tokens a step
    --micro-batch-size "${MICRO_BATCH:-8}" # 18 GB; the most that divides 256 over 32 GPUs
    --train-iters "$(steps 13542)" # 7.1 billion tokens, 20 for each weight
    --lr 3e-4
    --min-lr 3e-5

    --zero-stage 1 # optimizer state shared out over the ranks at no extra traffic
)
pretrain gpt_350M "${options[@]}" "$@"
