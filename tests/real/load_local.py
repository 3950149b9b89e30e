"""torchrun ... load_local.py [FOLDER REFERENCE PLACEMENT ...]: `dcp.load` of FOLDER (weights under "model") under FSDP's
sharding over all ranks, against a file of all tensors. A vector is loaded whole and in rows.

`{node}` in FOLDER becomes the node of a rank, by PLACEMENT: `0,0,1,1`.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, zeros

from tests.real import leave


def compare(folder: str, reference: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = load_file(reference)
    for vectors in (Shard(0), Replicate()):
        place = {k: [vectors if v.dim() < 2 else Shard(0)] for k, v in expected.items()}
        place |= {k: [Replicate()] for k, v in expected.items() if v.dim() == 0}
        state = {k: zeros(v.shape, dtype=v.dtype, device_mesh=mesh, placements=place[k]) for k, v in expected.items()}
        dcp.load({"model": state}, checkpoint_id=folder)
        for k, v in expected.items():
            assert torch.equal(state[k].full_tensor(), v), (folder, vectors, k)
    if dist.get_rank() == 0:
        print(f"loaded {len(expected)} tensors", file=sys.stderr)


def main() -> None:
    dist.init_process_group("gloo")
    for folder, reference, placement in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True):
        compare(folder.format(node=placement.split(",")[dist.get_rank()]), reference)
    leave()


if __name__ == "__main__":
    main()
