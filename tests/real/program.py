"""4 ranks of a running program: a Llama under FSDP2 x tensor parallelism (2 x 2) loads and saves by `ckpt_dist.dcp`.

    python program.py HF OUT [MORE ...]     prints what was read, as JSON

HF is the Hugging Face folder of a model, MORE hold the same one. Each is loaded into the sharded model under its own
names, and into shards under the names of torchtitan; everything must be bit-equal to the whole load. The model and the
torchtitan shards are saved to OUT, once with a rank that fails. The ranks are forked: the imports are done once.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, LlamaForCausalLM

import ckpt_dist
from tests.test_reader import to_torchtitan

Tensors = dict[str, torch.Tensor]
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def fork(world: int, main: Callable[..., None], *args: Any) -> None:
    """Run `main` on some ranks; 1 is the exit code if one of them fails."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            torch.set_num_threads(1)
            try:
                dist.init_process_group("gloo", init_method=f"file://{args[0]}.ranks", rank=rank, world_size=world)
                main(*args)
                dist.destroy_process_group()
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(1 if any(codes) else 0)


def sharded(folder: str, mesh: DeviceMesh) -> LlamaForCausalLM:
    """The model with weights of no use, sharded on both dims of the mesh."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    plan = {f"model.layers.*.{n}": ColwiseParallel() for n in COLUMNS}
    plan |= {f"model.layers.*.{n}": RowwiseParallel() for n in ROWS}
    parallelize_module(
        model, mesh["tp"], {**plan, "model.embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()}
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def load(state: dict[str, Any], whole: Tensors, path: str, **options: Any) -> tuple[int, int]:
    """Bytes that this rank has read, and of its shards, once everything is as it should be."""
    for value in state.values():
        value.data.fill_(float("nan"))
    reader = ckpt_dist.dcp.reader(path, **options)
    dcp.load(state, storage_reader=reader)
    shards = 0
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        shards += value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes
        assert torch.equal(full, whole[name]), (path, name)
    return reader.bytes_read, shards


class Failing(dcp.DefaultSavePlanner):
    """A rank whose memory cannot be read."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 3:
            raise OSError("this rank has failed")
        return super().resolve_data(write_item)


def save(model: Tensors, titan: Tensors, out: Path, config: str) -> None:
    """The model once, after a failure; the same as shards under torchtitan's names into several formats."""
    warnings.simplefilter("error", UserWarning)
    writer = ckpt_dist.dcp.writer(out / "hf", config=config)
    try:
        dcp.save(model, storage_writer=writer, planner=Failing())
        raise AssertionError("a rank has failed, and nobody said so")
    except CheckpointException as error:
        assert "this rank has failed" in str(error) and "rank 3" in str(error), error
    dist.barrier()
    assert not out.exists() or not list(out.iterdir())
    dist.barrier()
    dcp.save(model, storage_writer=writer)
    options: dict[str, dict[str, Any]] = {"hf": dict(max_shard_size="50KB"), "torch": {}, "dcp": dict(dtype="bfloat16")}
    for format, more in options.items():
        with warnings.catch_warnings(record=True):
            path = out / f"titan-{format}"
            dcp.save({"model": titan}, storage_writer=ckpt_dist.dcp.writer(path, format, config=config, **more))


def main(folder: str, out: str, *more: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    config, sources = {"config": folder}, (folder, *more)
    whole = load_file(Path(folder) / "model.safetensors")
    model = sharded(folder, mesh)
    read = {path: load(model.state_dict(), whole, path, **config) for path in sources}

    ranks = Path(folder) / "ranks"
    ranks.mkdir(exist_ok=True)
    torch.save(model.state_dict(), ranks / f"model_world_size_4_rank_{dist.get_rank()}.pt")
    dist.barrier()
    titan = to_torchtitan(whole, AutoConfig.from_pretrained(folder))
    for n, path in enumerate((str(ranks), *sources)):  # rows cut within heads, columns cut on both dims of the mesh
        places = [[Shard(0), Shard(1)], [Shard(1), Shard(1)], [Shard(0), Shard(0)]][n % 3]
        fit = {k: [Shard(min(p.dim, v.dim() - 1)) for p in places] for k, v in titan.items()}
        state: dict[str, Any] = {k: zeros(v.shape, device_mesh=mesh, placements=fit[k]) for k, v in titan.items()}
        read[f"{path} torchtitan"] = load(state, titan, path, **config, like=state)
        if n == 0:
            save(model.state_dict(), state, Path(out), folder)

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, read)
    if dist.get_rank() == 0:
        nbytes = sum(t.nbytes for t in whole.values())
        worst = {path: max(of[path][0] / of[path][1] for of in everyone) for path in read}
        print(json.dumps({"rank": worst, "node": {p: sum(of[p][0] for of in everyone) / nbytes for p in read}}))


if __name__ == "__main__":
    fork(4, main, *sys.argv[1:])
