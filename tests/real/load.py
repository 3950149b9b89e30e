"""torchrun, 4 ranks: a Llama under FSDP2 x tensor parallelism (2 x 2) loads each of argv[2:] through `ckpt_dist.dcp.reader`.

argv[1] is the Hugging Face folder that all of them hold. Each is loaded into the sharded model under its own names,
and into shards under the names of torchtitan; everything must be bit-equal to the whole load, and no rank may read
more than 1.1 times the bytes of its shards. The ranks also write their own `.pt` files to argv[1]/ranks and load those.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, LlamaForCausalLM

import ckpt_dist
from tests.test_reader import to_torchtitan


def sharded(folder: str, mesh: DeviceMesh) -> LlamaForCausalLM:
    """The model with weights of no use, sharded on both dims of the mesh."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    for layer in model.model.layers:
        plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
        plan |= {f"mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def load(state: dict[str, Any], whole: dict[str, torch.Tensor], path: str, **options: Any) -> float:
    """Bytes read for each byte of this rank's shards, once everything is as it should be."""
    for value in state.values():
        value.data.fill_(float("nan"))
    reader = ckpt_dist.dcp.reader(path, **options)
    dcp.load(state, storage_reader=reader)
    shards = 0
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        shards += value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes
        assert torch.equal(full, whole[name]), (path, name)
    return reader.bytes_read / shards


def main() -> None:
    dist.init_process_group("gloo")
    folder, sources = sys.argv[1], sys.argv[2:]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    config = {"model.config": folder}
    whole = load_file(Path(folder) / "model.safetensors")
    model = sharded(folder, mesh)
    most = {path: load(model.state_dict(), whole, path, **config) for path in sources}

    ranks = Path(folder) / "ranks"
    ranks.mkdir(exist_ok=True)
    torch.save(model.state_dict(), ranks / f"model_world_size_4_rank_{dist.get_rank()}.pt")
    dist.barrier()
    titan = to_torchtitan(whole, AutoConfig.from_pretrained(folder))
    for n, path in enumerate((*sources, str(ranks))):  # rows cut within heads, columns cut on both dims of the mesh
        places = [[Shard(0), Shard(1)], [Shard(1), Shard(1)], [Shard(0), Shard(0)]][n % 3]
        fit = {k: [Shard(min(p.dim, v.dim() - 1)) for p in places] for k, v in titan.items()}
        state: dict[str, Any] = {k: zeros(v.shape, device_mesh=mesh, placements=fit[k]) for k, v in titan.items()}
        most[f"{path} torchtitan"] = load(state, titan, path, **config, like=state)

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, most)
    if dist.get_rank() == 0:
        print(json.dumps({path: max(m[path] for m in everyone) for path in most}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
