"""DeepSeek-V3: latent attention; the first layers are dense, the others have routed and shared experts.

Behind them are layers that predict further tokens (`mtp_*`): each a layer like the last, with a projection of what is
known of two tokens before it. Hugging Face numbers them on, and has copies of the embedding and the head in each.

l layer  n layer that predicts further tokens  w what is known of two tokens  v vocabulary  e embedding  h head
a query latent  b key-value latent  p latent and rotary key
i query and key of a head  j key (without its rotary part) and value of a head  d value of a head
f feed-forward of a dense layer  x expert  m feed-forward of an expert  s feed-forward of the shared experts
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckpt_dist import megatron
from ckpt_dist.families import llama

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
weights |= {"mtp_" + w: axes.replace("l", "n", 1) for w, axes in weights.items() if axes.startswith("l ")}
weights |= dict(mtp_enorm="n e", mtp_hnorm="n e", mtp_proj="n e w", mtp_norm="n e", mtp_embed="n v e", mtp_head="n v e")
ties = dict(head="embed")
drops = (r".*rotary_(pos_)?emb\.inv_freq",)
further = dict(n="num_nextn_predict_layers")
copies = dict(mtp_embed="embed", mtp_head="head")
_dense, _shared = ("gate", "up", "down"), ("shared_gate", "shared_up", "shared_down")
_routed = ("router", "router_bias", "expert_gate", "expert_up", "expert_down")
init = {"router_bias": "zeros", **llama.init}
optional = {"q": "not q_lora_rank", **dict.fromkeys(("q_down", "q_norm", "q_up"), "q_lora_rank")}
optional |= dict.fromkeys(_dense, "first_k_dense_replace") | dict.fromkeys(_shared, "n_shared_experts")
optional |= dict.fromkeys([w for w in weights if w.startswith("mtp_")], "False")  # transformers has none of them
layers = dict.fromkeys(_dense, "l < first_k_dense_replace")
layers |= dict.fromkeys((*_routed, *_shared), "l >= first_k_dense_replace")
fixed = dict(attention_bias=False)
defaults = dict(
    deepseek_v3=dict(
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
)

_attn = "model.layers.{l}.self_attn."
_mlp = "model.layers.{l}.mlp."
_titan = "layers.{l}."
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
_hf = {
    **_rest,
    _mlp + "experts.{x}.gate_proj.weight": "expert_gate: m e",
    _mlp + "experts.{x}.up_proj.weight": "expert_up: m e",
    _mlp + "experts.{x}.down_proj.weight": "expert_down: e m",
}
_hf_stacked = {
    **_rest,
    _mlp + "experts.gate_up_proj": "expert_gate, expert_up: x ((1 + 1) m) e",
    _mlp + "experts.down_proj": "expert_down: x e m",
}
_next = "model.layers.{l+n}."
_further = {
    _next + "enorm.weight": "mtp_enorm: e",
    _next + "hnorm.weight": "mtp_hnorm: e",
    _next + "eh_proj.weight": "mtp_proj: e w",
    _next + "shared_head.norm.weight": "mtp_norm: e",
    _next + "embed_tokens.weight": "mtp_embed: v e",
    _next + "shared_head.head.weight": "mtp_head: v e",
}
_m = megatron.LAYER
_megatron = {
    "embedding.word_embeddings.weight": "embed: v e",
    _m + "input_layernorm.weight": "attn_norm: e",
    _m + "self_attention.linear_q_proj.weight": "q: (h i) e",
    _m + "self_attention.linear_q_down_proj.weight": "q_down: a e",
    _m + "self_attention.q_layernorm.weight": "q_norm: a",
    _m + "self_attention.linear_q_up_proj.weight": "q_up: (h i) a",
    _m + "self_attention.linear_kv_down_proj.weight": "kv_down: p e",
    _m + "self_attention.kv_layernorm.weight": "kv_norm: b",
    _m + "self_attention.linear_kv_up_proj.weight": "kv_up: (h j) b",
    _m + "self_attention.linear_proj.weight": "o: e (h d)",
    _m + "pre_mlp_layernorm.weight": "mlp_norm: e",
    _m + "mlp.linear_fc1.weight": "gate, up: ((1 + 1) f) e",
    _m + "mlp.linear_fc2.weight": "down: e f",
    _m + "mlp.router.weight": "router: x e",
    _m + "mlp.router.expert_bias": "router_bias: x",
    _m + "mlp.experts.experts.linear_fc1.weight": "expert_gate, expert_up: x ((1 + 1) m) e",
    _m + "mlp.experts.experts.linear_fc2.weight": "expert_down: x e m",
    _m + "mlp.shared_experts.linear_fc1.weight": "shared_gate, shared_up: ((1 + 1) s) e",
    _m + "mlp.shared_experts.linear_fc2.weight": "shared_down: e s",
    "decoder.final_layernorm.weight": "norm: e",
    "output_layer.weight": "head: v e",
}
_megatron_further = {
    megatron.FURTHER + "enorm.weight": "mtp_enorm: e",
    megatron.FURTHER + "hnorm.weight": "mtp_hnorm: e",
    megatron.FURTHER + "eh_proj.weight": "mtp_proj: e w",
    megatron.FURTHER + "final_layernorm.weight": "mtp_norm: e",
}


def _fused(name: str) -> str:
    """A norm of a latent as Transformer Engine has it: part of the linear layer after it."""
    return re.sub(r"\.(q|kv)_layernorm\.", r".linear_\1_up_proj.layer_norm_", name)


def _alike(rules: Mapping[str, str], layer: str, further: str) -> dict[str, str]:
    """The rules of a layer, as those of one that predicts further tokens and has all of them inside."""
    return {
        name.replace(layer, further): re.sub(r"(^|, | if )(?=\w)", r"\1mtp_", text)
        for name, text in rules.items()
        if name.startswith(layer)
    }


def _of_hf(rules: Mapping[str, str]) -> dict[str, str]:
    return {**rules, **_alike(rules, "model.layers.{l}.", _next), **_further}


def _of_megatron(rules: Mapping[str, str]) -> dict[str, str]:
    inside = _alike(rules, megatron.LAYER, megatron.FURTHER + "transformer_layer.")
    return {**rules, **inside, **_megatron_further}


dialects = dict(
    hf=_of_hf(_hf),
    hf_stacked=_of_hf(_hf_stacked),
    **megatron.dialects(_of_megatron(megatron.dense_too({_fused(n): text for n, text in _megatron.items()}))),
    megatron_local=_of_megatron(_megatron),
    megatron_local_stacked=megatron.stacked(_of_megatron(_megatron)),
    torchtitan={
        "tok_embeddings.weight": "embed: v e",
        _titan + "attention_norm.weight": "attn_norm: e",
        _titan + "attention.wq.weight": "q: (h i) e",
        _titan + "attention.wq_a.weight": "q_down: a e",
        _titan + "attention.q_norm.weight": "q_norm: a",
        _titan + "attention.wq_b.weight": "q_up: (h i) a",
        _titan + "attention.wkv_a.weight": "kv_down: p e",
        _titan + "attention.kv_norm.weight": "kv_norm: b",
        _titan + "attention.wkv_b.weight": "kv_up: (h j) b",
        _titan + "attention.wo.weight": "o: e (h d)",
        _titan + "ffn_norm.weight": "mlp_norm: e",
        _titan + "feed_forward.w1.weight": "gate: f e",
        _titan + "feed_forward.w3.weight": "up: f e",
        _titan + "feed_forward.w2.weight": "down: e f",
        _titan + "moe.router.gate.weight": "router: x e",
        _titan + "moe.expert_bias_E": "router_bias: x",
        _titan + "moe.routed_experts.inner_experts.w1_EFD": "expert_gate: x m e",
        _titan + "moe.routed_experts.inner_experts.w3_EFD": "expert_up: x m e",
        _titan + "moe.routed_experts.inner_experts.w2_EDF": "expert_down: x e m",
        _titan + "moe.shared_experts.w1.weight": "shared_gate: s e",
        _titan + "moe.shared_experts.w3.weight": "shared_up: s e",
        _titan + "moe.shared_experts.w2.weight": "shared_down: e s",
        "norm.weight": "norm: e",
        "lm_head.weight": "head: v e",
    },
)


def _from_hf(c: Mapping[str, Any]) -> dict[str, int]:
    known = llama.said(c, a="q_lora_rank", f="intermediate_size", x="n_routed_experts", m="moe_intermediate_size")
    known |= {"s": known["m"] * c["n_shared_experts"]} if "m" in known and c.get("n_shared_experts") else {}
    known |= llama.said(c, n="num_nextn_predict_layers") if c.get("num_nextn_predict_layers") else {}
    return known | dict(
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


def _from_args(a: Mapping[str, Any]) -> dict[str, int]:
    return _from_hf({**a, "num_hidden_layers": a["num_layers"], "vocab_size": 0, "qk_nope_head_dim": a["qk_head_dim"],
                     "qk_rope_head_dim": a["qk_pos_emb_head_dim"], "v_head_dim": a["v_head_dim"],
                     "num_nextn_predict_layers": a.get("mtp_num_layers")})  # fmt: skip


sizes = dict(hf=_from_hf, megatron=_from_args)
