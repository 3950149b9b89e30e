"""A model with its tensors cut otherwise: those of all layers as one, a vocabulary of another length.

Invariant: only entries and boxes change; what is stored is read where it is, and what is more are zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np

from ckpt_dist.catalog import Catalog, Chunks, padded
from ckpt_dist.errors import UsageError
from ckpt_dist.model import Model
from ckpt_dist.spelling import rules

ONE = re.compile(r"(\w+\.layers)\.(\d{1,9})\.(.+)")
ZEROS = "/dev/zero"


def together(m: Model) -> Model:
    """A model of no known family with one tensor for a weight of all layers, as Megatron has attention layers that are alike:
    `decoder.layers.0.mlp.linear_fc2.weight` and so on become `decoder.layers.mlp.linear_fc2.weight`."""
    found = {e: hit for e, n in enumerate(m.names) if n is not None and (hit := ONE.fullmatch(n))}
    of: dict[str, dict[str, dict[int, int]]] = {}  # block -> what is inside a layer -> layer -> entry
    for e, hit in found.items():
        of.setdefault(hit[1], {}).setdefault(hit[3], {})[int(hit[2])] = e
    entries, first = m.catalog.entries, dict[int, tuple[str, int, int]]()
    for block, inside in of.items():
        full = all(sorted(held) == list(range(len(held))) for held in inside.values())
        alike = all(len({(entries[e].shape, entries[e].dtype) for e in held.values()}) == 1 for held in inside.values())
        if (
            full
            and alike
            and len({len(held) for held in inside.values()}) == 1
            and any("attention." in n for n in inside)
        ):
            for inner, held in inside.items():
                first |= {e: (f"{block}.{inner}", held[0], len(held)) for e in held.values()}
    return _stacked(m, first, {e: int(found[e][2]) for e in first}) if first else m


def _stacked(m: Model, first: Mapping[int, tuple[str, int, int]], layer: Mapping[int, int]) -> Model:
    """Entries as slices of one: `first` has for each the name, the entry of layer 0, and how many there are."""
    kept = [e for e in range(len(m.names)) if e not in first or first[e][1] == e]
    number = {e: k for k, e in enumerate(kept)}
    entries, names = [], []
    for e in kept:
        entry, name = m.catalog.entries[e], m.names[e]
        if e in first:
            name, _, count = first[e]
            entry = replace(entry, name=name, path=(name,), shape=(count, *entry.shape))
        entries.append(entry)
        names.append(name)
    c = m.catalog.chunks
    inside = np.array([e in first for e in range(len(m.names))])[c.entry][:, None]
    at = np.array([layer.get(e, 0) for e in range(len(m.names))], np.int64)[c.entry][:, None]
    columns = {}
    for key, lead, fill in (("start", at, 0), ("stop", at + 1, 1), ("strides", at * 0, 0)):
        column = getattr(c, key)
        columns[key] = np.where(inside, np.hstack([lead, column]), np.hstack([column, at * 0 + fill]))
    new = np.array([number[first[e][1] if e in first else e] for e in range(len(m.names))], np.int64)
    catalog = replace(m.catalog, entries=tuple(entries), chunks=replace(c, entry=new[c.entry], **columns))
    return replace(m, source=replace(m.source, catalog=catalog), names=tuple(names))


def resized(m: Model, axis: str, length: int) -> Model:
    """The same model with another length of one axis: what is more are zeros, what is less is left out.

    Zeros are one more chunk of each tensor, at an address where only zeros are.
    """
    if m.family is None or m.unresolved or axis not in m.sizes:
        raise UsageError(
            f"{m.source.folder}: its vocabulary is not known, so it cannot become {length}. Give model.config=PATH."
        )
    dims = {e: r.pattern.dims.index((axis,)) for e, r in enumerate(rules(m)) if r and (axis,) in r.pattern.dims}
    catalog, have = m.catalog, m.sizes[axis]
    entries = tuple(
        replace(e, shape=tuple(length if d == dims.get(i) else n for d, n in enumerate(e.shape)))
        for i, e in enumerate(catalog.entries)
    )
    if length > have:
        catalog = _with_zeros(replace(catalog, entries=entries), dims, have)
    source = replace(m.source, catalog=replace(catalog, entries=entries))
    return replace(m, source=source, sizes={**m.sizes, axis: length})


def _with_zeros(catalog: Catalog, dims: Mapping[int, int], have: int) -> Catalog:
    """One chunk more for each of these entries: from `have` to the end of one dim, read from a file of zeros."""
    width = catalog.chunks.start.shape[1]
    start = padded(
        [[have if d == dim else 0 for d in range(len(catalog.entries[e].shape))] for e, dim in dims.items()], width, 0
    )
    stop = padded([catalog.entries[e].shape for e in dims], width, 1)
    number = np.full(len(dims), len(catalog.files))
    more = Chunks.dense(list(dims), start, stop, number, number * 0)
    chunks = Chunks(*(np.concatenate([getattr(c, f.name) for c in (catalog.chunks, more)]) for f in fields(Chunks)))
    columns = {k: v for k, v in catalog.about.items() if isinstance(v, np.ndarray)}  # of dcp: -1 is no blob around it
    about = {**catalog.about, **{k: np.concatenate([v, number * 0 - 1]) for k, v in columns.items()}}
    return replace(catalog, files=(*catalog.files, ZEROS), chunks=chunks, about=about)
