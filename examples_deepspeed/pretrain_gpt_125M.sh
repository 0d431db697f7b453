#!/usr/bin/env bash
# GPT-3's smallest model: 125M weights, sequences of 2,048 tokens.
# world size: 8
#
#   examples_deepspeed/pretrain_gpt_125M.sh                           # all GPUs of this machine, the quickstart's text
#   NUM_GPUS=1 TRAIN_ITERS=50 examples_deepspeed/pretrain_gpt_125M.sh --log-interval 1
#   DATA_PATH=/data/web_text TOKENIZER_MODEL=/data/tokenizer.model examples_deepspeed/pretrain_gpt_125M.sh
#
# Flags at the end are added, and win over those here. NUM_GPUS, NUM_NODES, HOSTFILE, LAUNCHER: see launch.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

SEQ_LENGTH=${SEQ_LENGTH:-2048}    # as GPT-3
MICRO_BATCH=${MICRO_BATCH:-8}     # the most that divides 256 over up to 32 GPUs; lower it when memory runs out
TRAIN_ITERS=${TRAIN_ITERS:-4768}  # 2.5 billion tokens, 20 for each weight (GPT-3 saw 300 billion: 572,205)
SAVE=${SAVE:-output/gpt_125M}

quickstart="$here/../quickstart"
DATA_PATH=${DATA_PATH:-$quickstart/data/python_text_document}
TOKENIZER_TYPE=${TOKENIZER_TYPE:-SentencePieceTokenizer}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-$quickstart/tokenizer.model}
if [ -z "${DRY_RUN:-}" ] && [ "${DATA_PATH#"$quickstart"}" != "$DATA_PATH" ] && [ ! -f "$DATA_PATH.idx" ]; then
    echo "error: no data. Set DATA_PATH and TOKENIZER_MODEL, or make the quickstart's: QUICKSTART_ONLY=data make quickstart" >&2
    exit 2
fi

options=(
    # The model of GPT-3's Table 2.1, first row.
    --num-layers 12
    --hidden-size 768
    --num-attention-heads 12 # heads of 64 channels
    --seq-length "$SEQ_LENGTH"
    --attention-dropout 0 # each token is seen about once, so there is nothing to overfit
    --hidden-dropout 0

    # 256 x 2,048 tokens are GPT-3's half a million a step, whatever the number of GPUs: ranks share them, and what
    # does not fit at once is accumulated.
    --global-batch-size 256
    --micro-batch-size "$MICRO_BATCH"
    --train-iters "$TRAIN_ITERS"

    --lr 6e-4 # GPT-3's for this size
    --min-lr 6e-5 # a tenth at the end
    --lr-decay-style cosine
    --lr-warmup-fraction 0.05
    --adam-beta2 0.95 # a shorter memory than 0.999: steadier with large batches
    --weight-decay 0.1
    --clip-grad 1.0

    --precision bf16 # fp16's range needs loss scaling; bf16 has fp32's
    --zero-stage 1 # optimizer state shared out over the ranks at no extra traffic

    --data-path "$DATA_PATH"
    --tokenizer-type "$TOKENIZER_TYPE"
    --tokenizer-model "$TOKENIZER_MODEL"
    --split "969,30,1"

    --save "$SAVE"
    --load "$SAVE"
    --load-if-exists # so that the same command starts and resumes
    --save-interval 500
    --keep-last 2
    --eval-interval 250
    --eval-iters 10
    --log-interval 10
)
exec "$here/launch.sh" pretrain_gpt.py "${options[@]}" "$@"
