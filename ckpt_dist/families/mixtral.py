"""Mixtral: Llama's attention, and a router over experts with gated MLPs.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
x expert  f feed-forward of an expert. On disk an expert is three tensors; inside transformers 5 all are stacked.
"""

from __future__ import annotations

from ckpt_dist import megatron
from ckpt_dist.families import llama

model_types = ("mixtral",)

weights = dict(
    embed="v e",
    attn_norm="l e",
    q="l g q c r e",
    k="l g c r e",
    v="l g c r e",
    o="l e g q c r",
    mlp_norm="l e",
    router="l x e",
    gate="l x f e",
    up="l x f e",
    down="l x e f",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
init = llama.init
defaults = dict(mixtral=dict(num_key_value_heads=8, num_local_experts=8))
drops = llama.drops

_rest = {k: v for k, v in llama.dialects["hf"].items() if ".mlp." not in k and "_norm" not in k and "bias" not in k}
_moe = "model.layers.{l}.block_sparse_moe."
_stacked = "model.layers.{l}.mlp."
_m = megatron.LAYER
_megatron = {k: v for k, v in llama.dialects["megatron"].items() if ".mlp." not in k and "bias" not in k} | {
    _m + "pre_mlp_layernorm.weight": "mlp_norm: e",
    _m + "mlp.router.weight": "router: x e",
    _m + "mlp.experts.experts.linear_fc1.weight": "gate, up: x ((1 + 1) f) e",
    _m + "mlp.experts.experts.linear_fc2.weight": "down: x e f",
}

dialects = dict(
    hf={
        **_rest,
        _moe + "gate.weight": "router: x e",
        _moe + "experts.{x}.w1.weight": "gate: f e",
        _moe + "experts.{x}.w3.weight": "up: f e",
        _moe + "experts.{x}.w2.weight": "down: e f",
    },
    hf_stacked={
        **_rest,
        _stacked + "gate.weight": "router: x e",
        _stacked + "experts.gate_up_proj": "gate, up: x ((1 + 1) f) e",
        _stacked + "experts.down_proj": "down: x e f",
    },
    **megatron.of_experts(_megatron),
)

sizes = dict(hf=lambda c: llama.from_hf(c) | llama.said(c, x="num_local_experts"), megatron=megatron.sizes)
