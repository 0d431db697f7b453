#!/usr/bin/env bash
# A model of Llama-2-7B's shape: each layer on two GPUs, and as many copies of these pairs as there are.
# With --tp-comm-overlap copies at the end shards travel beside the products, where these reach each other's memory.
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # Touvron et al. 2023 (arXiv:2307.09288).
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 11008
    --num-attention-heads 32 # heads of 128 channels; --num-key-value-heads 8 at the end makes groups of four
    --seq-length "${SEQ_LENGTH:-4096}"
    --position-embedding-type rope
    --normalization rmsnorm
    --activation-function swiglu
    --no-add-bias-linear
    --untie-embeddings-and-output-weights

    --global-batch-size 1024 # four million tokens a step
    --micro-batch-size "${MICRO_BATCH:-2}" # 49 GB of each GPU
    --train-iters "$(steps 32131)" # 135 billion tokens, 20 for each weight (Llama 2 saw two trillion: 476,837)
    --lr 3e-4
    --min-lr 3e-5

    --tensor-model-parallel-size "${TENSOR_PARALLEL:-$(ranks_within 2)}" # weights and gradients alone would take 54 GB
    --sequence-parallel # the rest of a layer is divided too
    --zero-stage 1
)
pretrain llama_7B "${options[@]}" "$@"
