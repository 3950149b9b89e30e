"""What should be among the weights of a model and is not: layers that are counted, weights that other
layers have, and weights that a config implies.

Invariant: nothing is missed but what the config, the names or the other layers of the same kind say is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from ckpt_dist import conditions
from ckpt_dist import family as families
from ckpt_dist.family import Family, Rule

WORDS = {"l": "layer", "x": "expert", "n": "further layer"}
FURTHER = "layers that predict further tokens"


def layers(rules: Sequence[Rule], lost: Sequence[str], counts: Mapping[str, int], told: str) -> str:
    """Which layers are not there of so many on each axis, which `told` says; none of which all names are `lost`, as was asked
    for. Layers that predict further tokens are all missed or none: transformers leaves them out."""
    for axis, length in counts.items():
        there = {index for rule in rules for a, index in rule.fixed if a == axis}
        if axis == "l":
            there |= {n for name in lost for n in map(int, families.NUMBER.findall(name)[:1]) if n < length}
        elif not there:
            continue
        if len(there) != length:
            first = next(n for n in count() if n not in there)
            what, one = ("layers", f"layer {first}") if axis == "l" else (FURTHER, f"number {first} of them")
            return f"{told} {length} {what}, the tensors have {len(there)}: {one} is the first that is missing"
    return ""


def weights(family: Family, rules: Sequence[Rule]) -> str:
    """Which weight some layers (or experts of a layer) have and another one, which should, has not: layers of one kind have
    the same weights, and `Family.layers` says which weights make a kind."""
    held: dict[str, set[tuple[int, ...]]] = {}
    axes: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        for weight in rule.weights if rule.fixed else ():
            axes[weight] = tuple(axis for axis, _ in rule.fixed)
            held.setdefault(weight, set()).add(tuple(index for _, index in rule.fixed))
    kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for weight, names in axes.items():
        kinds.setdefault((family.layers.get(family.zeros.get(weight, weight), ""), names), []).append(weight)
    for (_, names), alike in kinds.items():
        every: set[tuple[int, ...]] = set().union(*(held[w] for w in alike))
        if len(names) == 2:
            every = {(first, second) for first in {p[0] for p in every} for second in {p[1] for p in every}}
        for weight in alike:
            if gone := min(every - held[weight], default=()):
                where = ", ".join(f"{WORDS.get(a, a)} {k}" for a, k in zip(names, gone, strict=True))
                return f"{where} has no {weight!r} of {family.name}, which others have"
    return ""


def implied(family: Family, rules: Sequence[Rule], config: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Which weight that a model of this config has is not there at all. A head may be left out by who has no use for it
    (config.json then names no causal model), and where a config says nothing of the kind of model, so may what is optional."""
    there = {weight for rule in rules for weight in rule.weights}
    kind = config.get("model_type")
    complete = {**family.defaults.get(str(kind), {}), **config}
    try:
        needed = [
            w for w in conditions.weights(family, complete) if kind in family.model_types or w not in family.optional
        ]
        some = {w for w in family.layers if "l" not in sizes or conditions.layers(family, w, complete, sizes["l"])}
        needed = [w for w in needed if w in some or w not in family.layers]
    except ValueError:  # a config that is no help
        return ""
    untied = complete.get("tie_word_embeddings") is False
    classes = complete.get("architectures")
    headed = untied and any("CausalLM" in str(name) for name in (classes if isinstance(classes, list) else ()))
    gone = [w for w in needed if w not in there and (headed or w not in family.ties)]
    return f"no tensor is the {gone[0]!r} of {family.name}, which such a model has" if gone else ""
