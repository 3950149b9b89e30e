"""Buckets of Megatron's distributed optimizer in a distributed checkpoint (`dp_reshardable`), as slots of weights.

Facts: megatron-core 0.16.1. Each tensor- and pipeline-parallel rank has flat tensors, cut by data-parallel ranks, which
no parameter's name is on: `optimizer.distributed.dp_group_idx_3.gbuf_idx_0.dtype_(...).bucket_idx_0.exp_avg`. In them are
the rank's parameters in reverse order, each at a multiple of 64 elements.

Invariant: what a rank holds follows from the model and the args alone, and every parameter begins and ends where the
ranks that saved had a piece begin and end; else nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ckpt_dist import zero
from ckpt_dist.box import Ints, ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded
from ckpt_dist.files.inert import strides_of
from ckpt_dist.formats import BESIDE, dcp
from ckpt_dist.formats import _megatron_order as order
from ckpt_dist.formats._megatron_optimizer import ALIGNED, RESHARDABLE, Unread
from ckpt_dist.ranks import Piecewise

NAME = re.compile(
    r"(?:chained_(\d)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(torch\.(\w+), [^)]*\)\.bucket_idx_(\d+)\.(\w+)"
)
OBJECT = re.compile(r"(?:chained_(\d)\.)?optimizer\.distributed\.dp_group_idx_0\.(optimizer|grad_scaler)/shard_0_1")


@dataclass(frozen=True)
class Flat:
    """One flat tensor: what it is called, its entry, and the chunks that are its pieces, in order."""

    optimizer: int
    group: int
    buffer: int
    dtype: str
    bucket: int
    slot: str
    entry: int
    rows: Ints


def named(catalog: Catalog) -> Catalog:
    """The same checkpoint with slots of weights instead of flat tensors."""
    found = {k: m for k, e in enumerate(catalog.entries) if (m := NAME.fullmatch(e.name))}
    if not found:
        raise Unread("they are objects (dp_zero_gather_scatter), of which nothing shows where a parameter begins")
    flats, chunks = [], catalog.chunks
    if (catalog.about["length"] < 0).any():
        raise Unread("its tensors are not serialised as Megatron does")
    for k, m in found.items():
        rows = np.flatnonzero(chunks.entry == k)
        rows = rows[np.argsort(chunks.start[rows, 0], kind="stable")]
        flats.append(Flat(int(m[1] or 0), int(m[2]), int(m[3]), m[4], int(m[5]), m[6], k, rows))
    each, origin = order.layers(catalog.entries)
    made = _placed(catalog, flats, each)
    return _with(catalog, found, made, origin)


# ---- where its parameters lie


Row = tuple[str, int, list[int], list[int], list[int], int, int]  # slot, number in `each`, box, strides, piece, past


def _placed(catalog: Catalog, flats: Sequence[Flat], each: Sequence[Entry]) -> list[Row]:
    """The boxes of all slots, under the first order of modules that all flat tensors fit."""
    wrong: Unread | None = None
    count = 1 + max(f.optimizer for f in flats)
    for spec in order.SPECS:
        try:
            rows: list[Row] = []
            for rank, optimizer, params in order.holders(catalog.config, count, each, spec):
                group = rank.t + rank.tp * (rank.e + rank.ep * rank.p)
                mine = [f for f in flats if (f.optimizer, f.group) == (optimizer, group)]
                rows += _of_rank(catalog, mine, params, each, rank.t)
            return rows
        except Unread as error:
            wrong = wrong or error
    raise wrong or Unread("nothing is known of its modules")


def _of_rank(
    catalog: Catalog,
    flats: Sequence[Flat],
    params: Sequence[Sequence[Piecewise]],
    each: Sequence[Entry],
    t: int,
) -> Iterator[Row]:
    """Of each buffer (a virtual chunk's parameters of one dtype) its flat tensors, bucket by bucket."""
    lines: list[tuple[str, list[Piecewise]]] = []
    for chunk in params:
        for dtype in dict.fromkeys(each[one.entry].dtype for one in chunk):
            lines.append((dtype, [one for one in chunk if each[one.entry].dtype == dtype]))
    if {f.buffer for f in flats} != set(range(len(lines))):
        raise Unread(f"a rank has {len({f.buffer for f in flats})} flat buffers, by the model it has {len(lines)}")
    for number, (dtype, line) in enumerate(lines):
        for slot in dict.fromkeys(f.slot for f in flats):
            mine = sorted((f for f in flats if (f.buffer, f.slot) == (number, slot)), key=lambda f: f.bucket)
            if any(f.dtype != dtype for f in mine):
                raise Unread(f"buffer {number} of a rank is of {mine[0].dtype}, by the model of {dtype}")
            yield from _of_line(catalog, mine, line, each, t)


def _of_line(
    catalog: Catalog, flats: Sequence[Flat], line: Sequence[Piecewise], each: Sequence[Entry], t: int
) -> Iterator[Row]:
    backwards = list(reversed(line))
    places = packed([prod(one.shape) for one in backwards], [catalog.entries[f.entry].shape[0] for f in flats])
    for bucket, flat in enumerate(flats):
        inside = [k for k, (b, _) in enumerate(places) if b == bucket]
        starts, numels = [places[k][1] for k in inside], [prod(backwards[k].shape) for k in inside]
        begin, end = catalog.chunks.start[flat.rows, 0], catalog.chunks.stop[flat.rows, 0]
        total = catalog.entries[flat.entry].shape[0]
        if not len(begin) or begin[0] != 0 or end[-1] != total or (begin[1:] != end[:-1]).any():
            raise Unread(f"{catalog.entries[flat.entry].name!r} is not whole")
        edges = {0, *end.tolist()}
        for k, start, numel in zip(inside, starts, numels, strict=True):
            if start not in edges or start + numel not in edges:
                raise Unread(
                    f"{catalog.entries[flat.entry].name!r} has no parameter from element {start} to {start + numel}, where by the "
                    f"order of modules {each[backwards[k].entry].name!r} lies"
                )
        runs = zero.cut(starts, numels, end - begin)
        for r in range(len(runs)):
            one = backwards[inside[int(runs.which[r])]]
            if _again(one, each[one.entry], t):
                continue
            row = int(flat.rows[int(runs.slice[r])])
            for lo, hi, past in _boxes(one, int(runs.lo[r]), int(runs.hi[r])):
                steps = [*[0] * (len(lo) - len(one.shape)), *strides_of(one.shape)]
                yield flat.slot, one.entry, lo, hi, steps, row, int(runs.at[r]) + past


def packed(numels: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The bucket of each parameter and where it begins there: `packed([16, 70], [134])` -> `[(0, 0), (0, 64)]`."""
    places, bucket, end = [], 0, 0
    for numel in numels:
        start = -(-end // ALIGNED) * ALIGNED
        if bucket < len(lengths) and lengths[bucket] in (end, start):  # it is full; the next begins anew
            bucket, start = bucket + 1, 0
        if bucket == len(lengths) or start + numel > lengths[bucket]:
            raise Unread(f"buckets of {list(lengths)[:9]} elements do not fit parameters of {list(numels)[:9]}")
        places.append((bucket, start))
        end = start + numel
    if (bucket, end) != (len(lengths) - 1, lengths[-1]):
        raise Unread(f"buckets of {sum(lengths)} elements are longer than parameters of {sum(numels)}")
    return places


def _again(one: Piecewise, entry: Entry, t: int) -> bool:
    """Whether another rank has the same: what ranks do not divide, and the copy of a tied embedding."""
    alike = one.shape == entry.shape[len(entry.shape) - len(one.shape) :]
    return (alike and t > 0) or (one.path[1] == "output_layer.weight" and entry.name != "output_layer.weight")


def _boxes(one: Piecewise, first: int, last: int) -> Iterator[tuple[list[int], list[int], int]]:
    """Elements `first` to `last` of a rank's tensor as boxes of the whole, each with its place after `first`."""
    steps = strides_of(one.shape)
    _, starts, stops, _ = zero.boxes(one.shape, ints([first]), ints([last]))
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        for lo, hi, at, _ in one.pieces:
            more = len(lo) - len(one.shape)
            base = [at // s % n for s, n in zip(steps, one.shape, strict=True)]
            size = [b - a for a, b in zip(lo[more:], hi[more:], strict=True)]
            low = [max(a, b) for a, b in zip(start, base, strict=True)]
            high = [min(a, b + n) for a, b, n in zip(stop, base, size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                shift = [w - b for w, b in zip(lo[more:], base, strict=True)]
                past = sum(a * s for a, s in zip(low, steps, strict=True)) - first
                box = [[x + d for x, d in zip(corner, shift, strict=True)] for corner in (low, high)]
                yield [*lo[:more], *box[0]], [*hi[:more], *box[1]], past


# ---- the catalog


def _with(
    catalog: Catalog,
    flat: Mapping[int, re.Match[str]],
    made: Sequence[Row],
    origin: Sequence[tuple[int, int | None]],
) -> Catalog:
    """Slots under the names of their weights, instead of the flat tensors; with the settings of the first rank."""
    kept = [k for k in range(len(catalog.entries)) if k not in flat]
    entries = [catalog.entries[k] for k in kept]
    dtypes = {m[6]: catalog.entries[k].dtype for k, m in flat.items()}
    numbers: dict[tuple[str, int], int] = {}
    table = []
    for slot, number, lo, hi, steps, row, past in made:
        source, layer = origin[number]
        if (slot, source) not in numbers:
            numbers[slot, source] = len(entries)
            name = f"optimizer.state.{slot}.{catalog.entries[source].name}"
            entries.append(Entry(name, dtypes[slot], catalog.entries[source].shape, (name,), "optimizer"))
        if layer is not None:
            lo, hi, steps = [layer, *lo], [layer + 1, *hi], [0, *steps]
        table.append((numbers[slot, source], lo, hi, steps, row, past))
    extras = tuple(_settings(catalog))
    return replace(_joined(catalog, kept, table), entries=tuple(entries), extras=extras)


def _joined(catalog: Catalog, kept: Sequence[int], table: Sequence[tuple[Any, ...]]) -> Catalog:
    """The chunks of the entries that stay, and boxes in pieces of flat tensors: (entry, start, stop, strides, piece,
    elements of it that are before the box)."""
    renumbered = np.full(len(catalog.entries), -1)
    renumbered[list(kept)] = np.arange(len(kept))
    old, new = np.flatnonzero(renumbered[catalog.chunks.entry] >= 0), ints([r[4] for r in table])
    c, width = catalog.chunks.take(old), catalog.chunks.start.shape[1]
    boxes = [padded([r[k] for r in table], width, fill) for k, fill in ((1, 0), (2, 1), (3, 0))]
    past, run = ints([r[5] for r in table]), catalog.chunks.stop[new, 0] - catalog.chunks.start[new, 0]
    entry = np.concatenate([renumbered[c.entry], ints([r[0] for r in table])])
    start, stop, strides = (
        np.concatenate([mine, more]) for mine, more in zip((c.start, c.stop, c.strides), boxes, strict=True)
    )
    chunks = Chunks(entry, start, stop, strides, catalog.chunks.file[[*old, *new]], catalog.chunks.offset[[*old, *new]])
    about = {
        **catalog.about,
        "length": catalog.about["length"][[*old, *new]],
        "run": np.concatenate([old * 0, run]),
        "past": np.concatenate([old * 0, past]),
    }
    return replace(catalog, chunks=chunks, about=about)


def _settings(catalog: Catalog) -> Iterator[Extra]:
    """Settings of groups, which lie beside the flat tensors, as `fully_reshardable` has them in common.pt."""
    found: dict[int, dict[str, Any]] = {}
    for extra in catalog.extras:
        if m := OBJECT.fullmatch(extra.name):
            value = dcp.read_extra(catalog, extra)
            one = found.setdefault(int(m[1] or 0), {"param_state_sharding_type": RESHARDABLE})
            one[m[2]] = value[0] if isinstance(value, list) and len(value) == 1 else value
        elif extra.name == "content_metadata" and isinstance(extra.value, Mapping):
            more = {"distrib_optim_sharding_type": RESHARDABLE, "chained_optim_avoid_prefix": True}
            yield replace(extra, value={**extra.value, **more})
        elif (extra.name != "optimizer" and extra.role != "optimizer") or extra.name in BESIDE["torch_dist"][1:]:
            yield extra
    if found:
        yield Extra(
            "optimizer", ("optimizer",), "optimizer", found[0] if len(found) == 1 else dict(sorted(found.items()))
        )
