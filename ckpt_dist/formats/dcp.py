"""torch.distributed.checkpoint folders: `.metadata` and `*.distcp`, as FSDP1, FSDP2, TP, HSDP and torchtitan write them.

Facts: torch 2.3 to 2.13. `.metadata` is a pickle that lists the boxes of every tensor and where each blob lies; a
blob is a zip archive of one tensor (or a file is one safetensors image). The exact address of a tensor's bytes is in
the blob's own headers, so `locate` finds it only for the chunks a rank will touch.

Invariant: `.metadata` is unpickled by an allow-list, becomes integer arrays at once, and is checked against the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import Ints, distinct, ints, row_major, stacked
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded, role
from ckpt_dist.errors import CheckpointError, Missing, shown
from ckpt_dist.files import inert, metadata, pickles, safetensors, zips
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.elsewhere import answers
from ckpt_dist.files.streams import Unknown
from ckpt_dist.formats import Layout, Spec, _distcp, inside
from ckpt_dist.formats import torch as pt
from ckpt_dist.whole import contents

MOST_METADATA = 1 << 33
MOST = 1 << 60  # elements of a tensor, an empty one's other dims too, and of all together


def claims(path: Path) -> bool:
    return path.is_dir() and (
        (path / ".metadata").exists() or any(path.glob("__*.metadata")) or any(path.glob("*.distcp"))
    )


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """All of `.metadata` (or of the ranks' own `__R.metadata`) as arrays, checked against the files' sizes."""
    return described(path, {str(p): contents(p, MOST_METADATA) for p in _metadata_files(path)}, answers(options).sizes)


def described(path: Path, metadata_of: Mapping[str, bytes], elsewhere: Mapping[str, int]) -> Catalog:
    """What the contents of some `.metadata` say; files that are not below `path` have their sizes in `elsewhere`."""
    where = str(path / ".metadata")
    try:
        with pickles.uncollected():
            tables = [_tables(data, name) for name, data in metadata_of.items()]
            return _catalog(path, tables, elsewhere, where)
    except (TypeError, ValueError, OverflowError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is damaged: {type(error).__name__}: {error}. Was the save interrupted?"
        ) from None


def _metadata_files(path: Path) -> list[Path]:
    if (path / ".metadata").exists():
        return [path / ".metadata"]
    ranks = sorted(path.glob("__*.metadata"), key=lambda p: (len(p.name), p.name))
    if not ranks:
        unfinished = ".metadata.tmp is there: " if (path / ".metadata.tmp").exists() else ""
        raise CheckpointError(
            f"{path} has .distcp files but no .metadata: {unfinished}the save did not finish. Use an earlier checkpoint."
        )
    return ranks


@dataclass(frozen=True)
class _Tables:
    """One `.metadata`: described tensors and their boxes, and rows of storage, keyed by name and offset.

    `owner[chunk]` is a place in `described`, in whose values `chunks` is a number; `names[row]` and `relative[row]` index `texts`.
    """

    described: dict[str, Any]
    paths: Mapping[str, Any]
    owner: Ints
    start: Ints
    size: Ints
    texts: Sequence[str]
    names: Ints
    is_tensor: NDArray[np.bool_]
    at: Ints
    relative: Ints
    offset: Ints
    length: Ints


def _tables(data: bytes, where: str) -> _Tables:
    """The fast way; whatever that does not know, the general way reads, or says what is wrong."""
    try:
        return _arrays(*metadata.short(data, where), where)
    except (Unknown, CheckpointError, ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return _arrays(*metadata.whole(data, where), where)


def _arrays(record: Any, lanes: metadata.Lanes, where: str) -> _Tables:
    try:
        fields = record[0]
        stored: dict[Any, Any] = fields.get("storage_data") or {}
        described = {n: d[0] if len(d) else {} for n, d in fields["state_dict_metadata"].items()}
        paths = fields.get("planner_data")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where} is no metadata of torch.distributed.checkpoint: {shown(error, 200)}.") from None
    lists = [metadata.Rows(d["chunks"], lanes) for d in described.values() if "chunks" in d]
    tensors = np.array([k for k, d in enumerate(described.values()) if "chunks" in d], np.int64)
    chunks = metadata.Rows([c for d in described.values() for c in d.get("chunks", ())], lanes)
    rows = metadata.Rows([x for pair in stored.items() for x in pair], lanes)
    index, info = rows.every(0, 2), rows.every(1, 2)
    width = max((len(d["size"]) for d in described.values() if "chunks" in d), default=0)
    if any(f.get("transform_descriptors") for f in info.kept.values()):
        raise CheckpointError(
            f"{where}: blobs are transformed, which cannot be read by address. Save without extensions."
        )
    if info.column("transform_descriptors", "none")[1].any():  # of a record that was cut: look at it as it is
        raise Unknown
    at, is_tensor = index.column("offset", "size", width)
    names, relative = index.all("fqn", "text"), info.all("relative_path", "text")
    tables = _Tables(
        {n: {**d, "chunks": 0} if "chunks" in d else {} for n, d in described.items()},
        paths if type(paths) is dict else {},
        np.repeat(tensors, [len(one) for one in lists]),
        chunks.all("offsets", "size", width),
        chunks.all("sizes", "size", width, 1),
        list(lanes.text_ids),
        names,
        is_tensor,
        at,
        relative,
        info.all("offset", "int"),
        info.all("length", "int"),
    )
    lanes.settle(v for k, v in fields.items() if k not in ("state_dict_metadata", "storage_data", "planner_data"))
    return tables


def _catalog(path: Path, tables: Sequence[_Tables], elsewhere: Mapping[str, int], where: str) -> Catalog:
    described: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for table in tables:
        paths.update(table.paths)
        described.update({k: v for k, v in table.described.items() if k not in described})
    names = [n for n, d in described.items() if "chunks" in d]
    entries = tuple(_entry(n, described[n], paths, where) for n in names)
    width = max((len(e.shape) for e in entries), default=0)
    number = {n: e for e, n in enumerate(names)}
    owner = np.concatenate([ints([number.get(n, -1) for n in t.described])[t.owner] for t in tables])
    start, size, at = (stacked([getattr(t, k) for t in tables], width, k == "size") for k in ("start", "size", "at"))
    named = np.concatenate([ints([number.get(x, -1) for x in t.texts])[t.names] for t in tables])
    is_tensor = np.concatenate([t.is_tensor for t in tables])
    files, file, offset, length = _addresses(path, tables, elsewhere, where)
    tensors = np.flatnonzero(is_tensor)
    row = _storage_rows(entries, owner, start, size, named[tensors], at[tensors], tensors, where)
    keep = np.flatnonzero(row >= 0)
    start, size, entry, row = start[keep], size[keep], owner[keep], row[keep]
    _check_boxes(entries, entry, start, size, where)
    chunks = Chunks(entry, start, start + size, row_major(size), file[row], offset[row])
    if _safetensors_files(path, files, offset[tensors]):
        chunks = _in_safetensors(path, files, entries, chunks)
        length = np.full_like(length, -1)
    others = np.flatnonzero(~is_tensor)
    stored = [t.texts[k] for t in tables for k in t.names[~t.is_tensor].tolist()]
    addresses = zip(file[others].tolist(), offset[others].tolist(), length[others].tolist(), strict=True)
    extras = _extras(described, paths, dict(zip(stored, addresses, strict=True)))
    about = {"length": length[row], "ranks": len(tables), "nested": bool(paths)}
    return Catalog("dcp", str(path), tuple(files), entries, chunks, extras, about=about)


def _path(name: str, paths: Mapping[str, Any]) -> tuple[str | int, ...]:
    path = paths.get(name)
    fine = type(path) is tuple and 0 < len(path) <= pt.MAX_DEPTH and all(type(p) in (str, int) for p in path)
    return path if fine and path is not None else (name,)


def _entry(name: str, fields: Mapping[str, Any], paths: Mapping[str, Any], where: str) -> Entry:
    shape = tuple(int(n) for n in fields["size"])
    dtype = str(fields["properties"][0][0])
    if any(n < 0 for n in shape) or np.prod([float(max(n, 1)) for n in shape]) > MOST:
        raise CheckpointError(f"{where}: {name!r} has the shape {shape}, which no tensor has.")
    itemsize(dtype)
    path = _path(name, paths)
    return Entry(name, dtype, shape, path, role(path))


def _storage_rows(
    entries: Sequence[Entry], owner: Ints, start: Ints, size: Ints, named: Ints, at: Ints, tensors: Ints, where: str
) -> Ints:
    """For each described chunk the row of its storage; -1 for an empty one. Both sides are keyed by (name, offset)."""
    shape = padded([e.shape for e in entries], start.shape[1], 1)
    steps = row_major(shape)
    room = 2 * np.prod(np.maximum(shape, 1), axis=1, dtype=np.int64) + 2
    base = np.cumsum(room) - room
    if room.sum(dtype=float) > MOST:
        raise CheckpointError(f"{where}: its tensors have {room.sum(dtype=float):.0g} elements, which none have.")
    stored = base[named] + np.sum(at * steps[named], axis=1) if len(entries) else named
    stored[(named < 0) | ((at < 0) | (at >= np.maximum(shape[named], 1))).any(axis=1)] = -1  # of no tensor's chunk
    order = np.argsort(stored, kind="stable")
    wanted = base[owner] + np.sum(start * steps[owner], axis=1)
    full = (size > 0).all(axis=1)
    found = np.searchsorted(stored[order], wanted)
    hit = np.zeros(len(owner), bool)
    inside_range = found < len(stored)
    hit[inside_range] = stored[order][found[inside_range]] == wanted[inside_range]
    for lost in np.flatnonzero(full & ~hit)[:1].tolist():
        raise CheckpointError(
            f"{where}: {entries[owner[lost]].name!r} has a chunk at {start[lost].tolist()} that no file is named for."
        )
    rows = np.full(len(owner), -1, np.int64)
    take = full & hit
    rows[take] = tensors[order[found[take]]]
    return rows


def _check_boxes(entries: Sequence[Entry], entry: Ints, start: Ints, size: Ints, where: str) -> None:
    shape = padded([e.shape for e in entries], start.shape[1], 1)
    bad = np.flatnonzero(((start < 0) | (size < 0) | (start + size > shape[entry])).any(axis=1))
    for row in bad[:1].tolist():
        raise CheckpointError(
            f"{where}: {entries[entry[row]].name!r} of shape {entries[entry[row]].shape} has a chunk at {start[row].tolist()} "
            f"of size {size[row].tolist()}, which reaches outside."
        )


def _addresses(
    path: Path, tables: Sequence[_Tables], elsewhere: Mapping[str, int], where: str
) -> tuple[list[str], Ints, Ints, Ints]:
    """Files, and for each storage row its file, offset and length; all files there, or on another node, and long enough."""
    used = [[t.texts[k] for k in distinct(t.relative).tolist()] for t in tables]
    files = sorted({inside(path, f, where) for f in set(chain.from_iterable(used))})
    number = {f: i for i, f in enumerate(files)}
    file = np.concatenate([ints([number.get(x, -1) for x in t.texts])[t.relative] for t in tables])
    offset = np.concatenate([t.offset for t in tables])
    length = np.concatenate([t.length for t in tables])
    if len(file) and (offset.min() < 0 or length.min() < 0):
        raise CheckpointError(f"{where} holds a negative offset or length.")
    end = np.zeros(len(files), np.int64)
    np.maximum.at(end, file, offset + length)
    sizes = [(path / f).stat().st_size if (path / f).is_file() else elsewhere.get(str(path / f), -1) for f in files]
    lost = [str(path / f) for f, size in zip(files, sizes, strict=True) if size < 0]
    if lost:
        more = "".join(f", {p}" for p in lost[1:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise Missing(
            f"{lost[0]}{more} is missing: .metadata names {len(files)} files, {len(files) - len(lost)} are there. Fetch it again.",
            tuple(lost),
        )
    for name, size, need in zip(files, sizes, end.tolist(), strict=True):
        if size < need:
            raise CheckpointError(
                f"{path / name} is truncated: it has {size} bytes, .metadata needs {need}. Fetch it again."
            )
    return files, file, offset, length


def _safetensors_files(path: Path, files: Sequence[str], offsets: Ints) -> bool:
    """Whether tensors were serialised as safetensors: then all offsets are 0 and a file does not start as a zip does."""
    if len(offsets) == 0 or offsets.any():
        return False
    here = [path / f for f in files if (path / f).is_file()]
    if not here:
        return False
    with open(here[0], "rb") as file:
        return file.read(2) != b"PK"


def _in_safetensors(path: Path, files: Sequence[str], entries: Sequence[Entry], chunks: Chunks) -> Chunks:
    offset = chunks.offset.copy()
    for number in distinct(chunks.file).tolist():
        stored = {t.name: t for t in safetensors.read_header(path / files[number])[0]}
        for row in np.flatnonzero(chunks.file == number).tolist():
            entry = entries[chunks.entry[row]]
            tensor = stored.get(entry.name)
            shape = tuple((chunks.stop[row] - chunks.start[row]).tolist()[: len(entry.shape)])
            if tensor is None or tensor.shape != shape or tensor.dtype != entry.dtype:
                raise CheckpointError(
                    f"{path / files[number]}: {entry.name!r} should be {entry.dtype}{list(shape)} by .metadata, the file has {tensor}."
                )
            offset[row] = tensor.offset
    return Chunks(chunks.entry, chunks.start, chunks.stop, chunks.strides, chunks.file, offset)


def _extras(
    described: Mapping[str, Any], paths: Mapping[str, Any], addresses: Mapping[str, tuple[int, int, int]]
) -> tuple[Extra, ...]:
    """Everything that is no tensor, with the place of its bytes where it has one."""
    found = []
    for name in (n for n, d in described.items() if "chunks" not in d):
        path = _path(name, paths)
        found.append(Extra(name, path, role(path), address=addresses.get(name)))
    return tuple(found)


def locate(catalog: Catalog, rows: Ints) -> Chunks:
    """Exact addresses and strides of some chunks, from the headers of their blobs: two small reads each.

    A chunk may be a box that begins `past` elements after the first of a blob of a flat tensor of `run` elements.
    """
    chunks = catalog.chunks.take(rows)
    length = catalog.about["length"][rows]
    offset, strides = chunks.offset.copy(), chunks.strides.copy()
    run, past = (
        catalog.about[k][rows] if k in catalog.about else np.zeros(len(rows), np.int64) for k in ("run", "past")
    )
    known: dict[bytes, inert.TensorRef] = {}
    blobs = np.flatnonzero(length >= 0)  # the others' addresses are exact already
    order = blobs[np.argsort(chunks.file[blobs], kind="stable")]
    for group in np.split(order, np.flatnonzero(np.diff(chunks.file[order])) + 1):
        if not len(group):
            continue
        where = str(Path(catalog.root) / catalog.files[chunks.file[group[0]]])
        fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for row in group.tolist():
                entry = catalog.entries[chunks.entry[row]]
                shape = tuple((chunks.stop[row] - chunks.start[row]).tolist()[: len(entry.shape)])
                stored = (int(run[row]),) if run[row] > 0 else shape
                at, stride = _blob(
                    fd, int(chunks.offset[row]), int(length[row]), entry, stored, f"{where}: {entry.name!r}", known
                )
                offset[row] = at + max(int(past[row]), 0) * itemsize(entry.dtype)
                if run[row] <= 0:
                    strides[row, : len(stride)] = stride
        finally:
            os.close(fd)
    return Chunks(chunks.entry, chunks.start, chunks.stop, strides, chunks.file, offset)


def _blob(
    fd: int,
    base: int,
    length: int,
    entry: Entry,
    shape: tuple[int, ...],
    where: str,
    known: dict[bytes, inert.TensorRef],
) -> tuple[int, tuple[int, ...]]:
    """The address of a blob's first element, and its strides."""
    directory = zips.directory(fd, base, length, where)
    record = zips.find(directory, "/data.pkl", where)
    data = os.pread(fd, record.nbytes, record.offset)
    ref = known.get(data)
    if ref is None:
        ref = known.setdefault(data, pickles.loads(data, where))
    if not isinstance(ref, inert.TensorRef) or ref.shape != shape or ref.dtype != entry.dtype:
        raise CheckpointError(
            f"{where}: .metadata says {entry.dtype}{list(shape)}, the blob holds {shown(ref, 200)}. The files belong to another checkpoint."
        )
    return pt.storage_record(zips.storages(directory, record), ref, where), ref.stride


def read_extra(catalog: Catalog, extra: Extra) -> Any:
    """The value of an entry that is no tensor, by the allow-list; small tensors in it are read with it."""
    if extra.address is None:
        return extra.value
    number, base, length = extra.address
    file = Path(catalog.root) / catalog.files[number]
    tree, storages = pt.open_archive(file, base, length, f": {extra.name!r}")
    return pt.with_small(tree, file, storages)


def raw_extra(catalog: Catalog, extra: Extra) -> bytes:
    """The bytes of an entry that is no tensor, to be passed on."""
    assert extra.address is not None
    number, base, length = extra.address
    path = Path(catalog.root) / catalog.files[number]
    with open(path, "rb") as file:
        file.seek(base)
        found = file.read(length)
    if len(found) < length:
        raise CheckpointError(
            f"{path} is truncated: {extra.name!r} needs {base + length} bytes, it has {base + len(found)}."
        )
    return found


def lay_out(spec: Spec) -> Layout:
    return _distcp.lay_out(spec)
