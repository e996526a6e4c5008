#!/usr/bin/env bash
# The records beside this file: runs of the sample by the baseline, and by one and two workers, in turn.
#
#   bash results/two-cores/measure.sh [ROUNDS]          three rounds of five minutes
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
bash run_baseline.sh --prepare --sample
new=$(mktemp --directory) # the records name the commit, and say whether a file of it was changed: none may be yet
options=(--sample --device cpu --output-dir "$new")
export OMP_NUM_THREADS=1
for ((round = 1; round <= ${1:-3}; round++)); do
    .venv/bin/python baseline.py "${options[@]}" --run-name "baseline-$round"
    for workers in 1 2; do
        .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=$workers \
            distributed.py "${options[@]}" --run-name "workers-$workers-$round"
    done
done
.venv/bin/python distributed.py --report --output-dir "$new" | grep --invert-match "$new" > "$new/results/report.txt"
rm --force "$here"/*.json "$here"/speedup*
mv "$new"/results/* "$here"
rm -r "$new"
