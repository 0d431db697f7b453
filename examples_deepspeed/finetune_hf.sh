#!/usr/bin/env bash
# Goes on training a model of Hugging Face (GPT-2, Llama, Mistral, Qwen, Gemma) and writes each checkpoint as one again.
# world size: 8
#
#   HF_MODEL     its folder: config.json, safetensors, tokenizer
#   DATA_PATH    token files made with its tokenizer        (default: the standard library's sources, for trying)
#   IMPORTED     where the model is put as a checkpoint     (default: output/imported/NAME OF THE FOLDER)
#   TENSOR_PARALLEL   GPUs that share each layer: 2, 4 or 8 where a model is too large for one     (default: 1)
#
# What else can be set is at the head of pretrain.sh. It is started again with the same command, and goes on.
set -euo pipefail
# shellcheck source=examples_deepspeed/pretrain.sh
. "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
tools=$(dirname "$examples")/tools
python=${PYTHON:-python3}

[ -n "${HF_MODEL:-}" ] || stop_for_data "no model. Set HF_MODEL to a folder with config.json and safetensors"
name=$(basename "$HF_MODEL")
imported=${IMPORTED:-output/imported/$name}
SAVE=${SAVE-output/finetuned/$name}

prepare() { [ -n "${DRY_RUN:-}" ] || "$python" "$tools/$1" "${@:2}"; }

[ -f "$imported/latest" ] || prepare convert_hf.py import --hf "$HF_MODEL" --save "$imported"

if [ -z "${DATA_PATH:-}" ]; then
    DATA_PATH=$imported/data/python_text_document
    if [ ! -f "$DATA_PATH.meta.json" ]; then
        prepare collect_text.py --output "$imported/text.jsonl"
        prepare preprocess_data.py --input "$imported/text.jsonl" --output-prefix "$imported/data/python" \
            --append-eod --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HF_MODEL"
    fi
fi

options=(
    --use-checkpoint-args # model and tokenizer are those of the import
    --data-path "$DATA_PATH"
    --seq-length "${SEQ_LENGTH:-2048}"

    --global-batch-size 64 # 131,072 tokens a step: little, since there are few steps
    --micro-batch-size "${MICRO_BATCH:-1}"
    --train-iters "${TRAIN_ITERS:-500}"
    --lr 1e-5 # a tenth or less of pretraining's, so that what is known stays
    --min-lr 1e-6

    --tensor-model-parallel-size "${TENSOR_PARALLEL:-1}"
    --zero-stage 1
)
[ "${TENSOR_PARALLEL:-1}" = 1 ] || options+=(--sequence-parallel) # norms and residual sums are divided, too
[ -z "$SAVE" ] || options+=(--save-hf)
# Until there is a checkpoint of this run its weights are those of the import, with a new optimizer.
[ -n "$SAVE" ] && [ -f "$SAVE/latest" ] || options+=(--load "$imported" --finetune)
pretrain "finetuned_$name" "${options[@]}" "$@"
