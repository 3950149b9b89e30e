"""safetensors headers: read and validated, or laid out, without touching a tensor.

The format: 8 bytes little-endian N, N bytes of JSON (name -> dtype, shape, data_offsets), then the data, dense.
Invariant: a header that is accepted describes its file exactly: no gap, no overlap, no byte too few or too many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.dtypes import FROM_SAFETENSORS, itemsize, to_safetensors

MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Stored:
    """One tensor: `offset` is absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: str | Path) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its `__metadata__`."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: it has {size} bytes, its header says {8 + length}."
            )
        text = file.read(length)
    table = _table(text, path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is no table of strings.")
    stored = sorted(
        (_stored(name, fields, 8 + length, path) for name, fields in table.items()), key=lambda t: (t.offset, t.nbytes)
    )
    end = 8 + length
    for tensor in stored:
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: {tensor.name!r} begins at byte {tensor.offset}, the tensor before it ends at {end}. The header is damaged."
            )
        end += tensor.nbytes
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {what}: it has {size} bytes, its header needs {end}. Fetch it again.")
    return stored, metadata


def _table(text: bytes, path: str | Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [k for k, _ in pairs]
            double = next(n for n in names if names.count(n) > 1)
            raise CheckpointError(f"{path}: the header names {double!r} twice.")
        return table

    try:
        table = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is no JSON: {error}. Is it a safetensors file?") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: the header is {type(table).__name__}, not a table.")
    return table


def _stored(name: str, fields: Any, base: int, path: str | Path) -> Stored:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [begin, end, *shape]
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError("numbers must be non-negative integers")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name!r} is damaged: {error!r}.") from None
    if dtype not in FROM_SAFETENSORS:
        raise CheckpointError(f"{path}: {name!r} has the dtype {dtype!r}, which is not supported.")
    need = prod(shape) * itemsize(FROM_SAFETENSORS[dtype])
    if end - begin != need:
        raise CheckpointError(
            f"{path}: {name!r} of {dtype}{shape} needs {need} bytes, the header gives it {end - begin}."
        )
    return Stored(name, FROM_SAFETENSORS[dtype], tuple(shape), base + begin, need)


# as the library sorts them (safetensors 0.8): a test compares whole files
SORTED = (
    *(
        "uint64",
        "int64",
        "float64",
        "complex64",
        "float32",
        "uint32",
        "int32",
        "bfloat16",
        "float16",
        "uint16",
        "int16",
    ),
    *("float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"),
)
ORDER = {name: rank for rank, name in enumerate(SORTED)}


def lay_out(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The header's bytes, and where each tensor lies, in the order given.

    Tensors are stored as the safetensors library sorts them (wide dtypes first, then by name), so that a file is
    byte for byte what `save_file` writes.
    """
    order = sorted(range(len(tensors)), key=lambda i: (_rank(tensors[i][1]), tensors[i][0]))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, at = [0] * len(tensors), 0
    for i in order:
        name, dtype, shape = tensors[i]
        end = at + prod(shape) * itemsize(dtype)
        table[name] = {"dtype": to_safetensors(dtype), "shape": list(shape), "data_offsets": [at, end]}
        begins[i], at = at, end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + b for b in begins]


def _rank(dtype: str) -> int:
    return ORDER.get(dtype, len(ORDER))
