"""Saved catalogs: one file that says what a checkpoint holds, without its data; made by `inspect`, for planning only.

Facts: version 1 is a zip archive. Its first member is `ckpt_dist.json` (names, dtypes, shapes, files and their sizes, the
model's config); the others are one `.npy` for each column of the chunks, in the narrowest integers that hold it.

Invariant: opening one runs no code and takes memory in proportion to its length: nothing in it is compressed, and
every number is checked against the others before it is used.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.box import Ints, row_major
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, Key, padded
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import FORMATS, inside

VERSION = 1
HEAD = "ckpt_dist.json"
COLUMNS = ("entry", "start", "size", "file", "offset")
MOST_ELEMENTS = 1 << 43  # of all tensors together: plans cut them into tiles, and need memory for each tile
MOST_BYTES = 1 << 60
MOST_DIMS = 32
MEMBER = struct.Struct("<4s22xHH")  # a zip's local header: signature, lengths of name and extra field
DAMAGED: tuple[type[Exception], ...] = (zipfile.BadZipFile, OSError, EOFError, LookupError, ValueError, TypeError)
DAMAGED += (AttributeError, RuntimeError, OverflowError, MemoryError, struct.error)


def claims(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(MEMBER.size + len(HEAD))
    return head[:4] == b"PK\3\4" and head[MEMBER.size :] == HEAD.encode()


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The catalog as it was saved; `about["saved"]` tells that the data is not here."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path.stat().st_size)
            head = json.loads(archive.read(HEAD))
            if head["version"] != VERSION:
                raise CheckpointError(
                    f"it is of version {head['version']}, this program reads {VERSION}. Save it again"
                )
            columns = {n[:-4]: _column(archive.read(n), n) for n in archive.namelist() if n != HEAD}
        return _catalog(path, head, columns)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {str(error).rstrip('.')}.") from None
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error}. Make it again: ckpt-dist inspect save_catalog=FILE."
        ) from None


def save(path: Path, catalog: Catalog, where: Mapping[str, Any]) -> int:
    """Write a catalog to a new file; `where` is what a person is told of its place. The bytes that it has."""
    if path.exists():
        raise UsageError(f"save_catalog={path} exists; nothing was written. Choose another file.")
    head = {
        "version": VERSION,
        "format": catalog.format,
        "root": catalog.root,
        "where": dict(where),
        "files": list(zip(catalog.files, file_sizes(catalog), strict=True)),
        "entries": [[e.name, e.dtype, e.shape, e.role, _plain(e.path), e.frame] for e in catalog.entries],
        "extras": [[x.name, x.role, _plain(x.path), x.address] for x in catalog.extras],
        "config": catalog.config,
        "about": {k: v for k, v in catalog.about.items() if isinstance(v, (bool, int, str))},
    }
    try:
        with zipfile.ZipFile(part := path.with_name(path.name + ".part"), "w") as archive:
            _add(archive, HEAD, json.dumps(head, separators=(",", ":"), default=str).encode())
            for name, values in _columns(catalog).items():
                out = io.BytesIO()
                np.lib.format.write_array(out, _narrow(values), allow_pickle=False)
                _add(archive, name + ".npy", out.getvalue())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from None
    return path.stat().st_size


def file_sizes(catalog: Catalog) -> list[int]:
    """Bytes of each file: as saved, or as the disk says."""
    saved = catalog.about.get("saved")
    return saved["sizes"] if saved else [os.path.getsize(os.path.join(catalog.root, f)) for f in catalog.files]


def needs_data(catalog: Catalog) -> None:
    """Refuse to go on where tensors would be read and only a saved catalog is at hand."""
    saved = catalog.about.get("saved")
    if saved:
        raise UsageError(
            f"{saved['file']} is a saved catalog of {catalog.root}: it says what is stored and holds no data. "
            "Plan with it (dry_run=true), or give the checkpoint itself as source.path."
        )


# ---- writing


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Stored, and of no date: the same catalog is the same file."""
    archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_STORED)


def _columns(catalog: Catalog) -> dict[str, Ints]:
    c = catalog.chunks
    found = {"entry": c.entry, "start": c.start, "size": c.stop - c.start, "file": c.file, "offset": c.offset}
    if not np.array_equal(c.strides, row_major(c.stop - c.start)):
        found["strides"] = c.strides
    more = {k: v for k, v in catalog.about.items() if isinstance(v, np.ndarray) and v.shape == c.entry.shape}
    return found | {f"about.{k}": v for k, v in more.items()}


def _narrow(values: Ints) -> Any:
    """The same numbers in as few bytes as hold them."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    fits = [t for t in ("<u1", "<u2", "<u4") if low >= 0 and high <= np.iinfo(t).max]
    return np.ascontiguousarray(values).astype(fits[0] if fits else "<i8")


def _plain(path: Sequence[str | int]) -> list[Any]:
    """A path in JSON: the integer key of a dict is `[3]`, the index of a list is `3`."""
    return [[int(p)] if isinstance(p, Key) else p for p in path]


# ---- reading


def _check_members(archive: zipfile.ZipFile, length: int) -> None:
    members = archive.infolist()
    names = [m.filename for m in members]
    if len(set(names)) != len(names) or not {HEAD, *(f"{c}.npy" for c in COLUMNS)} <= set(names):
        raise CheckpointError(f"it has the members {', '.join(names[:10])}, which are not those of a catalog")
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
        raise CheckpointError("it has a compressed member, and catalogs are never compressed")
    if (need := sum(m.file_size for m in members)) > length:
        raise CheckpointError(f"it has {length} bytes and says that it holds {need}")


def _column(data: bytes, name: str) -> Ints:
    """The integers of a `.npy`; what it says of its length must be so."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise CheckpointError(f"{name} is no array of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.str not in ("|u1", "<u2", "<u4", "<i8") or fortran or len(shape) > 2:
        raise CheckpointError(f"{name} holds {dtype} in {len(shape)} dims, not a column of integers")
    need, have = prod(shape) * dtype.itemsize, len(data) - file.tell()
    if need != have:
        raise CheckpointError(f"{name} says {shape} numbers, which are {need} bytes, and has {have}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape).astype(np.int64)


def _catalog(path: Path, head: Mapping[str, Any], columns: Mapping[str, Ints]) -> Catalog:
    if head["format"] not in FORMATS or head["format"] == "catalog":
        raise CheckpointError(f"it is of a checkpoint in the format {head['format']!r}, which is unknown")
    root = _text(head["root"])
    files = tuple(inside(Path(root), name, "it") for name, _ in head["files"])
    sizes = [_count(size, "the bytes of a file", MOST_BYTES) for _, size in head["files"]]
    entries = tuple(_entry(*row) for row in head["entries"])
    for what, names in (("file", files), ("tensor", [e.name for e in entries])):
        if len(set(names)) != len(names):
            raise CheckpointError(f"it names a {what} twice")
    if (elements := sum(prod(max(n, 1) for n in e.shape) for e in entries)) > MOST_ELEMENTS:
        raise CheckpointError(f"its tensors have {elements} elements, more than the {MOST_ELEMENTS} of any model")
    if not isinstance(head["config"], dict) or not isinstance(head["about"], dict):
        raise CheckpointError("its config is no table of settings")
    chunks = _chunks(entries, sizes, columns)
    about = {k.removeprefix("about."): v for k, v in columns.items() if k.startswith("about.")}
    if any(v.shape != chunks.entry.shape for v in about.values()):
        raise CheckpointError("its columns differ in length")
    saved = {"file": str(path), "sizes": sizes, **_where(head["where"])}
    extras = tuple(Extra(_text(n), _path(p), _role(r), address=_address(a)) for n, r, p, a in head["extras"])
    config = head["config"]
    return Catalog(
        head["format"], root, files, entries, chunks, extras, config, about={**head["about"], **about, "saved": saved}
    )


def _entry(name: Any, dtype: Any, shape: Any, role: Any, path: Any, frame: Any) -> Entry:
    itemsize(_text(dtype))
    lengths = tuple(_count(n, "a length", MOST_ELEMENTS) for n in shape)
    if len(lengths) > MOST_DIMS:
        raise CheckpointError(f"{name!r} has {len(lengths)} dims, more than {MOST_DIMS}")
    bounds = tuple((_text(a), _count(s, "a frame"), _count(t, "a frame")) for a, s, t in frame)
    return Entry(_text(name), dtype, lengths, _path(path), _role(role), bounds)


def _chunks(entries: Sequence[Entry], sizes: Sequence[int], columns: Mapping[str, Ints]) -> Chunks:
    """The columns as chunks, each inside its tensor and inside its file."""
    entry, start, size, file, offset = (columns[c] for c in COLUMNS)
    width = max((len(e.shape) for e in entries), default=0)
    for name, wanted in (("start", (len(entry), width)), ("size", (len(entry), width)), ("file", entry.shape)):
        if entry.ndim != 1 or columns[name].shape != wanted or offset.shape != entry.shape:
            raise CheckpointError(f"its columns differ in length: {name} is {columns[name].shape}, not {wanted}")
    _within(entry, len(entries), "tensor")
    _within(file, len(sizes), "file")
    shape = padded([e.shape for e in entries], width, 1)[entry]
    if ((start < 0) | (size < 0) | (start > shape) | (size > shape - start)).any():
        raise CheckpointError("one of its chunks reaches outside its tensor")
    strides = columns.get("strides", row_major(size))
    if strides.shape != size.shape or ((strides < 0) | (strides > MOST_ELEMENTS)).any():
        raise CheckpointError("one of its chunks has strides that no tensor has")
    items = np.array([itemsize(e.dtype) for e in entries], np.float64)[entry]
    reach = (np.sum((size - 1) * strides.astype(np.float64), axis=1) + 1) * items * (size > 0).all(axis=1)
    if ((offset < 0) | (offset + reach > np.array(sizes, np.float64)[file])).any():
        raise CheckpointError("one of its chunks reaches outside its file")
    return Chunks(entry, start, start + size, strides, file, offset)


def _within(index: Ints, count: int, what: str) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise CheckpointError(f"a chunk is of {what} {int(index.max())}, and there are {count}")


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise CheckpointError(f"{value!r} is no name")
    return value


def _count(value: Any, what: str, most: int = MOST_BYTES) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise CheckpointError(f"{what} is {value!r}, not a number from 0 to {most}")
    return value


def _role(value: Any) -> str:
    if value not in ("weight", "optimizer", "state"):
        raise CheckpointError(f"{value!r} is no role")
    return str(value)


def _path(parts: Any) -> tuple[str | int, ...]:
    return tuple(
        _text(p) if isinstance(p, str) else Key(_count(p[0], "a key")) if isinstance(p, list) else _count(p, "an index")
        for p in parts
    )


def _address(value: Any) -> tuple[int, int, int] | None:
    if value is None:
        return None
    file, offset, nbytes = (_count(n, "an address") for n in value)
    return file, offset, nbytes


def _where(told: Mapping[str, Any]) -> dict[str, Any]:
    """Which checkpoint it was: only shown."""
    step = told["step"]
    notes = tuple(_text(n) for n in told["notes"])
    return {
        "asked": _text(told["asked"]),
        "folder": _text(told["folder"]),
        "step": None if step is None else _count(step, "a step"),
        "notes": notes,
    }
