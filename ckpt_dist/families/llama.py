"""Llama 2/3, Mistral and Qwen2 dense models: gated MLP, grouped queries, optional biases. Many families build on it.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
f feed-forward. Hugging Face rotates halves (c r); Meta and torchtitan rotate adjacent pairs (r c).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_dist import megatron, merak

model_types = ("llama", "mistral", "qwen2")

weights = dict(
    embed="v e",
    attn_norm="l e",
    q="l g q c r e",
    k="l g c r e",
    v="l g c r e",
    o="l e g q c r",
    q_bias="l g q c r",
    k_bias="l g c r",
    v_bias="l g c r",
    o_bias="l e",
    mlp_norm="l e",
    gate="l f e",
    up="l f e",
    down="l e f",
    gate_bias="l f",
    up_bias="l f",
    down_bias="l e",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
init = {  # as transformers: the first pattern that fits a weight
    "*norm": "ones",
    "*_bias": "zeros",
    "embed": "normal initializer_range or 0.02, zero row pad_token_id",
    "*": "normal initializer_range or 0.02",
}
_llama = "model_type == 'llama' and "  # the others have no such key, whatever their config says
optional = {  # when a model has a weight
    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), _llama + "attention_bias or model_type == 'qwen2'"),
    "o_bias": _llama + "attention_bias",
    **dict.fromkeys(("gate_bias", "up_bias", "down_bias"), _llama + "mlp_bias"),
}
defaults = dict(  # what transformers takes where a config.json does not say it
    mistral=dict(num_key_value_heads=8),
    qwen2=dict(num_key_value_heads=32),
)
drops = (r".*rotary_(pos_)?emb\.inv_freq", r"rope\.freqs", r"freqs_cis", r".*rope\.cache")

_hf = "model.layers.{l}."
_meta = "layers.{l}."
_m = megatron.LAYER
_megatron = {
    "embedding.word_embeddings.weight": "embed: v e",
    _m + "self_attention.linear_qkv.layer_norm_weight": "attn_norm: e",
    _m + "self_attention.linear_qkv.weight": "q, k, v: (g (q + 1 + 1) c r) e",
    _m + "self_attention.linear_qkv.bias": "q_bias, k_bias, v_bias: (g (q + 1 + 1) c r)",
    _m + "self_attention.linear_proj.weight": "o: e (g q c r)",
    _m + "self_attention.linear_proj.bias": "o_bias: e",
    _m + "mlp.linear_fc1.layer_norm_weight": "mlp_norm: e",
    _m + "mlp.linear_fc1.weight": "gate, up: ((1 + 1) f) e",
    _m + "mlp.linear_fc1.bias": "gate_bias, up_bias: ((1 + 1) f)",
    _m + "mlp.linear_fc2.weight": "down: e f",
    _m + "mlp.linear_fc2.bias": "down_bias: e",
    "decoder.final_layernorm.weight": "norm: e",
    "output_layer.weight": "head: v e",
}

_names = {
    "model.embed_tokens.weight": "embed: v e",
    _hf + "self_attn.q_proj.weight": "q: (g q c r) e",
    _hf + "self_attn.k_proj.weight": "k: (g c r) e",
    _hf + "self_attn.v_proj.weight": "v: (g c r) e",
    _hf + "self_attn.o_proj.weight": "o: e (g q c r)",
    _hf + "self_attn.q_proj.bias": "q_bias: (g q c r)",
    _hf + "self_attn.k_proj.bias": "k_bias: (g c r)",
    _hf + "self_attn.v_proj.bias": "v_bias: (g c r)",
    _hf + "self_attn.o_proj.bias": "o_bias: e",
    _hf + "mlp.gate_proj.weight": "gate: f e",
    _hf + "mlp.up_proj.weight": "up: f e",
    _hf + "mlp.down_proj.weight": "down: e f",
    _hf + "mlp.gate_proj.bias": "gate_bias: f",
    _hf + "mlp.up_proj.bias": "up_bias: f",
    _hf + "mlp.down_proj.bias": "down_bias: e",
    _hf + "input_layernorm.weight": "attn_norm: e",
    _hf + "post_attention_layernorm.weight": "mlp_norm: e",
    "model.norm.weight": "norm: e",
    "lm_head.weight": "head: v e",
}
_columns, _rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")

dialects = dict(
    hf=_names,
    merak=merak.dialect(_names, _columns, _rows),
    meta={
        "tok_embeddings.weight": "embed: v e",
        _meta + "attention.wq.weight": "q: (g q r c) e",
        _meta + "attention.wk.weight": "k: (g r c) e",
        _meta + "attention.wv.weight": "v: (g c r) e",
        _meta + "attention.wo.weight": "o: e (g q c r)",
        _meta + "feed_forward.w1.weight": "gate: f e",
        _meta + "feed_forward.w3.weight": "up: f e",
        _meta + "feed_forward.w2.weight": "down: e f",
        _meta + "attention_norm.weight": "attn_norm: e",
        _meta + "ffn_norm.weight": "mlp_norm: e",
        "norm.weight": "norm: e",
        "output.weight": "head: v e",
    },
    torchtitan={
        "tok_embeddings.weight": "embed: v e",
        _meta + "attention.qkv_linear.wq.weight": "q: (g q r c) e",
        _meta + "attention.qkv_linear.wk.weight": "k: (g r c) e",
        _meta + "attention.qkv_linear.wv.weight": "v: (g c r) e",
        _meta + "attention.wo.weight": "o: e (g q c r)",
        _meta + "feed_forward.w1.weight": "gate: f e",
        _meta + "feed_forward.w3.weight": "up: f e",
        _meta + "feed_forward.w2.weight": "down: e f",
        _meta + "attention_norm.weight": "attn_norm: e",
        _meta + "ffn_norm.weight": "mlp_norm: e",
        "norm.weight": "norm: e",
        "lm_head.weight": "head: v e",
    },
    **megatron.dialects(_megatron),
)


def from_hf(c: Mapping[str, Any]) -> dict[str, int]:
    """Axis lengths from a config.json in Llama's words, which many families use; what it lacks comes from shapes."""
    heads = c["num_attention_heads"]
    groups = c.get("num_key_value_heads") or heads
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    if heads % groups or head_dim % 2 or (not c.get("head_dim") and c["hidden_size"] % heads):
        raise ValueError(f"{heads} heads in {groups} groups, of {head_dim} elements, hidden size {c['hidden_size']}")
    return dict(
        l=c["num_hidden_layers"],
        v=c["vocab_size"],
        e=c["hidden_size"],
        f=c["intermediate_size"],
        g=groups,
        q=heads // groups,
        c=2,
        r=head_dim // 2,
    )


def said(c: Mapping[str, Any], **names: str) -> dict[str, int]:
    """The lengths that a config gives by name, without those that it lacks: `said(c, x="num_local_experts")`"""
    return {axis: c[key] for axis, key in names.items() if c.get(key) is not None}


def _from_params(p: Mapping[str, Any]) -> dict[str, int]:
    heads = p["n_heads"]
    groups = p.get("n_kv_heads") or heads
    head_dim = p.get("head_dim") or p["dim"] // heads
    return dict(l=p["n_layers"], e=p["dim"], g=groups, q=heads // groups, c=2, r=head_dim // 2)


sizes = dict(hf=from_hf, meta=_from_params, megatron=megatron.sizes)
