#!/usr/bin/env bash
# Train data-parallel on all GPUs of the job, or of this machine; the arguments are distributed.py's.
#
#   sbatch run_ddp.sh                                     2 nodes with 2 GPUs each
#   sbatch --nodes=1 --gres=gpu:4 run_ddp.sh --epochs 1   any other size; sbatch's own options come first
#   bash run_ddp.sh --sample                              on this machine, or on the nodes of salloc
# MASTER_ADDR and MASTER_PORT say where the workers meet, if not at the first node's name; NCCL_SOCKET_IFNAME and
# GLOO_SOCKET_IFNAME choose the network. For set-up, PYTHON and TRAIN_PYTHON, see run_baseline.sh.
#SBATCH --job-name=distributed --output=%x-%j.out --open-mode=append
#SBATCH --nodes=2 --ntasks-per-node=1 --gres=gpu:2 --cpus-per-task=16 --time=02:00:00
# Two minutes before the end Slurm asks the training to stop: it writes a checkpoint, and the job is queued again.
#SBATCH --signal=TERM@120 --requeue
# Your site may need these (remove one # to enable a line):
##SBATCH --gres=gpu:a100:2 --mem=64G
##SBATCH --partition=gpu --account=project
set -euo pipefail
launcher=run_ddp.sh script=distributed nodes=${SLURM_JOB_NUM_NODES:-1} stopped="1|143" # mostly 1, torchrun's own
# The same to the letter in both launchers: the project, its Python, the job. ------------------------------------------
fail() { echo "$launcher: error: $*" >&2 && exit "${status:-2}"; }
[[ $OSTYPE == linux* ]] || fail "this needs Linux"
# sbatch runs a copy of this file; Slurm knows the path of the original, and shows it followed by the arguments.
root=$(dirname "$(readlink --canonicalize "$0")")
if [[ -n ${SLURM_JOB_ID:-} && ! -e $root/$launcher ]]; then
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n '0,/^ *Command=/s/^ *Command=//p')
    root=$(cd "$SLURM_SUBMIT_DIR" && dirname "$(readlink --canonicalize "${original%" $*"}")")
fi
[[ -e $root/$launcher && -e $root/$script.py ]] || fail "$root is not the project: submit $launcher from its directory"
python=${TRAIN_PYTHON:-$root/.venv/bin/python} base=${PYTHON:-python3}
mark=$root/.venv/installed-requirements.txt # written last: what is installed, and the index that was chosen
wanted=$(cat "$root/requirements.txt" "$root/sample/requirements.txt" && echo "# index: ")
index=${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-} # where none is chosen, any will do: jobs must not undo a choice
is_complete() { [[ -x $python && $(cat "$mark" 2> /dev/null) == "$wanted"${index:-*} ]]; }
if [[ -n ${TRAIN_PYTHON:-} ]]; then
    check='import sys, importlib.metadata as of; [of.version(line.split("=")[0]) for line in open(sys.argv[1])]'
    lacks=$("$python" -c "$check" "$root/requirements.txt" 2>&1) || fail "TRAIN_PYTHON=$python: ${lacks##*$'\n'}"
elif ! is_complete; then
    [[ ${SLURM_JOB_NUM_NODES:-1} == 1 && (! -e $mark || " $* " == *" --prepare "*) ]] || # jobs may be using an old one
        fail "no .venv that fits: when no job is running, first run bash $launcher --prepare on a login node"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$base is older than Python 3.10: set PYTHON"
    # If several jobs start at once, one installs and the others wait. --clear: else pip keeps another index's torch.
    (flock 9 && { is_complete || { "$base" -m venv --clear "$root/.venv" &&
        "$python" -m pip install -r "$root/requirements.txt" &&
        "$python" -m pip install --no-deps --require-hashes -r "$root/sample/requirements.txt" &&
        echo "$wanted$index" > "$mark"; }; }) 9>> "$root/baseline.py" ||
        fail ".venv could not be set up: run bash $launcher --prepare where a package index can be reached"
fi
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    echo "job $SLURM_JOB_ID started $(date --utc +%FT%TZ) on $SLURM_JOB_NODELIST"
    asked=${SLURM_GPUS_PER_NODE:-0}
    ((${SLURM_GPUS_ON_NODE:-99} >= ${asked##*:})) || fail "instead of --gpus-per-node=$asked, use --gres=gpu:$asked"
    # A step gets one task per node, with all of the job's CPUs there; srun would take these variables as its options.
    unset SLURM_EXPORT_ENV SLURM_NTASKS SLURM_NPROCS SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK
    cpus=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sort --numeric-sort | sed 's/(.*//; q')
    step=(srun --quiet --quit-on-interrupt --kill-on-bad-exit=1 --nodes="$nodes" --ntasks-per-node=1 -c "$cpus")
    # In the shell of srun --pty, a new step would wait for that shell to end. Other shells have high step IDs or none.
    ((${SLURM_STEP_ID:-4294967290} >= 4294967290)) || step+=(--overlap)
    # Compute nodes seldom reach the internet, and sbatch --export=NONE leaves PATH unexported.
    export PATH HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=$cpus
fi
# The launcher's own: what to run. -------------------------------------------------------------------------------------
# One process checks the input and tokenizes before any worker starts, or does everything if nothing is trained.
[[ ! " $* " =~ " "(--prepare|--report|--help|-h)" " ]] || exec "$python" "$root/distributed.py" "$@"
"$python" "$root/distributed.py" --prepare "$@" || exit
# By default torchrun kills workers 30 s after SIGTERM, and every node but the first to exit prints a stack trace.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 LOGLEVEL=CRITICAL TORCH_CPP_LOG_LEVEL=ERROR
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    workers=$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')
    cpus=$(env -u OMP_NUM_THREADS nproc) # nproc would return that variable's value
    export OMP_NUM_THREADS=$((cpus > workers ? cpus / workers : 1))
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$workers" "$root/distributed.py" "$@"
fi
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines=1)}
export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))} # below those that the system hands out by itself
# shellcheck disable=SC2016 # On each node: a worker for each of its GPUs, or two on its CPUs.
command=(bash -c '
    fail() { echo "run_ddp.sh: error: $SLURMD_NODENAME: $*" >&2 && exit 2; }
    getent hosts "$MASTER_ADDR" > /dev/null || fail "$MASTER_ADDR does not resolve: set MASTER_ADDR"
    ((SLURM_NODEID)) || ! (: <> /dev/tcp/localhost/$MASTER_PORT) 2> /dev/null || fail "port in use: set MASTER_PORT"
    workers=${SLURM_GPUS_ON_NODE:-2}
    export OMP_NUM_THREADS=$((OMP_NUM_THREADS > workers ? OMP_NUM_THREADS / workers : 1))
    exec "$0" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --rdzv-conf=timeout=300 \
        --nproc-per-node="$workers" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@"' \
    "$python" "$root/distributed.py" "$@")
# The same in both again: run it, and after Slurm's warning queue the job again. ---------------------------------------
[[ -n ${SLURM_JOB_ID:-} ]] || exec "${command[@]}" # signals and the exit status are its own
"${step[@]}" "${command[@]}" && exit
status=$?
# Slurm warns up to a minute early. With more time left, or another status, the run has failed.
end=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n "s/^JobId=$SLURM_JOB_ID .* EndTime=\(\S*\) .*/\1/p")
[[ $status =~ ^($stopped)$ ]] && (($(date --date="$end" +%s) - $(date +%s) < 180)) || exit "$status"
value_of() { printf '%s\n' "${@:2}" | sed -n "s/^$1=//p; /^$1\$/{n;p}" | tail --lines=1; }
run=$(value_of --run-name "--run-name=$script-$SLURM_JOB_ID" "$@")
restarts=$(value_of --output-dir --output-dir=. "$@")/checkpoints/$run/restarts # a line for each since last.pt
mkdir --parents "${restarts%/*}"
[[ ! ${restarts%/*}/last.pt -nt $restarts ]] || : > "$restarts"
echo "$SLURM_JOB_ID" >> "$restarts"
(($(wc --lines < "$restarts") <= 3)) || fail "three restarts without a later checkpoint: give the job more --time"
scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}" 2> /dev/null ||
    fail "this job cannot be queued again; go on with: sbatch$(printf ' %q' "$root/$launcher" "$@" --run-name "$run")"
exit "$status"
