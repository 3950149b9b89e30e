#!/usr/bin/env bash
# Make .venv in this checkout, with the project (editable) and its test extras; quick when nothing has changed.
#
#   bash launch/env.sh               afterwards: source .venv/bin/activate
#
# A torch that `python3` already has is used as it is. Otherwise a machine without an NVIDIA driver gets torch's
# CPU build, which needs no CUDA packages. PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=$PWD/.venv
STAMP=$VENV/.ckpt_dist

wanted() { cat setup.cfg pyproject.toml launch/constraints.txt launch/env.sh; pwd; "$PYTHON" -V; }
KEY=$(wanted | cksum)
[ -x "$VENV/bin/ckpt-dist" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$KEY" ] && exit 0

has_torch() { "$PYTHON" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))' 2>/dev/null; }
has_driver() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# uv does not read pip's settings: hand over those that say where packages come from.
setting() {  # setting NAME: as pip would see it, from PIP_NAME or from its files
    local variable=PIP_${1^^}
    variable=${variable//-/_}
    [ -n "${!variable:-}" ] && { echo "${!variable}"; return; }
    "$PIP" config get "install.$1" 2>/dev/null || "$PIP" config get "global.$1" 2>/dev/null || true
}
hand_over() {  # hand_over UV_NAME pip-name
    [ -n "${!1:-}" ] && return
    local value
    value=$(setting "$2" | tr '\n' ' ')
    [ -z "${value// /}" ] || export "$1=${value% }"
}

echo "Making $VENV (this takes a few minutes the first time)"
rm -f "$STAMP"
SITE=(); has_torch && SITE=(--system-site-packages)
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "${SITE[@]}" "$VENV"
PIP=$VENV/bin/pip
[ -x "$VENV/bin/uv" ] || "$PIP" install --quiet --disable-pip-version-check uv
hand_over UV_DEFAULT_INDEX index-url
hand_over UV_INDEX extra-index-url
hand_over UV_FIND_LINKS find-links
hand_over SSL_CERT_FILE cert
[ -z "${UV_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS// /,}
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}  # as pip: the newest of all indexes
install() { "$VENV/bin/uv" pip install --python "$VENV/bin/python" --quiet "$@"; }

CONSTRAINTS=launch/constraints.txt
if has_torch; then
    echo "Using the torch of $PYTHON"
    CONSTRAINTS=$VENV/constraints.txt  # all but torch, which is not ours to choose here
    { grep -v '^torch==' launch/constraints.txt; "$PYTHON" -c 'import torch; print(f"torch=={torch.__version__}")'; } > "$CONSTRAINTS"
elif has_driver; then
    install -c "$CONSTRAINTS" torch
else
    TORCH=$(sed -n 's/^torch==//p' launch/constraints.txt)
    install "torch==$TORCH+cpu" 2>/dev/null || install --torch-backend cpu "torch==$TORCH"
fi
install -c "$CONSTRAINTS" -e '.[test]'
echo "$KEY" > "$STAMP"
