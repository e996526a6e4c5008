#!/usr/bin/env bash
# The records beside this file: three runs of the sample on each number of workers, in turn. About twenty minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
bash run_baseline.sh --prepare --sample
rm -f "$here"/*.json # a finished run is not repeated
options=(--sample --results "$here")
export OMP_NUM_THREADS=1
for repetition in 1 2 3; do
    .venv/bin/python baseline.py "${options[@]}" --run "baseline-$repetition"
    for workers in 1 2; do
        .venv/bin/torchrun --standalone --nproc-per-node=$workers -- distributed.py "${options[@]}" \
            --run "workers-$workers-$repetition"
    done
done
