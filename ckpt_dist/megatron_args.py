"""Megatron's args and config.json: the same model in the words of both.

Facts: megatron-core 0.16.1, Megatron-LM for args.

Invariant: pure; what one cannot say of the other is listed, what a config needs and args lack is a guess that is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ckpt_dist import configs
from ckpt_dist.configs import Translation
from ckpt_dist.errors import CheckpointError
from ckpt_dist.megatron import heads, is_args

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
    ("moe_router_topk_scaling_factor", "routed_scaling_factor"),
    ("moe_router_num_groups", "n_group"),
    ("moe_router_group_topk", "topk_group"),
)
EXPERTS = {
    "mixtral": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
}  # elsewhere num_experts
YARN = (  # args of latent attention, rope_scaling of config.json
    ("rotary_scaling_factor", "factor"),
    *((n, n) for n in ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
)
CLASSES = dict(
    llama="LlamaForCausalLM",
    mistral="MistralForCausalLM",
    qwen2="Qwen2ForCausalLM",
    qwen3="Qwen3ForCausalLM",
    qwen3_moe="Qwen3MoeForCausalLM",
    mixtral="MixtralForCausalLM",
    gpt2="GPT2LMHeadModel",
    bloom="BloomForCausalLM",
    deepseek_v3="DeepseekV3ForCausalLM",
)
OTHERS = {  # args, config.json of the models that do not use the words of Llama
    kind: (("hidden_size", width), ("num_layers", "n_layer"), ("num_attention_heads", "n_head"),
           ("layernorm_epsilon", "layer_norm_epsilon"), ("init_method_std", "initializer_range"), *more)
    for kind, width, more in (
        ("gpt2", "n_embd", ()),
        ("bloom", "hidden_size", (("apply_residual_connection_post_layernorm",) * 2,)),
    )
}  # fmt: skip
OFF = (  # of args: what changes what is computed where it is said and not nothing, and no config.json here says it
    "rotary_interleaved", "apply_layernorm_1p", "layernorm_zero_centered_gamma", "squared_relu", "quick_geglu", "window_size",
    "multi_latent_attention", "mtp_num_layers", "softmax_scale", "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_limited_devices",
    "moe_router_pre_softmax", "moe_apply_probs_on_input", "moe_expert_capacity_factor", "moe_latent_size",
    "attention_output_gate", "no_rope_freq", "nope_layer_interval", "mrope_section", "scale_factor", "mscale",
    "qk_l2_norm", "glu_linear_offset", "activation_func_clamp_value", "apply_residual_connection_post_layernorm",
    "use_mup", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "embedding_multiplier",
    "experimental_attention_variant", "linear_attention_type", "linear_attention_freq", "hybrid_override_pattern",
    "hybrid_attention_ratio", "heterogeneous_layers_config_path", "retro_add_retriever",
)  # fmt: skip
ALWAYS = dict(  # of args: what these models compute whatever a config.json says
    normalization="RMSNorm", swiglu=True, gated_linear_unit=True, add_bias_linear=False, position_embedding_type="rope",
    rotary_percent=1.0, moe_router_score_function="softmax", softmax_type="vanilla", activation="swiglu",
    **dict.fromkeys(OFF),
)  # fmt: skip
LATENT = {  # the same, of DeepSeek-V3; what its config.json says of these is not there
    **{
        k: v
        for k, v in ALWAYS.items()
        if not re.fullmatch(
            r"mtp_num_layers|mscale|moe_router_(topk_scaling_factor|num_groups|group_topk|pre_softmax)", k
        )
    },
    **dict(multi_latent_attention=True, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
}
PLAIN = dict(  # the same, of those with biases, norms that have them, and no gates
    normalization="LayerNorm", swiglu=False, gated_linear_unit=False, add_bias_linear=True, activation="gelu",
)  # fmt: skip
EACH = {  # the same, of each type of model
    "deepseek_v3": LATENT,
    "gpt2": {**ALWAYS, **PLAIN, "position_embedding_type": "learned_absolute"},
    "bloom": {**{k: v for k, v in ALWAYS.items() if k != "apply_residual_connection_post_layernorm"}, **PLAIN,
              "position_embedding_type": "alibi"},
    "llama": {k: v for k, v in ALWAYS.items() if k != "add_bias_linear"},  # by its weights
}  # fmt: skip
SAME = {
    "absolute": "learned_absolute",
    "fast-swiglu": "swiglu",
    "fast-gelu": "gelu",
    "openai-gelu": "gelu",
}  # one thing
SPLIT = dict(  # of args: how ranks share the layers; what a source says of its own does not hold for a target
    virtual_pipeline_model_parallel_size=None, num_layers_per_virtual_pipeline_stage=None,
    num_virtual_stages_per_pipeline_rank=None, decoder_first_pipeline_num_layers=None,
    decoder_last_pipeline_num_layers=None, pipeline_model_parallel_layout=None,
    account_for_embedding_in_pipeline_split=False, account_for_loss_in_pipeline_split=False,
    expert_model_parallel_size=1, expert_tensor_parallel_size=1, no_save_optim=True, no_save_rng=True,
)  # fmt: skip
SHAPE = (  # of config.json: what shapes and weights say too, or what Megatron computes in any case
    "model_type", "vocab_size", "intermediate_size", "num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step",
    "n_embd", "n_layer", "n_head", "n_positions", "n_ctx", "n_inner", "layer_norm_epsilon", "layer_norm_eps", "qk_head_dim",
    "rope_interleave", "rope_parameters", "rope_scaling", "rope_theta", "scoring_func", "topk_method", "norm_topk_prob",
    "is_decoder", "return_dict", "bos_token_id", "eos_token_id", "pad_token_id", "use_sliding_window", "max_window_layers",
    "seq_aux", "num_nextn_predict_layers",
    "n_embed", "seq_length", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "masked_softmax_fusion", "unk_token_id",
    "bias_dropout_fusion", "attention_softmax_in_fp32",  # of BLOOM as published; transformers does not read them
)  # fmt: skip
UNUSED = (
    "dropout",
    "pdrop",
    "aux_loss",
    "initializer",
    "summary_",
    "router_jitter",
    "reorder_and_upcast",
    "scale_attn_weights",
)


def model_type(types: Sequence[str], weights: Collection[str]) -> str:
    """Which of a family's models this is, by the weights that only some of Llama's relatives have."""
    if types[0] != "llama":
        return types[0]
    return "qwen2" if "q_bias" in weights and "o_bias" not in weights else "llama"


def to_hf(
    args: Mapping[str, Any], kind: str, lengths: Mapping[str, int], tied: bool, weights: Mapping[str, Collection[int]]
) -> Translation:
    """config.json of a model of type `kind` from its args; `lengths`, and `weights` with their layers, are the stored ones."""
    if kind in OTHERS:
        return _to_other_hf(args, kind, lengths, tied)
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
    if kind == "llama":
        config |= dict(attention_bias="o_bias" in weights, mlp_bias="down_bias" in weights)
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
    if told.get("use_rope_scaling") or told.get("rope_scaling") is True:
        config["rope_scaling"] = {**configs.SCALED, "factor": float(told.get("rope_scaling_factor", 8))}
    elif told.get("rotary_seq_len_interpolation_factor", 1) != 1:
        config["rope_scaling"] = dict(rope_type="linear", factor=float(told["rotary_seq_len_interpolation_factor"]))
    lost, dense = _untranslated(told, kind), _dense(weights)
    if kind == "deepseek_v3":
        config |= _latent(told, lengths, dense)
        lost += [f"layers {dense} without experts"] if dense != list(range(len(dense))) else []
    elif kind == "qwen3_moe":
        config |= {"norm_topk_prob": not told.get("moe_router_pre_softmax"), "mlp_only_layers": dense}
    guesses.append("no bos_token_id and eos_token_id")
    text = "config.json, from Megatron's args: " + ", ".join(guesses)
    return Translation(config, (text,), tuple(lost))


def _latent(args: Mapping[str, Any], lengths: Mapping[str, int], dense: Sequence[int]) -> dict[str, Any]:
    """What only the config.json of a DeepSeek-V3 says, also what it has not: transformers' own is a model of 671 billion."""
    scaled = {hf: args[m] for m, hf in YARN if m in args}
    config: dict[str, Any] = dict(
        num_key_value_heads=args["num_attention_heads"],
        n_shared_experts=lengths["s"] // lengths["m"] if "s" in lengths else None,
        q_lora_rank=lengths.get("a"),
        first_k_dense_replace=len(dense),
        norm_topk_prob=args.get("moe_router_topk", 2) > 1,  # of one expert Megatron takes its score as it is
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=args.get("moe_router_num_groups", 1),
        topk_group=args.get("moe_router_group_topk", 1),
        routed_scaling_factor=args.get("moe_router_topk_scaling_factor", 1.0),
        attention_bias=False,
        head_dim=args["qk_pos_emb_head_dim"],
    )
    yarn = args.get("rope_type", "yarn") == "yarn" and "factor" in scaled
    return config | {"rope_scaling": {"type": "yarn", "rope_type": "yarn", **scaled} if yarn else None}


def _to_other_hf(args: Mapping[str, Any], kind: str, lengths: Mapping[str, int], tied: bool) -> Translation:
    """config.json of a GPT-2 or BLOOM, which call nearly everything otherwise."""
    told = {k: v for k, v in args.items() if v is not None}
    told["layernorm_epsilon"] = told.get("layernorm_epsilon", told.get("norm_epsilon", 1e-5))
    config = {"architectures": [CLASSES[kind]], "model_type": kind, "vocab_size": lengths["v"]}
    config |= {hf: told[m] for m, hf in OTHERS[kind] if m in told} | {"tie_word_embeddings": tied}
    guesses = [f"model_type {kind}"]
    if kind == "gpt2":
        act = "gelu_fast" if told.get("bias_gelu_fusion") else "gelu_new" if told.get("openai_gelu") else "gelu"
        config |= dict(n_positions=lengths["p"], n_inner=lengths["f"], activation_function=act)
        config |= dict(bos_token_id=lengths["v"] - 1, eos_token_id=lengths["v"] - 1)
        guesses += [f"activation_function {act}", f"bos_token_id and eos_token_id {lengths['v'] - 1}"]
    else:
        config |= dict(bos_token_id=1, eos_token_id=2, slow_but_exact=False)
        guesses += ["bos_token_id 1", "eos_token_id 2"]
    text = "config.json, from Megatron's args: " + ", ".join(guesses)
    return Translation(config, (text,), tuple(_untranslated(told, kind)))


def _untranslated(told: Mapping[str, Any], kind: str) -> list[str]:
    """Args by which Megatron computes something else than what this type of model does by its config.json."""

    def other(key: str, wanted: Any) -> bool:
        said = told[key]
        if not isinstance(said, (str, int, float, list, tuple)):  # of a class that is not here
            return False
        said = SAME.get(said, said) if isinstance(said, str) else said
        alone = key.startswith("moe_router") and said == 1 and said is not True  # one group, a factor of one
        return bool(said) and not alone if wanted is None else said != wanted

    always = EACH.get(kind, ALWAYS)
    mine = {k: v for k, v in always.items() if kind != "qwen3_moe" or k != "moe_router_pre_softmax"}
    found = [f"{k}={told[k]!r}" for k, v in mine.items() if k in told and other(k, v)]
    balanced = told.get("moe_router_load_balancing_type")
    return found + (["moe_router_load_balancing_type=sinkhorn"] if "sinkhorn" in str(balanced) else [])


def centred(args: Mapping[str, Any]) -> list[str]:
    """What to say of norms whose weights Megatron adds 1 to, where they go to another program; nothing if it does not."""
    return [
        f"args say {said}: Megatron adds 1 to the weights of norms, which are stored and written without it. Elsewhere the "
        "model computes something else until 1 is added to the weight of each norm"
        for said in ("apply_layernorm_1p", "layernorm_zero_centered_gamma")
        if args.get(said) is True
    ][:1]


def _dense(weights: Mapping[str, Collection[int]]) -> list[int]:
    """The layers without experts, of a model of which others have them."""
    return sorted(weights.get("gate", ())) if "expert_gate" in weights else []


def to_args(
    config: Mapping[str, Any], lengths: Mapping[str, int], weights: Mapping[str, Collection[int]], tied: bool
) -> Translation:
    """Args of a model from its config.json (or from the args of its source) and the weights it has, with their layers."""
    known = _stored(lengths, weights, tied) if lengths.get("l") else {}
    if is_args(config):
        rows = {"padded_vocab_size": lengths["v"]} if "v" in lengths else {}
        return Translation({**known, **config, **SPLIT, **rows})
    if not known:
        return Translation(dict(SPLIT))
    said = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(one, Mapping) for one in said):
        raise CheckpointError(
            f"config.json is damaged: rope_scaling is {said[0]!r:.60}, rope_parameters {said[1]!r:.60}."
        )
    rope = {**said[0], **said[1]}
    given = {**rope, **config}
    args: dict[str, Any] = {m: given[hf] for m, hf in FIELDS if given.get(hf) is not None}
    scaling, lost = _scaling(rope, "kv_down" in weights)
    args |= {**known, **dict(rotary_percent=1.0, rotary_interleaved=False)}
    args |= {"vocab_size": config["vocab_size"]} if config.get("vocab_size") else {}
    if "num_attention_heads" not in args:
        args["num_attention_heads"] = (args["num_query_groups"] or 1) * lengths.get("q", 1)
    args.setdefault("num_layers", lengths["l"])
    args.setdefault("hidden_size", lengths["e"])
    args.setdefault("max_position_embeddings", lengths.get("p", 2048))
    args["seq_length"] = args["max_position_embeddings"]
    epsilon = config.get("layer_norm_epsilon", config.get("layer_norm_eps"))
    if act := config.get("activation_function"):
        args |= dict(openai_gelu=act == "gelu_new", bias_gelu_fusion=act in ("gelu_fast", "gelu_pytorch_tanh"))
    args |= {**SPLIT, **scaling, **({"norm_epsilon": epsilon} if epsilon is not None else {})}
    if "x" in lengths:
        args |= _routing(config, weights)
    return Translation(args, (), (*lost, *_untold(config, args)))


def _stored(lengths: Mapping[str, int], weights: Mapping[str, Collection[int]], tied: bool) -> dict[str, Any]:
    """Args that shapes and names say."""
    rotary, dense = "positions" not in weights, _dense(weights)
    args: dict[str, Any] = dict(
        group_query_attention="g" in lengths and lengths.get("q") != 1,
        num_query_groups=lengths.get("g", lengths.get("h")),
        kv_channels=lengths["c"] * lengths["r"] if "r" in lengths else lengths.get("d"),
        ffn_hidden_size=lengths.get("f"),
        padded_vocab_size=lengths.get("v"),
        untie_embeddings_and_output_weights=not tied,
        normalization="LayerNorm" if "norm_bias" in weights else "RMSNorm",
        swiglu="gate" in weights or "expert_gate" in weights,
        add_bias_linear="o_bias" in weights,
        add_qkv_bias="q_bias" in weights,
        qk_layernorm="q_norm" in weights,
        position_embedding_type="alibi" if "embed_norm" in weights else "rope" if rotary else "learned_absolute",
        add_position_embedding=not rotary,
        mtp_num_layers=lengths["n"] if "mtp_enorm" in weights else None,
    )
    if "x" in lengths:
        args |= dict(
            num_experts=lengths["x"],
            moe_layer_freq=[int(n not in dense) for n in range(lengths["l"])] if dense else 1,
            moe_ffn_hidden_size=lengths.get("m", lengths.get("f")),
            multi_latent_attention="kv_down" in weights,
        )
    return args | ({"moe_shared_expert_intermediate_size": lengths["s"]} if "s" in lengths else {})


def divisor(args: Mapping[str, Any], tp: int) -> dict[str, int]:
    """Args by which Megatron, that pads a vocabulary for its ranks, comes to as many rows as are stored.

    `divisor(dict(vocab_size=50257, padded_vocab_size=50304), 1)` -> `dict(make_vocab_size_divisible_by=128)`
    """
    key, words, rows = "make_vocab_size_divisible_by", args.get("vocab_size"), args.get("padded_vocab_size")
    if type(words) is not int or type(rows) is not int or words < 1:
        return {}
    tries = (args.get(key), *(1 << k for k in (7, 6, 5, 4, 3, 2, 1, 0, *range(8, 15))))
    fits = (n for n in tries if type(n) is int and n > 0 and -(-words // (n * tp)) * n * tp == rows)
    return {key: found} if (found := next(fits, None)) else {}


def _scaling(rope: Mapping[str, Any], latent: bool) -> tuple[dict[str, Any], list[str]]:
    """Args of a config's rope scaling; Megatron has Llama 3's with all but the factor fixed, the linear one, and of
    latent attention YaRN."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    odd = [
        f"rope {k}={rope[k]!r}"
        for k, v in configs.SCALED.items()
        if k not in ("rope_type", "factor") and rope.get(k, v) != v
    ]
    if any(isinstance(v, Mapping) for v in rope.values()):
        return {}, [f"rope of each kind of layer: {', '.join(sorted(rope))}"]
    if latent and kind in ("yarn", "default"):
        told = {m: rope[hf] for m, hf in YARN if hf in rope} if kind == "yarn" else {}
        return {"rope_type": "yarn" if kind == "yarn" else "rope", **told}, []
    if kind == "llama3":
        return dict(use_rope_scaling=True, rope_scaling_factor=float(rope.get("factor", 8))), odd
    if kind == "linear":
        return dict(rotary_seq_len_interpolation_factor=rope.get("factor", 1)), []
    return {}, [] if kind == "default" else [f"rope scaling {kind}, factor {rope.get('factor')}"]


def _routing(config: Mapping[str, Any], weights: Collection[str]) -> dict[str, Any]:
    """Args of how a mixture of experts chooses among them."""
    sigmoid = config.get("scoring_func") == "sigmoid" or config.get("model_type") == "deepseek_v3"
    return dict(
        moe_router_score_function="sigmoid" if sigmoid else "softmax",
        moe_router_enable_expert_bias="router_bias" in weights and sigmoid,
        moe_router_pre_softmax=not sigmoid
        and config.get("model_type") == "qwen3_moe"
        and not config.get("norm_topk_prob"),
    )


def _untold(config: Mapping[str, Any], args: Mapping[str, Any]) -> list[str]:
    """What a config.json says that no arg was found for, as far as a model computes something else by it."""
    known = {*configs.NEUTRAL, *SHAPE, *(hf for _, hf in FIELDS)}
    acts = ("silu", "swish") if args["swiglu"] else ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    normal: dict[str, tuple[Any, ...]] = {
        "hidden_act": acts,
        "activation_function": (*acts, "gelu"),
        "hidden_activation": acts,
    }
    normal |= dict.fromkeys(("partial_rotary_factor", "moe_layer_freq", "ep_size"), (1,))
    if config.get("use_sliding_window") is False:
        known |= {"sliding_window"}
    return [
        f"{key}={value!r:.60}"
        for key, value in config.items()
        if key not in known
        and not key.startswith("_")
        and not any(word in key for word in UNUSED)
        and value
        and value not in normal.get(key, ())
        and not (key == "layer_types" and set(value) == {"full_attention"})
    ]
