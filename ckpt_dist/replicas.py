"""What all tensor-parallel ranks hold alike: norms, biases. Training may let these copies drift apart.

A format that can read each rank's copies says which tensors they are (`about["replicated"]`), of which of them it only
supposes that they are alike (`unknown`), whether training is known to let them `drift`, how many copies there are, and takes
a `replica`; of others the first rank's are read.

Invariant: whether the copies are equal is known and said before one of them, or their mean, is taken; what is not known
to be alike is never taken where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import design, plan, task
from ckpt_dist import family as families
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.model import Model
from ckpt_dist.part import scanned
from ckpt_dist.report import Report
from ckpt_dist.spelling import Bound

MOST_COPIES = 16  # that are compared only to be sure


def first_only(keys: Mapping[str, Any], what: str) -> None:
    """Copies are averaged where all of them are read, and nowhere silently not."""
    if keys["replicas"] == "average":
        raise UsageError(
            f"replicas=average: of what ranks have alike, {what} takes the first rank's. Leave it out; the mean is taken by "
            "convert, from a format that can read each rank's copies, as megatron_deepspeed is."
        )


def others(group: Group, report: Report, m: Model, cfg: Mapping[str, Any], asked: bool = True) -> list[Model]:
    """The same checkpoint with the copies of each of the other ranks. Where a rule says that they are alike (Megatron adds
    up their gradients), they are compared if somebody `asked`, and are not too many: each takes a scan of its own."""
    about = m.catalog.about
    copies = int(about["copies"]) if about.get("replicated") and "saved" not in about else 1
    by_rule = not about.get("drift") and not about.get("unknown")
    if copies > 1 and by_rule and not (asked and copies <= MOST_COPIES):
        what = f"{len(about['replicated'])} tensors that each of {copies} ranks has: the first rank's are taken"
        report.notes.append(f"{what}, not compared" + ("; verify compares them" if copies <= MOST_COPIES else ""))
        return []
    ranks = range(1, copies)

    def opened(rank: int) -> Model:
        return scanned(group, lambda more: design.open_model({**cfg["source"], **more, "replica": rank}, cfg))

    return [opened(rank) for rank in ranks]


def settle(group: Group, report: Report, models: Sequence[Model], engine: Mapping[str, Any], average: bool) -> None:
    """Say whether the copies are equal."""
    names = models[0].catalog.about["replicated"]
    found = differing(group, report, models, engine, names)
    _refuse(group, models, found)
    what = f"{len(names)} tensors that each of {len(models)} ranks has"
    if found and average:
        report.warnings.append(f"of {what}, {len(found)} differ, first {min(found)!r}: their mean is taken")
    elif found:
        report.warnings.append(
            f"of {what}, {len(found)} differ, first {min(found)!r}: the first rank's are taken; convert with source.replicas=average takes the mean"
        )
    else:
        report.notes.append(f"{what} are equal")


def known(group: Group, report: Report, m: Model, cfg: Mapping[str, Any]) -> None:
    """Where nobody says whether the copies are equal, at least those that may be parts are."""
    if names := m.catalog.about.get("unknown"):
        source = {**cfg["source"], "path": str(m.source.folder)}
        models = [m, *others(group, report, m, {**cfg, "source": source})]
        _refuse(group, models, differing(group, report, models, task.engine_of(cfg), names))


def _refuse(group: Group, models: Sequence[Model], found: Mapping[str, int]) -> None:
    """What differs may be drift in a copy; of what no rule knows it is rather a part, and the whole of it is not known."""
    name = next((n for n in found if n in models[0].catalog.about.get("unknown", ())), None)
    if name is not None:
        one, two = group.on_first(lambda: [_file(models[k], name) for k in (0, found[name])])
        raise CheckpointError(
            f"{one} and {two} hold different values of {name!r}, and no rule says how tensor-parallel ranks divide a tensor of "
            "this name. Save with the format torch_dist, which says it, or with one tensor-parallel rank."
        )


def _file(m: Model, name: str) -> Path:
    """A file that holds some of an entry."""
    number = next(k for k, e in enumerate(m.catalog.entries) if e.name == name)
    return m.source.folder / m.catalog.files[int(m.catalog.chunks.file[m.catalog.chunks.entry == number][0])]


def differing(
    group: Group, report: Report, models: Sequence[Model], engine: Mapping[str, Any], replicated: Sequence[str]
) -> dict[str, int]:
    """The names of those that are not the same in all ranks, and the first of these in which one is not."""
    names, found = set(replicated), dict[str, int]()
    entries = tuple(e for e in models[0].catalog.entries if e.name in names)
    canon = Bound(entries, tuple(families.plain(e, e.name) for e in entries), {}, {})
    sides = []
    for m in models:
        rules = tuple(families.plain(e, e.name) if e.name in names else None for e in m.catalog.entries)
        sides.append((m, Bound(m.catalog.entries, rules, {}, {})))
    name = plan.tile_names(entries)

    def compare(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        first = next(values).copy()
        if wrong := [k for k, other in enumerate(values, 1) if not np.array_equal(first, other)]:
            found.setdefault(name(tile), wrong[0])

    task.run_tiles(group, report, engine, "compare ranks", canon, sides, None, compare, digests=False, quiet=True)
    return dict(sorted((name, k) for part in group.gather(found) for name, k in part.items()))
