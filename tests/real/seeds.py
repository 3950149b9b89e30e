"""torchrun: a seed in every format from the config argv[1], into the folder argv[2]; on two ranks then `dcp.load` of the
DCP one into a Llama under FSDP2, whose gathered weights are saved as loaded.safetensors.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import ckpt_dist
from tests.real import leave

TARGETS = {
    "hf": {},
    "dcp": {"format": "dcp"},
    "titan": {"format": "dcp", "dialect": "torchtitan"},
    "torch": {"format": "torch", "dtype": "bfloat16"},
    "exchanged": {"engine.transport": "collective"},
}


def seeds(config: Path, out: Path) -> dict[str, str]:
    """Each target, and its fingerprint."""
    return {n: ckpt_dist.seed(config, out / n, seed=7, **options)["fingerprint"] for n, options in TARGETS.items()}


def load(config: Path, out: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=out / "dcp")
    model.load_state_dict(state)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        save_file(whole, out / "loaded.safetensors")
    dist.barrier()


if __name__ == "__main__":
    faulthandler.enable()
    config, out = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    here = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": os.environ["RANK"]}
    os.environ |= here  # ranks of one node exchange nothing
    seeds(config, out)
    if dist.get_world_size() == 2:
        load(config, out)
    leave()
