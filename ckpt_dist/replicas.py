"""What all tensor-parallel ranks hold alike: norms, biases. Training may let these copies drift apart.

A format that can read each rank's copies says which tensors they are (`about["replicated"]`) and takes a `replica`; of
others the first rank's copies are read.

Invariant: whether the copies are equal is known and said before one of them, or their mean, is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_dist import design, plan, task
from ckpt_dist import family as families
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import UsageError
from ckpt_dist.model import Bound, Model
from ckpt_dist.part import scanned
from ckpt_dist.report import Report


def first_only(keys: Mapping[str, Any], what: str) -> None:
    """Copies are averaged where all of them are read, and nowhere silently not."""
    if keys["replicas"] == "average":
        raise UsageError(
            f"replicas=average: of what ranks have alike, {what} takes the first rank's. Leave it out; the mean is taken by "
            "convert, from a format that can read each rank's copies, as megatron_deepspeed is."
        )


def others(group: Group, m: Model, cfg: Mapping[str, Any]) -> list[Model]:
    """The same checkpoint with the copies of each of the other ranks."""
    ranks = range(1, int(m.catalog.about["tp"])) if m.catalog.about.get("replicated") else range(0)

    def opened(rank: int) -> Model:
        return scanned(group, lambda more: design.open_model({**cfg["source"], **more, "replica": rank}, cfg))

    return [opened(rank) for rank in ranks]


def settle(group: Group, report: Report, models: Sequence[Model], engine: Mapping[str, Any], average: bool) -> None:
    """Say whether the copies are equal."""
    names = models[0].catalog.about["replicated"]
    found = differing(group, report, models, engine)
    what = f"{len(names)} tensors that each of {len(models)} ranks has"
    if found and average:
        report.warnings.append(f"of {what}, {len(found)} differ, first {found[0]!r}: their mean is taken")
    elif found:
        report.warnings.append(
            f"of {what}, {len(found)} differ, first {found[0]!r}: the first rank's are taken; convert with source.replicas=average takes the mean"
        )
    else:
        report.notes.append(f"{what} are equal")


def differing(group: Group, report: Report, models: Sequence[Model], engine: Mapping[str, Any]) -> list[str]:
    """The names of those that are not the same in all ranks."""
    names, found = set(models[0].catalog.about["replicated"]), set[str]()
    entries = tuple(e for e in models[0].catalog.entries if e.name in names)
    canon = Bound(entries, tuple(families.plain(e, e.name) for e in entries), {}, {})
    sides = []
    for m in models:
        rules = tuple(families.plain(e, e.name) if e.name in names else None for e in m.catalog.entries)
        sides.append((m, Bound(m.catalog.entries, rules, {}, {})))
    ends = np.cumsum(plan.tile_counts(entries))

    def compare(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        first = next(values).copy()
        if not all([np.array_equal(first, other) for other in values]):
            found.add(entries[int(np.searchsorted(ends, tile, "right"))].name)

    task.run_tiles(group, report, engine, "compare ranks", canon, sides, None, compare, digests=False, quiet=True)
    return sorted(set().union(*group.gather(found)))
