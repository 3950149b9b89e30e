"""torchrun, 4 ranks: `dcp.load` of argv[1] (weights under "model") under five shardings, against the file argv[2]."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, zeros

from tests.real import leave

SHARDINGS = [
    [Shard(0), Replicate()],
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
    [Replicate(), Shard(1)],
    [Replicate(), Replicate()],
]


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2))
    whole = load_file(sys.argv[2])
    for places in SHARDINGS:
        fit = {
            k: [p if not isinstance(p, Shard) or p.dim < v.dim() else Replicate() for p in places]
            for k, v in whole.items()
        }
        state = {k: zeros(v.shape, dtype=v.dtype, device_mesh=mesh, placements=fit[k]) for k, v in whole.items()}
        dcp.load({"model": state}, checkpoint_id=sys.argv[1])
        for k, v in whole.items():
            assert torch.equal(state[k].full_tensor(), v), (places, k)
    if dist.get_rank() == 0:
        print(f"loaded under {len(SHARDINGS)} shardings")
    leave()


if __name__ == "__main__":
    main()
