#!/usr/bin/env bash
# Set up what the tests need, and run them; the arguments are pytest's.
#
#   SQUAD_DIR=FOLDER   also check the whole training subset, FOLDER/train-v2.0-subset.json.gz
#   SQUAD_LONG=1       also train until the encoder has learnt something: ten minutes (wants SQUAD_DIR)
set -euo pipefail
cd "$(dirname "$0")/.."
bash run_baseline.sh --prepare --sample # makes .venv
.venv/bin/python -m pip install --quiet -r tests/requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
