"""Megatron-core's words: how its checkpoints name layers, and its args as a config.json, read in both directions.

Facts: megatron-core 0.16.1 (names and layouts were compared with its own checkpoints), Megatron-LM for args. Names are
those of its distributed checkpoints: Transformer Engine's, whatever spec built the model, with global layer numbers.

Invariant: pure; what args cannot say is listed, what a config needs and args lack is a guess that is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_dist.configs import Translation

LAYER = "decoder.layers.{l}."
STEPS = "iter_{:07d}"
TRACKER = "latest_checkpointed_iteration.txt"
FIELDS = (  # args, config.json
    ("hidden_size", "hidden_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_attention_heads", "num_attention_heads"),
    ("kv_channels", "head_dim"),
    ("max_position_embeddings", "max_position_embeddings"),
    ("rotary_base", "rope_theta"),
    ("norm_epsilon", "rms_norm_eps"),
    ("init_method_std", "initializer_range"),
    ("moe_router_topk", "num_experts_per_tok"),
    ("moe_ffn_hidden_size", "moe_intermediate_size"),
    ("q_lora_rank", "q_lora_rank"),
    ("kv_lora_rank", "kv_lora_rank"),
    ("qk_head_dim", "qk_nope_head_dim"),
    ("qk_pos_emb_head_dim", "qk_rope_head_dim"),
    ("v_head_dim", "v_head_dim"),
)
EXPERTS = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts"}  # elsewhere num_experts
CLASSES = dict(
    llama="LlamaForCausalLM",
    mistral="MistralForCausalLM",
    qwen2="Qwen2ForCausalLM",
    qwen3="Qwen3ForCausalLM",
    qwen3_moe="Qwen3MoeForCausalLM",
    mixtral="MixtralForCausalLM",
)
ALWAYS = dict(  # of args: what these models compute whatever a config.json says
    normalization="RMSNorm", swiglu=True, add_bias_linear=False, position_embedding_type="rope", rotary_percent=1.0,
    rotary_interleaved=False, apply_layernorm_1p=False,
)  # fmt: skip


def stacked(rules: Mapping[str, str]) -> dict[str, str]:
    """The rules of layers that lie in one tensor: `decoder.layers.{l}.x: e` becomes `decoder.layers.x: l e`."""
    return {
        name.replace("{l}.", ""): text.replace(":", ": l", 1) if "{l}" in name else text for name, text in rules.items()
    }


def dialects(rules: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Both key styles of torch_dist."""
    return dict(megatron=dict(rules), megatron_stacked=stacked(rules))


def of_experts(rules: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Of a mixture of experts: built of Megatron's own layers it calls the norm before its experts otherwise."""
    own = {n.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): text for n, text in rules.items()}
    return {**dialects(rules), "megatron_local": own, "megatron_local_stacked": stacked(own)}


def is_args(config: Mapping[str, Any]) -> bool:
    return {"num_layers", "hidden_size", "num_attention_heads"} <= set(config)


def heads(args: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, key-value groups, elements of a head."""
    count = args["num_attention_heads"]
    groups = args.get("num_query_groups") if args.get("group_query_attention") is not False else None
    return count, groups or count, args.get("kv_channels") or args["hidden_size"] // count


def sizes(args: Mapping[str, Any]) -> dict[str, int]:
    """Axis lengths that shapes cannot tell, from args or a TransformerConfig."""
    count, groups, width = heads(args)
    if count % groups or width % 2:
        raise ValueError(f"{count} heads in {groups} groups, of {width} elements")
    return dict(l=args["num_layers"], e=args["hidden_size"], g=groups, q=count // groups, c=2, r=width // 2)


def model_type(types: Sequence[str], weights: set[str]) -> str:
    """Which of a family's models this is, by the weights that only some of Llama's relatives have."""
    if types[0] != "llama":
        return types[0]
    return "qwen2" if "q_bias" in weights and "o_bias" not in weights else "llama"


def to_hf(args: Mapping[str, Any], kind: str, lengths: Mapping[str, int], tied: bool) -> Translation:
    """config.json of a model of type `kind` from its args; `lengths` are the stored ones."""
    told = {"norm_epsilon": args.get("layernorm_epsilon"), **{k: v for k, v in args.items() if v is not None}}
    found = {hf: told[m] for m, hf in FIELDS if told.get(m) is not None}
    _, groups, width = heads(args)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **found,
        "head_dim": width,
        "num_key_value_heads": groups,
        "vocab_size": lengths["v"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }
    for axis in ("f", "m"):
        if axis in lengths:
            config["moe_intermediate_size" if axis == "m" else "intermediate_size"] = lengths[axis]
    if "x" in lengths:
        config[EXPERTS.get(kind, "num_experts")] = lengths["x"]
    guesses = [f"model_type {kind}"]
    absent = dict(max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-5)
    for key, value in absent.items():
        if key not in config:
            config[key] = value
            guesses.append(f"{key} {value:g}")
    if "x" in lengths and "num_experts_per_tok" not in config:
        config["num_experts_per_tok"] = 2
        guesses.append("num_experts_per_tok 2")
    lost = [f"{k}={told[k]!r}" for k, v in ALWAYS.items() if k in told and told[k] != v]
    if told.get("use_rope_scaling"):
        lost.append(f"use_rope_scaling (factor {told.get('rope_scaling_factor', 8)})")
    text = "config.json, from Megatron's args: " + ", ".join(guesses)
    return Translation(config, (text,), tuple(lost))


def to_args(config: Mapping[str, Any], lengths: Mapping[str, int], weights: set[str], tied: bool) -> dict[str, Any]:
    """Args of a model from its config.json (or from the args of its source) and the weights it has."""
    if is_args(config):
        return dict(config)
    if not lengths.get("l"):
        return {}
    given = {**(config.get("rope_parameters") or {}), **config}
    args: dict[str, Any] = {m: given[hf] for m, hf in FIELDS if given.get(hf) is not None}
    groups = lengths.get("g", lengths.get("h"))
    rope = "positions" not in weights
    args |= dict(
        group_query_attention="g" in lengths and lengths.get("q") != 1,
        num_query_groups=groups,
        kv_channels=lengths["c"] * lengths["r"] if "r" in lengths else lengths.get("d"),
        ffn_hidden_size=lengths.get("f"),
        padded_vocab_size=lengths.get("v"),
        untie_embeddings_and_output_weights=not tied,
        normalization="LayerNorm" if "norm_bias" in weights else "RMSNorm",
        swiglu="gate" in weights or "expert_gate" in weights,
        add_bias_linear="o_bias" in weights,
        add_qkv_bias="q_bias" in weights,
        qk_layernorm="q_norm" in weights,
        position_embedding_type="rope" if rope else "learned_absolute",
        add_position_embedding=not rope,
        rotary_percent=1.0,
        rotary_interleaved=False,
    )
    if "num_attention_heads" not in args:
        args["num_attention_heads"] = (groups or 1) * lengths.get("q", 1)
    args.setdefault("num_layers", lengths["l"])
    args.setdefault("hidden_size", lengths["e"])
    args.setdefault("max_position_embeddings", lengths.get("p", 2048))
    args["seq_length"] = args["max_position_embeddings"]
    if "x" in lengths:
        args["num_experts"] = lengths["x"]
    return args
