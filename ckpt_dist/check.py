"""The verbs that only look: inspect, verify, fingerprint.

Invariant: nothing is written; inspect reads headers only, unless statistics are asked for.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import formats, model, plan, quantised, replicas, task
from ckpt_dist.box import distinct, volume
from ckpt_dist.catalog import Entry
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError, Difference
from ckpt_dist.files.dtypes import is_floating, itemsize
from ckpt_dist.formats import catalog as saving
from ckpt_dist.model import Bound, Model
from ckpt_dist.part import scanned, wholly
from ckpt_dist.report import Report, size, table
from ckpt_dist.run import job
from ckpt_dist.task import Design
from ckpt_dist.writing import drain

Config = Mapping[str, Any]


def inspect(cfg: Config) -> dict[str, Any]:
    """What a checkpoint is, from its headers."""
    with job("inspect", {**cfg, "quiet": True}) as (group, report):
        m = group.on_first(
            lambda: task.open_model(
                cfg["source"],
                {**cfg, "keep": ["weights", "optimizer", "state"], "unmatched": "drop", "partial": True},
            )
        )
        facts = _facts(m)
        if cfg.get("save_catalog"):
            facts["saved"] = group.on_first(lambda: _save(m, Path(cfg["save_catalog"]).expanduser()))
        rows = _rows(m, cfg.get("match"))
        if cfg.get("stats"):
            rows = _with_statistics(group, report, m, rows, cfg)
        lines = [f"{k}: {v}" for k, v in _readable(facts).items()]
        if cfg.get("match") or cfg.get("stats"):
            lines += (
                ["", *table(list(rows[0]), [list(r.values()) for r in rows])]
                if rows
                else ["", f"no tensor matches {cfg['match']!r}"]
            )
        return {**facts, "tensors": rows, "text": lines}


def _save(m: Model, path: Path) -> str:
    """The catalog as a file of its own; what that is."""
    s, catalog = m.source, m.catalog
    if quantised.of(catalog):  # as it is stored, not as it is read
        catalog = formats.load(catalog.format).scan(s.folder, {})
    nbytes = saving.save(path, replace(catalog, config=s.config), s.asked, s.folder, s.step)
    return f"{path} ({size(nbytes)}): plan with source.path={path} dry_run=true"


def _facts(m: Model) -> dict[str, Any]:
    catalog = m.catalog
    chunks = volume(catalog.chunks.start, catalog.chunks.stop)
    items = np.array([itemsize(e.dtype) for e in catalog.entries], np.int64)
    each = np.zeros(len(catalog.entries), np.int64)
    np.add.at(each, catalog.chunks.entry, chunks * items[catalog.chunks.entry] if len(chunks) else chunks)
    numel = np.array([int(np.prod(e.shape, dtype=np.int64)) for e in catalog.entries], np.int64)
    packed = {q.name: q for q in quantised.of(catalog)}
    whole = numel * items
    for i, e in enumerate(catalog.entries):
        whole[i] = packed[e.name].stored_bytes if e.name in packed else whole[i]
    roles = [e.role for e in catalog.entries]
    by_role = {r: int(whole[[i for i, x in enumerate(roles) if x == r]].sum()) for r in sorted(set(roles))}
    weights = [i for i, r in enumerate(roles) if r == "weight"]
    return {
        "path": str(m.source.folder),
        "format": catalog.format,
        "family": m.family.name if m.family else "unknown",
        "dialect": m.dialect or "unknown",
        "step": m.step,
        "layout": _layout(m),
        "parameters": int(numel[weights].sum()),
        "bytes": by_role,
        "dtypes": dict(Counter(_stored_as(catalog.entries[i], packed) for i in weights)),
        "num_tensors": len(catalog.entries),
        "num_chunks": len(catalog.chunks),
        "num_files": len(set(catalog.files)),  # a file with quantised weights is read in two ways
        "optimizer": "optimizer" in roles or any(x.role == "optimizer" for x in catalog.extras),
        "wrapper": ".".join(map(str, m.wrapper)),
        "sizes": dict(m.sizes),
        "config": str(m.source.config_path) if m.source.config_path else None,
        "extras": [x.name for x in catalog.extras],
        "notes": [*m.source.notes, *([m.lacks] if m.lacks else [])],
        "dropped": {k: list(v) for k, v in m.dropped.items() if k != "unmatched"},
        "unmatched": list(m.dropped.get("unmatched", ())),
    }


def _stored_as(entry: Entry, packed: Mapping[str, quantised.Quantised]) -> str:
    """The dtype in the file, not the one that a quantised weight is read as."""
    return packed[entry.name].stored_dtype if entry.name in packed else entry.dtype


def _layout(m: Model) -> str:
    """How tensors are divided: the most parts of one tensor, and along which dims."""
    catalog = m.catalog
    if not len(catalog.chunks):
        return "empty"
    parts = np.bincount(catalog.chunks.entry, minlength=len(catalog.entries))
    most = int(parts.max(initial=0))
    dims = sorted({d for d in range(catalog.chunks.start.shape[1]) if len(distinct(catalog.chunks.start[:, d])) > 1})
    ranks = ", ".join(f"{k}={catalog.about[k]}" for k in ("tp", "pp", "vpp", "ep") if k in catalog.about)
    return (f"{ranks}: " if ranks else "") + (
        "whole tensors" if most <= 1 else f"up to {most} chunks a tensor, divided along dim {', '.join(map(str, dims))}"
    )


def _readable(facts: Config) -> dict[str, Any]:
    shown = dict(facts)
    shown["parameters"] = f"{facts['parameters']:,}"
    shown["bytes"] = ", ".join(f"{r} {size(b)}" for r, b in facts["bytes"].items())
    shown["dtypes"] = ", ".join(f"{d} ({n} tensors)" for d, n in facts["dtypes"].items())
    shown["sizes"] = ", ".join(f"{a}={n}" for a, n in facts["sizes"].items())
    shown["extras"] = f"{len(facts['extras'])}" + (
        f": {', '.join(facts['extras'][:6])}" + (", ..." if len(facts["extras"]) > 6 else "") if facts["extras"] else ""
    )
    for name in ("notes", "dropped", "unmatched"):
        found = facts[name]
        shown[name] = (
            "; ".join(f"{k}: {len(v)}" for k, v in found.items()) if isinstance(found, dict) else "; ".join(found)
        )
    return {k: v for k, v in shown.items() if v not in ("", None)}


def _rows(m: Model, match: str | None) -> list[dict[str, Any]]:
    counts = np.bincount(m.catalog.chunks.entry, minlength=len(m.catalog.entries)).tolist()
    packed = {q.name: q for q in quantised.of(m.catalog)}
    return [
        {
            "name": e.name,
            "dtype": _stored_as(e, packed),
            **({"scales": packed[e.name].scale_text if e.name in packed else ""} if packed else {}),
            "shape": list(e.shape),
            "role": e.role,
            "chunks": counts[i],
        }
        for i, e in enumerate(m.catalog.entries)
        if match is None or fnmatch.fnmatch(e.name, match)
    ]


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


def _own_design(m: Model) -> tuple[Bound, Bound]:
    """A checkpoint read as it is: every selected name a tensor of its own."""
    bound = model.bind_plain(m)
    canon = task._plain_entries(m)
    return bound, canon


def _read(
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


def _tile_names(canon: Bound) -> Callable[[int], str]:
    ends = np.cumsum(plan.tile_counts(canon.entries))
    return lambda tile: canon.entries[int(np.searchsorted(ends, tile, "right"))].name


def _statistics(group: Group, report: Report, m: Model, cfg: Config) -> dict[str, Sums]:
    bound, canon = _own_design(m)
    names = _tile_names(canon)
    mine: dict[int, Sums] = {}

    def combine(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        from ckpt_dist.averages.tensors import tensor

        sums = Sums()
        sums.add(tensor(next(values), dtypes[0]))
        mine[tile] = sums

    _read(group, report, "read", canon, [(m, bound)], combine, cfg)
    found: dict[str, Sums] = {}
    for part in group.gather(mine):
        for tile, sums in part.items():
            found.setdefault(names(tile), Sums()).merge(sums)
    return found


def _with_statistics(
    group: Group, report: Report, m: Model, rows: list[dict[str, Any]], cfg: Config
) -> list[dict[str, Any]]:
    wanted = {r["name"] for r in rows}
    names = tuple(n if m.catalog.entries[e].name in wanted else None for e, n in enumerate(m.names))
    own = {m.catalog.entries[e].name: n for e, n in enumerate(m.names)}
    found = _statistics(group, report, replace(m, names=names), cfg)
    for row in rows:
        sums = found.get(str(own[row["name"]]), Sums())
        mean = sums.total / sums.count if sums.count else 0.0
        some = (
            {"min": sums.least, "max": sums.most, "mean": mean, "norm": sums.squares**0.5}
            if sums.count
            else dict.fromkeys(("min", "max", "mean", "norm"), 0.0)
        )
        row |= {k: float(f"{v:.6g}") for k, v in some.items()} | {"not_finite": sums.bad}
    return rows


def verify(cfg: Config) -> dict[str, Any]:
    """Two checkpoints compared weight by weight, or one checked for itself."""
    with job("verify", cfg) as (group, report):
        a = _open(group, report, cfg["a"], cfg, "verify")
        if not cfg["b"].get("path"):
            found = _alone(group, report, a, cfg)
        else:
            b = _open(group, report, cfg["b"], cfg, "verify")
            found = _compare(group, report, a, b, cfg)
        return {**found, "warnings": report.warnings}


def _open(group: Group, report: Report, keys: Config, cfg: Config, verb: str) -> Model:
    """A checkpoint to look at, of which it was said whether the copies that its ranks have are equal."""
    replicas.first_only(keys, verb)
    engine = task.engine_of(cfg)
    with report.phase("scan"):
        settings = {**cfg, "source": keys, "keep": ["weights"], "unmatched": "error"}
        m = scanned(group, lambda more: task.open_model({**keys, **more}, settings))
        m = task.settle_ties(group, report, m, engine)
        copies = replicas.others(group, m, settings)
    if copies:
        replicas.settle(group, report, [m, *copies], engine, average=False)
    match = cfg.get("match")
    if match:
        m = replace(m, names=tuple(n if n is not None and fnmatch.fnmatch(n, match) else None for n in m.names))
        if not any(n is not None for n in m.names):
            raise CheckpointError(f"{m.source.folder}: no weight matches {match!r}.")
    return m


def _alone(group: Group, report: Report, m: Model, cfg: Config) -> dict[str, Any]:
    with report.phase("read"):
        found = _statistics(group, report, m, cfg)
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
    """How far two versions of one tensor are apart; `over` counts elements beyond the tolerance."""

    over: int = 0
    largest: float = 0.0
    nans: int = 0

    def merge(self, other: Gap) -> None:
        self.over, self.nans, self.largest = (
            self.over + other.over,
            self.nans + other.nans,
            max(self.largest, other.largest),
        )


def _gap(one: Any, two: Any, rtol: float, atol: float) -> Gap:
    import torch

    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (one, two))
    apart = (a - b).abs()
    apart[(a == b)] = 0
    nans = torch.isnan(a.abs()) != torch.isnan(b.abs())
    both = torch.isnan(a.abs()) & torch.isnan(b.abs())
    apart[both] = 0
    over = (apart > atol + rtol * b.abs()) | nans
    finite = apart[torch.isfinite(apart)]
    return Gap(int(over.sum()), float(finite.max()) if finite.numel() else float("inf"), int(nans.sum()))


def _pair(a: Model, b: Model) -> Design:
    """Both checkpoints over the same weights: by name where the spelling is the same, else by family."""
    if a.dialect == b.dialect and (a.family is None) == (b.family is None):
        bounds, canon = (model.bind_plain(a), model.bind_plain(b)), task._plain_entries(a)
        return Design(bounds, canon, canon, a.dialect)
    for m in (a, b):
        if m.family is None:
            raise CheckpointError(
                f"{m.source.folder} is of no known family; its names cannot be compared with those of {(b if m is a else a).source.folder}."
            )
    d, other = task._family_design([a], "hf", {}), task._family_design([b], "hf", {})
    return Design((d.sources[0], other.sources[0]), d.canon, d.canon, "hf")


def _compare(group: Group, report: Report, a: Model, b: Model, cfg: Config) -> dict[str, Any]:
    d = _pair(a, b)
    rtol, atol = float(cfg.get("rtol") or 0), float(cfg.get("atol") or 0)
    va, vb = (wholly(bound) for bound in d.sources)
    _same_names(a, b, va, vb, d)
    names = _tile_names(d.canon)
    mine: dict[int, Gap] = {}

    def combine(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        one = next(values).copy()
        two = next(values)
        if dtypes[0] == dtypes[1] and np.array_equal(one.view(np.uint8), two.view(np.uint8)):
            return
        from ckpt_dist.averages.tensors import tensor

        gap = _gap(tensor(one, dtypes[0]), tensor(two, dtypes[1]), rtol, atol)
        if not (rtol or atol) and not gap.over and (dtypes[0] != dtypes[1] or is_floating(dtypes[0])):
            gap.over = (
                0 if dtypes[0] != dtypes[1] else int((one != two).sum())
            )  # -0.0 and 0.0, or other payloads of NaN
        mine[tile] = gap

    with report.phase("compare"):
        sides = [(a, d.sources[0]), (b, d.sources[1])]
        done = _read(group, report, "compare", d.canon, sides, combine, cfg, digests=True)
    found: dict[str, Gap] = {}
    for part in group.gather(mine):
        for tile, gap in part.items():
            found.setdefault(names(tile), Gap()).merge(gap)
    return _verdict(a, b, d, found, done, rtol, atol)


def _same_names(a: Model, b: Model, va: Any, vb: Any, d: Design) -> None:
    only_a, only_b = sorted(set(va.keys) - set(vb.keys)), sorted(set(vb.keys) - set(va.keys))
    if only_a or only_b:
        lines = [
            f"  only in {m.source.folder}: {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for m, names in ((a, only_a), (b, only_b))
            if names
        ]
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
    wrong = {n: g for n, g in found.items() if g.over}
    if wrong:
        worst = sorted(wrong.items(), key=lambda item: -item[1].largest)[:10]
        lines = [
            f"  {n}: {g.over} elements differ, by up to {g.largest:.6g}"
            + (f", {g.nans} not a number on one side" if g.nans else "")
            for n, g in worst
        ]
        limit = "bit by bit" if not (rtol or atol) else f"within rtol={rtol:g} atol={atol:g}"
        raise Difference(
            f"{a.source.folder} and {b.source.folder} are not equal {limit}: {len(wrong)} of {len(d.canon.entries)} tensors differ, the worst:\n"
            + "\n".join(lines)
        )
    exact = not found
    print_a = task.fingerprint_of(task.weight_digests(d.canon, done, 0))
    largest = max((g.largest for g in found.values()), default=0.0)
    named = model.canonical(d.dialect) or bool(d.canon.axes)
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
        bare = model.canonical(m.dialect)
        d = task.design([m], {"format": "hf"}) if not bare else None
        bound, canon = (d.sources[0], d.canon) if d else _own_design(m)
        done = _read(group, report, "fingerprint", canon, [(m, bound)], drain, cfg, digests=True)
        return task.fingerprint_of(task.weight_digests(canon, done, 0))
