"""GPT-2: learned positions, fused query, key and value; every weight of a linear is stored input x output.

l layer  v vocabulary  p position  e embedding  h head  d element of a head  f feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_dist import megatron, merak
from ckpt_dist.families import llama

model_types = ("gpt2",)

weights = dict(
    embed="v e",
    positions="p e",
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
init = {
    "*norm": "ones",
    "*_bias": "zeros",
    **dict.fromkeys(("o", "down"), "normal (initializer_range or 0.02) / (2 * n_layer) ** 0.5"),
    "*": "normal initializer_range or 0.02",
}
fixed = dict(add_cross_attention=False)
defaults = dict(gpt2=dict(n_positions=1024, tie_word_embeddings=True))
drops = (r".*\.attn\.(masked_)?bias",)

_l = "transformer.h.{l}."
_m = megatron.LAYER
_megatron = {
    "embedding.word_embeddings.weight": "embed: v e",
    "embedding.position_embeddings.weight": "positions: p e",
    _m + "self_attention.linear_qkv.layer_norm_weight": "attn_norm: e",
    _m + "self_attention.linear_qkv.layer_norm_bias": "attn_norm_bias: e",
    _m + "self_attention.linear_qkv.weight": "q, k, v: (h (1 + 1 + 1) d) e",
    _m + "self_attention.linear_qkv.bias": "q_bias, k_bias, v_bias: (h (1 + 1 + 1) d)",
    _m + "self_attention.linear_proj.weight": "o: e (h d)",
    _m + "self_attention.linear_proj.bias": "o_bias: e",
    _m + "mlp.linear_fc1.layer_norm_weight": "mlp_norm: e",
    _m + "mlp.linear_fc1.layer_norm_bias": "mlp_norm_bias: e",
    _m + "mlp.linear_fc1.weight": "up: f e",
    _m + "mlp.linear_fc1.bias": "up_bias: f",
    _m + "mlp.linear_fc2.weight": "down: e f",
    _m + "mlp.linear_fc2.bias": "down_bias: e",
    "decoder.final_layernorm.weight": "norm: e",
    "decoder.final_layernorm.bias": "norm_bias: e",
    "output_layer.weight": "head: v e",
}

_hf = {
    "transformer.wte.weight": "embed: v e",
    "transformer.wpe.weight": "positions: p e",
    _l + "ln_1.weight": "attn_norm: e",
    _l + "ln_1.bias": "attn_norm_bias: e",
    _l + "attn.c_attn.weight": "q, k, v: e ((1 + 1 + 1) h d)",
    _l + "attn.c_attn.bias": "q_bias, k_bias, v_bias: ((1 + 1 + 1) h d)",
    _l + "attn.c_proj.weight": "o: (h d) e",
    _l + "attn.c_proj.bias": "o_bias: e",
    _l + "ln_2.weight": "mlp_norm: e",
    _l + "ln_2.bias": "mlp_norm_bias: e",
    _l + "mlp.c_fc.weight": "up: e f",
    _l + "mlp.c_fc.bias": "up_bias: f",
    _l + "mlp.c_proj.weight": "down: f e",
    _l + "mlp.c_proj.bias": "down_bias: e",
    "transformer.ln_f.weight": "norm: e",
    "transformer.ln_f.bias": "norm_bias: e",
    "lm_head.weight": "head: v e",
}
_linear = {  # where tensor-parallel ranks of Merak divide them: as torch's own linear layers
    _l + "attn.c_attn.weight": "q, k, v: ((1 + 1 + 1) h d) e",
    _l + "attn.c_proj.weight": "o: e (h d)",
    _l + "mlp.c_fc.weight": "up: f e",
    _l + "mlp.c_proj.weight": "down: e f",
}

dialects = dict(
    hf=_hf,
    merak=merak.dialect({**_hf, **_linear}, columns=("c_attn", "c_fc"), rows=("c_proj",)),
    **megatron.dialects(_megatron),
)


def _from_hf(c: Mapping[str, Any]) -> dict[str, int]:
    width, heads = c["n_embd"], c["n_head"]
    known = llama.said(c, p="n_positions") | dict(f=c.get("n_inner") or 4 * width)
    return known | dict(l=c["n_layer"], v=c["vocab_size"], e=width, h=heads, d=width // heads)


def from_args(a: Mapping[str, Any]) -> dict[str, int]:
    count, _, width = megatron.heads(a)
    return dict(l=a["num_layers"], e=a["hidden_size"], h=count, d=width)


sizes = dict(hf=_from_hf, megatron=from_args)
