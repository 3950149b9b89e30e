"""Model configs: Hugging Face's config.json and Meta's params.json, one table that is read in both directions.

    hidden_size <-> dim, rms_norm_eps <-> norm_eps, intermediate_size <-> multiple_of and ffn_dim_multiplier, ...

Facts: transformers 5.23 (older ones read the same config.json), llama-models up to Llama 3.3. What a file does not
say is taken from the shapes where they show it, else it is a guess that is listed; what the other file has no words
for is listed as lost, and refused where the model would compute something else.

Invariant: pure; a translation there and back gives the same values for every field that is not listed as lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ckpt_dist.errors import CheckpointError
from ckpt_dist.whole import MOST_SETTINGS, contents

FIELDS = (  # config.json, params.json, and what each of them means where it does not say (None: it has to)
    ("hidden_size", "dim", None, None),
    ("num_hidden_layers", "n_layers", None, None),
    ("num_attention_heads", "n_heads", None, None),
    ("num_key_value_heads", "n_kv_heads", "num_attention_heads", "n_heads"),  # as many as that one
    ("rms_norm_eps", "norm_eps", 1e-6, 1e-5),
    ("rope_theta", "rope_theta", 10000.0, 10000.0),
)
IMPLIED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)  # by Meta's code, always
SCALED = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # what use_scaled_rope stands for
PRESETS = "presets.yaml"
BUILD = {  # of config.json
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "tie_word_embeddings",
}  # fmt: skip
FEED_FORWARD = ("multiple_of", "ffn_dim_multiplier", "hidden_dim")
KNOWN = {*(meta for _, meta, *_ in FIELDS), "vocab_size", "use_scaled_rope", "head_dim", *FEED_FORWARD}
PUBLISHED = ((256, None), (256, 1.5), (4096, 1.3), (4096, 1.2), (1024, 1.3))  # multiple_of, ffn_dim_multiplier
TOKENS = {32000: (1, 2), 128256: (128000, 128001)}  # vocabulary: begin and end of a text, in Llama 2 and 3
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
NEUTRAL = (  # of config.json: nothing that the model computes depends on them
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "pretraining_tp",
    "initializer_range",
    "attention_dropout",
    "quantization_config",  # what is written is not quantised
)


@dataclass(frozen=True)
class Translation:
    """A config in the other file's words; what was guessed, and which fields it has no words for."""

    config: dict[str, Any]
    guesses: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def read_config(path: Path) -> dict[str, Any]:
    """A model's JSON config; params.json may be wrapped as `{"model": {...}}`."""
    try:
        content = json.loads(contents(path, MOST_SETTINGS))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a table of settings.")
    inner = content.get("model")
    return inner if isinstance(inner, dict) and "n_layers" in inner else content


def folder(name: str) -> Path:
    """`conf` or `jobs`: inside an installed package, beside the package in a checkout; never of another place."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def presets() -> dict[str, dict[str, Any]]:
    """The config.json of well-known models, by name: `presets()["llama3.1-8b"]["rope_theta"]` -> 500000.0"""
    return {name: config for name, config in _table().items() if not name.startswith(".")}


def flavour(config: Mapping[str, Any]) -> str | None:
    """Module and flavour of torchtitan that build this config.json's model, `llama3 8B`; None where no preset does."""
    built, known = _built(config), presets()
    return next((str(name) for n, name in _table()[".torchtitan"].items() if _built(known[n]) == built), None)


def _built(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a model of the same tensors."""
    head = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    return {**{k: config.get(k) for k in BUILD}, "head_dim": head}


@cache
def _table() -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((folder("conf") / PRESETS).read_text()))


def is_hf(config: Mapping[str, Any]) -> bool:
    return "model_type" in config or "architectures" in config


def is_params(config: Mapping[str, Any]) -> bool:
    return "n_layers" in config and not is_hf(config)


def feed_forward(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Meta's rule: two thirds of 4 * dim, times the multiplier, rounded up: `feed_forward(4096, 1024, 1.3)` -> 14336."""
    size = int(2 * (4 * dim) / 3)
    size = int(multiplier * size) if multiplier is not None else size
    return -(-size // multiple_of) * multiple_of


def to_hf(params: Mapping[str, Any], sizes: Mapping[str, int], tied: bool) -> Translation:
    """config.json of a Llama from its params.json; `sizes` are the stored ones, v the vocabulary and f the feed-forward."""
    shared = _read(params, "params.json", [(meta, hf, absent) for hf, meta, _, absent in FIELDS])
    scaled, theta = bool(params.get("use_scaled_rope")), shared["rope_theta"]
    _same_feed_forward(params, sizes["f"])
    begin, end = TOKENS.get(sizes["v"], (None, None))
    length = 131072 if scaled else 4096 if theta <= 10000 else 8192 if theta == 500000 else 16384
    config = {
        "architectures": ["LlamaForCausalLM"],
        **IMPLIED,
        **shared,
        "head_dim": params.get("head_dim") or params["dim"] // params["n_heads"],
        "intermediate_size": sizes["f"],
        "vocab_size": sizes["v"],
        "rope_scaling": dict(SCALED) if scaled else None,
        "max_position_embeddings": length,
        "tie_word_embeddings": tied,
        "bos_token_id": begin,
        "eos_token_id": end,
    }
    guesses = [f"max_position_embeddings {length}"]
    guesses += [f"bos_token_id {begin}", f"eos_token_id {end}"] if begin else ["no bos_token_id and eos_token_id"]
    guesses += [] if "rope_theta" in params else [f"rope_theta {theta:g}, as in Llama 1 and 2"]
    guesses += ["rope_scaling factor 8, as in Llama 3.1 (Llama 3.2 has 32)"] if scaled else []
    text = "config.json, where params.json does not say: " + ", ".join(guesses)
    return Translation(config, (text,), tuple(sorted(k for k in set(params) - KNOWN if params[k] is not None)))


def to_meta(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Translation:
    """params.json of a Llama from its config.json. A model that Meta's code would compute otherwise is refused."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    flat = {**({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}), **config}
    shared = _read(flat, "config.json", [(hf, meta, absent) for hf, meta, absent, _ in FIELDS])
    kind = rope.get("rope_type", rope.get("type", "default"))
    head = shared["dim"] // shared["n_heads"]
    for key, wanted in {**IMPLIED, "head_dim": head}.items():
        if config.get(key) not in (None, wanted):
            raise CheckpointError(_otherwise(key, config[key], wanted))
    if kind not in ("default", "llama3"):
        raise CheckpointError(_otherwise("rope type", kind, "default or llama3"))
    multiple_of, multiplier = _multiples(shared["dim"], sizes["f"])
    params = {**shared, "vocab_size": sizes["v"], "multiple_of": multiple_of}
    params |= {"ffn_dim_multiplier": multiplier} if multiplier is not None else {}
    params |= {"use_scaled_rope": True} if kind == "llama3" else {}
    back = to_hf(params, sizes, bool(config.get("tie_word_embeddings"))).config
    rare = [k for k, v in config.items() if k not in (*NEUTRAL, *ROPE) and v is not None and back.get(k) != v]
    rare += [f"rope {k} {rope[k]:g}, where Meta's code has {v:g}" for k, v in SCALED.items()
             if kind == "llama3" and k != "rope_type" and rope.get(k, v) != v]  # fmt: skip
    return Translation(params, (), tuple(sorted(rare)))


def _read(config: Mapping[str, Any], where: str, names: list[tuple[str, str, Any]]) -> dict[str, Any]:
    """The fields under their other names; an absent one by its default, or by the field that its default names."""
    found: dict[str, Any] = {}
    for name, other, absent in names:
        value = config.get(name)
        value = config.get(absent) if value is None and isinstance(absent, str) else absent if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(
                f"{where}: {name} is {value!r}, a number is expected. Give model.config=PATH of a whole one."
            )
        found[other] = value
    return found


def _same_feed_forward(params: Mapping[str, Any], stored: int) -> None:
    if not any(params.get(k) for k in FEED_FORWARD):
        return
    rule = feed_forward(params["dim"], params.get("multiple_of") or 256, params.get("ffn_dim_multiplier"))
    said = params.get("hidden_dim") or rule
    if said != stored:
        values = ", ".join(f"{k}={params[k]}" for k in ("dim", *FEED_FORWARD) if params.get(k))
        raise CheckpointError(
            f"params.json says a feed-forward size of {said} ({values}), the tensors have {stored}. Is it that of another model?"
        )


def _multiples(dim: int, size: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give this size: those of a published model, or just any.

    `_multiples(4096, 14336)` -> `(1024, 1.3)`
    """
    exact = size / int(2 * (4 * dim) / 3)
    steps = [n for n in (256, 64, 16, 4, 2, 1) if size % n == 0]
    tries = [*PUBLISHED, *((n, None) for n in steps), *((n, round(exact, d)) for d in (1, 2, 4, 17) for n in steps)]
    for multiple_of, multiplier in (*tries, (1, exact * (1 + 1e-15))):
        if feed_forward(dim, multiple_of, multiplier) == size:
            return multiple_of, multiplier
    raise CheckpointError(f"No multiple_of and ffn_dim_multiplier give a feed-forward size of {size} for dim {dim}.")


def _otherwise(key: str, value: object, wanted: object) -> str:
    return (
        f"config.json says {key}={value!r}, and a model in Meta's layout always has {wanted!r}: params.json cannot say it. "
        "Use another target.format."
    )
