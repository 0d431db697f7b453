#!/usr/bin/env bash
# GPT 1.3B (GPT-3 XL), on any number of GPUs: all of it fits on each.
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # GPT-3's Table 2.1 (Brown et al. 2020), with 16 heads: its 24 heads of 128 channels are not the width.
    --num-layers 24
    --hidden-size 2048
    --num-attention-heads 16 # heads of 128 channels, which attention kernels are fastest at
    --seq-length "${SEQ_LENGTH:-2048}"

    --global-batch-size 512 # a million tokens a step
    --micro-batch-size "${MICRO_BATCH:-8}" # 38 GB; 16,384 tokens keep a GPU's products busy
    --train-iters "$(steps 25081)" # 26 billion tokens, 20 for each weight
    --lr 2e-4
    --min-lr 2e-5

    --zero-stage 1 # less traffic than 2 or 3, which send with every micro-batch, and what it leaves whole fits
)
pretrain gpt_1.3B "${options[@]}" "$@"
