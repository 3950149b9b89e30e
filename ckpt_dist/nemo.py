"""NeMo's words for a model as Megatron's args: model_config.yaml of NeMo 1, context/model.yaml of NeMo 2.

Facts: NeMo 1.x (`megatron_gpt_config.yaml`) and NeMo 2.x (`GPTConfig`), from source. NeMo 2 has Megatron-core's words but
for those below, and so has Megatron Bridge (run_config.yaml); NeMo 1 has some of its own.

Invariant: pure; only what the settings say is translated, what they leave out stays out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_dist import megatron

SETTINGS = (  # files, seen from the tensors
    "model_config.yaml", "../model_config.yaml", "../context/model.yaml", "hparams.yaml", "../hparams.yaml",
    "../../hparams.yaml",
)  # fmt: skip
WORDS = dict(  # of NeMo -> of args
    layernorm_epsilon="norm_epsilon",
    rotary_percentage="rotary_percent",
    seq_len_interpolation_factor="rotary_seq_len_interpolation_factor",
    num_moe_experts="num_experts",
    bias="add_bias_linear",
    qkv_bias="add_qkv_bias",
    encoder_seq_length="seq_length",
    bias_activation_fusion="bias_gelu_fusion",
)
NORMS = dict(rmsnorm="RMSNorm", layernorm="LayerNorm", layernorm1p="LayerNorm", low_precision_layernorm="LayerNorm")
LLAMA_3 = dict(low_freq_factor=1, high_freq_factor=4, old_context_len=8192)
GATED = ("swiglu", "fast-swiglu")


def settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Args from either tool's settings, an empty dict where they are not of a language model.

    `{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "normalization": "rmsnorm"}` -> `normalization: RMSNorm`
    """
    inner = tree.get("config") or tree.get("cfg") or tree.get("model")  # of NeMo 2, of hparams.yaml, of a run's config
    told = inner if isinstance(inner, Mapping) else tree
    said = ((str(k), v) for k, v in told.items() if v is not None and megatron.plain(v))
    given = {WORDS.get(k, k): v for k, v in said if "${" not in str(v)}  # which is another setting's value
    if not megatron.is_args(given):
        return {}
    if str(given.get("normalization")).lower() in NORMS:
        norm = str(given["normalization"]).lower()
        given["normalization"] = NORMS[norm]
        given["apply_layernorm_1p"] = norm == "layernorm1p" or given.get("layernorm_zero_centered_gamma") is True
    function = told.get("activation_func")
    if isinstance(function, Mapping):  # of NeMo 2: `torch.nn.functional.silu`
        name = str(function.get("_target_")).rpartition(".")[2].replace("_", "-")
        given["activation"] = "swiglu" if name == "silu" and told.get("gated_linear_unit") else name
    if isinstance(given.get("activation"), str):
        given["swiglu"] = given["activation"] in GATED
        given["squared_relu"] = given["activation"] == "squared-relu"
        given["openai_gelu"] = given["activation"] == "openai-gelu"
    share = given.get("share_embeddings_and_output_weights")
    if isinstance(share, bool):
        given["untie_embeddings_and_output_weights"] = not share
    given.setdefault("rotary_percent", 1.0)
    if "seq_length" in given:
        given.setdefault("max_position_embeddings", given["seq_length"])
    return given | _scaling(given)


def _scaling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The longer rotary embedding of Llama 3.1: Megatron has it with its own numbers, and a factor."""
    if given.get("scale_positional_embedding"):
        return dict(use_rope_scaling=True)
    if "scale_factor" not in given or any(given.get(key, value) != value for key, value in LLAMA_3.items()):
        return {}
    return dict(use_rope_scaling=True, rope_scaling_factor=given["scale_factor"], scale_factor=None)
