"""The verb inspect: what a checkpoint is.

Invariant: only headers are read, unless statistics are asked for.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import beside, design, formats, quantised, slots
from ckpt_dist.box import distinct, volume
from ckpt_dist.catalog import Entry
from ckpt_dist.engine.group import Group
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import catalog as saving
from ckpt_dist.model import Model
from ckpt_dist.report import Report, size, table
from ckpt_dist.run import job
from ckpt_dist.sums import Sums, statistics

Config = Mapping[str, Any]


def inspect(cfg: Config) -> dict[str, Any]:
    """What a checkpoint is, from its headers."""
    with job("inspect", {**cfg, "quiet": True}) as (group, report):
        m = group.on_first(
            lambda: design.open_model(
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
        "wrapper": m.around,
        "sizes": dict(m.sizes),
        "config": str(m.source.config_path) if m.source.config_path else None,
        "extras": [x.name for x in catalog.extras],
        "notes": [*m.source.notes, *beside.aside(m), *([m.lacks] if m.lacks else []), *slots.lacking(catalog)],
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


def _with_statistics(
    group: Group, report: Report, m: Model, rows: list[dict[str, Any]], cfg: Config
) -> list[dict[str, Any]]:
    wanted = {r["name"] for r in rows}
    names = tuple(n if m.catalog.entries[e].name in wanted else None for e, n in enumerate(m.names))
    own = {m.catalog.entries[e].name: n for e, n in enumerate(m.names)}
    found = statistics(group, report, replace(m, names=names), cfg)
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
