"""GPT-2: learned positions, fused query, key and value; every weight of a linear is stored input x output.

l layer  v vocabulary  p position  e embedding  h head  d element of a head  f feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

model_types = ("gpt2",)

weights = dict(
    embed="v e",
    positions="p e",
    attn_norm="l e",
    attn_norm_bias="l e",
    q="l h d e",
    k="l h d e",
    v="l h d e",
    q_bias="l h d",
    k_bias="l h d",
    v_bias="l h d",
    o="l e h d",
    o_bias="l e",
    mlp_norm="l e",
    mlp_norm_bias="l e",
    up="l f e",
    up_bias="l f",
    down="l e f",
    down_bias="l e",
    norm="e",
    norm_bias="e",
    head="v e",
)
ties = dict(head="embed")
drops = (r".*\.attn\.(masked_)?bias",)

_l = "transformer.h.{l}."

dialects = dict(
    hf={
        "transformer.wte.weight": "embed: v e",
        "transformer.wpe.weight": "positions: p e",
        _l + "ln_1.weight": "attn_norm: e",
        _l + "ln_1.bias": "attn_norm_bias: e",
        _l + "attn.c_attn.weight": "q, k, v: e ((1 + 1 + 1) h d)",
        _l + "attn.c_attn.bias": "q_bias, k_bias, v_bias: ((1 + 1 + 1) h d)",
        _l + "attn.c_proj.weight": "o: (h d) e",
        _l + "attn.c_proj.bias": "o_bias: e",
        _l + "ln_2.weight": "mlp_norm: e",
        _l + "ln_2.bias": "mlp_norm_bias: e",
        _l + "mlp.c_fc.weight": "up: e f",
        _l + "mlp.c_fc.bias": "up_bias: f",
        _l + "mlp.c_proj.weight": "down: f e",
        _l + "mlp.c_proj.bias": "down_bias: e",
        "transformer.ln_f.weight": "norm: e",
        "transformer.ln_f.bias": "norm_bias: e",
        "lm_head.weight": "head: v e",
    },
)


def _from_hf(c: Mapping[str, Any]) -> dict[str, int]:
    return dict(l=c["n_layer"], v=c["vocab_size"], e=c["n_embd"], h=c["n_head"], d=c["n_embd"] // c["n_head"])


sizes = dict(hf=_from_hf)
