"""Gemma 2 and 3 (text): Llama's attention and gated MLP, norms before and after each; Gemma 3 norms queries and keys.

l layer  v vocabulary  e embedding  g key-value group  q queries per group  c rotary half  r rotary pair
f feed-forward. Norms are stored as what is added to one, in all dialects here.
"""

from __future__ import annotations

from ckpt_dist import megatron
from ckpt_dist.families import llama, qwen3

model_types = ("gemma2", "gemma3_text")

weights = dict(
    embed="v e",
    attn_norm="l e",
    q="l g q c r e",
    k="l g c r e",
    v="l g c r e",
    o="l e g q c r",
    q_norm="l c r",
    k_norm="l c r",
    attn_out_norm="l e",
    mlp_norm="l e",
    gate="l f e",
    up="l f e",
    down="l e f",
    mlp_out_norm="l e",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
drops = llama.drops
init = {**llama.init, "*norm": "zeros"}
optional = dict.fromkeys(("q_norm", "k_norm"), "model_type == 'gemma3_text'")
fixed = dict(attention_bias=False)
_usual = dict(num_key_value_heads=4, head_dim=256, pad_token_id=0, tie_word_embeddings=True)
defaults = dict(gemma2=_usual, gemma3_text=_usual)

_l = "model.layers.{l}."
_m = megatron.LAYER

dialects = dict(
    hf={
        **{k: v for k, v in qwen3.dialects["hf"].items() if "bias" not in k},
        _l + "post_attention_layernorm.weight": "attn_out_norm: e",
        _l + "pre_feedforward_layernorm.weight": "mlp_norm: e",
        _l + "post_feedforward_layernorm.weight": "mlp_out_norm: e",
    },
    **megatron.dialects(
        {k: v for k, v in qwen3.dialects["megatron"].items() if "bias" not in k}
        | {
            _m + "self_attention.linear_proj.post_layernorm.weight": "attn_out_norm: e",
            _m + "mlp.linear_fc2.post_layernorm.weight": "mlp_out_norm: e",
        }
    ),
)

sizes = dict(hf=llama.from_hf, megatron=megatron.sizes)
