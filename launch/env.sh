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

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$PYTHON is $("$PYTHON" -V); Python 3.10 or later is needed. Give one: PYTHON=python3.12 bash launch/env.sh" >&2
    exit 1
}
has_torch() { "$PYTHON" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))' 2>/dev/null; }
has_driver() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# uv does not read pip's settings: hand over those that say where packages come from.
setting() {  # setting NAME: as pip would see it, from PIP_NAME or from its files
    local variable=PIP_${1^^}
    variable=${variable//-/_}
    [ -n "${!variable:-}" ] && { echo "${!variable}"; return; }
    pip config get "install.$1" 2>/dev/null || pip config get "global.$1" 2>/dev/null || true
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
{ [ -x "$VENV/bin/pip" ] && [ "$("$VENV/bin/python" -V)" = "$("$PYTHON" -V)" ]; } ||
    "$PYTHON" -m venv --clear "${SITE[@]}" "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if has_torch; then
    echo "Using the torch of $PYTHON"
    # --system-site-packages shows those of the interpreter, not those of a venv that $PYTHON belongs to
    "$VENV/bin/python" -c 'import torch' 2>/dev/null || "$PYTHON" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        > "$("$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])')/of_python3.pth"
    # the version that pip knows: PyPI's torch 2.13.0 says 2.13.0+cu130 of itself
    { grep -v '^torch==' launch/constraints.txt
      "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' 2>/dev/null || {
          echo "pip does not know the torch of $PYTHON: it has no metadata. Install without it: pip install --no-deps -e ." >&2
          exit 1
      }; } > "$VENV/constraints.txt"
    # pip counts what lies in those folders as installed; uv does not
    pip install --quiet -c "$VENV/constraints.txt" -e '.[test]'
    echo "$KEY" > "$STAMP"
    exit 0
fi

[ -x "$VENV/bin/uv" ] || pip install --quiet uv
hand_over UV_DEFAULT_INDEX index-url
hand_over UV_INDEX extra-index-url
hand_over UV_FIND_LINKS find-links
hand_over SSL_CERT_FILE cert
[ -z "${UV_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS// /,}
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}  # as pip: the newest of all indexes
install() { "$VENV/bin/uv" pip install --python "$VENV/bin/python" --quiet "$@"; }

CONSTRAINTS=launch/constraints.txt
if has_driver; then
    install -c "$CONSTRAINTS" torch
else
    TORCH=$(sed -n 's/^torch==//p' launch/constraints.txt)
    install "torch==$TORCH+cpu" 2>/dev/null || install --torch-backend cpu "torch==$TORCH"
fi
install -c "$CONSTRAINTS" -e '.[test]'
echo "$KEY" > "$STAMP"
