"""Qwen3 mixtures of experts: Qwen3's attention; layers are dense or have a router over experts.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
f feed-forward of a dense layer  x expert  m feed-forward of an expert
"""

from __future__ import annotations

from ckpt_dist.families import llama

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
    expert_gate="l x m e",
    expert_up="l x m e",
    expert_down="l x e m",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
drops = llama.drops
optional = dict.fromkeys(("gate", "up", "down"), "mlp_only_layers")

_mlp = "model.layers.{l}.mlp."
_rest = {k: v for k, v in llama.dialects["hf"].items() if "bias" not in k} | {_mlp + "gate.weight": "router: x e"}

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
)

sizes = dict(hf=llama.from_hf)
