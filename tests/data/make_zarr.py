"""Makes `tests/data/megatron-core-0.12-zarr/`: zarr checkpoints as NeMo 1 leaves them, and what others make of them.

    python tests/data/make_zarr.py tests/data NEMO/scripts/checkpoint_averaging/distributed_checkpoint_averaging.py

Run once with megatron-core 0.12, which wrote zarr, zarr 2.18, tensorstore and ml_dtypes, on a CPU.
    run/              two steps, saved by `dist_checkpointing.save`
    reference.pt      step -> the whole tensors, as they were given to that
    averaged.pt       what NeMo's own script made of the fp32 tensors of both steps, read by zarr
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

LAYERS, NAME = 2, "gpt--val_loss=2.35-step={}-consumed_samples={}.0"
STACKED = {"self_attention.linear_qkv.weight": (16, 8), "mlp.linear_fc1.layer_norm_weight": (8,)}
SINGLE = {"embedding.word_embeddings.weight": (24, 8), "decoder.final_layernorm.weight": (8,)}


def main() -> None:
    torch.cuda.synchronize = lambda *_: None  # it is called whatever the device
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29733", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    top = Path(sys.argv[1]) / "megatron-core-0.12-zarr"
    shutil.rmtree(top, ignore_errors=True)
    values = {}
    for step in (10, 20):
        values[step] = whole(step)
        save(top / "run" / NAME.format(step, step * 8), values[step], step)
    torch.save(values, top / "reference.pt")
    torch.save(of_the_script(top / "run", Path(sys.argv[2])), top / "averaged.pt")


def whole(step: int) -> dict[str, torch.Tensor]:
    """Stacked layers in bf16, the rest in fp32."""
    torch.manual_seed(step)
    made = {f"model.decoder.layers.{n}": torch.randn(LAYERS, *shape).bfloat16() for n, shape in STACKED.items()}
    return made | {f"model.{n}": torch.randn(shape) for n, shape in SINGLE.items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], step: int) -> None:
    folder.mkdir(parents=True)
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if ".layers." not in name:  # two halves, as tensor-parallel ranks have them
            for part, half in enumerate(tensor.chunk(2)):
                state[f"{name}{part}"] = ShardedTensor.from_rank_offsets(name, half.contiguous(), (0, part, 2))
            continue
        for layer in range(LAYERS):
            one = ShardedTensor.from_rank_offsets(name, tensor[layer].clone(), (0, layer, LAYERS), prepend_axis_num=1)
            key = name.replace(".layer_norm_weight", ".weight").replace(".weight", "._extra_state")
            state |= {f"{name}{layer}": one, f"{name}s{layer}": ShardedObject(key, None, (LAYERS,), (layer,))}
    first = "model.embedding.word_embeddings.weight"
    moment = torch.zeros_like(tensors[first])
    state["exp_avg"] = ShardedTensor.from_rank_offsets(f"optimizer.state.exp_avg.{first}", moment)
    common = {"state_dict": {}, "epoch": 0, "global_step": step, "pytorch-lightning_version": "2.0.7"}
    dist_checkpointing.save({"model": state, **common}, str(folder), sharded_strategy=("zarr", 1))


def of_the_script(run: Path, script: Path) -> dict[str, torch.Tensor]:
    """The averages of NeMo's script, which is run as it is; it cannot read bf16, so only fp32 is left."""
    import zarr

    copy = run.parent / "copy"
    shutil.copytree(run, copy)
    for path in [p for p in copy.glob("*/*") if p.is_dir() and ".layers." in p.name]:
        shutil.rmtree(path)
    command = [sys.executable, script, "--name_prefix=gpt", f"--checkpoint_dir={copy}", "--steps", "10", "20"]
    subprocess.run(command, check=True)
    found = {}
    for name in SINGLE:
        group = zarr.open(str(copy / "gpt-10_20-averaged" / f"model.{name}"), mode="r")
        found[f"model.{name}"] = torch.from_numpy(group[:])
    shutil.rmtree(copy)
    return found


if __name__ == "__main__":
    main()
