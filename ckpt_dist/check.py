"""The verbs verify and fingerprint.

Invariant: nothing is written; what is compared is read to its end, or the first thing that is wrong is said.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckpt_dist import design, plan, replicas, spelling, task, ties
from ckpt_dist.design import Design
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError, Difference, listed
from ckpt_dist.model import Model
from ckpt_dist.part import scanned, wholly
from ckpt_dist.report import Report
from ckpt_dist.run import job
from ckpt_dist.sums import own_design, read, statistics
from ckpt_dist.writing import drain, saved, unchanged

Config = Mapping[str, Any]


def verify(cfg: Config) -> dict[str, Any]:
    """Two checkpoints compared weight by weight, or one checked for itself."""
    with job("verify", cfg) as (group, report):
        a = _open(group, report, cfg["a"], cfg, "verify")
        b = _open(group, report, cfg["b"], cfg, "verify") if cfg["b"].get("path") else None
        with _of_one_save(group, [a, b] if b else [a]):
            found = _compare(group, report, a, b, cfg) if b else _alone(group, report, a, cfg)
        return {**found, "warnings": report.warnings}


def _open(group: Group, report: Report, keys: Config, cfg: Config, verb: str) -> Model:
    """A checkpoint to look at, of which it was said whether the copies that its ranks have are equal."""
    replicas.first_only(keys, verb)
    engine = task.engine_of(cfg)
    with report.phase("scan"):
        settings = {**cfg, "source": keys, "keep": ["weights"], "unmatched": "keep"}
        m = scanned(group, lambda more: design.open_model({**keys, **more}, settings))
        m = ties.settle(group, report, m, engine)
        copies = replicas.others(group, report, m, settings)
    if copies:
        replicas.settle(group, report, [m, *copies], engine, average=False)
    match = cfg.get("match")
    if match:
        m = replace(m, names=tuple(n if n is not None and fnmatch.fnmatch(n, match) else None for n in m.names))
        if not any(n is not None for n in m.names):
            raise CheckpointError(f"{m.source.folder}: no weight matches {match!r}.")
    return m


@contextmanager
def _of_one_save(group: Group, models: Sequence[Model]) -> Iterator[None]:
    """What is said of checkpoints, also that they differ, is of files that nobody has written to meanwhile."""
    before = saved(models) if group.local_rank == 0 else {}  # of each node what it sees

    def still() -> None:
        group.together(lambda: unchanged(models, before) if group.local_rank == 0 else None)

    try:
        yield
    except Difference:
        still()
        raise
    still()


def _alone(group: Group, report: Report, m: Model, cfg: Config) -> dict[str, Any]:
    with report.phase("read"):
        found = statistics(group, report, m, cfg)
    bad = {n: s.bad for n, s in found.items() if s.bad}
    if bad:
        worst = sorted(bad.items(), key=lambda item: -item[1])[:10]
        raise Difference(
            f"{m.source.folder} is readable and complete, but {len(bad)} tensors hold values that are not finite:\n"
            + "\n".join(f"  {n}: {count} values" for n, count in worst)
        )
    return {
        "path": str(m.source.folder),
        "complete": True,
        "finite": True,
        "tensors": len(found),
        "text": [f"{m.source.folder}: {len(found)} tensors, readable, complete and finite"],
    }


@dataclass
class Gap:
    """How far two versions of one tensor are apart; `over` counts elements beyond the tolerance.

    `largest` and `times` are the most that such an element is off, as a number and in tolerances; `any` is of all elements.
    """

    over: int = 0
    largest: float = 0.0
    times: float = 0.0
    any: float = 0.0
    nans: int = 0
    dtypes: str = ""  # where they are not alike

    def merge(self, other: Gap) -> None:
        self.over, self.nans = self.over + other.over, self.nans + other.nans
        self.largest, self.times = max(self.largest, other.largest), max(self.times, other.times)
        self.any, self.dtypes = max(self.any, other.any), self.dtypes or other.dtypes

    def worse(self) -> tuple[bool, float, float]:
        """What the worst are sorted by: a NaN is off by more than any number."""
        return bool(self.nans), self.times, self.largest

    def __str__(self) -> str:
        """`2 elements differ, by up to 0.5, 1 not a number on one side`"""
        said = [f"stored as {self.dtypes}"] if self.dtypes else []
        said += [f"{self.over} elements differ"] if self.over else []
        said += [f"by up to {self.largest:.6g}"] if self.over > self.nans else []
        return ", ".join(said + ([f"{self.nans} not a number on one side"] if self.nans else []))


def _gap(one: Any, two: Any, rtol: float, atol: float) -> Gap:
    import torch

    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (one, two))
    apart = (a - b).abs()
    apart[(a == b)] = 0
    nans = torch.isnan(a.abs()) != torch.isnan(b.abs())
    both = torch.isnan(a.abs()) & torch.isnan(b.abs())
    apart[both] = 0
    limit = atol + rtol * b.abs()
    over = (apart > limit) | torch.isinf(apart) | nans  # no part of an infinity is a tolerance
    beyond = over & ~nans
    times = torch.nan_to_num(apart[beyond] / limit[beyond], nan=float("inf"))
    return Gap(int(over.sum()), _most(apart[beyond]), _most(times), _most(apart[~nans]), int(nans.sum()))


def _most(value: Any) -> float:
    return float(value.max()) if value.numel() else 0.0


def _pair(a: Model, b: Model) -> Design:
    """Both checkpoints over the same weights: by name where the spelling is the same, else by family."""
    if a.dialect == b.dialect and (a.family is None) == (b.family is None):
        bounds, canon = (spelling.bind_plain(a), spelling.bind_plain(b)), design.plain_entries(a)
        return Design(bounds, canon, canon, a.dialect)
    for m in (a, b):
        if m.family is None:
            raise CheckpointError(
                f"{m.source.folder} is of no known family; its names cannot be compared with those of {(b if m is a else a).source.folder}."
            )
    d, other = design.of_family([a], "hf", {}), design.of_family([b], "hf", {})
    return Design((d.sources[0], other.sources[0]), d.canon, d.canon, "hf")


def _compare(group: Group, report: Report, a: Model, b: Model, cfg: Config) -> dict[str, Any]:
    d = _pair(a, b)
    rtol, atol = float(cfg.get("rtol") or 0), float(cfg.get("atol") or 0)
    va, vb = (wholly(bound) for bound in d.sources)
    _same_names(a, b, va, vb, d)
    names = plan.tile_names(d.canon.entries)
    mine: dict[int, Gap] = {}
    if rtol or atol:  # torch will be needed, and is to leave the cores to our threads
        import ckpt_dist.averages.tensors  # noqa: F401

    def combine(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        one = next(values).copy()
        two = next(values)
        if dtypes[0] == dtypes[1] and np.array_equal(one.view(np.uint8), two.view(np.uint8)):
            return
        from ckpt_dist.averages.tensors import tensor

        gap = _gap(tensor(one, dtypes[0]), tensor(two, dtypes[1]), rtol, atol)
        if not (rtol or atol) and dtypes[0] != dtypes[1]:
            gap.dtypes = " and ".join(dtypes)
        elif not (rtol or atol) and not gap.over:
            # -0.0 and 0.0, other payloads of NaN, integers that fp64 does not tell apart
            gap.over = int((one != two).sum())
        mine[tile] = gap

    with report.phase("compare"):
        sides = [(a, d.sources[0]), (b, d.sources[1])]
        done = read(group, report, "compare", d.canon, sides, combine, cfg, digests=True)
    found: dict[str, Gap] = {}
    for part in group.gather(mine):
        for tile, gap in part.items():
            found.setdefault(names(tile), Gap()).merge(gap)
    return _verdict(a, b, d, found, done, rtol, atol)


def _same_names(a: Model, b: Model, va: Any, vb: Any, d: Design) -> None:
    only_a, only_b = sorted(set(va.keys) - set(vb.keys)), sorted(set(vb.keys) - set(va.keys))
    if only_a or only_b:
        lines = [f"  only in {m.source.folder}: {listed(names)}" for m, names in ((a, only_a), (b, only_b)) if names]
        raise Difference("The checkpoints do not hold the same weights:\n" + "\n".join(lines))
    aligned = [{k: v.sizes[i].tolist() for i, k in enumerate(v.keys)} for v in (va, vb)]
    for key, lengths in aligned[0].items():
        if lengths != aligned[1][key]:
            raise Difference(
                f"{key} has axis lengths {lengths} in {a.source.folder} and {aligned[1][key]} in {b.source.folder}."
            )


def _verdict(
    a: Model, b: Model, d: Design, found: Mapping[str, Gap], done: Any, rtol: float, atol: float
) -> dict[str, Any]:
    wrong = {n: g for n, g in found.items() if g.over or g.dtypes}
    if wrong:
        worst = sorted(wrong.items(), key=lambda item: item[1].worse(), reverse=True)[:10]
        lines = [f"  {n}: {g}" for n, g in worst]
        limit = "bit by bit" if not (rtol or atol) else f"within rtol={rtol:g} atol={atol:g}"
        raise Difference(
            f"{a.source.folder} and {b.source.folder} are not equal {limit}: {len(wrong)} of {len(d.canon.entries)} tensors differ, the worst:\n"
            + "\n".join(lines)
        )
    exact = not found
    print_a = task.fingerprint_of(task.weight_digests(d.canon, done, 0))
    largest = max((g.any for g in found.values()), default=0.0)
    named = spelling.canonical(d.dialect) or bool(d.canon.axes)
    beside = any(e.role == "optimizer" for m in (a, b) for e in m.catalog.entries)
    text = f"{len(d.canon.entries)} tensors are {'bit-equal' if exact else f'equal within tolerance (largest difference {largest:.6g})'}"
    return {
        "equal": True,
        "bit_equal": exact,
        "tensors": len(d.canon.entries),
        "largest_difference": largest,
        "fingerprint": print_a if exact and named else None,
        "text": [
            text + (f", fingerprint {print_a}" if exact and named else ""),
            *(["the optimizer's state was not compared"] if beside else []),
        ],
    }


def fingerprint(cfg: Config) -> str:
    """The digest of a model's values, the same for every format, dialect and sharding of it."""
    with Group(cfg["engine"]["timeout"]) as group:
        report = Report("fingerprint")
        m = _open(group, report, cfg["a"], cfg, "fingerprint")
        for text in report.warnings if group.rank == 0 else ():
            warnings.warn(f"{m.source.folder}: {text}", stacklevel=3)
        bare = spelling.canonical(m.dialect)
        d = design.of([m], {"format": "hf"}) if not bare else None
        bound, canon = (d.sources[0], d.canon) if d else own_design(m)
        with _of_one_save(group, [m]):
            done = read(group, report, "fingerprint", canon, [(m, bound)], drain, cfg, digests=True)
        return task.fingerprint_of(task.weight_digests(canon, done, 0))
