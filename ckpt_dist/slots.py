"""Slots: the values that an optimizer keeps of each weight, such as its moments and its own copy in fp32.

Megatron calls them `optimizer.state.exp_avg.NAME`, where NAME is what it calls the weight; where a run has several
optimizers, `chained_0.` and so on may stand before that.

Invariant: a slot lies as its weight does, so it has no rule of its own: the weight's, and weights named after the slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ckpt_dist import family as families
from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.family import Family, Rule
from ckpt_dist.pattern import shape

T = TypeVar("T")
SLOT = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.")
MASTERS = ("fp32_param", "param")  # of Megatron's optimizers with and without shards
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def parted(name: str) -> tuple[str, str]:
    """`optimizer.state.exp_avg.output_layer.weight` -> `("optimizer.state.exp_avg.", "output_layer.weight")`."""
    found = SLOT.match(name)
    return (found[0], name[found.end() :]) if found else ("", name)


def lacking(catalog: Catalog) -> list[str]:
    """What to say of an optimizer that seems to have lost something; one line, or none."""
    every: tuple[Entry | Extra, ...] = (*catalog.entries, *catalog.extras)
    found = halved(x.name for x in every if x.role == "optimizer")
    return [f"{catalog.root}: {found}; if its optimizer keeps both, fetch the rest"] if found else []


def halved(names: Iterable[str]) -> str:
    """Which weights have only one of Adam's two moments in an optimizer that has both of most, in words, or nothing.

    No more than that can be told: an Adafactor, or a Lion beside an AdamW, keeps one of them of some weights.

    >>> halved(["optim.state.a.exp_avg", "optim.state.b.exp_avg", "optim.state.b.exp_avg_sq", "optim.state.c.exp_avg",
    ...         "optim.state.c.exp_avg_sq"])
    "of 1 of 3 weights, first 'a', 'optim.state' has exp_avg or exp_avg_sq only"
    """
    held: dict[str, dict[str, int]] = {}
    for name in names:
        parts = name.split(".")
        at = next((k for k, part in enumerate(parts) if part in MOMENTS), 0)
        begin = next((k for k in range(at, 0, -1) if parts[k - 1] == "state"), 0)
        if begin:  # torch puts the weight before the moment, Megatron after it
            place, weight = ".".join(parts[:begin]), ".".join(parts[begin:at] or parts[at + 1 :])
            of_place = held.setdefault(place, {})
            of_place[weight] = of_place.get(weight, 0) | 1 << MOMENTS.index(parts[at])
    for place, weights in held.items():
        halves = [w for w, found in weights.items() if found < 3]
        if 0 < len(halves) * 2 < len(weights):
            only = " or ".join(MOMENTS)
            return f"of {len(halves)} of {len(weights)} weights, first {halves[0]!r}, {place!r} has {only} only"
    return ""


def of(slot: str, rule: Rule) -> Rule:
    """The weight's rule for one of its slots."""
    return replace(rule, weights=tuple(slot + w for w in rule.weights))


def is_slot(family: Family, rule: Rule) -> bool:
    """Whether a rule is of a slot: its weights are named after some of the family."""
    slot, weight = parted(rule.weights[0])
    return bool(slot) and weight in family.weights


def match(family: Family, dialect: str, name: str, sizes: Mapping[str, int] | None = None) -> Rule | None:
    """The rule of a weight's name, or of a slot's."""
    rule = families.match(family, dialect, name, sizes)
    slot, own = parted(name)
    if rule is not None or not slot:
        return rule
    rule = families.match(family, dialect, own, sizes)
    return None if rule is None else of(slot, rule)


def unprefixed(family: Family, dialect: str, prefix: str, name: str) -> str:
    """A slot's name without the prefix that all of a model's names have; any other name as it is."""
    slot, own = parted(name)
    short = slot + own.removeprefix(prefix)
    return short if slot and match(family, dialect, short) else name


def axes(family: Family, rules: Iterable[Rule | None]) -> dict[str, tuple[str, ...]]:
    """The axes of each weight, and of the slots that these rules are of."""
    found = {w: family.axes(w) for w in family.weights}
    for weight in (w for rule in rules if rule is not None for w in rule.weights):
        slot, own = parted(weight)
        if slot and own in found:
            found[weight] = found[own]
    return found


def misshapen(rule: Rule, sizes: Mapping[str, int], stored: tuple[int, ...]) -> str:
    """What is wrong with a stored shape, if it is not that of its weight."""
    wanted = shape(rule.pattern, sizes)
    return "" if wanted == stored else f"has shape {list(stored)}, its weight {list(wanted)}"


def grouped(present: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What is known of weights, slot by slot: `{"q": 1, "optimizer.state.exp_avg.q": 2}` -> `{"": {"q": 1}, ...: {"q": 2}}`."""
    found: dict[str, dict[str, T]] = {"": {}}
    for key, value in present.items():
        slot, weight = parted(key)
        found.setdefault(slot, {})[weight] = value
    return found


def masters(catalog: Catalog) -> Catalog:
    """The same checkpoint with each weight as its optimizer has it: its own copy in fp32, where there is one."""
    numbers = {e.name: k for k, e in enumerate(catalog.entries) if e.role == "weight"}
    weight_of = np.full(len(catalog.entries), -1)
    entries = list(catalog.entries)
    for k, entry in enumerate(catalog.entries):
        found, own = SLOT.match(entry.name), numbers.get(parted(entry.name)[1])
        if found is None or found[1] not in MASTERS or own is None:
            continue
        if entry.shape != entries[own].shape:
            raise CheckpointError(
                f"{catalog.root}: {entry.name!r} has shape {list(entry.shape)}, its weight {list(entries[own].shape)}. It is "
                "damaged, or in pieces (fully_sharded_model_space of megatron-core up to 0.15), which are not read."
            )
        if own in weight_of:
            first = catalog.entries[int(np.flatnonzero(weight_of == own)[0])].name
            raise CheckpointError(f"{catalog.root}: {first!r} and {entry.name!r} both are the copy of one weight.")
        weight_of[k], entries[own] = own, replace(entries[own], dtype=entry.dtype)
    copied = weight_of[weight_of >= 0]
    if not len(copied):
        raise UsageError(
            f"{catalog.root} holds no fp32 copies of weights (optimizer.state.fp32_param.NAME or param.NAME): its optimizer "
            "keeps none, or was not saved. Leave source.weights out."
        )
    owner = catalog.chunks.entry
    own_rows, copies = np.flatnonzero(~np.isin(owner, copied)), np.flatnonzero(weight_of[owner] >= 0)
    rows = np.concatenate([own_rows, copies])
    chunks = catalog.chunks.take(rows)
    chunks = replace(chunks, entry=np.concatenate([owner[own_rows], weight_of[owner[copies]]]))
    about = {k: v[rows] if isinstance(v, np.ndarray) else v for k, v in catalog.about.items()}
    rest = len(numbers) - len(copied)
    said = "weights: the optimizer's own copies in fp32" + (
        f"; {rest} that have none are the model's own" if rest else ""
    )
    about["notes"] = (*about.get("notes", ()), said)
    return replace(catalog, entries=tuple(entries), chunks=chunks, about=about)
