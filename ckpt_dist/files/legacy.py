"""Files that torch.save wrote before 1.6, or without its zip: pickles in a row, then the storages, one after another.

    magic number | version | machine | the tree | keys of the storages | for each: number of elements, its bytes

Facts: torch 0.4 to 2.13 (`_use_new_zipfile_serialization=False`). Storages begin wherever the one before them ends, so
tensors of several bytes an element lie at any address.

Invariant: pickles go through the allow-list; of the storages only their counts are read.
"""

from __future__ import annotations

import mmap
import struct
from pickle import UnpicklingError
from typing import Any

from ckpt_dist.errors import CheckpointError, shown
from ckpt_dist.files import inert, pickles
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.zips import Record

MAGIC = 0x1950A86A20F9469CFC6C
HEAD = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # that number, and the end of its pickle
VERSION = 1001


def is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[2 : 2 + len(HEAD)] == HEAD


def read(fd: int, where: str) -> tuple[Any, dict[str, Record]]:
    """The tree, with references in place of tensors, and where each storage lies in the file."""
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        found, at, storages = [], 0, {}

        def noted(pid: Any) -> inert.Storage:
            storage = pickles.storage(pid)
            if len(pid) > 5 and pid[5] is not None:
                raise UnpicklingError("a storage that is a view of another one, as torch before 0.4 has them")
            storages[storage.key] = storage
            return storage

        for _ in range(5):
            end = pickles.end(data, at, where)
            found.append(pickles.loads(data[at:end], where, noted))
            at = end
        magic, version, machine, tree, keys = found
        if (magic, version) != (MAGIC, VERSION) or not isinstance(keys, list):
            raise CheckpointError(
                f"{where} is of version {shown(version, 20)} of torch's old format; only {VERSION} is known."
            )
        if not (isinstance(machine, dict) and machine.get("little_endian")):
            raise CheckpointError(f"{where} was written on a big-endian machine, which is not supported.")
        return tree, _records(data, at, keys, storages, where)


def _records(data: Any, at: int, keys: list[Any], storages: dict[str, inert.Storage], where: str) -> dict[str, Record]:
    """Each storage after its count of elements; both numbers have to be those of the tree."""
    found = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise CheckpointError(f"{where} is damaged: it lists a storage {shown(key, 40)} that no tensor has.")
        nbytes = storage.numel * itemsize(storage.dtype)
        if at + 8 + nbytes > len(data):
            raise CheckpointError(
                f"{where} is truncated: storage {key!r} needs bytes {at + 8} to {at + 8 + nbytes}, {len(data)} are there."
            )
        (count,) = struct.unpack_from("<q", data, at)
        if count not in (storage.numel, nbytes):
            raise CheckpointError(
                f"{where} is damaged: storage {key!r} has {count} elements, the pickle {storage.numel}."
            )
        found[key] = Record(key, at + 8, nbytes)
        at += 8 + nbytes
    return found
