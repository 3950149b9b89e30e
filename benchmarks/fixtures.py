"""Checkpoints to measure with, of one Llama-shaped model in bf16: `torchrun --nproc-per-node 4 benchmarks/fixtures.py WORK LAYERS`.

WORK/dcp_fsdp        FSDP: Shard(0) over 4 ranks, as dcp.save writes it
WORK/dcp_tp          tensor parallel over 4 ranks: o_proj and down_proj are divided along dim 1, norms are replicated
WORK/run/step-1..4   four FSDP checkpoints that differ
WORK/dcp_tenth       FSDP, of a model with a tenth of the bytes: two layers and a vocabulary of 1000
WORK/ranks           model_world_size_4_rank_R.pt: each rank's own part of dcp_fsdp, as training scripts save it
WORK/hf_sharded      dcp_fsdp as torch's own writer of Hugging Face shards leaves it: a file of each rank
WORK/chunks_512k     a .metadata of 1000 tensors x 512 ranks, with sparse files of zeros
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

E, F, V, HEADS, GROUPS = 2048, 5632, 32000, 16, 8
NUM_TENSORS, NUM_RANKS, ROWS, COLUMNS, BYTES = 1000, 512, 8, 4096, 70000  # of chunks_512k


def shapes(layers: int, vocabulary: int = V) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, E)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {p + f"self_attn.{n}_proj.weight": (rows, E) for n, rows in (("q", E), ("k", E // 2), ("v", E // 2))}
        found |= {p + "self_attn.o_proj.weight": (E, E)}
        found |= {
            p + "mlp.gate_proj.weight": (F, E),
            p + "mlp.up_proj.weight": (F, E),
            p + "mlp.down_proj.weight": (E, F),
        }
        found |= {p + "input_layernorm.weight": (E,), p + "post_attention_layernorm.weight": (E,)}
    return found | {"model.norm.weight": (E,), "lm_head.weight": (vocabulary, E)}


def config(layers: int, vocabulary: int = V) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": E,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": vocabulary,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def state_dict(layers: int, tensor_parallel: bool, seed: int, vocabulary: int = V) -> dict[str, DTensor]:
    """Each tensor has its own part of the same seeded noise: what the values are does not matter to the speed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(seed * 100 + dist.get_rank())
    noise = torch.randn(V * E // dist.get_world_size(), generator=generator).bfloat16()
    state = {}
    for name, shape in shapes(layers, vocabulary).items():
        dim = 1 if tensor_parallel and ("o_proj" in name or "down_proj" in name) else 0
        place = Replicate() if tensor_parallel and len(shape) == 1 else Shard(dim)
        local = list(shape)
        if isinstance(place, Shard):
            local[dim] //= dist.get_world_size()
        numel = int(torch.tensor(local).prod())
        state[name] = DTensor.from_local(noise[:numel].view(local), mesh, [place], run_check=False)
    return state


def save(folder: Path, layers: int, tensor_parallel: bool, seed: int, vocabulary: int = V) -> None:
    dcp.save({"model": state_dict(layers, tensor_parallel, seed, vocabulary)}, checkpoint_id=folder)
    write_config(folder, layers, vocabulary)


def write_config(folder: Path, layers: int, vocabulary: int = V) -> None:
    if dist.get_rank() == 0:
        (folder / "config.json").write_text(json.dumps(config(layers, vocabulary)))


def apart(state: dict[str, DTensor]) -> dict[str, DTensor]:
    """The same tensors in memory of their own, which some writers insist on."""
    return {name: value.clone() for name, value in state.items()}


def save_ranks(folder: Path, layers: int) -> None:
    folder.mkdir(exist_ok=True)
    torch.save(
        apart(state_dict(layers, False, 0)),
        folder / f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt",
    )
    write_config(folder, layers)


def save_shards(folder: Path, layers: int) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(apart(state_dict(layers, False, 0)), storage_writer=writer)
    write_config(folder, layers)


def chunks(folder: Path) -> None:
    """The metadata that 512 ranks would write; rank 0 only."""
    if dist.get_rank():
        return
    folder.mkdir(exist_ok=True)
    tensors, stored = {}, {}
    for n in range(NUM_TENSORS):
        name, parts = f"model.layers.{n}.weight", []
        for r in range(NUM_RANKS):
            offset = torch.Size([r * ROWS, 0])
            parts.append(ChunkStorageMetadata(offset, torch.Size([ROWS, COLUMNS])))
            stored[MetadataIndex(name, offset, r)] = _StorageInfo(f"__{r}_0.distcp", n * BYTES, BYTES)
        whole = torch.Size([NUM_RANKS * ROWS, COLUMNS])
        tensors[name] = TensorStorageMetadata(TensorProperties(torch.bfloat16), whole, parts)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, None, stored)))
    for r in range(NUM_RANKS):
        with open(folder / f"__{r}_0.distcp", "wb") as file:
            file.truncate(NUM_TENSORS * BYTES)


def make(folder: Path, build: Callable[[Path], None]) -> None:
    """A folder of this name is always a whole one."""
    exists = folder.exists()
    dist.barrier()
    if exists:
        return
    part = folder.with_name(folder.name + ".part")
    build(part)
    dist.barrier()
    if dist.get_rank() == 0:
        part.rename(folder)
    dist.barrier()


def main() -> None:
    dist.init_process_group("gloo")
    work, layers = Path(sys.argv[1]), int(sys.argv[2])
    (work / "run").mkdir(parents=True, exist_ok=True)
    make(work / "dcp_fsdp", lambda folder: save(folder, layers, False, 0))
    make(work / "dcp_tp", lambda folder: save(folder, layers, True, 0))
    for step in (1, 2, 3, 4):
        make(work / f"run/step-{step}", lambda folder, seed=step: save(folder, layers, False, seed))  # type: ignore[misc]
    make(work / "dcp_tenth", lambda folder: save(folder, max(1, layers // 9), False, 0, 1000))
    make(work / "ranks", lambda folder: save_ranks(folder, layers))
    make(work / "hf_sharded", lambda folder: save_shards(folder, layers))
    make(work / "chunks_512k", chunks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
