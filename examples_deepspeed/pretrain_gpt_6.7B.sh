#!/usr/bin/env bash
# GPT 6.7B: each layer on two GPUs, and as many copies of these pairs as there are.
# With --tp-comm-overlap copies at the end shards travel beside the products, where these reach each other's memory.
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # Shape and rates of GPT-3's Table 2.1 (Brown et al. 2020).
    --num-layers 32
    --hidden-size 4096
    --num-attention-heads 32 # heads of 128 channels
    --seq-length "${SEQ_LENGTH:-2048}"

    --global-batch-size 1024 # two million tokens a step
    --micro-batch-size "${MICRO_BATCH:-4}" # 48 GB of each GPU
    --train-iters "$(steps 63505)" # 133 billion tokens, 20 for each weight
    --lr 1.2e-4
    --min-lr 1.2e-5

    # Weights and gradients alone would take 53 GB of each GPU (8 bytes for each weight when backward ends).
    --tensor-model-parallel-size "${TENSOR_PARALLEL:-$(ranks_within 2)}"
    --sequence-parallel # the rest of a layer is divided too, at no more traffic forward
    --zero-stage 1
)
pretrain gpt_6.7B "${options[@]}" "$@"
