"""Makes `tests/data/torch-VERSION/`: small checkpoints written by an old torch, and what they hold.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/data/make_old.py tests/data

Run once with torch 2.3.1 and once with 2.6.0 (CPU); the results are kept in the repository.
    dcp/     dcp.save of a model and optimizer state: Shard(0) uneven, Shard(1), replicated, 0-d, values that are no tensors
    ranks/   torch.save of each rank's DTensors
    reference.pt   the same, whole, as plain tensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

try:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
except ImportError:
    from torch.distributed._tensor import Replicate, Shard, distribute_tensor
from torch.distributed.device_mesh import init_device_mesh


def main() -> None:
    dist.init_process_group("gloo")
    out = Path(sys.argv[1]) / f"torch-{torch.__version__.split('+')[0]}"
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(3)
    whole = {
        "layers.0.weight": torch.randn(5, 4),
        "layers.0.bias": torch.randn(1),
        "layers.1.weight": torch.randn(4, 6).bfloat16(),
        "norm.weight": torch.randn(3),
        "scale": torch.tensor(2.5),
        "count": torch.tensor([1000001, 2]),
    }
    places = {"layers.1.weight": Shard(1), "norm.weight": Replicate()}
    model = {
        k: distribute_tensor(v, mesh, [places.get(k, Shard(0))]) if v.dim() else v
        for k, v in whole.items()
        if k != "count"
    }
    model["count"] = whole["count"]
    optim = {
        "state": {k: {"step": torch.tensor(3.0), "exp_avg": v} for k, v in model.items() if v.dim() == 2},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["layers.0.weight", "layers.1.weight"]}],
    }
    dcp.save(
        {"model": model, "optim": optim, "train_state": {"step": 7, "note": "seven"}}, checkpoint_id=str(out / "dcp")
    )
    (out / "ranks").mkdir(exist_ok=True)
    torch.save(model, out / "ranks" / f"model_world_size_2_rank_{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        torch.save(whole, out / "reference.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
