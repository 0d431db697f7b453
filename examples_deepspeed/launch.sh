#!/usr/bin/env bash
# Starts a training script on the GPUs of one machine or many, or on the CPU where there is no GPU.
#
#   examples_deepspeed/launch.sh pretrain_gpt.py [FLAG...]
#   examples_deepspeed/launch.sh --count     prints how many machines, and how many ranks on each, it would start
#
#   LAUNCHER    deepspeed, torchrun, srun, mpirun, or none     (default: srun in a SLURM job, none where mpirun or
#               srun has started this script for each rank already, else deepspeed)
#   NUM_GPUS    ranks on each machine; on the CPU, processes   (default: the GPUs of this machine; 1 without a GPU)
#   NUM_NODES   machines                                       (default: those of HOSTFILE or of the SLURM job, else 1)
#   HOSTFILE    file of `host slots=N` lines: deepspeed, torchrun and mpirun
#   NODE_RANK   number of this machine, where the same command is run on each of several: torchrun (found in HOSTFILE if
#               possible), and deepspeed, which then needs no ssh
#   DS_ACCELERATOR=cpu  leave the GPUs alone
#   MASTER_ADDR, MASTER_PORT   where the ranks meet            (default: found out; on one machine a free port)
#   LAUNCHER_LOG  how much the deepspeed launcher tells: error, warning, info   (default: error)
#   PYTHON      interpreter                                    (default: the repository's .venv, else python3)
#   DRY_RUN=1   print the command, one word a line, and start nothing
#
# docs/launch.md has a command for each launcher. SIGTERM and SIGUSR1 let the ranks save first; exit code 143 then.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
number() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1=$2 is not a whole number of at least 1."; }

[ $# -gt 0 ] || fail "no script to start. Usage: $0 pretrain_gpt.py [FLAG...]"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON="$root/.venv/bin/python"
fi
script=$1
if [ "$script" != --count ]; then
    [ -f "$script" ] || script="$root/$1"
    [ -f "$script" ] || fail "$1 is no file here or in $root."
fi
shift

find_launcher() { # a rank of srun sees the number of its step's tasks, which the batch script does not
    if [ -n "${OMPI_COMM_WORLD_RANK:-}${PMI_RANK:-}${MV2_COMM_WORLD_RANK:-}" ] || [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
        echo none
    elif [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${HOSTFILE:-}" ] && command -v srun >/dev/null; then
        echo srun
    else
        echo deepspeed
    fi
}

find_gpus() { # prints their number as torch sees them: CUDA_VISIBLE_DEVICES and vendors are its business
    [ "${DS_ACCELERATOR:-}" != cpu ] || { echo 0 && return; }
    "$PYTHON" -c 'import torch; print(torch.cuda.device_count())' ||
        fail "$PYTHON cannot import torch; run 'make setup', or name another interpreter as PYTHON=..."
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

launcher=${LAUNCHER:-$(find_launcher)}
case "$launcher" in
deepspeed | torchrun | srun | mpirun | none) ;;
*) fail "LAUNCHER=$launcher is not one of deepspeed, torchrun, srun, mpirun, none." ;;
esac
for name in NUM_GPUS NUM_NODES MASTER_PORT; do
    [ -z "${!name:-}" ] || number "$name" "${!name}"
done
gpus=${NUM_GPUS:-} first_host="" this_host=none all_hosts=""
num_nodes=${NUM_NODES:-1}
case "$launcher" in
srun) gpus=${gpus:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}} ;;
none) gpus=${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-${SLURM_NTASKS_PER_NODE:-1}}} ;;
*)
    if [ -n "${HOSTFILE:-}" ]; then
        hosts=$("$PYTHON" "$root/tools/read_hostfile.py" "$HOSTFILE" "${NUM_NODES:-}" "$gpus") || exit 2
        read -r num_nodes gpus first_host this_host all_hosts <<<"$hosts"
    fi
    ;;
esac
[[ ! "$launcher" =~ ^(srun|mpirun)$ || -n "${HOSTFILE:-}" ]] || num_nodes=${NUM_NODES:-${SLURM_JOB_NUM_NODES:-1}}
# srun, and a hostfile that does not name this machine, start ranks elsewhere: its own GPUs say nothing then.
elsewhere=${HOSTFILE:+$this_host}
if [[ -z "${DRY_RUN:-}" && ! "$launcher" =~ ^(srun|none)$ && "$elsewhere" != none ]]; then
    found=$(find_gpus)
    [ "$found" -gt 0 ] || export DS_ACCELERATOR=cpu
    [ "$found" -eq 0 ] || [ "${gpus:-$found}" -le "$found" ] ||
        fail "NUM_GPUS=$gpus, and this machine shows $found; lower NUM_GPUS${HOSTFILE:+, or the slots in $HOSTFILE}."
    [ "$found" -eq 0 ] || gpus=${gpus:-$found}
fi
gpus=${gpus:-1}
if [ "$script" = --count ]; then
    echo "$num_nodes $gpus"
    exit
fi
over_ssh="" master_addr=${MASTER_ADDR:-$first_host} node_rank=${NODE_RANK:-}
[[ -z "$node_rank" || ("$node_rank" =~ ^[0-9]{1,6}$ && "$node_rank" -lt "$num_nodes") ]] ||
    fail "NODE_RANK=$node_rank is not the number of a machine, 0 to $((num_nodes - 1))."
# As many threads as a rank has cores, and no more than data preparation on the host can use.
threads=$((${SLURM_CPUS_PER_TASK:-$(nproc) / gpus}))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}"

case "$launcher" in
deepspeed)
    [ "$num_nodes" -eq 1 ] || [ -n "${HOSTFILE:-}" ] ||
        fail "NUM_NODES=$num_nodes needs HOSTFILE=FILE with a line 'host slots=$gpus' for each machine."
    # `deepspeed` by the name of its module: it runs under $PYTHON, also where its command is not on PATH.
    command=("$PYTHON" -m deepspeed.launcher.runner --log_level "${LAUNCHER_LOG:-error}")
    if [ -n "${HOSTFILE:-}" ]; then
        command+=(--hostfile "$HOSTFILE" --num_nodes "$num_nodes" --num_gpus "$gpus")
        command+=(--master_port "${MASTER_PORT:-29500}")
        if [ -n "$node_rank" ]; then # started on every machine by hand
            command+=(--no_ssh --node_rank "$node_rank" --master_addr "$master_addr")
        else
            [ "$num_nodes" -eq 1 ] || over_ssh=$all_hosts
            [ -z "${MASTER_ADDR:-}" ] || command+=(--master_addr "$MASTER_ADDR")
        fi
    else
        # Without --hostfile it would look for /job/hostfile. With --num_gpus it ignores CUDA_VISIBLE_DEVICES.
        command+=(--hostfile none --master_port "${MASTER_PORT:-$(free_port)}")
        if [[ -z "${CUDA_VISIBLE_DEVICES:-}" || "${DS_ACCELERATOR:-}" = cpu ]]; then
            command+=(--num_gpus "$gpus")
        elif [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
            command+=(--include "localhost:$(cut -d, -f"1-$gpus" <<<"$CUDA_VISIBLE_DEVICES")")
        else
            fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names GPUs other than by number, which the deepspeed" \
                "launcher cannot take; use numbers or LAUNCHER=torchrun."
        fi
    fi
    ;;
torchrun)
    command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$gpus")
    if [ "$num_nodes" -eq 1 ]; then
        command+=(--standalone)
    else
        [ -n "$node_rank" ] || [ "$this_host" = none ] || node_rank=$this_host
        [ -n "$master_addr" ] && [ -n "$node_rank" ] ||
            fail "LAUNCHER=torchrun with NUM_NODES=$num_nodes is started on every machine, and needs MASTER_ADDR and" \
                "this machine's NODE_RANK, 0 to $((num_nodes - 1)); or a HOSTFILE that names this machine."
        command+=(--nnodes "$num_nodes" --node-rank "$node_rank")
        command+=(--master-addr "$master_addr" --master-port "${MASTER_PORT:-29500}")
    fi
    ;;
srun)
    # The ranks find address and port from SLURM's own variables.
    [ -n "${DRY_RUN:-}" ] || [ -n "${SLURM_JOB_ID:-}" ] || fail "LAUNCHER=srun works inside a SLURM job (sbatch, salloc)."
    command=(srun --nodes "$num_nodes" --ntasks-per-node "$gpus" --distribution block --kill-on-bad-exit=1)
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || command+=(--cpus-per-task "$SLURM_CPUS_PER_TASK") # it does not pass it on itself
    command+=("$PYTHON")
    ;;
mpirun)
    command -v mpirun >/dev/null || [ -n "${DRY_RUN:-}" ] || fail "LAUNCHER=mpirun, but there is no mpirun on PATH."
    [ "$num_nodes" -eq 1 ] || [ -n "$master_addr${SLURM_JOB_ID:-}" ] ||
        fail "LAUNCHER=mpirun with NUM_NODES=$num_nodes needs HOSTFILE=FILE with a line 'host slots=$gpus' for each machine."
    if [ "$num_nodes" -eq 1 ]; then
        export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-$(free_port)}
    elif [ -n "$master_addr" ]; then # else the ranks take the first host of the SLURM job
        export MASTER_ADDR=$master_addr
    fi
    if [[ "$(mpirun --version 2>/dev/null)" == *"Open MPI"* || -n "${DRY_RUN:-}" ]]; then
        command=(mpirun -np $((num_nodes * gpus)) --map-by "ppr:$gpus:node" --bind-to none)
        [ -z "${HOSTFILE:-}" ] || command+=(--hostfile "$HOSTFILE")
        for name in MASTER_ADDR MASTER_PORT PATH PYTHONPATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR; do
            [ -z "${!name:-}" ] || command+=(-x "$name")
        done
    else
        fail "mpirun is not Open MPI's; start the ranks with your own, as docs/launch.md says, and LAUNCHER=none."
    fi
    command+=("$PYTHON")
    ;;
none) command=("$PYTHON") ;;
esac
command+=("$script" "$@")

if [ -n "${DRY_RUN:-}" ]; then
    printf '%s\n' "${command[@]}"
    exit
fi
[ "$launcher" != none ] || exec "${command[@]}"
printf 'starting:%s\n' "$(printf ' %q' "${command[@]}")" >&2

# The launchers kill ranks that have not left some seconds after a signal, or die of it and leave them running. So the
# ranks get it, and not their launcher, which then sees them save and leave; and this script stays until the last is gone.
# shellcheck disable=SC2329 # called by a trap
ranks_below() { # PID: the first processes below it that a launcher has told their rank; further down are their workers
    local child
    # shellcheck disable=SC2013 # words are wanted
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        if grep -qz '^LOCAL_RANK=' "/proc/$child/environ" 2>/dev/null; then
            echo "$child"
        else
            ranks_below "$child"
        fi
    done
}
# shellcheck disable=SC2329
pass_on() { # SIGNAL
    local ranks
    [ "$1" = INT ] || asked=yes
    ranks=$(ranks_below "$job")
    if [[ "$launcher" =~ ^(srun|mpirun)$ && "$1" != INT ]]; then
        kill -USR1 "$job" # which they give to the ranks on all hosts; after a SIGTERM they kill them at once
    elif [ -n "$over_ssh" ] && [ "$1" != INT ]; then
        PDSH_RCMD_TYPE=ssh pdsh -S -w "$over_ssh" "pkill -USR1 -P \$(pgrep -d, -f '$launch_command')" ||
            kill -TERM -- "-$job" # no rank yet
    elif [ -n "$ranks" ] && [ "$1" != INT ]; then
        # shellcheck disable=SC2086 # numbers
        kill "-$1" $ranks
    else # no rank yet
        kill "-${1/USR1/TERM}" -- "-$job"
    fi 2>/dev/null || true
}
# What the deepspeed launcher runs on each host, as a regular expression; a rank is its child.
launch_command="^[^ ]+ -u -m deepspeed.launcher.launch .*--master_port=${MASTER_PORT:-29500}( |\$)"
asked=""
set -m
"${command[@]}" </dev/null &
job=$!
set +m
for signal in TERM INT USR1; do
    # shellcheck disable=SC2064 # the signal's name is to be filled in now
    trap "pass_on $signal" "$signal"
done
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do # a signal ended the wait, not the job
    code=0
    wait "$job" || code=$?
done
while kill -0 -- "-$job" 2>/dev/null; do sleep 0.2; done
# torchrun turns every exit code into 1; the others are of a rank that the signal met before its training or after it.
[[ -z "$asked" || ! "$launcher:$code" =~ ^(torchrun:1|[a-z]+:(138|246))$ ]] || code=143
exit "$code"
