"""gpt-oss in bf16: biases and attention sinks; experts stacked, input x output, gate and up in turns.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
x expert  f feed-forward of an expert
"""

from __future__ import annotations

from ckpt_dist import megatron
from ckpt_dist.families import llama, qwen3

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
    balance="l x",
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
init = {"router_bias": "normal initializer_range or 0.02", **llama.init}
fixed = dict(attention_bias=True)
defaults = dict(gpt_oss=dict(num_key_value_heads=8, head_dim=64, num_local_experts=128))
zeros = dict(balance="router")  # torchtitan may move it, to balance experts
drops = llama.drops

_l = "model.layers.{l}."
_m = megatron.LAYER
_megatron = {k: v for k, v in llama.dialects["megatron"].items() if ".mlp." not in k} | {
    _m + "self_attention.core_attention.softmax_offset": "sinks: (g q)",
    _m + "pre_mlp_layernorm.weight": "mlp_norm: e",
    _m + "mlp.router.weight": "router: x e",
    _m + "mlp.router.bias": "router_bias: x",
    _m + "mlp.experts.experts.linear_fc1.weight": "gate, up: x ((1 + 1) f) e",
    _m + "mlp.experts.experts.linear_fc1.bias": "gate_bias, up_bias: x ((1 + 1) f)",
    _m + "mlp.experts.experts.linear_fc2.weight": "down: x e f",
    _m + "mlp.experts.experts.linear_fc2.bias": "down_bias: x e",
}
_titan = "layers.{l}.attention."
_moe = "layers.{l}.moe."

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
    **megatron.of_experts(_megatron),
    torchtitan={
        **{k: v for k, v in qwen3.dialects["torchtitan"].items() if "feed_forward" not in k and "_norm" not in k},
        "layers.{l}.attention_norm.weight": "attn_norm: e",
        "layers.{l}.ffn_norm.weight": "mlp_norm: e",
        _titan + "qkv_linear.wq.bias": "q_bias: (g q c r)",
        _titan + "qkv_linear.wk.bias": "k_bias: (g c r)",
        _titan + "qkv_linear.wv.bias": "v_bias: (g c r)",
        _titan + "wo.bias": "o_bias: e",
        _titan + "sinks": "sinks: (g q)",
        _moe + "router.gate.weight": "router: x e",
        _moe + "router.gate.bias": "router_bias: x",
        _moe + "expert_bias_E": "balance: x",
        _moe + "routed_experts.inner_experts.mlp1_weight_EGD": "gate, up: x (f (1 + 1)) e",
        _moe + "routed_experts.inner_experts.mlp1_bias_EG": "gate_bias, up_bias: x (f (1 + 1))",
        _moe + "routed_experts.inner_experts.mlp2_weight_EDF": "down: x e f",
        _moe + "routed_experts.inner_experts.mlp2_bias_ED": "down_bias: x e",
    },
)

sizes = dict(hf=lambda c: llama.from_hf(c) | llama.said(c, x="num_local_experts"), megatron=megatron.sizes)
