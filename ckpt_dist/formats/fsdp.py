"""Per-rank pickles of sharded state dicts: `model_world_size_W_rank_R.pt` and `pytorch_model_fsdp_I_rankR.bin`.

Facts: torch 2.3 to 2.13. Each file is a torch.save of one rank's state dict; a value is a DTensor (FSDP2, TP, HSDP),
a ShardedTensor (FSDP1) or a plain tensor that every rank has. Where a shard lies follows from its placements and the
rank's coordinate in its own mesh, never from the order of files, the equality of values or the number of ranks.
Replicas have equal boxes, of which the plan reads one.

Invariant: read only; no process group; a missing, foreign or short shard is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.box import ints, row_major
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded, role
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import inert, zips
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import torch as pt
from ckpt_dist.parallel import placed

NAMED = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
BARE = re.compile(r"pytorch_model_fsdp(?:_\d+)?_rank_?(\d+)\.bin")


def claims(path: Path) -> bool:
    return path.is_dir() and any(NAMED.fullmatch(p.name) or BARE.fullmatch(p.name) for p in path.iterdir())


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickles of all ranks; each shard becomes a chunk at its place in the whole tensor."""
    names = _files(path)
    table = _Table()
    for number, name in enumerate(names):
        tree, storages = pt.open_archive(path / name)
        for label, leaf in pt.walk(tree):
            table.add(path / name, number, label, leaf, storages)
    return table.catalog(path, names)


def _files(path: Path) -> list[str]:
    """One file for each rank, in order; a missing one, or files of several world sizes, are refused."""
    named = {(int(m[1]), int(m[2])): m[0] for p in path.iterdir() if (m := NAMED.fullmatch(p.name))}
    if named:
        worlds = sorted({w for w, _ in named})
        if len(worlds) > 1:
            counts = ", ".join(f"{sum(w == x for x, _ in named)} of {w}" for w in worlds)
            raise CheckpointError(
                f"{path} mixes shards of different world sizes ({counts}). Move those of the other run away."
            )
        world, ranks = worlds[0], {r for _, r in named}
    else:
        bare = {int(m[1]): m[0] for p in path.iterdir() if (m := BARE.fullmatch(p.name))}
        world, ranks = max(bare) + 1, set(bare)
        named = {(world, r): n for r, n in bare.items()}
    missing = world - sum(r < world for r in ranks)  # as many as a name says: no list of them
    if missing:
        first = next(r for r in count() if r not in ranks)
        wanted = next(iter(named.values())).replace(f"rank_{min(ranks)}", f"rank_{first}")
        raise CheckpointError(
            f"{path}: {missing} of {world} shards are missing, first that of rank {first} ({wanted}). Fetch it again."
        )
    return [named[world, r] for r in range(world)]


class _Table:
    """Entries and chunks as they are found, file by file."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.extras: dict[str, Extra] = {}
        self.rows: list[
            tuple[int, list[int], list[int], list[int], int, int]
        ] = []  # entry, start, stop, strides, file, offset
        self.order: dict[str, int] = {}

    def add(
        self, file: Path, number: int, path: tuple[str | int, ...], leaf: Any, storages: Mapping[str, zips.Record]
    ) -> None:
        label = ".".join(map(str, path))
        if not isinstance(leaf, (inert.TensorRef, inert.Sharded)):
            self.extras.setdefault(label, Extra(label, path, role(path) if path else "state", leaf))
            return
        shape, where = leaf.shape, f"{file}: {label!r}"
        entry = self.entries.get(label)
        if entry is None:
            entry = self.entries[label] = Entry(label, leaf.dtype, shape, path, role(path))
            self.order[label] = len(self.order)
        if (entry.shape, entry.dtype) != (shape, leaf.dtype):
            raise CheckpointError(
                f"{where} is {leaf.dtype}{list(shape)}, another rank has {entry.dtype}{list(entry.shape)}. The shards are of different models."
            )
        for start, stop, ref, at in _pieces(leaf, where, storages, file):
            offset = pt.storage_record(storages, ref, where) + at * itemsize(ref.dtype)
            self.rows.append((self.order[label], start, stop, list(ref.stride), number, offset))

    def catalog(self, path: Path, names: Sequence[str]) -> Catalog:
        entries = tuple(self.entries.values())
        width = max((len(e.shape) for e in entries), default=0)
        entry, start, stop, strides, file, offset = zip(*self.rows, strict=True) if self.rows else ((),) * 6
        chunks = Chunks(
            ints(entry),
            padded(start, width, 0),
            padded(stop, width, 1),
            padded(strides, width, 0),
            ints(file),
            ints(offset),
        )
        return Catalog(
            "fsdp", str(path), tuple(names), entries, chunks, tuple(self.extras.values()), about={"ranks": len(names)}
        )


def _pieces(
    leaf: Any, where: str, storages: Mapping[str, zips.Record], file: Path
) -> list[tuple[list[int], list[int], inert.TensorRef, int]]:
    """(start, stop, tensor, element of the tensor where the piece begins) for all that a leaf holds."""
    if isinstance(leaf, inert.TensorRef):
        return [([0] * len(leaf.shape), list(leaf.shape), leaf, 0)]
    if leaf.parts or leaf.local is None:
        for _offsets, sizes, ref in leaf.parts:
            if ref.shape != sizes:
                if len(ref.shape) == 1 and len(sizes) != 1:
                    raise CheckpointError(
                        f"{where} is a flat shard (FSDP1 LOCAL_STATE_DICT), which does not say its shape. Save with SHARDED_STATE_DICT."
                    )
                raise CheckpointError(f"{where} says a shard of {list(sizes)}, the tensor has {list(ref.shape)}.")
        return [(list(o), [a + n for a, n in zip(o, s, strict=True)], r, 0) for o, s, r in leaf.parts]
    return _dtensor(leaf, leaf.local, where, storages, file)


def _dtensor(
    leaf: inert.Sharded, local: inert.TensorRef, where: str, storages: Mapping[str, zips.Record], file: Path
) -> list[Any]:
    if any(p[0] == "partial" for p in leaf.placements):
        raise CheckpointError(f"{where} holds partial sums of a tensor, which were not reduced before saving.")
    coordinate = leaf.coordinate or _coordinate(leaf, where, storages, file)
    if len(coordinate) != len(leaf.mesh_shape) or len(leaf.placements) != len(leaf.mesh_shape):
        raise CheckpointError(
            f"{where}: a mesh of {leaf.mesh_shape}, the coordinate {coordinate} and {len(leaf.placements)} placements do not fit together."
        )
    if any(c >= n for c, n in zip(coordinate, leaf.mesh_shape, strict=True)):
        raise CheckpointError(f"{where}: the coordinate {coordinate} lies outside the mesh {leaf.mesh_shape}.")
    if any(type(p[1]) is not int or not 0 <= p[1] < len(leaf.shape) for p in leaf.placements if len(p) > 1):
        raise CheckpointError(
            f"{where}: placements {leaf.placements} name a dim that a tensor of shape {leaf.shape} does not have."
        )
    boxes = placed(leaf.shape, leaf.mesh_shape, coordinate, leaf.placements)
    have = tuple(max((at[d] + box[d][1] - box[d][0] for box, at in boxes), default=0) for d in range(len(leaf.shape)))
    if have != local.shape and 0 not in have + local.shape:
        raise CheckpointError(
            f"{where}: by its placements {leaf.placements} rank {coordinate} holds {list(have)}, the file has {list(local.shape)}."
        )
    found = []
    for box, at in boxes:
        if all(t > s for s, t in box) and 0 not in local.shape:
            element = sum(a * s for a, s in zip(at, local.stride, strict=True))
            found.append(([s for s, _ in box], [t for _, t in box], local, element))
    return found


def _coordinate(leaf: inert.Sharded, where: str, storages: Mapping[str, zips.Record], file: Path) -> tuple[int, ...]:
    """Where this file's rank stands in the mesh, when only the tensor of ranks is stored."""
    if leaf.mesh is None:
        raise CheckpointError(
            f"{where}: the mesh does not say which ranks it is made of; save with torch 2.3 or newer."
        )
    name = NAMED.fullmatch(file.name) or BARE.fullmatch(file.name)
    rank = leaf.rank if leaf.rank is not None else int(name[name.lastindex or 1]) if name else 0
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        count = int(np.prod(leaf.mesh.shape, dtype=np.int64))
        data = os.pread(fd, count * itemsize(leaf.mesh.dtype), pt.storage_record(storages, leaf.mesh, where))
    finally:
        os.close(fd)
    ranks = np.frombuffer(data, leaf.mesh.dtype).tolist()
    if rank not in ranks:
        raise CheckpointError(f"{where}: rank {rank} is none of the mesh's ranks {ranks}.")
    place = ranks.index(rank)
    return tuple(place // int(s) % n for s, n in zip(row_major(leaf.mesh_shape).tolist(), leaf.mesh_shape, strict=True))
