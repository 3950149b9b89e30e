"""Train a tiny Llama under FSDP2 and save a checkpoint every ten steps, as a real run does.

    torchrun --nproc-per-node 2 launch/train_tiny.py quickstart

writes quickstart/hf (config and tokenizer) and quickstart/run/step-{10,20,30} (torch.distributed.checkpoint).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "a checkpoint is a catalog of chunks; a conversion joins two catalogs and copies each overlapping box once. "
STEPS, EVERY, LENGTH, BATCH = 30, 10, 64, 8


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that no vocabulary has to be fetched."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model() -> LlamaForCausalLM:
    """0.4 million parameters; three key-value heads on two ranks, so that shards cut through heads."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def shard(model: LlamaForCausalLM) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def batch(ids: torch.Tensor) -> torch.Tensor:
    """Random windows of the text; each rank has its own."""
    starts = torch.randint(len(ids) - LENGTH, (BATCH,))
    return torch.stack([ids[s : s + LENGTH] for s in starts])


def train(model: LlamaForCausalLM, ids: torch.Tensor, run: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1 + dist.get_rank())
    for step in range(1, STEPS + 1):
        x = batch(ids)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": state}, checkpoint_id=run / f"step-{step}")
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss.item():.3f}, saved {run / f'step-{step}'}", flush=True)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    tokenizer, model = make_tokenizer(), make_model()
    if dist.get_rank() == 0:
        model.config.save_pretrained(folder / "hf")
        tokenizer.save_pretrained(folder / "hf")
    shard(model)
    train(model, torch.tensor(tokenizer(TEXT * 20)["input_ids"]), folder / "run")
    sys.stdout.flush()
    os._exit(0)  # FSDP2 keeps the process group alive; its threads may abort an interpreter that ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
