"""Megatron-core's words: how its checkpoints name layers, and the sizes that its args say.

Facts: megatron-core 0.16.1 (names and layouts were compared with its own checkpoints). Names are those of its distributed
checkpoints: Transformer Engine's, whatever spec built the model, with global layer numbers.

Invariant: pure; what args say is checked before it is counted with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_dist import configs
from ckpt_dist.errors import CheckpointError

LAYER = "decoder.layers.{l}."
FURTHER = "mtp.layers.{n}."  # one that predicts further tokens
STEPS = "iter_{:07d}"
TRACKER = "latest_checkpointed_iteration.txt"
PLAIN = (str, int, float, bool, type(None))
MOST = 1 << 20  # ranks, experts, rows of a latent: more than any run has


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
    return {**dialects(dense_too(rules)), "megatron_local": own, "megatron_local_stacked": stacked(own)}


def dense_too(rules: Mapping[str, str]) -> dict[str, str]:
    """Of a model that also has layers without experts: their norm is part of the linear layer after it."""
    name = LAYER + "pre_mlp_layernorm.weight"
    if not any("mlp.linear_fc1" in n for n in rules):
        return dict(rules)
    fused = {LAYER + "mlp.linear_fc1.layer_norm_weight": rules[name] + " if gate"}
    return {**rules, name: rules[name] + " if router", **fused}


def is_args(config: Mapping[str, Any]) -> bool:
    return {"num_layers", "hidden_size", "num_attention_heads"} <= set(config) and not configs.is_hf(config)


def plain(value: Any, depth: int = 2) -> bool:
    """A word or a number, a list of them, or one of such lists."""
    inside = type(value) in (list, tuple) and depth > 0 and all(plain(v, depth - 1) for v in value)
    return type(value) in PLAIN or inside


def count(args: Mapping[str, Any], key: str) -> int:
    """How many, by one of the args: 0 where that does not say it."""
    said = args.get(key) or 0
    if type(said) is not int or said > MOST:
        raise CheckpointError(f"args are damaged: {key} is {said!r:.40}, no number up to {MOST}.")
    return max(said, 0)


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
