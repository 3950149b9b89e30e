"""Weights that are stored twice: one copy is left out where the config ties it, or where it is found equal.

Invariant: a copy that differs is never left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_dist import family as families
from ckpt_dist import slots, spelling, task
from ckpt_dist.configs import is_hf
from ckpt_dist.design import EQUAL, TIED, tied
from ckpt_dist.engine.group import Group
from ckpt_dist.model import Model
from ckpt_dist.report import Report
from ckpt_dist.spelling import Bound

RANKS = ("megatron", "nemo")  # formats of which, whatever the model, the last stage has a copy of a tied embedding
MEGATRONS = {"output_layer.weight": "embedding.word_embeddings.weight"}


def settle(group: Group, report: Report, m: Model, engine: Mapping[str, Any]) -> Model:
    """Where the config ties two weights, or cannot say so, and both are stored: leave the copy out if it is equal.

    Values that are not stored yet cannot be compared: both are kept.
    """
    if m.source.reader or (m.family is None and not (m.catalog.format in RANKS and tied(m))):
        return m
    m = _without_copies(group, report, m, engine) if m.family else m
    if not tied(m) and is_hf(m.source.config):
        return m
    rules = spelling.rules(m) if m.family else spelling.bind_plain(m).rules
    where = {r.weights[0]: e for e, r in enumerate(rules) if r is not None and len(r.weights) == 1}
    for copy, of in (m.family.ties if m.family else MEGATRONS).items():
        if copy not in where or of not in where:
            continue
        one, two = where[copy], where[of]
        saved = "saved" in m.catalog.about
        if saved:
            differ = "are equal, as the config says" if tied(m) else "differ"
            report.guesses.append(f"{m.names[one]} and {m.names[two]} {differ}")
        if tied(m) if saved else equal_entries(group, report, m, one, two, engine):
            # of an unknown model it is the copy of Megatron's last stage, which no file of all stages has
            kept = {str(m.names[one]): str(m.names[two])} if m.family else {}
            m = replace(_left_out(m, one, TIED + str(m.names[two])), copies={**m.copies, **kept})
        elif tied(m):
            report.warnings.append(
                f"{m.names[one]} and {m.names[two]} differ although the config ties them; both are kept, untied"
            )
    return m


def _left_out(m: Model, copy: int, rule: str) -> Model:
    """Without a stored copy of a weight, and what an optimizer keeps of it."""
    names = tuple(None if n and slots.parted(n)[1] == m.names[copy] else n for n in m.names)
    lost = tuple(e.name for e, a, b in zip(m.catalog.entries, m.names, names, strict=True) if a != b)
    return replace(m, names=names, dropped={**m.dropped, rule: (*m.dropped.get(rule, ()), *lost)})


def _without_copies(group: Group, report: Report, m: Model, engine: Mapping[str, Any]) -> Model:
    """Without the copies that only some dialects have; one that is not equal stays, and is said."""
    assert m.family is not None
    found = [(e, r.weights[0]) for e, r in enumerate(spelling.rules(m)) if r and len(r.weights) == 1]
    where = {weight: e for e, weight in found}
    for e, copy in found if not m.unresolved else ():
        of = m.family.copies.get(copy, "")
        original = where.get(of, where.get(m.family.ties.get(of, "")))
        if original is None:
            continue
        saved = "saved" in m.catalog.about
        report.guesses += [f"{m.names[e]} and {m.names[original]} are equal"] if saved else []
        if saved or equal_entries(group, report, m, e, original, engine, expected=True):
            m = _left_out(m, e, EQUAL + str(m.names[original]))
        else:
            report.warnings.append(f"{m.names[e]} is no copy of {m.names[original]}; it is kept")
    return m


def equal_entries(
    group: Group, report: Report, m: Model, one: int, two: int, engine: Mapping[str, Any], expected: bool = False
) -> bool:
    """Whether two stored tensors have the same shape, dtype and bytes. Where nobody says that they have, one thread
    stops at the first difference: hardly anything is read of a large model whose head is its own."""
    a, b = m.catalog.entries[one], m.catalog.entries[two]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    canon = Bound((replace(a, name="tied"),), (families.plain(a, "tied"),), {}, {})
    sides = []
    for e in (one, two):
        rules = tuple(families.plain(a, "tied") if i == e else None for i in range(len(m.names)))
        sides.append((m, Bound(m.catalog.entries, rules, {}, {})))
    different: list[int] = []
    expected |= tied(m)
    engine = {**engine, "transport": task.OWN} | ({} if expected else {"workers": 1})

    def compare(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        if different and not expected:
            return
        kept = next(values).copy()
        if not np.array_equal(kept, next(values)):
            different.append(tile)

    task.run_tiles(
        group, report, engine, "compare tied weights", canon, sides, None, compare, digests=False, quiet=True
    )
    return not any(group.gather(bool(different)))
