#!/usr/bin/env bash
# Train data-parallel on all GPUs of the job, or of this machine; the arguments are distributed.py's.
#
#   sbatch run_ddp.sh                                          2 nodes with 2 A100s each
#   sbatch --nodes=1 --gres=gpu:a100:4 run_ddp.sh --epochs 1   other numbers, no edit; so do other types of GPU
#   bash run_ddp.sh --sample                                   on this machine: its GPUs, or two CPU workers
#   bash run_ddp.sh --report                                   the scaling table again, from the records at hand
#
#SBATCH --job-name=distributed
#SBATCH --nodes=2
# One task per node: torchrun, which starts the node's workers itself.
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:2
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# Two minutes before the time is over this shell is told: the run writes a checkpoint and the job is queued again.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#
# Your site may want these; take one # away:
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail

# Your site's Python 3.10 or newer, if the login shell's is older:
# module load python
# Where NCCL or gloo picks the wrong network of several:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# sbatch runs a copy of this file from Slurm's spool. Slurm knows the original, as it was named to sbatch, and shows it
# followed by the arguments; of an array it shows all jobs, and one will do.
root=$(cd "$(dirname "$0")" && pwd)
if [[ ! -e $root/distributed.py && -n ${SLURM_JOB_ID:-} ]]; then
    command=$(scontrol show job "$SLURM_JOB_ID" | sed -n '0,/^ *Command=/s/^ *Command=//p')
    root=$(cd "$SLURM_SUBMIT_DIR" && cd "$(dirname "${command%" $*"}")" && pwd)
fi

# Nothing to train: one process is enough.
for argument; do
    case $argument in
        --report | --help | -h)
            exec bash "$root/run_baseline.sh" -- "$root/.venv/bin/python" "$root/distributed.py" "$@"
            ;;
        --prepare) exec bash "$root/run_baseline.sh" "$@" ;;
    esac
done

# Sets up .venv, refuses bad arguments and bad input before any worker starts, and tokenises in one process: no
# worker waits in a collective for another that still tokenises.
bash "$root/run_baseline.sh" --prepare "$@"
torchrun=$root/.venv/bin/torchrun # wants -- before the script: it would take --run for an option of its own

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    # This machine's GPUs, or those of them that CUDA_VISIBLE_DEVICES leaves.
    all=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste --serial --delimiters=,) || all=
    visible=${CUDA_VISIBLE_DEVICES-$all}
    IFS=, read -ra gpus <<< "${visible#-1}" # -1 means none
    workers=${#gpus[@]}
    ((workers > 0)) || workers=2                           # on CPUs
    threads=$(($(env -u OMP_NUM_THREADS nproc) / workers)) # nproc would take that variable's word
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    exec "$torchrun" --standalone --nproc-per-node="$workers" -- "$root/distributed.py" "$@"
fi

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # as in run_baseline.sh
# torchrun and its C++ part warn, with a stack trace, when a node leaves a moment after the first one, at the end of a
# job that went well. Errors are still shown.
export LOGLEVEL=${LOGLEVEL:-ERROR} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# The workers meet on the first node, by the name that Slurm gives it. The port comes from the job's number, so that
# two jobs on a node do not meet, and lies below those that the system hands out by itself.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines=1)
port=$((10000 + SLURM_JOB_ID % 20000))

# srun does not take --cpus-per-task from sbatch since Slurm 22.05: without it, a node's threads would share one CPU.
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
step=(srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$cpus")

# A rehearsal: torchrun looks for ever for a name that does not resolve, and says little where a port is closed.
lost=$("${step[@]}" "$root/.venv/bin/python" -I -c '
import os, socket, sys, time

head, port, is_head = sys.argv[1], int(sys.argv[2]), os.environ["SLURM_NODEID"] == "0"
ipv6 = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
deadline = time.monotonic() + 60
try:
    server = socket.create_server(("", port), **ipv6) if is_head else None
    while True:
        try:
            socket.create_connection((head, port), timeout=30).close()
            break
        except ConnectionRefusedError:  # not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
except OSError as error:
    print(os.environ["SLURMD_NODENAME"], error, sep=": ")
    sys.exit()
for _ in range(int(os.environ["SLURM_NNODES"]) if is_head else 0):
    server.settimeout(max(0.1, deadline - time.monotonic()))
    try:
        server.accept()
    except TimeoutError:  # the one that did not come says why
        break
' "$head" "$port")
if [[ -n $lost ]]; then
    echo "run_ddp.sh: error: the nodes cannot meet at $head:$port: ${lost//$'\n'/; }" >&2
    exit 1
fi

# On each node: a worker for each GPU that Slurm allots, or two on its CPUs; the CPUs divided among them. is_host: the
# first node holds the meeting, and no other does, whatever torchrun thinks of their names; so nobody trains alone.
# When a worker dies, torchrun ends those of its node, and srun ends the other nodes'. Asked to stop, workers have 30 s.
# shellcheck disable=SC2016 # a node's own variables
exec bash "$root/run_baseline.sh" -- "${step[@]}" --kill-on-bad-exit=1 bash -c '
    workers=${SLURM_GPUS_ON_NODE:-2}
    export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > workers ? SLURM_CPUS_PER_TASK / workers : 1))
    exec "$0" --nproc-per-node="$workers" --local-addr="$SLURMD_NODENAME" \
        --rdzv-conf="is_host=$((SLURM_NODEID == 0)),join_timeout=300" "$@"' \
    "$torchrun" --nnodes="$SLURM_NNODES" --rdzv-backend=c10d --rdzv-endpoint="$head:$port" \
    --rdzv-id="$SLURM_JOB_ID" -- "$root/distributed.py" "$@"
