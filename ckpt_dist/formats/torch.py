"""`.pt` files: one zip archive written by torch.save, a dict of tensors, plain or nested under keys.

Facts: torch 2.13. The archive's data.pkl says where each tensor lies in which storage; storages are records
of the zip, stored uncompressed at multiples of 64 bytes. Only the pickle is read, by an allow-list.

Invariant: no code of a file is run, and no storage is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, Key, padded, role, whole
from ckpt_dist.errors import CheckpointError, shown
from ckpt_dist.files import inert, legacy, pickles, zips
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import Crc, Layout, Spec

ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
MAX_DEPTH = 64
MOST_LEFT_OUT = 1 << 16  # values of a list
SMALL = 256  # bytes of a tensor that is a value like a number is one
COUNTER_BYTES = 8  # of a storage that may be a counter's


@dataclass(frozen=True)
class Head:
    """What a node says of a file that another one lacks: its length, its pickle, the records of its storages, and the bytes
    of those that may be counters, by which files of one save are known."""

    nbytes: int
    tree: Any
    storages: Mapping[str, zips.Record]
    counters: Mapping[str, bytes]


def claims(path: Path) -> bool:
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix in ENDINGS and p.is_file()]
        return len(found) == 1
    return path.suffix in ENDINGS


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickle and the zip directory of one file (or of the only such file of a folder)."""
    if path.is_dir():
        path = next(p for p in sorted(path.iterdir()) if p.suffix in ENDINGS and p.is_file())
    return scan_files(path.parent, [path.name], options)


def open_archive(
    path: Path, base: int = 0, length: int | None = None, what: str = ""
) -> tuple[Any, dict[str, zips.Record]]:
    """The restricted unpickling of a file's data.pkl, and the records of its storages by key.

    Also of files without a zip, and of a part of a file; `what` is added to its name in errors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    where = str(path) + what
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if length is None and legacy.is_legacy(os.pread(fd, 16, 0)):
            return legacy.read(fd, where)
        records = zips.directory(fd, base, os.fstat(fd).st_size if length is None else length, where)
        data = zips.find(records, "/data.pkl", where)
        order = records.get(data.name.removesuffix("data.pkl") + "byteorder")
        if order is not None and os.pread(fd, min(order.nbytes, 16), order.offset) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which is not supported.")
        tree = pickles.loads(os.pread(fd, data.nbytes, data.offset), where)
    finally:
        os.close(fd)
    return tree, zips.storages(records, data)


def with_small(tree: Any, path: Path, storages: Mapping[str, zips.Record]) -> Any:
    """The same values with small tensors (the step of an optimizer) read; a larger one is no value."""
    if isinstance(tree, inert.TensorRef):
        nbytes = prod(tree.shape) * itemsize(tree.dtype)
        if nbytes > SMALL or tree.storage.numel != prod(tree.shape):
            return inert.Record()
        at = storage_record(storages, tree, str(path))
        with open(path, "rb") as file:
            file.seek(at)
            return inert.Small(tree.dtype, tree.shape, file.read(nbytes))
    if isinstance(tree, inert.Record):
        return tree
    if isinstance(tree, Mapping):
        return {k: with_small(v, path, storages) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_small(v, path, storages) for v in tree)
    return tree


def head(path: str) -> Head:
    tree, storages = open_archive(Path(path))
    with open(path, "rb") as file:
        small = {k: r for k, r in storages.items() if r.nbytes <= COUNTER_BYTES}
        nbytes = os.fstat(file.fileno()).st_size
        return Head(nbytes, tree, storages, {k: os.pread(file.fileno(), r.nbytes, r.offset) for k, r in small.items()})


def storage_record(storages: Mapping[str, zips.Record], ref: inert.TensorRef, where: str) -> int:
    """The address of a tensor's first element; its storage is all of a record, as in what torch writes and reads."""
    record, item = storages.get(ref.storage.key), itemsize(ref.storage.dtype)
    need = ref.storage.numel * item
    if record is None or not 0 <= record.nbytes - need < item:
        have = "missing" if record is None else f"{record.nbytes} bytes long"
        raise CheckpointError(f"{where}: storage {ref.storage.key!r} is {have}, the pickle needs {need} bytes.")
    return record.offset + ref.offset * itemsize(ref.dtype)


def walk(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Leaves of nested dicts and lists, each with its path; a list without tensors is one leaf."""
    if len(path) > MAX_DEPTH:
        raise CheckpointError(f"Nested deeper than {MAX_DEPTH} levels at {'.'.join(map(str, path[:4]))}...; refused.")
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from walk(value, (*path, _word(key)))
    elif isinstance(tree, (list, tuple)) and not isinstance(tree, inert.Record) and any(_holds_tensor(v) for v in tree):
        for index, value in enumerate(tree):
            yield from walk(value, (*path, index))
    else:
        yield path, tree


def _word(key: Any) -> str | int:
    return Key(key) if type(key) is int else key if isinstance(key, str) else shown(key, 200)


def _holds_tensor(value: Any, depth: int = 0) -> bool:
    if type(value) in (list, tuple) and depth < MAX_DEPTH:
        return any(_holds_tensor(v, depth + 1) for v in value)
    return isinstance(value, (inert.TensorRef, inert.Sharded, Mapping))


def scan_files(root: Path, names: Sequence[str], options: Mapping[str, Any]) -> Catalog:
    """One or several files that together hold one state dict."""
    entries: list[Entry] = []
    extras: list[Extra] = []
    refs: list[tuple[inert.TensorRef, int, int]] = []
    held: dict[str, int] = {}
    for number, name in enumerate(names):
        tree, storages = open_archive(root / name)
        file = str(root / name)
        for path, leaf in walk(tree):
            label = ".".join(map(str, path))
            if isinstance(leaf, inert.Sharded):
                raise CheckpointError(
                    f"{file}: {label!r} is a shard of a tensor; give the folder with the files of all ranks."
                )
            if not isinstance(leaf, inert.TensorRef):
                extras.append(Extra(label, path, role(path) if path else "state", leaf))
                continue
            label = label or "tensor"
            if label in held:
                raise CheckpointError(f"{root}: {label!r} is stored in {names[held[label]]} and in {name}.")
            held[label] = number
            entries.append(Entry(label, leaf.dtype, leaf.shape, path or (label,), role(path) if path else "weight"))
            refs.append((leaf, number, storage_record(storages, leaf, f"{file}: {label}")))
    return Catalog("torch", str(root), tuple(names), tuple(entries), chunks(entries, refs), tuple(extras))


def chunks(entries: Sequence[Entry], refs: Sequence[tuple[inert.TensorRef, int, int]]) -> Chunks:
    dense = whole(entries, [n for _, n, _ in refs], [a for *_, a in refs])
    strides = padded([r.stride for r, *_ in refs], dense.strides.shape[1], 0)
    return Chunks(dense.entry, dense.start, dense.stop, strides, dense.file, dense.offset)


def lay_out(spec: Spec) -> Layout:
    """One `.pt` file that holds everything, nested as the entries' paths say."""
    return lay_out_files(spec, [str(spec.options.get("file") or "model.pt")], [list(range(len(spec.entries)))])


def lay_out_files(
    spec: Spec,
    names: Sequence[str],
    groups: Sequence[Sequence[int]],
    each: Sequence[Extra] = (),
    own: Sequence[Sequence[Extra]] = (),
) -> Layout:
    """Archives as torch.save lays them out, with `each` in all of them and `own` in one each; a storage's CRC is known
    only when its bytes are."""
    file = np.zeros(len(spec.entries), np.int64)
    offset = np.zeros(len(spec.entries), np.int64)
    lengths: list[int] = []
    pieces: list[tuple[int, int, bytes]] = []
    crcs: list[Crc] = []
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        beside = [*each, *(own[number] if own else ()), *(spec.extras if number == 0 else ())]
        tree = _tree([spec.entries[i] for i in group], beside)
        storages = [
            int(np.prod(spec.entries[i].shape, dtype=np.int64)) * itemsize(spec.entries[i].dtype) for i in group
        ]
        small: list[bytes] = []
        data_pkl = pickles.dumps(tree, small, len(storages))
        archive = zips.lay_out(records(data_pkl, [*storages, *small]), Path(name).stem)
        data = [k for k, (label, _) in enumerate(records(b"", storages)) if label.startswith("data/")]
        for i, k, nbytes in zip(group, data, storages, strict=True):
            file[i], offset[i] = number, archive.addresses[k]
            crcs.append(Crc(number, archive.addresses[k], nbytes, archive.crc_at[k]))
        pieces += [(number, at, piece) for at, piece in archive.pieces]
        lengths.append(archive.length)
    catalog = Catalog("torch", "", tuple(names), spec.entries, whole(spec.entries, file, offset))
    return Layout(catalog, tuple(lengths), tuple(pieces), tuple(crcs))


def records(data_pkl: bytes, storages: Sequence[bytes | int]) -> list[tuple[str, bytes | int]]:
    """The records of an archive in torch's order; an int stands for bytes that come later."""
    return [
        ("data.pkl", data_pkl),
        (".format_version", b"1"),
        (".storage_alignment", b"64"),
        ("byteorder", b"little"),
        *((f"data/{k}", nbytes) for k, nbytes in enumerate(storages)),
        ("version", b"3\n"),
        (".data/serialization_id", b"0" * 40),
    ]


def archive(tree: Any, name: str = "archive") -> bytes:
    """A torch.save of values, with small tensors at most."""
    small: list[bytes] = []
    data_pkl = pickles.dumps(tree, small)
    layout = zips.lay_out(records(data_pkl, small), name)
    data = bytearray(layout.length)
    for at, piece in layout.pieces:
        data[at : at + len(piece)] = piece
    return bytes(data)


def tensor(entry_dtype: str, shape: Sequence[int], key: str) -> inert.TensorRef:
    """A dense tensor that fills one storage."""
    numel = int(np.prod(shape, dtype=np.int64))
    strides = [1] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        strides[k] = strides[k + 1] * max(shape[k + 1], 1)
    return inert.TensorRef(inert.Storage(key, entry_dtype, numel), entry_dtype, 0, tuple(shape), tuple(strides))


def _tree(entries: Sequence[Entry], extras: Sequence[Extra]) -> Any:
    leaves = [(e.path, tensor(e.dtype, e.shape, str(k))) for k, e in enumerate(entries)]
    leaves += [(x.path, x.value) for x in extras if x.address is None]
    root: dict[Any, Any] = {}
    if len(leaves) == 1 and not leaves[0][0]:  # a file may be one tensor or value without a name
        return leaves[0][1]
    for path, leaf in leaves:
        node: Any = root
        for part in path[:-1]:
            node = node.setdefault(part, {}) if type(node) is dict else None
        if type(node) is not dict or path[-1] in node:
            raise CheckpointError(
                f"{'.'.join(map(str, path)):.300}: something else is at this place, or around it, in the dict that is to be written. "
                "Use another target.key, or another target.format."
            )
        node[path[-1]] = leaf
    return _lists(root)


def _lists(node: Any) -> Any:
    """Dicts keyed by list indices become lists again, with None for what is not carried; integer keys of dicts stay keys."""
    if not isinstance(node, dict) or isinstance(node, inert.Instance):
        return node
    if node and all(type(k) is int for k in node):
        if max(node) - len(node) > MOST_LEFT_OUT:
            raise CheckpointError(f"A list of {max(node) + 1} values, of which {len(node)} are there, is damaged.")
        return [_lists(node.get(k)) for k in range(max(node) + 1)]
    return {int(k) if isinstance(k, Key) else k: _lists(v) for k, v in node.items()}
