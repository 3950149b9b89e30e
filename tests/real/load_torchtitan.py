"""torchrun: torchtitan's own Llama under FSDP2 loads the Hugging Face folder argv[1], against torchtitan's own adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.models.llama3 import model_registry

import ckpt_dist


def main() -> None:
    dist.init_process_group("gloo")
    spec = model_registry("debugmodel")
    model = spec.model.build()
    for layer in model.layers.values():
        fully_shard(layer)
    fully_shard(model)
    state = {k: v for k, v in model.state_dict().items() if "rope" not in k}
    dcp.load(state, storage_reader=ckpt_dist.dcp.reader(sys.argv[1], like=state))
    model.load_state_dict(state)
    theirs = spec.state_dict_adapter(spec.model, None).from_hf(load_file(Path(sys.argv[1]) / "model.safetensors"))
    for name, value in model.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(full, theirs[name]), name
    if dist.get_rank() == 0:
        print(f"{len(theirs)} tensors are what torchtitan's adapter makes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
