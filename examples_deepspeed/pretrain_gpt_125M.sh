#!/usr/bin/env bash
# GPT-3's smallest model: 125M weights, on any number of GPUs.
# world size: 8
#
#   examples_deepspeed/pretrain_gpt_125M.sh                           # all GPUs of this machine, the quickstart's text
#   NUM_GPUS=1 TRAIN_ITERS=50 examples_deepspeed/pretrain_gpt_125M.sh --log-interval 1
#   DATA_PATH=/data/web_text TOKENIZER_MODEL=/data/tokenizer.model examples_deepspeed/pretrain_gpt_125M.sh
#
# With --cuda-graph at the end a GPU repeats the blocks as recorded: their kernels are shorter than their launches.
# What can be set is at the head of pretrain.sh.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

options=(
    # Shape and rates of GPT-3's Table 2.1 (Brown et al. 2020), first row.
    --num-layers 12
    --hidden-size 768
    --num-attention-heads 12 # heads of 64 channels
    --seq-length "${SEQ_LENGTH:-2048}"

    # 256 x 2,048 tokens are GPT-3's half a million a step, whatever the number of GPUs: ranks share them, and what
    # does not fit at once is accumulated.
    --global-batch-size 256
    --micro-batch-size "${MICRO_BATCH:-8}" # the most that divides 256 over up to 32 GPUs; 8 GB
    --train-iters "$(steps 4768)" # 2.5 billion tokens, 20 for each weight (GPT-3 saw 300 billion: 572,205)
    --lr 6e-4
    --min-lr 6e-5 # a tenth at the end

    --zero-stage 1 # optimizer state shared out over the ranks at no extra traffic
)
pretrain gpt_125M "${options[@]}" "$@"
