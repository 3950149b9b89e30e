"""Saved catalogs: one file that says what a checkpoint holds, without its data; made by `inspect`, for planning only.

Facts: version 1 is a safetensors file. Its metadata is one JSON text (names, dtypes, shapes, files, the model's
config); its tensors are the columns of the chunks, in the narrowest integers that hold them.

Invariant: opening one runs no code and takes memory in proportion to its length; every number is checked before it is
used to count or to allocate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.box import Ints, ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, Key, padded
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import safetensors
from ckpt_dist.files.codecs import CODECS, Packed
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import FORMATS, inside

VERSION = 1
HEAD = "ckpt_dist_catalog"
COLUMNS = ("entry", "start", "size", "strides", "file", "offset")
NUMBERS = ("tp", "pp", "vpp", "ep", "partition", "padded", "vocabulary", "embedding")  # of what is noted about ranks
WIDTHS = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "int64": "<i8"}
MOST_ELEMENTS = 1 << 43  # of all tensors together: plans cut them into tiles, and need memory for each tile
MOST_BYTES = 1 << 60
MOST_DIMS = 32


def claims(path: Path) -> bool:
    if not path.is_file():
        return False
    mark = b'{"__metadata__":{"' + HEAD.encode()
    with open(path, "rb") as file:
        return file.read(8 + len(mark))[8:] == mark


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The catalog as it was saved; `about["saved"]` is the file, which tells that the data is not here."""
    stored, metadata = safetensors.read_header(path)
    try:
        head = json.loads(metadata[HEAD])
        if head["version"] != VERSION:
            raise CheckpointError(f"it is of version {head['version']!r}, this program reads {VERSION}; save it again")
        return _catalog(path, head, {t.name: _column(path, t) for t in stored})
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {str(error).rstrip('.')}.") from None
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error!s:.200}. Make it again: ckpt-dist inspect save_catalog=FILE."
        ) from None


def save(path: Path, catalog: Catalog, asked: Path, folder: Path, step: int | None) -> int:
    """Write a catalog to a new file: the bytes that it has. The rest is what a plan says of the checkpoint's place."""
    if path.exists():
        raise UsageError(f"save_catalog={path} exists; nothing was written. Choose another file.")
    head = {
        "version": VERSION,
        "format": catalog.format,
        "root": catalog.root,
        "asked": str(asked.absolute()),
        "folder": str(folder.absolute()),
        "step": step,
        "files": catalog.files,
        "entries": [[e.name, e.dtype, e.shape, e.role, _plain(e.path)] for e in catalog.entries],
        "extras": [[x.name, x.role] for x in catalog.extras],
        "config": catalog.config,
        "about": {k: v for k, v in catalog.about.items() if isinstance(v, str) or (k in NUMBERS and v is not None)},
        "packed": [[p.file, p.codec, p.stored_bytes, p.nbytes] for p in catalog.about.get("packed", ())],
    }
    c = catalog.chunks
    columns = [_narrow(v) for v in (c.entry, c.start, c.stop - c.start, c.strides, c.file, c.offset)]
    tensors = [(n, v.dtype.name, v.shape) for n, v in zip(COLUMNS, columns, strict=True)]
    header, places = safetensors.lay_out(tensors, {HEAD: json.dumps(head, separators=(",", ":"), default=str)})
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(header)
            for at, values in zip(places, columns, strict=True):
                file.seek(at)
                file.write(values.tobytes())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from None
    return path.stat().st_size


def needs_data(catalog: Catalog) -> None:
    """Refuse to go on where tensors would be read and only a saved catalog is at hand."""
    if "saved" in catalog.about:
        raise UsageError(
            f"{catalog.about['saved']} is a saved catalog of {catalog.root}: it says what is stored and holds no data. "
            "Plan with it (dry_run=true), or give the checkpoint itself as source.path."
        )


def _narrow(values: Ints) -> Any:
    """The same numbers in as few bytes as hold them."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    fits = [t for t in ("<u1", "<u2", "<u4") if low >= 0 and high <= np.iinfo(t).max]
    return np.ascontiguousarray(values).astype(fits[0] if fits else "<i8")


def _plain(path: Sequence[str | int]) -> list[Any]:
    """A path in JSON: the integer key of a dict is `[3]`, the index of a list is `3`."""
    return [[int(p)] if isinstance(p, Key) else p for p in path]


# ---- reading


def _column(path: Path, stored: safetensors.Stored) -> Ints:
    if stored.name not in COLUMNS or stored.dtype not in WIDTHS or len(stored.shape) > 2:
        raise CheckpointError(
            f"{stored.name!r:.100} of {stored.dtype} in {len(stored.shape)} dims is none of its columns"
        )
    values = np.fromfile(path, WIDTHS[stored.dtype], prod(stored.shape), offset=stored.offset)
    return values.reshape(stored.shape).astype(np.int64)


def _catalog(path: Path, head: Mapping[str, Any], columns: Mapping[str, Ints]) -> Catalog:
    if head["format"] not in FORMATS or head["format"] == "catalog":
        raise CheckpointError(f"it is of a checkpoint in the format {head['format']!r:.100}, which is unknown")
    root = _text(head["root"])
    files = tuple(inside(Path(root), name, "it") for name in head["files"])
    entries = tuple(_entry(*row) for row in head["entries"])
    packed = tuple(_packed(*row) for row in head.get("packed", ()))  # catalogs of old have no such list
    packed_files = [p.file for p in packed]
    _within(ints(packed_files), len(files), "file")
    for what, names in (("file", files), ("tensor", [e.name for e in entries]), ("compressed file", packed_files)):
        if len(set(names)) != len(names):
            raise CheckpointError(f"it names a {what} twice")
    if (elements := sum(prod(max(n, 1) for n in e.shape) for e in entries)) > MOST_ELEMENTS:
        raise CheckpointError(f"its tensors have {elements} elements, more than the {MOST_ELEMENTS} of any model")
    if not isinstance(head["config"], dict):
        raise CheckpointError("its config is no table of settings")
    about: dict[str, Any] = {_text(k): _fact(k, v) for k, v in head["about"].items()} | {
        k: _text(head[k]) for k in ("asked", "folder")
    }
    about |= {"saved": str(path), "step": None if head["step"] is None else _count(head["step"], "a step")}
    about["packed"] = packed
    extras = tuple(Extra(_text(name), (), _role(role)) for name, role in head["extras"])
    chunks = _chunks(entries, len(files), columns)
    return Catalog(head["format"], root, files, entries, chunks, extras, head["config"], about=about)


def _entry(name: Any, dtype: Any, shape: Any, role: Any, path: Any, *_: Any) -> Entry:
    itemsize(_text(dtype))
    lengths = tuple(_count(n, "a length", MOST_ELEMENTS) for n in shape)
    if len(lengths) > MOST_DIMS:
        raise CheckpointError(f"{name!r:.100} has {len(lengths)} dims, more than {MOST_DIMS}")
    return Entry(_text(name), dtype, lengths, _path(path), _role(role))


def _packed(file: Any, codec: Any, stored_bytes: Any, nbytes: Any) -> Packed:
    if codec not in CODECS:
        raise CheckpointError(f"{codec!r:.100} is no codec")
    return Packed(_count(file, "a file"), codec, _count(stored_bytes, "a length"), _count(nbytes, "a length"))


def _chunks(entries: Sequence[Entry], num_files: int, columns: Mapping[str, Ints]) -> Chunks:
    """The columns as chunks, each inside its tensor, at addresses that a file can have."""
    entry, start, size, strides, file, offset = (columns[c] for c in COLUMNS)
    width = max((len(e.shape) for e in entries), default=0)
    for name, values in columns.items():
        wanted = (entry.size, width) if name in ("start", "size", "strides") else (entry.size,)
        if values.shape != wanted:
            raise CheckpointError(f"its columns differ in length: {name} is {values.shape}, not {wanted}")
    _within(entry, len(entries), "tensor")
    _within(file, num_files, "file")
    shape = padded([e.shape for e in entries], width, 1)[entry]
    if ((start < 0) | (size < 0) | (start > shape) | (size > shape - start)).any():
        raise CheckpointError("one of its chunks reaches outside its tensor")
    items = np.array([itemsize(e.dtype) for e in entries], np.float64)[entry]  # floats: these could exceed 64 bits
    reach = offset + (np.sum(np.maximum(size - 1, 0) * strides.astype(np.float64), axis=1) + 1) * items
    if (offset < 0).any() or (strides < 0).any() or (strides > MOST_ELEMENTS).any() or (reach > MOST_BYTES).any():
        raise CheckpointError("one of its chunks has an address or strides that no file has")
    return Chunks(entry, start, start + size, strides, file, offset)


def _within(index: Ints, count: int, what: str) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise CheckpointError(f"a chunk is of {what} {int(index.max())}, and there are {count}")


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise CheckpointError(f"{value!r:.100} is no name")
    return value


def _count(value: Any, what: str, most: int = MOST_BYTES) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise CheckpointError(f"{what} is {value!r:.100}, not a number from 0 to {most}")
    return value


def _fact(name: str, value: Any) -> Any:
    """What a format has noted: numbers where it is about ranks, else text."""
    if name not in NUMBERS:
        return _text(value)
    if isinstance(value, list) is not (name == "partition"):
        raise CheckpointError(f"its {name} is {value!r:.100}")
    for one in value if isinstance(value, list) else [value]:
        _count(int(one) if type(one) is bool else one, f"its {name}", MOST_ELEMENTS)
    return value


def _role(value: Any) -> str:
    if value not in ("weight", "optimizer", "state"):
        raise CheckpointError(f"{value!r:.100} is no role")
    return str(value)


def _path(parts: Any) -> tuple[str | int, ...]:
    return tuple(
        _text(p) if isinstance(p, str) else Key(_count(p[0], "a key")) if isinstance(p, list) else _count(p, "an index")
        for p in parts
    )
