#!/usr/bin/env bash
# Lint, types and all tests, two files at a time: `bash launch/test.sh`. Arguments go to pytest, which then runs one test
# after the other: `bash launch/test.sh -k report -x`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/env.sh
PATH=$PWD/.venv/bin:$PATH
python -m ruff check .
python -m mypy
# Ranks wait for each other's imports, so two at a time cost little; a file's tests share what they train.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder --durations=25
python -m pytest "$@"
