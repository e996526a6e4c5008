#!/usr/bin/env bash
# Train on one device; the arguments are those of baseline.py.
#   bash run_baseline.sh --prepare       on a login node: make .venv, fetch model and data, tokenize
#   sbatch run_baseline.sh --epochs 1    as a job; sbatch's own options come before the file's name
#   bash run_baseline.sh --sample        on this machine, or on a node of salloc
# Set PYTHON=python3.12 to make .venv with it, or TRAIN_PYTHON=/path/to/python to use no .venv.
# Two minutes before the time limit (USR1@120), training saves a checkpoint and requeues the job.
#SBATCH --job-name=baseline --output=%x-%j.out --open-mode=append --signal=USR1@120 --requeue
#SBATCH --nodes=1 --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=8 --time=02:00:00
# Your site may need these (remove one # to enable the line):
##SBATCH --partition=gpu --account=project --gres=gpu:a100:1 --mem=64G
set -euo pipefail
fail() {
    echo "run_baseline.sh: error: $*" >&2
    exit 2
}

# Slurm runs a copy of this file: the project is where sbatch was called, or where --chdir points.
for project in "$(dirname "$(readlink -f "$0")")" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
    [[ ! -e $project/baseline.py ]] || break
done
[[ -e $project/baseline.py ]] || fail "no baseline.py here: call sbatch in its directory"

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

unset OMP_PROC_BIND OMP_PLACES GOMP_CPU_AFFINITY KMP_AFFINITY # they could bind all to one core
[[ -n ${SLURM_JOB_NODELIST:-} ]] || exec "$python" "$project/baseline.py" "$@"
# Compute nodes seldom reach the internet, and sbatch --export=NONE leaves PATH unexported.
export PATH HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${SLURM_JOB_CPUS_PER_NODE%%[(,]*}
# srun would take these as its options.
unset SLURM_EXPORT_ENV SLURM_TRES_PER_TASK SLURM_CPUS_PER_{TASK,GPU} SLURM_MEM_PER_{CPU,GPU,NODE}
[[ -z ${SLURM_STEP_ID:-} ]] || export SLURM_OVERLAP=1 # the shell of srun --pty is a step, too
exec srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpu-bind=none --quit-on-interrupt \
    "$python" "$project/baseline.py" "$@"
