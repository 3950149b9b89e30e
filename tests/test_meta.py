"""Contract: Meta's Llama folders of 1 to 8 shards become what transformers computes with, and the way back gives the
shards that the rules of Meta's code give; config.json and params.json say the same. The reference is plain torch code
written here from those rules, and transformers itself. Not checked: weights that Meta released, which nobody may pass on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckpt_dist
from ckpt_dist import configs
from ckpt_dist.errors import CheckpointError, UsageError
from tests.test_real import same

Tensors = dict[str, torch.Tensor]
HEADS, GROUPS, DIM, FFN, VOCAB = 16, 8, 64, 256, 96
PARAMS = dict(
    dim=DIM,
    n_layers=2,
    n_heads=HEADS,
    n_kv_heads=GROUPS,
    vocab_size=VOCAB,
    multiple_of=256,
    norm_eps=1e-5,
    rope_theta=500000.0,
)
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


# ---- the reference: Meta's rules in plain torch


def hf_model(seed: int = 3, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()
    for name, value in model.named_parameters():
        if "norm" in name:  # all ones would prove nothing
            value.data.uniform_(0.5, 1.5)
    return model


def adjacent(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves of each head as adjacent pairs."""
    return w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape).contiguous()


def to_meta(state: Tensors) -> Tensors:
    out = {}
    for name, value in state.items():
        heads = HEADS if "q_proj" in name else GROUPS if "k_proj" in name else 0
        for theirs, metas in NAMES.items():
            name = name.replace(theirs, metas)
        out[name] = adjacent(value, heads) if heads else value.clone()
    return out


def split(whole: Tensors, count: int, embedding: int = 0) -> list[Tensors]:
    rows, columns = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")
    shards: list[Tensors] = [{} for _ in range(count)]
    for name, value in whole.items():
        kind = name.split(".")[-2]
        dim = embedding if kind == "tok_embeddings" else 0 if kind in rows else 1 if kind in columns else None
        parts = [value] * count if dim is None else value.chunk(count, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.contiguous().clone()
    return shards


def save(folder: Path, shards: list[Tensors], params: dict[str, Any] | None = PARAMS) -> Path:
    folder.mkdir()
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_text("a tokenizer")
    return folder


def shards_of(folder: Path) -> list[Tensors]:
    files = sorted(folder.glob("consolidated.*.pth"))
    return [torch.load(f, weights_only=True, mmap=True) for f in files]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) * 3 % VOCAB).logits


# ---- from Meta


@pytest.mark.parametrize("embedding", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_transformers_loads_what_any_number_of_shards_becomes(tmp_path: Path, count: int, embedding: int) -> None:
    from transformers import LlamaForCausalLM

    model = hf_model()
    whole = to_meta(model.state_dict())
    source = save(tmp_path / "meta", split(whole, count, embedding))
    one = save(tmp_path / "one", [whole])
    done = ckpt_dist.convert(source, tmp_path / "hf", **{"engine.verify": True})
    same(load_file(tmp_path / "hf/model.safetensors"), dict(model.state_dict()))
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.float32
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert (tmp_path / "hf/tokenizer.model").read_text() == "a tokenizer"
    assert any("max_position_embeddings 8192" in g for g in done["guesses"])
    facts = ckpt_dist.inspect(source)
    assert (facts["format"], facts["dialect"], facts["num_files"]) == ("meta", "meta", count)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    prints = {ckpt_dist.fingerprint(p) for p in (source, one, tmp_path / "hf")}
    assert prints == {done["fingerprint"]}
    assert ckpt_dist.verify(source, one)["bit_equal"]
