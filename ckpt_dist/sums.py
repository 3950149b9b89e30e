"""Tensors of a checkpoint read once, for what is said of them: statistics, digests, comparisons.

Invariant: nothing is written; each rank reads its own tiles, and what it finds is put together by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_dist import design, plan, spelling, task
from ckpt_dist.engine.group import Group
from ckpt_dist.model import Model
from ckpt_dist.report import Report
from ckpt_dist.spelling import Bound

Config = Mapping[str, Any]


@dataclass
class Sums:
    """Running statistics of one tensor."""

    count: int = 0
    bad: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")

    def add(self, value: Any) -> None:
        import torch

        wide = value.to(torch.complex128).abs() if value.is_complex() else value.to(torch.float64)
        finite = torch.isfinite(wide)
        good = wide[finite]
        self.bad += int(wide.numel() - good.numel())
        self.count += int(good.numel())
        if good.numel():
            self.total += float(good.sum())
            self.squares += float((good * good).sum())
            self.least, self.most = min(self.least, float(good.min())), max(self.most, float(good.max()))

    def merge(self, other: Sums) -> None:
        self.count, self.bad = self.count + other.count, self.bad + other.bad
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)


def own_design(m: Model) -> tuple[Bound, Bound]:
    """A checkpoint read as it is: every selected name a tensor of its own."""
    bound = spelling.bind_plain(m)
    canon = design.plain_entries(m)
    return bound, canon


def read(
    group: Group,
    report: Report,
    what: str,
    canon: Bound,
    sides: Sequence[tuple[Model, Bound]],
    combine: Any,
    cfg: Config,
    digests: bool = False,
) -> Any:
    return task.run_tiles(
        group,
        report,
        task.engine_of(cfg),
        what,
        canon,
        sides,
        None,
        combine,
        digests=digests,
        quiet=bool(cfg.get("quiet")),
    )


def statistics(group: Group, report: Report, m: Model, cfg: Config) -> dict[str, Sums]:
    bound, canon = own_design(m)
    names = plan.tile_names(canon.entries)
    mine: dict[int, Sums] = {}

    from ckpt_dist.averages.tensors import tensor

    def combine(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        sums = Sums()
        sums.add(tensor(next(values), dtypes[0]))
        mine[tile] = sums

    read(group, report, "read", canon, [(m, bound)], combine, cfg)
    found: dict[str, Sums] = {}
    for part in group.gather(mine):
        for tile, sums in part.items():
            found.setdefault(names(tile), Sums()).merge(sums)
    return found
