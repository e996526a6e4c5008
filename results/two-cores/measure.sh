#!/usr/bin/env bash
# The records beside this file: runs of the sample by the baseline, one and two workers, in turn; ten minutes a round.
#
#   bash results/two-cores/measure.sh [ROUNDS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
bash run_baseline.sh --prepare --sample
new=$(mktemp --directory) # the records name the commit, and say whether a file of it was changed: none may be yet
options=(--sample --results "$new")
export OMP_NUM_THREADS=1
for ((round = 1; round <= ${1:-2}; round++)); do
    .venv/bin/python baseline.py "${options[@]}" --run "baseline-$round"
    for workers in 1 2; do
        .venv/bin/torchrun --standalone --nproc-per-node=$workers -- distributed.py "${options[@]}" \
            --run "workers-$workers-$round"
    done
done
rm -f "$here"/*.json
mv "$new"/* "$here"
rmdir "$new"
