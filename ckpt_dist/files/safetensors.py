"""safetensors headers: read and validated, or laid out, without touching a tensor.

The format: 8 bytes little-endian N, N bytes of JSON (name -> dtype, shape, data_offsets), then the data, dense.
Invariant: a header that is accepted describes its file exactly: no gap, no overlap, no byte too few or too many.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.dtypes import FROM_SAFETENSORS, itemsize, to_safetensors

MAX_HEADER = 100_000_000  # the limit of the safetensors library
MOST_DIMS = 64  # a tensor without elements may have any number of them, and planning grows with it
MOST = 1 << 62  # of elements and of bytes: more does not fit a signed offset


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
        if len(text) != length:
            raise CheckpointError(f"{path} became shorter while it was read. Is it still being written?")
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
            double = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(
                f"{path}: the header names {double!r} twice; which one is meant cannot be known. Write it again."
            )
        return table

    try:
        decoded = text.decode("utf-8")  # json would guess another encoding, which no other reader does
        table = json.loads(decoded, object_pairs_hook=once)
        if "\\u" in decoded:  # only an escape can spell half of a surrogate pair, which no file name or terminal takes
            json.dumps(table, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is no JSON: {error!s:.200}. Is it a safetensors file?") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: the header is {type(table).__name__}, not a table. Is it a safetensors file?")
    return table


def _stored(name: str, fields: Any, base: int, path: str | Path) -> Stored:
    try:
        short, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        if type(short) is not str or type(shape) is not list:
            raise ValueError("the dtype must be a text and the shape a list")
        if not all(type(n) is int and 0 <= n < MOST for n in (begin, end, *shape)):
            raise ValueError("numbers must be non-negative integers")
        if len(shape) > MOST_DIMS:
            raise ValueError(f"{len(shape)} dims, {MOST_DIMS} are the most")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header's entry for {name!r} is damaged: {error!r:.200}. Fetch it again."
        ) from None
    if short not in FROM_SAFETENSORS:
        raise CheckpointError(f"{path}: {name!r} has the dtype {short!r:.20}, which is not supported.")
    need = itemsize(FROM_SAFETENSORS[short])
    for n in shape:
        need *= n
        if need >= MOST:
            raise CheckpointError(
                f"{path}: {name!r} of {len(shape)} dims needs more than {MOST} bytes, the header gives it {end - begin}."
            )
    if end - begin != need:
        raise CheckpointError(
            f"{path}: {name!r} of {short}{shape} needs {need} bytes, the header gives it {end - begin}."
        )
    return Stored(name, FROM_SAFETENSORS[short], tuple(shape), base + begin, need)


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

    `lay_out([("w", "float32", (2,))], {})` -> `(b"8...{"w":{"dtype":"F32",...", [64])`. Tensors are stored as the
    safetensors library sorts them (wide dtypes first, then by name), so that a file is byte for byte what `save_file`
    writes.
    """
    _check_names([name for name, *_ in tensors])
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
    if len(text) > MAX_HEADER:
        raise CheckpointError(
            f"The header of {len(tensors)} tensors needs {len(text)} bytes, no reader takes more than {MAX_HEADER}. "
            "Lower target.max_shard_size."
        )
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + b for b in begins]


def _check_names(names: Sequence[str]) -> None:
    """A header is a table: a name twice, or its own word, would lose a tensor without a trace."""
    if len(set(names)) != len(names):
        double = Counter(names).most_common(1)[0][0]
        raise CheckpointError(f"Two tensors are called {double!r}; a safetensors file holds one of a name.")
    for name in names:
        if name == "__metadata__" or not _is_utf8(name):
            raise CheckpointError(f"A safetensors file cannot hold a tensor called {name!r:.100}. Rename it.")


def _is_utf8(name: str) -> bool:
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:
        return False


def _rank(dtype: str) -> int:
    return ORDER.get(dtype, len(ORDER))
