#!/usr/bin/env bash
# A job on this node, or this node's part of a job on several nodes:
#
#   launch/torchrun.sh VERB key=value ...
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh VERB key=value ...     (the same on each node)
#
# NPROC ranks on each node: by default one for each GPU, or where there is none one for each 8 CPUs, because a rank
# has up to 8 threads of its own. MASTER_PORT is 29400 unless given. PYTHON is the interpreter: by default that of .venv.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VERB=${1:-}
if [ -z "$VERB" ] || [ ! -f "$HERE/jobs/$VERB.py" ]; then
    echo "Give a verb first: $(cd "$HERE/jobs" && echo [a-z]*.py | sed 's/\.py//g')" >&2
    exit 2
fi
shift
PYTHON=${PYTHON:-$([ -x "$HERE/.venv/bin/python" ] && echo "$HERE/.venv/bin/python" || echo python3)}
if [ -z "${NPROC:-}" ]; then
    GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    CPUS=${SLURM_CPUS_ON_NODE:-$(nproc)}
    NPROC=$((GPUS > 0 ? GPUS : CPUS > 8 ? CPUS / 8 : 1))
fi
WHERE=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    : "${NODE_RANK:?NODE_RANK is needed with NNODES: the number of this node, from 0}"
    : "${MASTER_ADDR:?MASTER_ADDR is needed with NNODES: the name or address of node 0}"
    WHERE=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29400}")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m torch.distributed.run "${WHERE[@]}" --nproc-per-node "$NPROC" "$HERE/jobs/$VERB.py" "$@"
