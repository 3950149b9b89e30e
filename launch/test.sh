#!/usr/bin/env bash
# Lint, types and tests: `bash launch/test.sh`; arguments go to pytest: `bash launch/test.sh -k report -x`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/env.sh
PATH=$PWD/.venv/bin:$PATH
python -m ruff check .
python -m mypy
python -m pytest "$@"
