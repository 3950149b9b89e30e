"""What a folder of torch.distributed.checkpoint is written as: `.metadata`, and `*.distcp` files of zip blobs.

Facts: torch 2.3 to 2.13, whose own reader loads it. Tensors are cut by rows, each part a blob of its own; with a placement
each rank has files of its own, with what it will load under FSDP.

Invariant: addresses are known before any byte is; only `.metadata` is made at the end, of torch's own classes.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import ints, volume
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import pickles, zips
from ckpt_dist.files.dtypes import LATER, itemsize, of_torch
from ckpt_dist.formats import Crc, Layout, Spec, held, split
from ckpt_dist.formats import torch as pt
from ckpt_dist.parallel import Interval, chunked

CHUNK_BYTES = 64 << 20  # rows are cut so: torch's reader loads a whole chunk for any part of it
FILE_BYTES = 512 << 20  # several files: ranks that write into one file take turns at its lock


def lay_out(spec: Spec) -> Layout:
    """Row chunks of at most CHUNK_BYTES, each a zip blob, in `__0_k.distcp` files of at most FILE_BYTES or `max_shard_size`.

    With a placement, `__r_k.distcp` hold what rank r will load under FSDP.
    """
    _describable(spec.entries)
    placement = tuple(spec.options.get("placement") or ())
    firsts = {placement.index(node) for node in placement} or {0}  # of each node
    boxes = [(0, e, *rows) for e, entry in enumerate(spec.entries) for rows in _row_chunks(entry)]
    if placement:
        cuts = [chunked(e.shape[0], len(placement)) if len(e.shape) > 1 else [] for e in spec.entries]
        ranks = range(len(placement))
        boxes = [(r, e, *rows) for r in ranks for e, rows in _rows_of(spec.entries, cuts, r, r in firsts)]
    width = max((len(e.shape) for e in spec.entries), default=0)
    start, stop = (
        np.zeros((len(boxes), width), np.int64),
        padded([spec.entries[e].shape for _, e, *_ in boxes], width, 1),
    )
    if width:
        start[:, 0], stop[:, 0] = ints([lo for *_, lo, _ in boxes]), ints([hi for *_, hi in boxes])
    sizes = volume(start, stop) * ints([itemsize(spec.entries[e].dtype) for _, e, *_ in boxes])
    blobs = [
        _blob_layout(spec.entries[e], (stop[b] - start[b]).tolist(), int(n))
        for b, ((_, e, *_), n) in enumerate(zip(boxes, sizes, strict=True))
    ]
    # what comes from DCP is passed on as it is; else it is what torch.save would write
    values = [(x, x.value if x.address is not None else pt.archive(x.value)) for x in spec.extras]
    limit = min(int(spec.options["max_shard_size"]), FILE_BYTES)
    groups = _files_of([r for r, *_ in boxes], [b.length for b in blobs], limit, firsts)
    names = [f"__{r}_{k}.distcp" for r, k, _ in groups]
    file, offset, base = np.zeros(len(boxes), np.int64), np.zeros(len(boxes), np.int64), np.zeros(len(boxes), np.int64)
    pieces: list[tuple[int, int, bytes]] = []
    crcs: list[Crc] = []
    lengths: list[int] = []
    stored: list[tuple[int, Extra, int, int]] = []
    for number, (r, part, group) in enumerate(groups):
        end = 0
        for extra, blob in values if part == 0 and r in firsts else ():
            pieces.append((number, end, blob))
            stored.append((number, extra, end, len(blob)))
            end += len(blob)
        for b in group:
            blob_layout = blobs[b]
            k = _DATA
            file[b], base[b], offset[b] = number, end, end + blob_layout.addresses[k]
            pieces += [(number, end + at, piece) for at, piece in blob_layout.pieces]
            crcs.append(Crc(number, int(offset[b]), int(sizes[b]), tuple(end + at for at in blob_layout.crc_at[k])))
            end += blob_layout.length
        lengths.append(end)
    chunks = Chunks.dense([e for _, e, *_ in boxes], start, stop, file, offset)
    catalog = Catalog("dcp", "", tuple(names), spec.entries, chunks)
    blob_at = [(int(at), blob.length) for at, blob in zip(base, blobs, strict=True)]
    layout = Layout(catalog, tuple(lengths), tuple(pieces), tuple(crcs))
    if placement:
        layout = replace(layout, holders=tuple(frozenset([placement[r]]) for r, *_ in groups))
        return replace(layout, own={".metadata": partial(_metadata, layout, blob_at, stored)})
    return replace(layout, late={".metadata": partial(_metadata, layout, blob_at, stored, None)})


def _describable(entries: Sequence[Entry]) -> None:
    """Refuse what the installed torch cannot name in the metadata. A plan is made without torch where all of them can."""
    for entry in entries:
        if entry.dtype in LATER:
            import torch

            try:
                of_torch(torch, entry.dtype)
            except CheckpointError as error:
                raise CheckpointError(f"{entry.name}: {error} Or write target.format=hf.") from None


def _rows_of(
    entries: Sequence[Entry], cuts: Sequence[Sequence[Interval]], rank: int, first: bool
) -> Iterator[tuple[int, Interval]]:
    """What a rank loads under FSDP, as (entry, rows). What has one dim or none may be a buffer, which each rank loads
    whole: the `first` rank of a node has it."""
    for e, entry in enumerate(entries):
        if cuts[e]:
            lo, hi = cuts[e][rank]
            mine = replace(entry, shape=(hi - lo, *entry.shape[1:]))
            yield from ((e, (lo + s, lo + t)) for s, t in _row_chunks(mine) if t > s)
        elif first:
            yield from ((e, rows) for rows in _row_chunks(entry))


def _files_of(
    ranks: Sequence[int], sizes: Sequence[int], limit: int, firsts: set[int]
) -> list[tuple[int, int, list[int]]]:
    """(rank, number, boxes) of each file. A rank that has no boxes has no file, unless what is no tensor may go into it."""
    boxes: dict[int, list[int]] = {rank: [] for rank in firsts}
    for b, rank in enumerate(ranks):
        boxes.setdefault(rank, []).append(b)
    found = []
    for rank, mine in sorted(boxes.items()):
        groups = split([sizes[b] for b in mine], limit)
        found += [(rank, k, [mine[i] for i in group]) for k, group in enumerate(groups)]
    return found


_DATA = next(k for k, (name, _) in enumerate(pt.records(b"", [0])) if name == "data/0")


def _row_chunks(entry: Entry) -> list[tuple[int, int]]:
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = max(int(np.prod(entry.shape[1:], dtype=np.int64)) * itemsize(entry.dtype), 1)
    step = max(CHUNK_BYTES // row_bytes, 1)
    return [(lo, min(lo + step, rows)) for lo in range(0, rows, step)] or [(0, 0)]


def _blob_layout(entry: Entry, box: Sequence[int], nbytes: int) -> zips.Layout:
    shape = tuple(box[: len(entry.shape)])
    return zips.lay_out(pt.records(pickles.dumps(pt.tensor(entry.dtype, shape, "0")), [nbytes]))


def _metadata(
    layout: Layout, blobs: Sequence[tuple[int, int]], extras: Sequence[tuple[int, Extra, int, int]], node: int | None
) -> bytes:
    """The pickle that torch's own reader expects, made of torch's own classes."""
    import pickle

    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    catalog, here = layout.catalog, held(layout, node)
    extras = sorted(extras, key=lambda x: bool(here[x[0]]))  # the last of equals is named
    described: dict[str, Any] = {x.name: BytesStorageMetadata() for _, x, *_ in extras}
    stored = {MetadataIndex(x.name): _StorageInfo(catalog.files[f], at, n) for f, x, at, n in extras}
    for entry in catalog.entries:
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        described[entry.name] = TensorStorageMetadata(properties, torch.Size(entry.shape), [])
    chunks = catalog.chunks
    for row in _once(chunks, here):
        at, length = blobs[row]
        entry = catalog.entries[chunks.entry[row]]
        start = torch.Size(chunks.start[row].tolist()[: len(entry.shape)])
        stop = chunks.stop[row].tolist()[: len(entry.shape)]
        boxes = described[entry.name].chunks
        boxes.append(ChunkStorageMetadata(start, torch.Size(t - s for s, t in zip(start, stop, strict=True))))
        file = catalog.files[chunks.file[row]]
        stored[MetadataIndex(entry.name, start, len(boxes) - 1)] = _StorageInfo(file, at, length)
    paths = {e.name: e.path or (e.name,) for e in catalog.entries} | {
        x.name: x.path or (x.name,) for _, x, *_ in extras
    }
    plain = {name: tuple(str(p) if type(p) is not int else p for p in path) for name, path in paths.items()}
    return pickle.dumps(Metadata(described, plain, stored, StorageMeta(save_id=str(uuid.UUID(int=0)))))


def _once(chunks: Chunks, here: NDArray[np.bool_]) -> list[int]:
    """The rows of all boxes, of equal ones only that in a file that is here, or the first."""
    order = np.argsort(~here[chunks.file], kind="stable")
    boxes = np.column_stack([chunks.entry, chunks.start, chunks.stop])[order]
    found: list[int] = sorted(order[np.unique(boxes, axis=0, return_index=True)[1]].tolist())
    return found
