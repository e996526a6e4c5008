#!/usr/bin/env bash
# Set up what the tests need, and run them all; or, with arguments, call pytest once, with these.
#
#   SQUAD_DIR=FOLDER   also check the whole training subset, FOLDER/train-v2.0-subset.json.gz
#   SQUAD_LONG=1       also train until the encoder has learnt something: ten minutes (wants SQUAD_DIR)
set -euo pipefail
cd "$(dirname "$0")/.."
bash run_baseline.sh --prepare --sample # makes .venv
.venv/bin/python -m pip install --quiet -r tests/requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
pytest=(.venv/bin/python -m pytest)
(($# == 0)) || exec "${pytest[@]}" "$@"
# Two files at a time, whose tests share runs, as on a machine of two cores; then those tests that must be alone.
status=0
"${pytest[@]}" -n 2 --dist loadfile -m "not alone" || status=$?
((status < 2)) || exit $status # interrupted, or not even started
"${pytest[@]}" -m alone
exit $status
