"""DeepSeek-V3: latent attention; the first layers are dense, the others have routed and shared experts.

l layer  v vocabulary  e embedding  h head  a query latent  b key-value latent  p latent and rotary key
i query and key of a head  j key (without its rotary part) and value of a head  d value of a head
f feed-forward of a dense layer  x expert  m feed-forward of an expert  s feed-forward of the shared experts
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

model_types = ("deepseek_v3",)

weights = dict(
    embed="v e",
    attn_norm="l e",
    q="l h i e",
    q_down="l a e",
    q_norm="l a",
    q_up="l h i a",
    kv_down="l p e",
    kv_norm="l b",
    kv_up="l h j b",
    o="l e h d",
    mlp_norm="l e",
    gate="l f e",
    up="l f e",
    down="l e f",
    router="l x e",
    router_bias="l x",
    expert_gate="l x m e",
    expert_up="l x m e",
    expert_down="l x e m",
    shared_gate="l s e",
    shared_up="l s e",
    shared_down="l e s",
    norm="e",
    head="v e",
)
ties = dict(head="embed")
drops = (r".*rotary_emb\.inv_freq",)
optional = dict.fromkeys(("q", "q_down", "q_norm", "q_up"), "q_lora_rank")
optional |= dict.fromkeys(("gate", "up", "down"), "first_k_dense_replace")
optional |= dict.fromkeys(("shared_gate", "shared_up", "shared_down"), "n_shared_experts")

_attn = "model.layers.{l}.self_attn."
_mlp = "model.layers.{l}.mlp."
_rest = {
    "model.embed_tokens.weight": "embed: v e",
    "model.layers.{l}.input_layernorm.weight": "attn_norm: e",
    _attn + "q_proj.weight": "q: (h i) e",
    _attn + "q_a_proj.weight": "q_down: a e",
    _attn + "q_a_layernorm.weight": "q_norm: a",
    _attn + "q_b_proj.weight": "q_up: (h i) a",
    _attn + "kv_a_proj_with_mqa.weight": "kv_down: p e",
    _attn + "kv_a_layernorm.weight": "kv_norm: b",
    _attn + "kv_b_proj.weight": "kv_up: (h j) b",
    _attn + "o_proj.weight": "o: e (h d)",
    "model.layers.{l}.post_attention_layernorm.weight": "mlp_norm: e",
    _mlp + "gate_proj.weight": "gate: f e",
    _mlp + "up_proj.weight": "up: f e",
    _mlp + "down_proj.weight": "down: e f",
    _mlp + "gate.weight": "router: x e",
    _mlp + "gate.e_score_correction_bias": "router_bias: x",
    _mlp + "shared_experts.gate_proj.weight": "shared_gate: s e",
    _mlp + "shared_experts.up_proj.weight": "shared_up: s e",
    _mlp + "shared_experts.down_proj.weight": "shared_down: e s",
    "model.norm.weight": "norm: e",
    "lm_head.weight": "head: v e",
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
)


def _from_hf(c: Mapping[str, Any]) -> dict[str, int]:
    return dict(
        l=c["num_hidden_layers"],
        v=c["vocab_size"],
        e=c["hidden_size"],
        h=c["num_attention_heads"],
        i=c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        j=c["qk_nope_head_dim"] + c["v_head_dim"],
        d=c["v_head_dim"],
        b=c["kv_lora_rank"],
        p=c["kv_lora_rank"] + c["qk_rope_head_dim"],
    )


sizes = dict(hf=_from_hf)
