"""Qwen3 dense models: Llama with norms of queries and keys. torchtitan rotates its halves, not adjacent pairs as Llama's,
in tensors of the same names: so it is a family of its own.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
f feed-forward
"""

from __future__ import annotations

from ckpt_dist import megatron
from ckpt_dist.families import llama

model_types = ("qwen3",)

_bias_of_mlp = ("gate_bias", "up_bias", "down_bias")
weights = {w: axes for w, axes in llama.weights.items() if w not in _bias_of_mlp} | dict(q_norm="l c r", k_norm="l c r")
ties = llama.ties
init = llama.init
optional = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), "attention_bias")
defaults = dict(qwen3=dict(num_key_value_heads=32, head_dim=128))
drops = llama.drops

_hf = "model.layers.{l}.self_attn."
_titan = "layers.{l}.attention."
_megatron = {k: v for k, v in llama.dialects["megatron"].items() if not (".mlp." in k and ".bias" in k)} | {
    megatron.LAYER + "self_attention.q_layernorm.weight": "q_norm: (c r)",
    megatron.LAYER + "self_attention.k_layernorm.weight": "k_norm: (c r)",
}

dialects = dict(
    hf={
        **{k: v for k, v in llama.dialects["hf"].items() if not (".mlp." in k and ".bias" in k)},
        _hf + "q_norm.weight": "q_norm: (c r)",
        _hf + "k_norm.weight": "k_norm: (c r)",
    },
    torchtitan={
        **llama.dialects["torchtitan"],
        _titan + "qkv_linear.wq.weight": "q: (g q c r) e",
        _titan + "qkv_linear.wk.weight": "k: (g c r) e",
        _titan + "q_norm.weight": "q_norm: (c r)",
        _titan + "k_norm.weight": "k_norm: (c r)",
    },
    **megatron.dialects(_megatron),
)

sizes = dict(hf=llama.from_hf, megatron=megatron.sizes)
