"""gpt-oss in bf16: biases and attention sinks; experts stacked, input x output, gate and up in turns.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
x expert  f feed-forward of an expert
"""

from __future__ import annotations

from ckpt_dist.families import llama

model_types = ("gpt_oss",)

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
    sinks="l g q",
    mlp_norm="l e",
    router="l x e",
    router_bias="l x",
    gate="l x f e",
    up="l x f e",
    down="l x e f",
    gate_bias="l x f",
    up_bias="l x f",
    down_bias="l x e",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
drops = llama.drops

_l = "model.layers.{l}."

dialects = dict(
    hf={
        **{k: v for k, v in llama.dialects["hf"].items() if ".mlp." not in k and "_norm." not in k},
        _l + "self_attn.sinks": "sinks: (g q)",
        _l + "mlp.router.weight": "router: x e",
        _l + "mlp.router.bias": "router_bias: x",
        _l + "mlp.experts.gate_up_proj": "gate, up: x e (f (1 + 1))",
        _l + "mlp.experts.gate_up_proj_bias": "gate_bias, up_bias: x (f (1 + 1))",
        _l + "mlp.experts.down_proj": "down: x f e",
        _l + "mlp.experts.down_proj_bias": "down_bias: x e",
    },
)

sizes = dict(hf=llama.from_hf)
