"""Qwen3 mixtures of experts: Qwen3's attention; layers are dense or have a router over experts.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
f feed-forward of a dense layer  x expert  m feed-forward of an expert
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_dist import megatron
from ckpt_dist.families import llama, qwen3

model_types = ("qwen3_moe",)

weights = dict(
    embed="v e",
    attn_norm="l e",
    q="l g q c r e",
    k="l g c r e",
    v="l g c r e",
    o="l e g q c r",
    q_norm="l c r",
    k_norm="l c r",
    mlp_norm="l e",
    gate="l f e",
    up="l f e",
    down="l e f",
    router="l x e",
    balance="l x",
    expert_gate="l x m e",
    expert_up="l x m e",
    expert_down="l x e m",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
zeros = dict(balance="router")  # torchtitan may move it, to balance experts
drops = llama.drops
init = llama.init
optional = dict.fromkeys(("gate", "up", "down"), "mlp_only_layers or decoder_sparse_step > 1")
_sparse = "l not in mlp_only_layers and (l + 1) % decoder_sparse_step == 0"
layers = dict.fromkeys(("gate", "up", "down"), f"not ({_sparse})")
layers |= dict.fromkeys(("router", "expert_gate", "expert_up", "expert_down"), _sparse)
fixed = dict(attention_bias=False)
defaults = dict(
    qwen3_moe=dict(num_key_value_heads=4, num_experts=128, moe_intermediate_size=768, decoder_sparse_step=1)
)

_mlp = "model.layers.{l}.mlp."
_rest = {k: v for k, v in qwen3.dialects["hf"].items() if "bias" not in k} | {_mlp + "gate.weight": "router: x e"}
_moe = "layers.{l}.moe."
_m = megatron.LAYER
_dense = {k: v for k, v in qwen3.dialects["megatron"].items() if "bias" not in k and "layer_norm_weight" not in k}
_megatron = _dense | {
    _m + "self_attention.linear_qkv.layer_norm_weight": "attn_norm: e",
    _m + "pre_mlp_layernorm.weight": "mlp_norm: e",
    _m + "mlp.router.weight": "router: x e",
    _m + "mlp.experts.experts.linear_fc1.weight": "expert_gate, expert_up: x ((1 + 1) m) e",
    _m + "mlp.experts.experts.linear_fc2.weight": "expert_down: x e m",
}

dialects = dict(
    hf={
        **_rest,
        _mlp + "experts.{x}.gate_proj.weight": "expert_gate: m e",
        _mlp + "experts.{x}.up_proj.weight": "expert_up: m e",
        _mlp + "experts.{x}.down_proj.weight": "expert_down: e m",
    },
    hf_stacked={
        **_rest,
        _mlp + "experts.gate_up_proj": "expert_gate, expert_up: x ((1 + 1) m) e",
        _mlp + "experts.down_proj": "expert_down: x e m",
    },
    **megatron.of_experts(_megatron),
    torchtitan={
        **qwen3.dialects["torchtitan"],
        _moe + "router.gate.weight": "router: x e",
        _moe + "expert_bias_E": "balance: x",
        _moe + "routed_experts.inner_experts.w1_EFD": "expert_gate: x m e",
        _moe + "routed_experts.inner_experts.w3_EFD": "expert_up: x m e",
        _moe + "routed_experts.inner_experts.w2_EDF": "expert_down: x e m",
    },
)


def _from_hf(c: Mapping[str, Any]) -> dict[str, int]:
    return (
        llama.from_hf(c)
        | llama.said(c, x="num_experts", m="moe_intermediate_size")
        | llama.said(c, x="num_local_experts")
    )


sizes = dict(hf=_from_hf, megatron=megatron.sizes)
