"""Entries and chunks as a scan finds them in `.pt` files, one after another.

Invariant: what is added lies in its file, and no name is there twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import zero
from ckpt_dist.box import Ints, ints, row_major
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import inert, zips
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import torch as pt

COUNTERS = {"float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8"}


@dataclass(frozen=True)
class File:
    """An opened `.pt` file: its number in the catalog, its pickle, the records of its storages."""

    path: Path
    number: int
    tree: Any
    storages: Mapping[str, zips.Record]

    def address(self, ref: inert.TensorRef, what: str) -> int:
        return pt.storage_record(self.storages, ref, f"{self.path}: {what}")

    def number_of(self, ref: inert.TensorRef, what: str) -> float | None:
        """The value of a counter that is a tensor, which a scan may read: it says of which save a file is."""
        at, kind = self.address(ref, what), COUNTERS.get(ref.dtype)
        if kind is None or ref.shape not in ((), (1,)):
            return None
        with open(self.path, "rb") as file:
            file.seek(at)
            return float(np.frombuffer(file.read(itemsize(ref.dtype)), kind)[0])


def opened(root: Path, name: str, number: int) -> File:
    """The pickle of one file, which has to hold a dict."""
    tree, storages = pt.open_archive(root / name)
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{root / name} holds no dict. Was it written by DeepSpeed?")
    return File(root / name, number, tree, storages)


@dataclass(frozen=True)
class Slice:
    """A flat tensor: the file it is in, the address of its first element, and how many there are."""

    file: int
    address: int
    length: int
    dtype: str


def flat(file: File, ref: Any, what: str) -> Slice:
    """A one-dimensional dense tensor."""
    if not isinstance(ref, inert.TensorRef) or len(ref.shape) != 1 or (ref.stride != (1,) and ref.shape[0] > 1):
        kind = list(ref.shape) if isinstance(ref, inert.TensorRef) else type(ref).__name__
        raise CheckpointError(f"{file.path}: {what} is {kind}, a flat tensor is expected. Was it written by DeepSpeed?")
    return Slice(file.number, file.address(ref, what), ref.shape[0], ref.dtype)


@dataclass
class Table:
    """`rows` are (entry, file, offset), start, stop, strides of some chunks each."""

    entries: dict[str, Entry] = field(default_factory=dict)
    rows: list[tuple[Ints, Ints, Ints, Ints]] = field(default_factory=list)

    def _new(self, entry: Entry, where: object) -> int:
        if self.entries.setdefault(entry.name, entry) is not entry:
            raise CheckpointError(f"{where}: {entry.name!r} is stored twice.")
        return len(self.entries) - 1

    def whole(self, entry: Entry, ref: inert.TensorRef, file: File) -> None:
        """A tensor that lies in one file as a whole."""
        number = self._new(entry, file.path)
        stop, strides = (ints(v).reshape(1, -1) for v in (ref.shape, ref.stride))
        head = ints([[number, file.number, file.address(ref, entry.name)]])
        self.rows.append((head, np.zeros_like(stop), stop, strides))

    def runs(self, entry: Entry, lo: Ints, hi: Ints, file: Ints, address: Ints) -> None:
        """A tensor in runs of its row-major elements; each is dense, at an address in a file."""
        number = self._new(entry, "The checkpoint")
        row, start, stop, past = zero.boxes(entry.shape, lo, hi)
        offset = address[row] + past * itemsize(entry.dtype)
        head = np.stack([np.full_like(row, number), file[row], offset], 1)
        self.rows.append((head, start, stop, np.tile(row_major(entry.shape), (len(row), 1))))

    def again(self, entry: Entry, of: str) -> None:
        """The same chunks under another name."""
        number, known = self._new(entry, "The checkpoint"), list(self.entries).index(of)
        for head, start, stop, strides in [r for r in self.rows if len(r[0]) and r[0][0, 0] == known]:
            again = np.hstack([np.full_like(head[:, :1], number), head[:, 1:]])
            self.rows.append((again, start, stop, strides))

    def catalog(self, format: str, root: Path, files: Sequence[str], extras: Sequence[Extra], about: Any) -> Catalog:
        width = max((len(e.shape) for e in self.entries.values()), default=0)
        head = np.concatenate([r[0] for r in self.rows]) if self.rows else np.zeros((0, 3), np.int64)
        start, stop, strides = (_stack([r[k] for r in self.rows], width, fill) for k, fill in ((1, 0), (2, 1), (3, 0)))
        chunks = Chunks(head[:, 0], start, stop, strides, head[:, 1], head[:, 2])
        return Catalog(
            format, str(root), tuple(files), tuple(self.entries.values()), chunks, tuple(extras), about=about
        )


def _stack(rows: Sequence[Ints], width: int, fill: int) -> Ints:
    """Boxes of differing numbers of dims as one array: `_stack([[[2]], [[3, 4]]], 2, 1)` -> `[[2, 1], [3, 4]]`."""
    wide = [np.pad(r, ((0, 0), (0, width - r.shape[1])), constant_values=fill) for r in rows]
    return np.concatenate(wide) if wide else np.zeros((0, width), np.int64)
