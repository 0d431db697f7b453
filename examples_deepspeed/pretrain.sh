#!/usr/bin/env bash
# What the scripts pretrain_*.sh share: data, schedule, saving, and the start. They read it with `.` and call `pretrain`.
#
#   DATA_PATH        prefix of token files      (default: the quickstart's, which are for trying: 100 steps of them)
#   TOKENIZER_MODEL  the tokenizer that made them; TOKENIZER_TYPE says its kind     (default: SentencePieceTokenizer)
#   VOCAB_FILE, MERGE_FILE   instead, where it is GPT-2's byte pairs
#   SEQ_LENGTH, MICRO_BATCH, TRAIN_ITERS   tokens of a sample, samples of a rank at once, optimizer steps
#   TENSOR_PARALLEL, PIPELINE_PARALLEL     where a script has them: ranks that share a layer, stages of layers
#   SAVE             folder of the checkpoints; SAVE= saves none                    (default: output/NAME)
#   NUM_GPUS, NUM_NODES, HOSTFILE, LAUNCHER, DRY_RUN   see launch.sh
#
# Flags at the end of a script's command line are added, and win over its own; --mock-data there needs no data.
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
quickstart=$(dirname "$examples")/quickstart

shared=(
    --attention-dropout 0 # each token is seen about once, so there is nothing to overfit
    --hidden-dropout 0
    --lr-decay-style cosine
    --lr-warmup-fraction 0.02
    --adam-beta2 0.95 # a shorter memory than 0.999: steadier with large batches
    --weight-decay 0.1
    --clip-grad 1.0
    --precision bf16 # fp16's range needs loss scaling; bf16 has fp32's
    --split "969,30,1"
    --eval-interval 250
    --eval-iters 10
    --log-interval 10
)

steps() { # N: optimizer steps, unless TRAIN_ITERS says it or there is only the quickstart's text
    local trial=100
    [ -z "${DATA_PATH:-}" ] || trial=$1
    echo "${TRAIN_ITERS:-$trial}"
}

ranks_within() { # N [M]: N, or a half, a quarter ... of it, of which (M times over) a machine's ranks are a multiple
    local n=$1 m=${2:-1} ranks
    ranks=$("$examples/launch.sh" --count) || return
    ranks=${ranks#* }
    while [ "$n" -gt 1 ] && [ $((ranks % (n * m))) -ne 0 ]; do n=$((n / 2)); done
    echo "$n"
}

stop_for_data() { printf 'error: %s\n' "$*" >&2; exit 2; }

choose_data() { # FLAG...: fills `data`, unless the flags name a source themselves
    local word
    data=()
    for word; do
        [[ ! "$word" =~ ^--(mock[-_]data|(train[-_])?data[-_]path)(=|$) ]] || return 0
    done
    if [ -z "${DATA_PATH:-}" ]; then
        [ -n "${DRY_RUN:-}" ] || [ -f "$quickstart/data/python_text_document.idx" ] ||
            stop_for_data "no data. Set DATA_PATH and TOKENIZER_MODEL, or make the quickstart's: QUICKSTART_ONLY=data make quickstart"
        data=(--data-path "$quickstart/data/python_text_document")
        data+=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$quickstart/tokenizer.model")
        return
    fi
    data=(--data-path "$DATA_PATH")
    if [ -n "${VOCAB_FILE:-}" ]; then
        data+=(--tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB_FILE" --merge-file "${MERGE_FILE:-}")
    elif [ -n "${TOKENIZER_MODEL:-}" ]; then
        data+=(--tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}" --tokenizer-model "$TOKENIZER_MODEL")
    fi # else the flags at the end name it, or what is missing is told
}

pretrain() { # NAME FLAG...
    local name=$1 save
    shift
    choose_data "$@"
    save=${SAVE-output/$name}
    # --load-if-exists: the same command starts and resumes
    [ -z "$save" ] || shared+=(--save "$save" --load "$save" --load-if-exists --save-interval 500 --keep-last 2)
    exec "$examples/launch.sh" pretrain_gpt.py "${shared[@]}" "${data[@]}" "$@"
}
