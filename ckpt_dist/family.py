"""Families: the weights of one kind of model, and the names and layouts that each framework gives them.

A family is one declarative file in `families/`. A *dialect* maps stored names to patterns; `{l}` in a name is
the axis that the number stands for, `{l+n}` the axis n, whose numbers go on where those of l end. `bind` turns a
catalog into views of weights, `spell` lists what a checkpoint in some dialect holds: the same table, read in both
directions.

Invariant: each stored name is matched by exactly one rule or reported; nothing is guessed by position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from ckpt_dist.box import Ints, ints
from ckpt_dist.catalog import Chunks, Entry, Views, padded
from ckpt_dist.errors import CheckpointError, Unfit, nearest
from ckpt_dist.pattern import Pattern, PatternError, boxes, identity, parse, shape, solve

COPIES = ("meta", "torchtitan")  # dialects in which a tied weight is stored twice
PLACE = re.compile(r"\{(?:(\w+)\+)?(\w+)\}")  # in a name of a table: `{l}` counts from 0, `{l+n}` on from the last of l
NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)|^\d{1,9}(?=\.)")  # of a layer or an expert, in a stored name
CANONICAL = "hf"  # the spelling in which tiles are cut and fingerprints are taken
BASE = "hf_base"  # the same without what stands before all names but the head's, as transformers saves a model alone
LEAD = re.compile(r"(\w+\.)\w+\.\{l\}\.")


@dataclass(frozen=True)
class Family:
    """One table. `weights`: name -> axes; `dialects`: dialect -> stored name -> pattern; `drops`: derived buffers.

    A pattern may end with a condition, for a weight with two names: `mlp_norm: e if router` is its name where the
    layer has that weight too. It is read under both.

    What a config alone implies (`initial.py`, `absent.py`): `init`: weight -> its first values; `optional`: weight ->
    when a model has it; `layers`: weight -> the layers that have it; `fixed`: what no config may say otherwise; `defaults`: model
    type -> what transformers takes where a config does not say it.
    `further`: the axis of layers that predict further tokens -> the key of a config.json with their number; a dialect
    without such layers leaves them out.
    `zeros`: a weight that dialects without a name for it take to be 0 -> another weight that is where it is.
    `copies`: a weight that only some dialects have, and that always equals another one -> that one.
    """

    name: str
    weights: Mapping[str, str]
    dialects: Mapping[str, Mapping[str, str]]
    sizes: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, int]]] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, str] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    further: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    init: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def axes(self, weight: str) -> tuple[str, ...]:
        return tuple(self.weights[weight].split())

    def __reduce__(self) -> tuple[Any, ...]:
        """Other ranks read a table by its name; what stands in it need not be what can be sent."""
        return load, (self.name,)


def load(name: str) -> Family:
    """The family of that name: the module `families/<name>.py` read as a table."""
    if name not in available():
        raise CheckpointError(f"No model family {name!r}.{nearest(name, available())} Known: {', '.join(available())}.")
    table = import_module(f"ckpt_dist.families.{name}")
    fields = {f: getattr(table, f) for f in Family.__dataclass_fields__ if f != "name" and hasattr(table, f)}
    return Family(name, **{**fields, "dialects": {**table.dialects, **_base(table.dialects.get(CANONICAL, {}))}})


def _base(rules: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The names of a model that was saved without a head: `_base({"model.layers.{l}.x": "x: e"})` -> `layers.{l}.x` ..."""
    lead = next((found[1] for name in rules if (found := LEAD.match(name))), "")
    return {BASE: {name.removeprefix(lead): text for name, text in rules.items()}} if lead else {}


def available() -> list[str]:
    from ckpt_dist import families

    return list(_modules(tuple(families.__path__)))


@cache
def _modules(folders: tuple[str, ...]) -> tuple[str, ...]:
    from pkgutil import iter_modules

    return tuple(sorted(m.name for m in iter_modules(folders)))


@dataclass(frozen=True)
class Rule:
    """What one stored name says: its pattern, the weight of each branch, and the axes that stand in the name."""

    pattern: Pattern
    weights: tuple[str, ...]
    fixed: tuple[tuple[str, int], ...] = ()


Places = tuple[tuple[str, str], ...]  # of a name: (the axis whose length is added, or none; the axis)


@cache
def _table(
    family_name: str, dialect: str, rules: tuple[tuple[str, str], ...]
) -> dict[str, list[tuple[Pattern, Places]]]:
    """Rules keyed by the name with every number replaced by `{}`, so that a lookup is one dictionary access."""
    table: dict[str, list[tuple[Pattern, Places]]] = {}
    for name, text in rules:
        pattern = parse(text.partition(" if ")[0])
        table.setdefault(PLACE.sub("{}", name), []).append((pattern, tuple(PLACE.findall(name))))
    return table


def match(family: Family, dialect: str, name: str, sizes: Mapping[str, int] | None = None) -> Rule | None:
    """The rule for a stored name, or None: `model.layers.3.mlp.up_proj.weight` -> `up: f e`, with l = 3.

    Of a name that stands for layers of two kinds it is the kind that has as many, by what is known of `sizes`.
    """
    table = _table(family.name, dialect, tuple(family.dialects[dialect].items()))
    numbers = [int(n) for n in NUMBER.findall(name)]
    found, sizes = [], sizes or {}
    for pattern, places in table.get(NUMBER.sub("{}", name), ()):
        fixed = tuple((a, k - sizes.get(base, k) if base else k) for (base, a), k in zip(places, numbers, strict=True))
        found.append(Rule(pattern, pattern.weights, fixed))
    fits = (r for r in found if all(0 <= k < sizes.get(a, 0 if a in family.further else k + 1) for a, k in r.fixed))
    return (next(fits, None) or found[0]) if found else None


def counted_on(family: Family, dialect: str, names: Iterable[str]) -> dict[str, int]:
    """Lengths by the numbers of names that only go on counting: `layers.5.enorm` and `layers.6.enorm` -> l = 5, n = 2."""
    table = _table(family.name, dialect, tuple(family.dialects[dialect].items()))
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        kinds = {places for _, places in table.get(NUMBER.sub("{}", name), ())}
        for place, number in zip(kinds.pop(), NUMBER.findall(name), strict=True) if len(kinds) == 1 else ():
            found.setdefault(place, []).append(int(number))
    on = {place: numbers for place, numbers in found.items() if place[0]}
    lengths = [((base, min(of)), (axis, 1 + max(of) - min(of))) for (base, axis), of in on.items()]
    return {axis: length for both in lengths for axis, length in both}


def axes_in(name: str) -> tuple[str, ...]:
    """The axes that stand in a name of a table: `experts.{x}.w1` -> `("x",)`"""
    return tuple(axis for _, axis in PLACE.findall(name))


def counted(family: Family) -> set[str]:
    """The axes that stand in stored names, in whatever dialect: layers and experts."""
    return {a for rules in family.dialects.values() for name in rules for a in axes_in(name)}


def weights_in(family: Family, dialect: str) -> set[str]:
    """The weights that a dialect has names for."""
    return {w for text in family.dialects[dialect].values() for w in parse(text.partition(" if ")[0]).weights}


def without(family: Family, dialect: str) -> set[str]:
    """The axes of layers that a dialect has no names for."""
    return set(family.further) - {a for name in family.dialects.get(dialect, ()) for a in axes_in(name)}


def dropped(family: Family, name: str) -> bool:
    """Whether a stored name is a derived buffer that every framework computes again."""
    return any(re.fullmatch(drop, name) for drop in family.drops)


def plain(entry: Entry, name: str) -> Rule:
    """The rule of an unknown model: the name is the weight, each dim an axis."""
    return Rule(identity(len(entry.shape)), (name,))


def resolve(
    family: Family, dialect: str, named: Iterable[tuple[str, Sequence[int]]], known: Mapping[str, int]
) -> dict[str, int]:
    """Axis lengths from the config (`known`) and the stored shapes; contradictions are refused with both numbers."""
    sizes = dict(known)
    seen: dict[tuple[Pattern, tuple[int, ...]], str] = {}
    for name, stored in named:
        rule = match(family, dialect, name, known)
        if rule is None:
            continue
        for axis, index in rule.fixed:
            if axis not in known:
                sizes[axis] = max(sizes.get(axis, 0), index + 1)
            elif index >= known[axis]:
                raise CheckpointError(
                    f"{name}: index {index} of axis {axis}, but the config says {known[axis]} of them."
                )
        seen.setdefault((rule.pattern, tuple(stored)), name)
    for _ in range(2):  # a length found in one tensor may be what another one needs
        for (pattern, stored), name in seen.items():
            try:
                sizes = solve(pattern, stored, sizes)
            except PatternError as error:
                raise Unfit(
                    f"{name} has shape {tuple(stored)}, which does not fit {family.name} ({dialect}): {error}. "
                    "Is the config that of another model? Give the right one with model.config=PATH, or, if it is a model of "
                    "no known family, keep its names as they are with model=identity."
                ) from None
    return sizes


def bind(
    entries: Sequence[Entry],
    rules: Sequence[Rule | None],
    chunks: Chunks,
    sizes: Mapping[str, int],
    axes: Mapping[str, tuple[str, ...]],
) -> Views:
    """Views of all chunks whose entry has a rule. `axes` orders a weight's axes; a plain weight keeps its dims."""
    keys: dict[str, int] = {}
    lengths: list[tuple[int, ...]] = []
    groups: dict[tuple[Pattern, tuple[str, ...], bool], list[int]] = {}
    orders: dict[str, tuple[str, ...]] = {}
    for e, rule in enumerate(rules):
        if rule is None:
            continue
        known = rule.weights[0] in axes
        if not known:
            orders[rule.weights[0]] = rule.pattern.axes(0)
        for weight in rule.weights:
            if weight not in keys:
                order = axes.get(weight) or rule.pattern.axes(0)
                keys[weight] = len(keys)
                lengths.append(tuple(sizes[a] for a in order) if known else entries[e].shape)
        names = tuple(a for a, _ in rule.fixed)
        groups.setdefault((rule.pattern, names, known), []).append(e)
    width = max((len(n) for n in lengths), default=0)
    row_of_entry = np.full(len(entries), -1, np.int64)
    parts = []
    for (pattern, names, known), members in groups.items():
        row_of_entry[:] = -1
        row_of_entry[members] = np.arange(len(members))
        rows = np.flatnonzero(row_of_entry[chunks.entry] >= 0)
        local = row_of_entry[chunks.entry[rows]]
        fixed = ints([[i for _, i in rules[m].fixed] for m in members]).reshape(len(members), len(names))  # type: ignore[union-attr]
        for branch in range(len(pattern.weights)):
            ids = ints([keys[rules[m].weights[branch]] for m in members])  # type: ignore[union-attr]
            weight = rules[members[0]].weights[branch]  # type: ignore[union-attr]
            order = axes[weight] if known else pattern.axes(0)
            parts.append(_group(pattern, branch, names, fixed, sizes, order, width, chunks, rows, local, ids, known))
    if not parts:
        none = np.zeros(0, np.int64)
        return Views(tuple(keys), padded(lengths, width, 1), none, none, *(np.zeros((0, width), np.int64),) * 3, none)
    columns = (np.concatenate(c) for c in zip(*parts, strict=True))
    return _clipped(Views(tuple(keys), padded(lengths, width, 1), *columns))


def _clipped(views: Views) -> Views:
    """Without what lies beyond a weight's sizes: the end of a vocabulary that is to be shorter."""
    end = views.sizes[views.weight]
    if (views.stop <= end).all():
        return views
    views = replace(views, stop=np.minimum(views.stop, end))
    return views.take(np.flatnonzero((views.stop > views.start).all(axis=1)))


def _group(
    pattern: Pattern,
    branch: int,
    names: tuple[str, ...],
    fixed: Ints,
    sizes: Mapping[str, int],
    order: tuple[str, ...],
    width: int,
    chunks: Chunks,
    rows: Ints,
    local: Ints,
    ids: Ints,
    known: bool,
) -> tuple[Ints, ...]:
    """The views of one branch of one pattern, for all chunks of the entries that share it."""
    inside = sizes if known else dict.fromkeys(pattern.axes(0), 1)
    row, start, stop, stride, origin = boxes(
        pattern, branch, inside, chunks.start[rows], chunks.stop[rows], chunks.strides[rows]
    )
    place = {a: k for k, a in enumerate(pattern.axes(branch))}
    out_start, out_stop = np.zeros((len(row), width), np.int64), np.ones((len(row), width), np.int64)
    out_stride = np.zeros((len(row), width), np.int64)
    for k, axis in enumerate(order):
        if axis in place:
            at = place[axis]
            out_start[:, k], out_stop[:, k] = start[:, at], stop[:, at]
            out_stride[:, k] = stride[:, at]
        elif axis in names:
            out_start[:, k] = fixed[local[row], names.index(axis)]
            out_stop[:, k] = out_start[:, k] + 1
    return ids[local[row]], rows[row], out_start, out_stop, out_stride, origin


def spell(
    family: Family, dialect: str, present: Mapping[str, Ints], sizes: Mapping[str, int]
) -> list[tuple[str, Rule, tuple[int, ...]]]:
    """What a model is called in a dialect: (stored name, rule, shape), in the order of the table, layer by layer.

    `present[weight]`: (n, axes) lower corners of the boxes a source holds, to know which layers have a weight.
    """
    found: list[tuple[tuple[int, ...], int, str, Rule, tuple[int, ...]]] = []
    for position, (name, text) in enumerate(family.dialects[dialect].items()):
        text, _, beside = text.partition(" if ")
        pattern = parse(text)
        if not all(w in present for w in (*pattern.weights, *([beside] if beside else []))):
            continue
        names = axes_in(name)
        places = [family.axes(pattern.weights[0]).index(a) for a in names]
        corners = sorted({tuple(int(c) for c in row) for row in present[pattern.weights[0]][:, places]})
        if beside:
            there = {tuple(map(int, row)) for row in present[beside][:, [family.axes(beside).index(a) for a in names]]}
            corners = [c for c in corners if c in there]
        for corner in corners:
            fixed = tuple(zip(names, corner, strict=True))
            numbers = tuple(sizes.get(base, 0) + k for (base, _), k in zip(PLACE.findall(name), corner, strict=True))
            spelled = PLACE.sub("{}", name).format(*numbers)
            found.append((numbers, position, spelled, Rule(pattern, pattern.weights, fixed), shape(pattern, sizes)))
    first = min((p for c, p, *_ in found if c), default=0)
    found.sort(key=lambda f: (bool(f[0]) + (not f[0] and f[1] > first) * 2, f[0], f[1]))
    return [(name, rule, stored) for _, _, name, rule, stored in found]


def missing_names(family: Family, dialect: str, name: str) -> str:
    """The nearest known stored name, for an error about an unknown one."""
    number = iter(re.findall(r"\d+", name))
    known = [PLACE.sub("{}", k) for k in family.dialects[dialect]]
    hint = nearest(re.sub(r"\d+", "{}", name), known, 0.8)  # all end with .weight
    return re.sub(r"\{\}", lambda _: next(number, "0"), hint)
