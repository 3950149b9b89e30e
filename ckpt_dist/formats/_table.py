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
from ckpt_dist.box import Ints, ints, row_major, stacked
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra
from ckpt_dist.errors import CheckpointError, Missing, listed
from ckpt_dist.files import inert, zips
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.elsewhere import NOBODY, Answers
from ckpt_dist.formats import torch as pt

COUNTERS = {"float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8"}


@dataclass(frozen=True)
class File:
    """An opened `.pt` file: its number in the catalog, its pickle, the records of its storages; of a file of another node
    also the bytes of what may be a counter."""

    path: Path
    number: int
    tree: Any
    storages: Mapping[str, zips.Record]
    counters: Mapping[str, bytes] | None = None

    def address(self, ref: inert.TensorRef, what: str) -> int:
        return pt.storage_record(self.storages, ref, f"{self.path}: {what}")

    def number_of(self, ref: inert.TensorRef, what: str) -> float | None:
        """The value of a counter that is a tensor, which a scan may read: it says of which save a file is."""
        at, kind = self.address(ref, what), COUNTERS.get(ref.dtype)
        if kind is None or ref.shape not in ((), (1,)):
            return None
        if self.counters is not None:
            data = self.counters.get(ref.storage.key, b"")[ref.offset * itemsize(ref.dtype) :]
        else:
            with open(self.path, "rb") as file:
                file.seek(at)
                data = file.read(itemsize(ref.dtype))
        return float(np.frombuffer(data, kind, 1)[0]) if len(data) >= itemsize(ref.dtype) else None


@dataclass(frozen=True)
class Folder:
    """A folder of `.pt` files, some of which other nodes may have: what is not here is asked for."""

    path: Path
    others: Answers = NOBODY

    @property
    def names(self) -> list[str]:
        return sorted({p.name for p in self.path.iterdir()} | self.others.names(self.path))

    def opened(self, names: Sequence[str], first: int = 0) -> list[File]:
        """The pickles of some files, numbered from `first`; each has to hold a dict."""
        away = [str(self.path / n) for n in names if not (self.path / n).is_file()]
        if lost := [p for p in away if self.others.head(Path(p)) is None]:
            raise Missing(f"{listed(lost)} cannot be opened: it is not on this node. Fetch it.", tuple(lost), "head")
        return [self._file(name, first + k) for k, name in enumerate(names)]

    def _file(self, name: str, number: int) -> File:
        path = self.path / name
        head = None if path.is_file() else self.others.head(path)
        tree, storages = (head.tree, head.storages) if head else pt.open_archive(path)
        if not isinstance(tree, Mapping):
            raise CheckpointError(f"{path} holds no dict. Was it written by DeepSpeed?")
        return File(path, number, tree, storages, head.counters if head else None)

    def sizes(self, names: Sequence[str]) -> tuple[int, ...]:
        """Of files that were opened. Nodes may have one of the same name that some rank of theirs wrote, with other settings
        in it: only one that is as long has its tensors at the same places."""
        each = [self.path / n for n in names]
        return tuple(p.stat().st_size if p.is_file() else self.others.head(p).nbytes for p in each)

    def lacks(self, what: str) -> Missing:
        """Something is not among the files that are known: other nodes may have more."""
        return Missing(what, (str(self.path),), "names")


def opened(root: Path, name: str, number: int) -> File:
    """The pickle of one file, which has to hold a dict."""
    return Folder(root).opened([name], number)[0]


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
        start, stop, strides = (stacked([r[k] for r in self.rows], width, fill) for k, fill in ((1, 0), (2, 1), (3, 0)))
        chunks = Chunks(head[:, 0], start, stop, strides, head[:, 1], head[:, 2])
        return Catalog(
            format, str(root), tuple(files), tuple(self.entries.values()), chunks, tuple(extras), about=about
        )
