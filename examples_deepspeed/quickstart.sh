#!/usr/bin/env bash
# From nothing to a small GPT that writes in the manner of Python's own sources: text, tokenizer, training, resume,
# loss curve, sample. Called by `make quickstart`. All it makes is in quickstart/; what is finished is not made again.
# world size: 2
#
#   QUICKSTART_ONLY=data    stop when the token files are there
#   QUICKSTART_STEPS=N      optimizer steps before the resume (default: 580)
#   DRY_RUN=1               print the training command, one word a line, and start nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
folder=quickstart
tokenizer=$folder/tokenizer.model
text=$folder/text.jsonl
data=$folder/data/python_text_document
checkpoints=$folder/checkpoints
steps=${QUICKSTART_STEPS:-580}
steps_after_resume=20
total=$((steps + steps_after_resume))

model=( # 1.3 million weights: what two CPU cores teach something in two minutes
    --num-layers 4
    --hidden-size 128
    --num-attention-heads 4
    --seq-length 128
    --position-embedding-type rope
    --normalization rmsnorm
    --attention-dropout 0 # the text is seen about once: nothing to overfit
    --hidden-dropout 0
)
training=(
    --global-batch-size 16 # small, for many steps in little time
    --train-iters "$total"
    --lr 4e-3              # small models take high rates
    --min-lr 4e-4
    --lr-decay-style cosine
    --lr-warmup-iters 30
    --adam-beta2 0.95
    --weight-decay 0.1
    --data-path "$data"
    --split "97,3,0"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$tokenizer"
    --num-workers 0 # the ranks have all cores already
    --save "$checkpoints"
    --load "$checkpoints"
    --load-if-exists
    --save-interval 200
    --keep-last 2
    --eval-interval 200
    --eval-iters 40
    --log-interval 20
)

# --- words on the terminal ---

step() { # NAME: starts a numbered step
    count=$((${count:-0} + 1))
    started=$SECONDS
    name=$1
    printf '\n[%d/8] %s\n' "$count" "$1"
}

finished() { printf '      %d s\n' "$((SECONDS - started))"; }

there() { printf '      there already: %s\n' "$1"; }

indented() { sed -u 's/^/      /'; }

explain_stop() {
    local code=$?
    [ "$code" -eq 0 ] || printf '\nThe quickstart stopped in step %s. %s\n' "${count:-0} (${name:-start})" \
        "Mend what is said above and run it again: it goes on from there." >&2
}
trap explain_stop EXIT

# --- parts ---

iteration() { # of the newest complete checkpoint; 0 without one
    local tag=step_0
    [ ! -f "$checkpoints/latest" ] || tag=$(cat "$checkpoints/latest")
    echo "$((10#${tag#step_}))"
}

train() { # FLAG...: goes on from the newest checkpoint
    NUM_GPUS=$ranks examples_deepspeed/launch.sh pretrain_gpt.py "${model[@]}" "${training[@]}" \
        --precision "$precision" --micro-batch-size "$((16 / ranks))" "$@"
}

choose_ranks() { # a power of two of the GPUs here, which divides the batch; on the CPU two processes
    local gpus=0
    [ -n "${DRY_RUN:-}" ] || [ "${DS_ACCELERATOR:-}" = cpu ] ||
        gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -eq 0 ]; then
        ranks=2 precision=fp32
        export DS_ACCELERATOR=cpu
    else
        precision=bf16
        for ranks in 8 4 2 1; do
            [ "$ranks" -gt "$gpus" ] || break
        done
    fi
}

choose_ranks
if [ -n "${DRY_RUN:-}" ]; then
    train
    exit
fi
mkdir -p "$folder"
SECONDS=0

step "Text: the standard library's own sources and docstrings"
if [ -f "$text" ]; then
    there "$text"
else
    "$python" tools/collect_text.py --output "$text" | indented
    finished
fi

step "Tokenizer: 4,096 pieces learned from it"
if [ -f "$tokenizer" ]; then
    there "$tokenizer"
else
    "$python" tools/train_tokenizer.py --input "$text" --output "$tokenizer" --vocab-size 4096 | indented
    finished
fi

step "Token files: Megatron's .bin and .idx"
if [ -f "$data.idx" ] && [ -f "$data.meta.json" ]; then
    there "$data.idx"
else
    "$python" tools/preprocess_data.py --input "$text" --output-prefix "${data%_text_document}" --append-eod \
        --workers "$(nproc)" --tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer" 2>&1 | indented
    finished
fi
if [ "${QUICKSTART_ONLY:-}" = data ]; then
    exit
fi

step "Training: $steps steps on $ranks ranks in $precision, with DeepSpeed"
if [ "$(iteration)" -ge "$steps" ]; then
    there "$checkpoints, step $(iteration)"
else
    train --exit-interval "$steps"
    finished
fi

step "Resume: $steps_after_resume more steps from the checkpoint"
if [ "$(iteration)" -ge "$total" ]; then
    there "$checkpoints, step $(iteration)"
else
    train
    finished
fi

step "Loss curve"
"$python" tools/plot_run.py "$checkpoints/metrics.jsonl" --output "$folder/loss.png" | indented

step "Against a model that only counts tokens"
"$python" tools/unigram_loss.py --load "$checkpoints" | indented

step "A sample of what it writes"
"$python" tools/generate_text.py --load "$checkpoints" --prompt "def " --max-new-tokens 120 --temperature 0.7 --seed 1 | indented

printf '\nDone in %d s. Everything is in %s/; remove that folder to start anew.\n' "$SECONDS" "$folder"
