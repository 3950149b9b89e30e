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
from ckpt_dist.catalog import Catalog
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.family import Family, Rule
from ckpt_dist.pattern import shape

T = TypeVar("T")
SLOT = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.")
MASTERS = ("fp32_param", "param")  # of Megatron's optimizers with and without shards
MOMENTS = {"exp_avg", "exp_avg_sq"}  # Adam's; optimizers that keep one of them for each weight have other values too
ADAM = {*MOMENTS, "max_exp_avg_sq", "step", *MASTERS}
SLOT_OF = re.compile(r"(?P<place>.*?\bstate)\.(?P<value>\w+)\.(?P<weight>.+)")  # as Megatron calls them
STATE_OF = re.compile(r"(?P<place>.*?\bstate)\.(?P<weight>.+)\.(?P<value>\w+)")  # as torch does


def parted(name: str) -> tuple[str, str]:
    """`optimizer.state.exp_avg.output_layer.weight` -> `("optimizer.state.exp_avg.", "output_layer.weight")`."""
    found = SLOT.match(name)
    return (found[0], name[found.end() :]) if found else ("", name)


def halved(names: Iterable[str]) -> str:
    """Which weight has only one of Adam's two moments, where the same optimizer has both of other weights.

    Told by one optimizer at a time, and by weights of which it keeps what Adam does: of some weights an Adafactor has
    `exp_avg_sq` alone, and a Lion beside an AdamW has nothing but `exp_avg`.
    """
    held: dict[tuple[str, bool], dict[str, set[str]]] = {}
    for name in names:
        for pattern in (SLOT_OF, STATE_OF):  # read the wrong way no weight has both
            if found := pattern.fullmatch(name):
                of_place = held.setdefault((found["place"], pattern is SLOT_OF), {})
                of_place.setdefault(found["weight"], set()).add(found["value"])
    for (place, _), weights in held.items():
        whole = next((w for w, values in weights.items() if values >= MOMENTS), None)
        for weight, values in weights.items():
            if whole and values <= ADAM and len(gone := MOMENTS - values) == 1 and values & {"step", *MASTERS}:
                return f"of {weight!r} {place!r} holds {', '.join(sorted(values))} and no {gone.pop()}, which it holds of {whole!r}"
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
