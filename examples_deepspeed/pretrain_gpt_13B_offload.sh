#!/usr/bin/env bash
# GPT 13B on few GPUs, or one: ZeRO-3 with weights and optimizer in the host's memory, of which it takes 240 GB.
# world size: 1
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

    --global-batch-size 256 # half a million tokens a step: the optimizer on the host wants large steps
    --micro-batch-size "${MICRO_BATCH:-16}" # 25 GB; all weights travel to the GPU twice for each micro-batch
    --train-iters "$(steps 490188)" # 257 billion tokens, 20 for each weight
    --lr 1e-4
    --min-lr 1e-5

    --zero-stage 3
    --remote-device cpu # a rank's share of the weights: 26 GB over all ranks
    --cpu-optimizer # their fp32 copy, Adam's two moments and the gradients: 206 GB
    --recompute-granularity full # memory for the large micro-batch
    --loss-chunk-size 4096
)
pretrain gpt_13B_offload "${options[@]}" "$@"
