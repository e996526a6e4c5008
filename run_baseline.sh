#!/usr/bin/env bash
# Train on one device; the arguments are baseline.py's.
#
#   bash run_baseline.sh --prepare       on a login node: set up .venv, fetch model and data, tokenize
#   sbatch run_baseline.sh --epochs 1    a job; sbatch's own options come before the file's name
#   bash run_baseline.sh --sample        on this machine, or on a node of salloc
#
# PYTHON=python3.12 chooses the Python of .venv; TRAIN_PYTHON=/path/to/python (a module's, conda's, a container's) is
# used as it is, without .venv. For a driver too old for torch's default build, first choose another one:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126 bash run_baseline.sh --prepare
#SBATCH --job-name=baseline --output=%x-%j.out --open-mode=append
#SBATCH --nodes=1 --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=8 --time=02:00:00
# Two minutes before the end Slurm asks the training to stop: it writes a checkpoint, and the job is queued again.
#SBATCH --signal=TERM@120 --requeue
# Your site may need these (remove one # to enable a line):
##SBATCH --gres=gpu:a100:1 --mem=64G
##SBATCH --partition=gpu --account=project
set -euo pipefail
launcher=run_baseline.sh script=baseline nodes=1 stopped=143
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
command=("$python" "$root/baseline.py" "$@")
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
