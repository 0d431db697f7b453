#!/usr/bin/env bash
# A Llama-like model of 1.3B, on any number of GPUs: rotary positions, RMSNorm, SwiGLU, no biases, a head of its own.
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    --num-layers 24
    --hidden-size 2048
    --ffn-hidden-size 5504 # 8/3 of the width, in multiples of 128: as many weights as 4 without a gate
    --num-attention-heads 16 # heads of 128 channels
    --seq-length "${SEQ_LENGTH:-2048}"
    --position-embedding-type rope
    --normalization rmsnorm
    --activation-function swiglu
    --no-add-bias-linear
    --untie-embeddings-and-output-weights

    --global-batch-size 512 # a million tokens a step
    --micro-batch-size "${MICRO_BATCH:-8}" # 39 GB
    --train-iters "$(steps 25654)" # 27 billion tokens, 20 for each weight
    --lr 3e-4
    --min-lr 3e-5

    --zero-stage 1 # less traffic than 2 or 3, and what it leaves whole fits
)
pretrain llama_1.3B "${options[@]}" "$@"
