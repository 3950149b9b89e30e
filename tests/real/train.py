"""Real training checkpoints, tiny: transformers models under torch's own parallelism, over gloo.

    torchrun --nproc-per-node 4 -m tests.real.train OUT CASE [CASE ...]

Every case trains one or two steps and writes to OUT/CASE:
    reference.safetensors   the whole state dict, gathered by torch (full_tensor)
    logits.pt               {"ids", "logits"} of the trained model, computed unsharded in fp32
    hf/                     save_pretrained of the trained model: config, and what transformers itself would write
    dcp/                    dcp.save of {"model", "optim"} as get_state_dict gives them
    ranks/                  model_world_size_W_rank_R.pt: torch.save of each rank's own state dict
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from tests.real import leave

SIZES = dict(
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=131,
    max_position_embeddings=64,
)


class WithBuffers(nn.Module):
    """A model with a counter, a scalar and a tensor of three rows beside the Llama: buffers and empty shards."""

    def __init__(self, inner: LlamaForCausalLM) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.tensor([1000001, 3], dtype=torch.int64))
        self.register_buffer("temperature", torch.tensor(1.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids).logits * self.scale.mean()


def model(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)


def shard_llama(m: LlamaForCausalLM, **options: Any) -> None:
    for layer in m.model.layers:
        fully_shard(layer, **options)
    fully_shard(m, **options)


def tensor_parallel(m: LlamaForCausalLM, mesh: Any) -> None:
    for layer in m.model.layers:
        plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
        plan |= {f"mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, mesh, plan)


def build(case: str) -> nn.Module:
    world = dist.get_world_size()
    if case == "fsdp2":
        m = model()
        shard_llama(m, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",)))
        return m
    if case == "bf16":
        m = model(dtype=torch.bfloat16)
        shard_llama(m)
        return m
    if case == "buffers":
        wrapped = WithBuffers(model())
        shard_llama(wrapped.inner)
        fully_shard(wrapped)
        return wrapped
    if case == "tied":
        m = model(tied=True)
        shard_llama(m)
        return m
    if case == "dim1":
        m = model()
        shard_llama(m, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % world == 0 else Shard(0))
        return m
    if case == "hsdp":
        m = model()
        shard_llama(m, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
        return m
    if case == "tp_fsdp":
        m = model()
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(m, mesh["tp"])
        shard_llama(m, mesh=mesh["dp"])
        return m
    if case == "tp":
        m = model()
        tensor_parallel(m, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
        return m
    if case == "fsdp1":
        return FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=True)
    raise SystemExit(f"no case {case}")


def train(m: nn.Module, steps: int) -> torch.optim.Optimizer:
    torch.manual_seed(11)
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False)
    for _ in range(steps):
        ids = torch.randint(0, SIZES["vocab_size"], (2, 12))
        out = m(ids)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def local_state(m: nn.Module) -> dict[str, Any]:
    if isinstance(m, FullyShardedDataParallel):
        from torch.distributed.fsdp import ShardedStateDictConfig, StateDictType

        with FullyShardedDataParallel.state_dict_type(m, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()):
            return m.state_dict()
    return m.state_dict()


def whole(m: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(m, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def merged_by_torch(out: Path) -> dict[str, torch.Tensor]:
    """FSDP1's own gathering crashes on CPU (torch 2.13), so torch's converter says what the model is."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dist.barrier()
    if dist.get_rank() == 0:
        dcp_to_torch_save(out / "dcp", out / "merged.pt")
        return torch.load(out / "merged.pt", weights_only=True)["model"]
    return {}


def save_reference(out: Path, case: str, full: dict[str, torch.Tensor]) -> None:
    """What torch and transformers say the model is, made on one rank from the gathered weights."""
    distinct = {k: v.detach().clone().contiguous() for k, v in full.items()}
    save_file(distinct, out / "reference.safetensors", metadata={"format": "pt"})
    plain = model(tied=case == "tied", dtype=torch.bfloat16 if case == "bf16" else torch.float32)
    prefix = "inner." if case == "buffers" else ""
    plain.load_state_dict({k[len(prefix) :]: v for k, v in full.items() if k.startswith(prefix)}, strict=False)
    plain.save_pretrained(out / "hf")
    wide = model(
        tied=case == "tied"
    ).eval()  # in fp32 from the start: casting a bf16 model up keeps rounded rotary tables
    wide.load_state_dict(plain.state_dict())
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.save({"ids": ids, "logits": wide(ids).logits}, out / "logits.pt")


def run(case: str, out: Path) -> None:
    m = build(case)
    out.mkdir(parents=True, exist_ok=True)
    optimizer = train(m, 2)
    rank, world = dist.get_rank(), dist.get_world_size()
    state, optim = get_state_dict(m, optimizer)
    dcp.save({"model": state, "optim": optim}, checkpoint_id=out / "dcp")
    (out / "ranks").mkdir(exist_ok=True)
    torch.save(local_state(m), out / "ranks" / f"model_world_size_{world}_rank_{rank}.pt")
    full = merged_by_torch(out) if case == "fsdp1" else whole(m)
    if rank == 0:
        save_reference(out, case, full)
    dist.barrier()


def run_steps(out: Path) -> None:
    """Three checkpoints of one run, for averages: OUT/steps/step-N, the config above them, one rank count for all."""
    m = build("bf16")
    for step in (1, 2, 3):
        optimizer = train(m, 1)
        state, optim = get_state_dict(m, optimizer)
        dcp.save({"model": state, "optim": optim}, checkpoint_id=out / f"step-{step * 10}")
    if dist.get_rank() == 0:
        m.config.save_pretrained(out)
    dist.barrier()


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist.init_process_group("gloo")
    out = Path(sys.argv[1])
    for case in sys.argv[2:]:
        if case == "steps":
            run_steps(out / case)
        else:
            run(case, out / case)
    leave()


if __name__ == "__main__":
    main()
