"""Checkpoints to measure with, of one Llama-shaped model in bf16: torchrun, 4 ranks, gloo.

    torchrun --nproc-per-node 4 benchmarks/fixtures.py WORK LAYERS

WORK/dcp_fsdp     FSDP: Shard(0) over 4 ranks, as dcp.save writes it
WORK/dcp_tp       tensor parallel over 4 ranks: o_proj and down_proj are divided along dim 1
WORK/run/step-1..4   four FSDP checkpoints that differ
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

E, F, V, HEADS, GROUPS = 2048, 5632, 32000, 16, 8


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, E)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {p + "self_attn.q_proj.weight": (E, E), p + "self_attn.k_proj.weight": (E // 2, E), p + "self_attn.v_proj.weight": (E // 2, E)}
        found |= {p + "self_attn.o_proj.weight": (E, E), p + "mlp.gate_proj.weight": (F, E), p + "mlp.up_proj.weight": (F, E)}
        found |= {p + "mlp.down_proj.weight": (E, F), p + "input_layernorm.weight": (E,), p + "post_attention_layernorm.weight": (E,)}
    return found | {"model.norm.weight": (E,), "lm_head.weight": (V, E)}


def config(layers: int) -> dict[str, object]:
    return dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=E, intermediate_size=F, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, vocab_size=V, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip


def save(folder: Path, layers: int, tensor_parallel: bool, seed: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(seed * 100 + dist.get_rank())
    noise = torch.randn(V * E // dist.get_world_size(), generator=generator).bfloat16()
    state = {}
    for name, shape in shapes(layers).items():
        dim = 1 if tensor_parallel and ("o_proj" in name or "down_proj" in name) else 0
        place = Replicate() if tensor_parallel and len(shape) == 1 else Shard(dim)
        local = list(shape)
        if isinstance(place, Shard):
            local[dim] //= dist.get_world_size()
        numel = int(torch.tensor(local).prod())
        state[name] = DTensor.from_local(noise[:numel].view(local), mesh, [place], run_check=False)
    dcp.save({"model": state}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        (folder / "config.json").write_text(json.dumps(config(layers)))


def main() -> None:
    dist.init_process_group("gloo")
    work, layers = Path(sys.argv[1]), int(sys.argv[2])
    save(work / "dcp_fsdp", layers, False, 0)
    save(work / "dcp_tp", layers, True, 0)
    for step in range(1, 5):
        save(work / f"run/step-{step}", layers, False, step)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
