"""Phi-3: Llama with query, key and value in one tensor, one after the other, and gate and up in another.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
f feed-forward
"""

from __future__ import annotations

from ckpt_dist.families import llama

model_types = ("phi3",)

weights = {w: axes for w, axes in llama.weights.items() if "bias" not in w and w not in ("q_norm", "k_norm")}
ties = dict(head="embed")
init = llama.init
defaults = dict(phi3=dict(pad_token_id=32000))
drops = llama.drops

_l = "model.layers.{l}."

dialects = dict(
    hf={
        "model.embed_tokens.weight": "embed: v e",
        _l + "input_layernorm.weight": "attn_norm: e",
        _l + "self_attn.qkv_proj.weight": "q, k, v: ((g q + g + g) c r) e",
        _l + "self_attn.o_proj.weight": "o: e (g q c r)",
        _l + "post_attention_layernorm.weight": "mlp_norm: e",
        _l + "mlp.gate_up_proj.weight": "gate, up: ((1 + 1) f) e",
        _l + "mlp.down_proj.weight": "down: e f",
        "model.norm.weight": "norm: e",
        "lm_head.weight": "head: v e",
    },
)

sizes = dict(hf=llama.from_hf)
