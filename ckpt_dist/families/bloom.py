"""BLOOM: query, key and value fused head by head, biases everywhere, a norm after the embedding.

l layer  v vocabulary  e embedding  h head  d element of a head  f feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_dist import megatron, merak
from ckpt_dist.families import gpt2

model_types = ("bloom",)

weights = dict(
    embed="v e",
    embed_norm="e",
    embed_norm_bias="e",
    attn_norm="l e",
    attn_norm_bias="l e",
    q="l h d e",
    k="l h d e",
    v="l h d e",
    q_bias="l h d",
    k_bias="l h d",
    v_bias="l h d",
    o="l e h d",
    o_bias="l e",
    mlp_norm="l e",
    mlp_norm_bias="l e",
    up="l f e",
    up_bias="l f",
    down="l e f",
    down_bias="l e",
    norm="e",
    norm_bias="e",
    head="v e",
)
ties = dict(head="embed")
init = {"*norm": "ones", "*_bias": "zeros", "*": "normal initializer_range or 0.02"}
defaults = dict(bloom=dict(tie_word_embeddings=True))

_l = "transformer.h.{l}."

_hf = {
    "transformer.word_embeddings.weight": "embed: v e",
    "transformer.word_embeddings_layernorm.weight": "embed_norm: e",
    "transformer.word_embeddings_layernorm.bias": "embed_norm_bias: e",
    _l + "input_layernorm.weight": "attn_norm: e",
    _l + "input_layernorm.bias": "attn_norm_bias: e",
    _l + "self_attention.query_key_value.weight": "q, k, v: (h (1 + 1 + 1) d) e",
    _l + "self_attention.query_key_value.bias": "q_bias, k_bias, v_bias: (h (1 + 1 + 1) d)",
    _l + "self_attention.dense.weight": "o: e (h d)",
    _l + "self_attention.dense.bias": "o_bias: e",
    _l + "post_attention_layernorm.weight": "mlp_norm: e",
    _l + "post_attention_layernorm.bias": "mlp_norm_bias: e",
    _l + "mlp.dense_h_to_4h.weight": "up: f e",
    _l + "mlp.dense_h_to_4h.bias": "up_bias: f",
    _l + "mlp.dense_4h_to_h.weight": "down: e f",
    _l + "mlp.dense_4h_to_h.bias": "down_bias: e",
    "transformer.ln_f.weight": "norm: e",
    "transformer.ln_f.bias": "norm_bias: e",
    "lm_head.weight": "head: v e",
}

_word = "embedding.word_embeddings."
_megatron = {
    _word + "weight": "embed: v e",
    _word + "norm.weight": "embed_norm: e",
    _word + "norm.bias": "embed_norm_bias: e",
    **{k: v for k, v in gpt2.dialects["megatron"].items() if "embedding." not in k},
}

dialects = dict(
    hf=_hf,
    merak=merak.dialect(_hf, columns=("query_key_value", "dense_h_to_4h"), rows=("dense", "dense_4h_to_h")),
    **megatron.dialects(_megatron),
)


def _from_hf(c: Mapping[str, Any]) -> dict[str, int]:
    width, heads = c.get("hidden_size") or c["n_embed"], c.get("n_head") or c["num_attention_heads"]  # as published
    count = c.get("n_layer") or c["num_hidden_layers"]
    return dict(l=count, v=c["vocab_size"], e=width, h=heads, d=width // heads, f=4 * width)


sizes = dict(hf=_from_hf, megatron=gpt2.from_args)
