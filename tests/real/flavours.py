"""What torchtitan builds the models of conf/presets.yaml with: `python -m tests.real.flavours FILE`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FLAVOURS = {
    "llama3": {"8B": "llama3.1-8b", "70B": "llama3.1-70b", "405B": "llama3.1-405b"},
    "qwen3": {f: f"qwen3-{f.lower()}" for f in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B")},
    "gpt_oss": {"20b": "gpt-oss-20b", "120b": "gpt-oss-120b"},
}


def facts(config: Any) -> dict[str, Any]:
    layer = config.layers[0]
    attention, rope, mlp = layer.attention, layer.attention.rope, layer.feed_forward
    found = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=len(config.layers),
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads,
        head_dim=attention.head_dim or config.dim // attention.n_heads,
        rms_norm_eps=config.norm.eps,
        rope_theta=rope.theta,
        max_position_embeddings=rope.max_seq_len,
        tie_word_embeddings=config.enable_weight_tying,
    )
    if rope.scaling == "llama":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        found["rope_scaling"] = {n: getattr(rope, n) for n in names} | dict(
            rope_type="llama3", factor=rope.scaling_factor
        )
    if rope.scaling == "yarn":
        found["rope_scaling"] = {n: getattr(rope, n) for n in ("beta_fast", "beta_slow", "truncate")} | dict(
            rope_type="yarn", factor=rope.rope_factor, original_max_position_embeddings=rope.original_seq_len
        )
    if mlp is not None:
        return {**found, "intermediate_size": mlp.w1.out_features}
    experts, router = layer.moe.routed_experts.inner_experts, layer.moe.router
    found["num_experts"], found["num_experts_per_tok"] = experts.num_experts, router.top_k
    return {**found, "moe_intermediate_size": experts.hidden_dim, "norm_topk_prob": router.route_norm}


def main() -> None:
    found = {
        preset: facts(import_module(f"torchtitan.models.{package}").model_registry(flavour).model)
        for package, flavours in FLAVOURS.items()
        for flavour, preset in flavours.items()
    }
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items()]
    Path(sys.argv[1]).write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
