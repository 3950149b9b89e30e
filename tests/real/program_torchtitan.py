"""4 ranks: torchtitan's own Llama under FSDP2 x tensor parallelism (2 x 2) loads the Hugging Face folder argv[1] and
saves it again to argv[2], both against torchtitan's own adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchtitan.models.llama3 import model_registry

import ckpt_dist
from tests.real.program import fork


def main(folder: str, out: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    spec = model_registry("debugmodel")
    model = spec.model.build()
    for name, weight in list(model.named_parameters()):
        if weight.dim() == 2:  # every matrix by rows or by columns, as tensor parallelism does
            place, _, leaf = name.rpartition(".")
            columns = Shard(1) if ".wo." in name or ".w2." in name else Shard(0)
            shard = distribute_tensor(weight.detach(), mesh["tp"], [columns])
            setattr(model.get_submodule(place), leaf, torch.nn.Parameter(shard))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    state = {k: v for k, v in model.state_dict().items() if "rope" not in k}
    dcp.load(state, storage_reader=ckpt_dist.dcp.reader(folder, like=state))
    model.load_state_dict(state)
    adapter, whole = spec.state_dict_adapter(spec.model, None), load_file(Path(folder) / "model.safetensors")
    theirs = adapter.from_hf(dict(whole))
    found = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    two_dims = sum(isinstance(v, DTensor) and v.device_mesh.ndim == 2 for v in state.values())
    dcp.save(model.state_dict(), storage_writer=ckpt_dist.dcp.writer(out, config=folder))
    if dist.get_rank() == 0:
        made, expected = load_file(Path(out) / "model.safetensors"), adapter.to_hf(dict(found))
        assert sorted(made) == sorted(expected) == sorted(whole)
        assert all(torch.equal(made[name], value) for name, value in expected.items())
        print(f"{len(theirs)} tensors, {two_dims} of them on both dims, are what torchtitan's adapter makes")


if __name__ == "__main__":
    fork(4, main, *sys.argv[1:])
