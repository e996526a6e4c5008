#!/usr/bin/env bash
# Train data-parallel on all GPUs of the job, or of this machine; arguments: distributed.py's.
#   sbatch run_ddp.sh                                    two nodes with two GPUs each
#   sbatch --nodes=1 --gres=gpu:4 run_ddp.sh --epochs 1  any other size; sbatch's options come first
#   bash run_ddp.sh --sample                             on this machine, or on the nodes of salloc
# PYTHON and TRAIN_PYTHON: see run_baseline.sh. MASTER_ADDR and MASTER_PORT say where workers meet,
# if not on the first node; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network.
# Two minutes before the time limit (USR1@120), training saves a checkpoint and requeues the job.
#SBATCH --job-name=distributed --output=%x-%j.out --open-mode=append --signal=USR1@120 --requeue
#SBATCH --nodes=2 --ntasks-per-node=1 --gres=gpu:2 --cpus-per-task=16 --time=02:00:00
# Your site may need these (remove one # to enable the line):
##SBATCH --partition=gpu --account=project --gres=gpu:a100:2 --mem=64G
set -euo pipefail
fail() {
    echo "run_ddp.sh: error: $*" >&2
    exit 2
}

# Slurm runs a copy of this file: the project is where sbatch was called, or where --chdir points.
for project in "$(dirname "$(readlink -f "$0")")" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
    [[ ! -e $project/distributed.py ]] || break
done
[[ -e $project/distributed.py ]] || fail "no distributed.py here: call sbatch in its directory"

# .venv is made once, by the first of several jobs, and never changed: others may be using it.
python=${TRAIN_PYTHON:-$project/.venv/bin/python}
wanted=$project/requirements.txt
installed=$project/.venv/installed-requirements.txt
if [[ -z ${TRAIN_PYTHON:-} && ! -e $installed ]]; then
    (
        flock 9
        [[ ! -e $installed ]] || exit 0
        "${PYTHON:-python3}" -m venv --clear "$project/.venv"
        "$python" -m pip install -r "$wanted" || fail ".venv needs Python 3.10-3.13 and an index"
        "$python" -m pip install --no-deps --require-hashes -r "$project/sample/requirements.txt"
        cp "$wanted" "$installed"
    ) 9>> "$project/.venv.lock"
fi
[[ -n ${TRAIN_PYTHON:-} ]] || cmp --silent "$wanted" "$installed" ||
    fail ".venv does not match $wanted: remove it when no job uses it, then try again"
problem=$("$python" -c 'import re, sys, importlib.metadata as packages
for name, least in re.findall(r"(\w+)>=([\d.]+)", open(sys.argv[1]).read()):
    version = packages.version(name)
    if [int(n) for n in version.split(".")[:2]] < [int(n) for n in least.split(".")]:
        sys.exit(f"{name} {version} is older than {least}")' "$wanted" 2>&1) ||
    fail "$python: ${problem##*$'\n'}"

# Compute nodes seldom reach the internet, and sbatch --export=NONE leaves PATH unexported.
[[ -z ${SLURM_JOB_NODELIST:-} ]] || export PATH HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# One process checks the input and tokenizes before any worker starts. These options need no worker.
case " $* " in *" --prepare "* | *" --report "* | *" --help "* | *" -h "*)
    exec "$python" "$project/distributed.py" "$@" ;;
esac
"$python" "$project/distributed.py" --prepare "$@" > /dev/null # the training says it again

# Make torchrun give its workers 110 s to save (30 s before torch 2.13), and log less.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 LOGLEVEL=CRITICAL TORCH_CPP_LOG_LEVEL=ERROR
unset OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES GOMP_CPU_AFFINITY KMP_AFFINITY
# shellcheck disable=SC2016 # On each node, start a worker for each of its GPUs, or two on its CPUs:
on_node='
    count="import torch; print(torch.cuda.device_count() or 2, torch.get_num_threads())"
    read -r workers cpus < <("$0" -c "$count")
    workers=${SLURM_GPUS_ON_NODE:-$workers} cpus=${SLURM_CPUS_ON_NODE:-$cpus}
    export OMP_NUM_THREADS=$((cpus > workers ? cpus / workers : 1))
    # torchrun, but without its stack trace of a signal.
    exec "$0" -c "import sys, torch.distributed.run as run; sys.tracebacklimit = 0; run.main()" \
        --nproc-per-node="$workers" --node-rank="${SLURM_NODEID:-0}" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"'

[[ -n ${SLURM_JOB_NODELIST:-} ]] || exec bash -c "$on_node" "$python" \
    --standalone --local-addr=localhost "$project/distributed.py" "$@"
master_addr=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
master_port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
# srun would take these as its options.
unset SLURM_EXPORT_ENV SLURM_TRES_PER_TASK SLURM_CPUS_PER_{TASK,GPU} SLURM_MEM_PER_{CPU,GPU,NODE}
[[ -z ${SLURM_STEP_ID:-} ]] || export SLURM_OVERLAP=1 # the shell of srun --pty is a step, too
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpu-bind=none --quit-on-interrupt --kill-on-bad-exit=1 bash -c "$on_node" "$python" \
    --nnodes="$SLURM_JOB_NUM_NODES" --master-addr="$master_addr" --master-port="$master_port" \
    --rdzv-conf=timeout=300 "$project/distributed.py" "$@"
