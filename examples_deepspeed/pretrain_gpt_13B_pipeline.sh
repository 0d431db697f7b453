#!/usr/bin/env bash
# GPT 13B in a pipeline of two stages with ZeRO-1: for machines whose links to each other are slow.
#
#   HOSTFILE=hosts PIPELINE_PARALLEL=4 TENSOR_PARALLEL=8 examples_deepspeed/pretrain_gpt_13B_pipeline.sh  # on 4 x 8
# world size: 8
#
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

stages=${PIPELINE_PARALLEL:-$(ranks_within 2)}
options=(
    # Shape and rates of GPT-3's Table 2.1 (Brown et al. 2020), its width rounded to whole heads.
    --num-layers 40 # shared out by work: the stage with the output head gets fewer
    --hidden-size 5120
    --num-attention-heads 40 # heads of 128 channels
    --seq-length "${SEQ_LENGTH:-2048}"

    --global-batch-size 1024 # a rank idles (stages - 1) / micro-batches of a step: many of them hide it
    --micro-batch-size "${MICRO_BATCH:-2}" # 37 GB; the first stage keeps as many micro-batches as there are stages
    --train-iters "$(steps 122547)" # 257 billion tokens, 20 for each weight
    --lr 1e-4
    --min-lr 1e-5

    --pipeline-model-parallel-size "$stages" # sends one tensor of hidden states on, not two for each layer
    --tensor-model-parallel-size "${TENSOR_PARALLEL:-$(ranks_within 4 "$stages")}"
    --sequence-parallel
    --zero-stage 1 # what DeepSpeed's pipeline can do
)
pretrain gpt_13B_pipeline "${options[@]}" "$@"
