#!/usr/bin/env bash
# Starts a training script on the GPUs of one machine or many, or on the CPU where there is no GPU.
#
#   examples_deepspeed/launch.sh pretrain_gpt.py [FLAG...]
#
#   NUM_GPUS    ranks on each machine; on the CPU, processes   (default: the GPUs of this machine; 1 without a GPU)
#   NUM_NODES   machines                                       (default: 1)
#   LAUNCHER    deepspeed, torchrun or srun                    (default: deepspeed)
#   HOSTFILE    deepspeed: file of `host slots=N` lines        (needed for more than one machine)
#   NODE_RANK   torchrun: number of this machine, when the same command is run on each of several
#   DS_ACCELERATOR=cpu  leave the GPUs alone
#   MASTER_ADDR, MASTER_PORT   where the ranks meet            (default: found out; on one machine a free port)
#   LAUNCHER_LOG  how much the deepspeed launcher tells: error, warning, info   (default: error)
#   PYTHON      interpreter                                    (default: the repository's .venv, else python3)
#   DRY_RUN=1   print the command, one word a line, and start nothing
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ $# -gt 0 ] || fail "no script to start. Usage: $0 pretrain_gpt.py [FLAG...]"
launcher=${LAUNCHER:-deepspeed}
num_nodes=${NUM_NODES:-1}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON="$root/.venv/bin/python"
fi
script=$1
[ -f "$script" ] || script="$root/$1"
[ -f "$script" ] || fail "$1 is no file here or in $root."
shift

find_gpus() { # prints their number as torch sees them: CUDA_VISIBLE_DEVICES and vendors are its business
    [ "${DS_ACCELERATOR:-}" != cpu ] || { echo 0 && return; }
    "$PYTHON" -c 'import torch; print(torch.cuda.device_count())' ||
        fail "$PYTHON cannot import torch; run 'make setup', or name another interpreter as PYTHON=..."
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

if [ -z "${DRY_RUN:-}" ]; then
    gpus=$(find_gpus)
    if [ "$gpus" -gt 0 ]; then
        num_gpus=${NUM_GPUS:-$gpus}
        [ "$num_gpus" -le "$gpus" ] || fail "NUM_GPUS=$num_gpus, and this machine shows $gpus; lower NUM_GPUS."
    else
        export DS_ACCELERATOR=cpu
        num_gpus=${NUM_GPUS:-1}
    fi
    # As many threads as a rank has cores, and no more than data preparation on the host can use.
    threads=$(($(nproc) / num_gpus))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}"
else
    num_gpus=${NUM_GPUS:-1}
fi

case "$launcher" in
deepspeed)
    # The launcher takes a hostfile that does not exist for none and trains on this machine alone; so look first.
    [ -z "${HOSTFILE:-}" ] || [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE does not exist."
    [ "$num_nodes" -eq 1 ] || [ -n "${HOSTFILE:-}" ] ||
        fail "NUM_NODES=$num_nodes needs HOSTFILE=FILE with a line 'host slots=$num_gpus' for each machine."
    # `deepspeed` by the name of its module: it runs under $PYTHON, also where its command is not on PATH.
    command=("$PYTHON" -m deepspeed.launcher.runner --log_level "${LAUNCHER_LOG:-error}")
    if [ -n "${HOSTFILE:-}" ]; then
        command+=(--hostfile "$HOSTFILE" --num_nodes "$num_nodes" --num_gpus "$num_gpus")
        command+=(--master_port "${MASTER_PORT:-29500}")
        [ -z "${MASTER_ADDR:-}" ] || command+=(--master_addr "$MASTER_ADDR")
    else
        # Without --hostfile it would look for /job/hostfile. With --num_gpus it ignores CUDA_VISIBLE_DEVICES.
        command+=(--hostfile none --master_port "${MASTER_PORT:-$(free_port)}")
        if [[ -z "${CUDA_VISIBLE_DEVICES:-}" || "${DS_ACCELERATOR:-}" = cpu ]]; then
            command+=(--num_gpus "$num_gpus")
        elif [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
            command+=(--include "localhost:$(cut -d, -f"1-$num_gpus" <<<"$CUDA_VISIBLE_DEVICES")")
        else
            fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names GPUs other than by number, which the deepspeed" \
                "launcher cannot take; use numbers or LAUNCHER=torchrun."
        fi
    fi
    ;;
torchrun)
    command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$num_gpus")
    if [ "$num_nodes" -eq 1 ]; then
        command+=(--standalone)
    else
        [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] ||
            fail "LAUNCHER=torchrun with NUM_NODES=$num_nodes needs MASTER_ADDR and this machine's NODE_RANK."
        command+=(--nnodes "$num_nodes" --node-rank "$NODE_RANK")
        command+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
    ;;
srun)
    # The ranks find address and port from SLURM's own variables.
    [ -n "${DRY_RUN:-}" ] || [ -n "${SLURM_JOB_ID:-}" ] || fail "LAUNCHER=srun works inside a SLURM job (sbatch, salloc)."
    command=(srun --nodes "$num_nodes" --ntasks-per-node "$num_gpus" "$PYTHON")
    ;;
*) fail "LAUNCHER=$launcher is not one of deepspeed, torchrun, srun." ;;
esac
command+=("$script" "$@")

if [ -n "${DRY_RUN:-}" ]; then
    printf '%s\n' "${command[@]}"
    exit
fi
exec "${command[@]}"
