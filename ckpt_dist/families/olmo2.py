"""OLMo 2: Llama's attention and gated MLP, normed after them; queries and keys are normed over all heads at once.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
f feed-forward
"""

from __future__ import annotations

from ckpt_dist.families import llama

model_types = ("olmo2",)

weights = dict(
    embed="v e",
    q="l g q c r e",
    k="l g c r e",
    v="l g c r e",
    o="l e g q c r",
    q_norm="l g q c r",
    k_norm="l g c r",
    attn_out_norm="l e",
    gate="l f e",
    up="l f e",
    down="l e f",
    mlp_out_norm="l e",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
init = llama.init
fixed = dict(attention_bias=False)
defaults = dict(olmo2=dict(pad_token_id=1))
drops = llama.drops

_l = "model.layers.{l}."

dialects = dict(
    hf={
        **{k: v for k, v in llama.dialects["hf"].items() if "bias" not in k and "input_layernorm" not in k},
        _l + "self_attn.q_norm.weight": "q_norm: (g q c r)",
        _l + "self_attn.k_norm.weight": "k_norm: (g c r)",
        _l + "post_attention_layernorm.weight": "attn_out_norm: e",
        _l + "post_feedforward_layernorm.weight": "mlp_out_norm: e",
    },
)

sizes = dict(hf=llama.from_hf)
