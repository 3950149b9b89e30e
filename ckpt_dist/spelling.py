"""The names of a model as rules: what each of its stored tensors is, and what it is called in a dialect.

Invariant: a name is bound by the family's table, or is a weight of its own; nothing here looks at a shape to guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckpt_dist import family as families
from ckpt_dist import slots
from ckpt_dist.box import Ints, distinct, expand
from ckpt_dist.catalog import Chunks, Entry, Views
from ckpt_dist.errors import CheckpointError
from ckpt_dist.family import CANONICAL, Family, Rule
from ckpt_dist.model import Model

FURTHER = "a layer that predicts further tokens (model=identity keeps all, in the same names)"


@dataclass(frozen=True)
class Bound:
    """Entries with a rule each: a source, a target or the canonical spelling, ready to become views of any chunks."""

    entries: tuple[Entry, ...]
    rules: tuple[Rule | None, ...]
    sizes: Mapping[str, int]
    axes: Mapping[str, tuple[str, ...]]

    def views(self, chunks: Chunks) -> Views:
        return families.bind(self.entries, self.rules, chunks, self.sizes, self.axes)


def bind_plain(model: Model) -> Bound:
    """Every name its own weight: when nothing has to be spelled differently."""
    rules = tuple(None if n is None else families.plain(model.catalog.entries[e], n) for e, n in enumerate(model.names))
    return Bound(model.catalog.entries, rules, {}, {})


def bind_family(model: Model) -> Bound:
    """Names as the family's dialect reads them, and what is no weight under its own name."""
    assert model.family is not None
    found = rules(model)
    return Bound(model.catalog.entries, found, model.sizes, slots.axes(model.family, found))


def rules(model: Model) -> tuple[Rule | None, ...]:
    """What each stored name says, as the family's dialect reads it; what it does not know, and no slot of that, is itself."""
    family, dialect = model.family, model.dialect
    assert family is not None

    def rule(entry: Entry, name: str) -> Rule:
        return slots.match(family, dialect, name, model.sizes) or families.plain(entry, name)

    pairs = zip(model.catalog.entries, model.names, strict=True)
    return tuple(None if n is None else rule(e, n) for e, n in pairs)


def spoken(model: Model, dialect: str) -> Model:
    """Without the layers that predict further tokens, where a dialect has no words for them."""
    lost = families.without(model.family, dialect) if model.family else set()
    gone = {e for e, rule in enumerate(rules(model)) if rule and lost & {a for a, _ in rule.fixed}} if lost else set()
    if not gone:
        return model
    names = tuple(None if e in gone else n for e, n in enumerate(model.names))
    stored = tuple(model.catalog.entries[e].name for e in sorted(gone))
    return replace(model, names=names, dropped={**model.dropped, FURTHER: stored})


def corners(family: Family, bound: Bound, views: Views) -> dict[str, Ints]:
    """For each weight the lower corners of its boxes, which tell its layers and experts apart: each is in a box of its own."""
    named = families.counted(family)
    found = {}
    for w, key in enumerate(views.keys):
        if key not in bound.axes:
            continue
        boxes = distinct(np.stack([views.start, views.stop], 1)[views.weight == w], axis=0)
        start, stop = boxes[:, 0], boxes[:, 1]
        for place, axis in enumerate(bound.axes[key]):
            if axis in named:
                rows, index = expand(start[:, place], stop[:, place] - start[:, place])
                start, stop = start[rows], stop[rows]
                start[:, place] = index
        found[key] = distinct(start, axis=0)
    return found


def copied(family: Family, present: Mapping[str, Ints]) -> dict[str, tuple[str, Ints]]:
    """The weights that no source needs to hold, for they equal another one: which, and their corners.

    Where they stand in names of layers, they are in those of any other weight with such an axis.
    """
    found, held = {}, [w for w in present if w in family.weights and w not in family.copies]  # of present, no slots
    for copy, of in family.copies.items():
        original = of if of in present else family.ties.get(of, of)
        own = set(family.axes(copy)) - set(family.axes(of))
        other = next((w for w in held if own <= set(family.axes(w))), None)
        if copy not in present and original in present and other:
            places = [family.axes(other).index(a) if a in own else -1 for a in family.axes(copy)]
            zero = np.zeros((len(present[other]), 1), np.int64)
            found[copy] = original, distinct(np.hstack([present[other], zero])[:, places], axis=0)
    return found


def beside(family: Family, zeros: Mapping[str, str], present: Mapping[str, Ints]) -> dict[str, Ints]:
    """Corners of weights that no source holds: each is wherever another one is."""
    found = {}
    for weight, other in zeros.items():
        places = [family.axes(other).index(a) for a in family.axes(weight)]
        found[weight] = distinct(present[other][:, places], axis=0)
    return found


def spelled(
    family: Family, dialect: str, present: Mapping[str, Ints], sizes: Mapping[str, int], dtype_of: Any
) -> Bound:
    """The entries of a model in a dialect; a weight that it has no name for is refused, or taken to be zeros there."""
    entries: list[Entry] = []
    rules: list[Rule] = []
    for slot, mine in slots.grouped(present).items():
        found = families.spell(family, dialect, mine, sizes)
        named = {w for _, rule, _ in found for w in rule.weights}
        for weight in mine:
            if weight not in named and weight not in family.zeros:
                copy = family.copies.get(weight)
                more = f" (it would not need one, were it equal to {copy!r})" if copy else ""
                raise CheckpointError(
                    f"The weight {weight!r} of {family.name} has no name in the dialect {dialect!r}{more}; choose another "
                    "target.dialect."
                )
        for name, rule, shape in found:
            rules.append(slots.of(slot, rule))
            role = "optimizer" if slot else "weight"
            entries.append(Entry(slot + name, dtype_of(rules[-1]), shape, (slot + name,), role))
    return Bound(tuple(entries), tuple(rules), sizes, slots.axes(family, rules))


def canonical(dialect: str) -> bool:
    """Whether names in this dialect are the ones that fingerprints are taken of."""
    return dialect in ("", CANONICAL)
