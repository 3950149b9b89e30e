"""Megatron-core's distributed checkpoints of zarr arrays, as NeMo 1 and megatron-core up to 0.15 write them: a folder a tensor.

Facts: megatron-core 0.12, zarr 2.18. A folder has the array's `.zarray` and one raw file for each chunk, all of one
size, also at the edges. numpy has no bfloat16, so Megatron writes that word into `.zarray` by itself. What is no tensor
lies beside the arrays as `KEY/shard_OFFSET_COUNT.pt`.

Other writers compress each chunk; such a file is read through `files.codecs`.

Invariant: an array's files are all there and, if they are not compressed, exactly as long as its `.zarray` says.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.box import Ints, ints, row_major, stacked
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded, role
from ckpt_dist.errors import CheckpointError, Missing, UsageError
from ckpt_dist.files.codecs import CODECS, Packed
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.elsewhere import answers
from ckpt_dist.formats import Layout, Spec, torch_dist
from ckpt_dist.formats import torch as pt
from ckpt_dist.whole import contents

ARRAY = ".zarray"
DTYPES = {
    "<f8": "float64", "<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16", "<i8": "int64", "<i4": "int32",
    "<i2": "int16", "|i1": "int8", "|u1": "uint8", "|b1": "bool", "<u2": "uint16", "<u4": "uint32", "<u8": "uint64",
}  # fmt: skip
CHUNK_BYTES = 64 << 20
CHUNK = re.compile(r"/\d+(\.\d+)*$")
OBJECT = re.compile(r"/shard_[\d._]+\.pt$")
MOST_CHUNKS, MOST_DIMS = 1 << 17, 8  # of one array: more than any checkpoint has files


def claims(path: Path) -> bool:
    file = path / torch_dist.METADATA
    if not file.is_file() or file.stat().st_size > 1 << 20:
        return False
    try:
        said = json.loads(contents(file))
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("sharded_backend") == "zarr"


@dataclass(frozen=True)
class Grid:
    """How an array is cut: into chunks of one shape, all of them whole files, the last ones with unused ends."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    separator: str = "."
    columns_first: bool = False
    codec: str | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def places(self) -> Ints:
        """Each chunk's place in the grid, row by row: `[[0, 0], [0, 1], ...]`"""
        counts = self.counts if prod(self.counts) else (0,) * len(self.shape)
        return np.indices(counts, np.int64).reshape(len(self.shape), prod(counts)).T

    def name(self, place: Sequence[int]) -> str:
        return self.separator.join(map(str, place)) or "0"

    def strides(self) -> Ints:
        order = -1 if self.columns_first else 1
        return row_major(ints([self.chunk[::order]]).reshape(1, -1))[0, ::order]


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """Every `.zarray`, and the sizes of its chunks' files."""
    catalog = described(path, _sizes(path), lambda name: contents(path / name), answers(options).sizes)
    common = torch_dist.common_of(path / torch_dist.COMMON)
    config = torch_dist.args_of(common) or torch_dist.settings_beside(path)
    return replace(catalog, config=config, about={**catalog.about, "lightning": torch_dist.of_lightning(common)})


def _sizes(path: Path) -> dict[str, int]:
    """The size of each plain file, by its name. What cannot be listed is refused: its arrays would be left out unsaid."""
    sizes = {}
    for folder, inner, found in os.walk(path, onerror=_unreadable):
        linked = next(
            (d for d in inner if os.path.isfile(f"{folder}/{d}/{ARRAY}") and os.path.islink(f"{folder}/{d}")), None
        )
        if linked:
            raise CheckpointError(
                f"{folder}/{linked} is a link to an array of another folder. Put the array itself there."
            )
        for file in (os.path.join(folder, f) for f in found):
            if os.path.isfile(file):
                sizes[os.path.relpath(file, path)] = os.path.getsize(file)
    return sizes


def _unreadable(error: OSError) -> None:
    raise CheckpointError(f"{error.filename} cannot be listed: {error.strerror}.") from None


def described(
    path: Path, sizes: Mapping[str, int], read: Callable[[str], bytes], elsewhere: Mapping[str, int]
) -> Catalog:
    """What some files hold, by their names below `path`, their sizes, and the contents of the small ones."""
    heads = sorted(n.removesuffix("/" + ARRAY) for n in sizes if n.endswith("/" + ARRAY))
    arrays = {name: _array(name, read(f"{name}/{ARRAY}"), path) for name in heads}
    bare = next((n for n in sizes if CHUNK.search(n) and n.split("/")[0] not in arrays), None)
    if bare:
        raise CheckpointError(
            f"{path / bare} is a chunk of an array whose {ARRAY} is missing. Fetch the checkpoint again."
        )
    entries = tuple(entry for entry, _ in arrays.values())
    files: list[str] = []
    packed: list[Packed] = []
    rows: list[tuple[Ints, Ints, Ints]] = []
    for entry, grid in arrays.values():
        places = grid.places()
        names = [grid.name(p) for p in places.tolist()]
        names = [f"{entry.name}/{n}" for n in names]
        nbytes = prod(grid.chunk) * itemsize(entry.dtype)
        found = _complete(path, names, sizes, None if grid.codec else nbytes, elsewhere)
        if grid.codec:
            packed += [Packed(len(files) + k, grid.codec, size, nbytes) for k, size in enumerate(found)]
        files += names
        start = places * ints(grid.chunk)
        rows.append(
            (start, np.minimum(start + ints(grid.chunk), ints(grid.shape)), np.tile(grid.strides(), (len(places), 1)))
        )
    width = max((len(e.shape) for e in entries), default=0)
    start, stop, strides = (stacked([r[k] for r in rows], width, fill) for k, fill in enumerate((0, 1, 0)))
    owner = np.repeat(np.arange(len(rows)), [len(r[0]) for r in rows])
    chunks = Chunks(owner, start, stop, strides, np.arange(len(files)), np.zeros(len(files), np.int64))
    objects = sorted(n for n in sizes if OBJECT.search(n))
    states = {o: path / o for o in objects if torch_dist.STATE in o}
    extras = tuple(Extra(o.removesuffix(".pt"), (o,), role((o,)), None) for o in objects if o not in states)
    about = {"states": states, **({"packed": tuple(packed)} if packed else {})}
    return Catalog("zarr", str(path), tuple(files), entries, chunks, extras, about=about)


def _array(name: str, text: bytes, path: Path) -> tuple[Entry, Grid]:
    """What `.zarray` says; whatever cannot be read by address is refused by name."""
    where = path / name / ARRAY
    try:
        said = json.loads(text)
        shape, chunk = (tuple(_length(n, least) for n in said[key]) for key, least in (("shape", 0), ("chunks", 1)))
        stored, order, separator = str(said["dtype"]), str(said.get("order", "C")), said.get("dimension_separator", ".")
        coded = [c["id"] for c in (said.get("compressor"), *(said.get("filters") or ())) if c is not None]
        if (
            said["zarr_format"] != 2
            or not len(chunk) == len(shape) <= MOST_DIMS
            or order not in ("C", "F")
            or separator not in (".", "/")
        ):
            raise ValueError(f"zarr_format {said['zarr_format']}, shape {shape}, chunks {chunk}, order {order}")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error!s:.200}. Fetch it again.") from None
    if said.get("filters") or not all(c in CODECS for c in coded):
        raise CheckpointError(
            f"{where}: its chunks are coded by {', '.join(map(str, coded)):.100}; one of {', '.join(CODECS)} is read, and no filters. "
            "Copy the array with the zarr package and compressor=None."
        )
    if stored not in DTYPES:
        raise CheckpointError(f"{where}: the dtype {stored!r:.60} is not read; known are {', '.join(DTYPES)}.")
    grid = Grid(shape, chunk, separator, order == "F", coded[0] if coded else None)
    if prod(grid.counts) > MOST_CHUNKS:
        raise CheckpointError(
            f"{where} says {prod(grid.counts)} chunks, more than the {MOST_CHUNKS} of any checkpoint."
        )
    return Entry(name, DTYPES[stored], shape, (name,), role((name,))), grid


def _length(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 43:
        raise ValueError(f"a length of {value!r:.40}")
    return value


def _complete(
    path: Path, names: Sequence[str], sizes: Mapping[str, int], nbytes: int | None, elsewhere: Mapping[str, int]
) -> list[int]:
    """The sizes of all chunks, which are `nbytes` where that can be known.

    All are there, or on another node. One that zarr would take for zeros is missing too: Megatron writes all.
    """
    found = [sizes.get(n, elsewhere.get(str(path / n), -1)) for n in names]
    lost = [str(path / n) for n, size in zip(names, found, strict=True) if size < 0]
    if lost:
        raise Missing(
            f"{lost[0]} is missing: by its {ARRAY} there are {len(names)} chunks, {len(names) - len(lost)} are there. "
            "Fetch it again.",
            tuple(lost),
        )
    for name, size in zip(names, found, strict=True):
        if nbytes is not None and size != nbytes:
            raise CheckpointError(f"{path / name} has {size} bytes, by its {ARRAY} {nbytes}. Fetch it again.")
    return found


def lay_out(spec: Spec) -> Layout:
    """A folder for each tensor: raw chunks of whole rows, and the objects that Megatron asks for."""
    grids = [_rows(entry) for entry in spec.entries]
    places = [grid.places() for grid in grids]
    names = [f"{e.name}/{g.name(p)}" for e, g, at in zip(spec.entries, grids, places, strict=True) for p in at.tolist()]
    owner = np.repeat(np.arange(len(grids)), [len(p) for p in places])
    width = max((len(g.shape) for g in grids), default=0)
    shape, chunk = padded([g.shape for g in grids], width, 1)[owner], padded([g.chunk for g in grids], width, 1)[owner]
    start = stacked(places, width, 0) * chunk
    number, stop = np.arange(len(names)), np.minimum(start + chunk, shape)
    catalog = Catalog("zarr", "", tuple(names), spec.entries, Chunks.dense(owner, start, stop, number, number * 0))
    items = ints([itemsize(e.dtype) for e in spec.entries])[owner]
    sizes = tuple((np.prod(chunk, axis=1) * items).tolist())
    late = {f"{e.name}/{ARRAY}": _header(e, g).encode for e, g in zip(spec.entries, grids, strict=True)}
    return torch_dist.placed(spec, Layout(catalog, sizes, late={**late, **_states(spec)}), "zarr")


def _rows(entry: Entry) -> Grid:
    """Chunks of whole rows; only the last one has an unused end."""
    row = prod(entry.shape[1:]) * itemsize(entry.dtype)
    rows = min(max(CHUNK_BYTES // max(row, 1), 1), max(entry.shape[0], 1)) if entry.shape else 1
    return Grid(entry.shape, tuple(max(n, 1) for n in (rows, *entry.shape[1:]))[: len(entry.shape)])


def _header(entry: Entry, grid: Grid) -> str:
    if "/" in entry.name:
        raise UsageError(f"target.format=zarr: {entry.name!r} is no name of a folder. Use another target.format.")
    stored = next((word for word, dtype in DTYPES.items() if dtype == entry.dtype), None)
    if stored is None:
        raise CheckpointError(
            f"{entry.name}: Megatron's zarr has no word for {entry.dtype}. Give target.dtype=bfloat16."
        )
    said = dict(
        chunks=grid.chunk,
        compressor=None,
        dtype=stored,
        fill_value=None,
        filters=None,
        order="C",
        shape=grid.shape,
        zarr_format=2,
    )
    return json.dumps(said, indent=4)


def _states(spec: Spec) -> dict[str, Any]:
    """A layer's state: the source's where that has it, else none."""
    held = torch_dist.held_states(spec, "zarr")
    names = torch_dist.layer_states(spec, held)
    return {f"{name}.pt": lambda: pt.archive(None) for name in names} | {
        name: partial(contents, path) for name, path in (held or {}).items()
    }
