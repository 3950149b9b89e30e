"""Quantised checkpoints: which stored arrays are one weight in low precision and the scales of its blocks.

    w  float8, [.., rows, columns]         with  w_scale_inv, [.., rows / 128, columns / 128]        (DeepSeek, fp8)
    w_blocks  two fp4 a byte, [x, columns, rows / 32, 16]  with  w_scales, [x, columns, rows / 32]   (gpt-oss, mxfp4)

Both become one entry `w` that is read in a floating dtype; its address is in a file of its own, whose bytes
`engine.dequantise` computes from the two stored arrays. Facts: transformers 5.23, `finegrained_fp8.py` and `mxfp4.py`.

Invariant: pure; an array that belongs to a quantised weight is paired, or the checkpoint is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ckpt_dist.box import stacked
from ckpt_dist.catalog import Catalog, Chunks, Entry, whole
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.codecs import Packed
from ckpt_dist.files.dtypes import itemsize

METHODS = ("fp8", "mxfp8", "mxfp4")  # the first two differ in their blocks and scales only
DEFAULT, READ_AS = "bfloat16", ("bfloat16", "float16", "float32")  # the products are float32; wider ones are cast
VALUES, SCALES = ("float8_e4m3fn", "float8_e5m2"), ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
SCALE_INV, BLOCKS, BLOCK_SCALES, ACTIVATION = "_scale_inv", "_blocks", "_scales", ".activation_scale"
FP8_BLOCK, MXFP4_BLOCK = (128, 128), 32
TENSOR_SCALE = ".weight_scale"  # of a weight in bytes; elsewhere it is a name like any other
MARKS = {  # of methods that are not read, where no config names them
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_2": "modelopt (nvfp4)",
    TENSOR_SCALE: "compressed-tensors, fbgemm or modelopt",
}


@dataclass(frozen=True)
class Stored:
    """An array as it lies in a file; `offset` in bytes."""

    file: int
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Quantised:
    """A weight as it is read (`shape`, `dtype`, an address in a computed file), and what it is made of.

    `block`: rows and columns of the weight, as it is read, that share a scale.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Stored
    scales: Stored
    block: tuple[int, int]
    file: int = -1
    offset: int = 0

    @property
    def packed(self) -> bool:
        """Two values a byte, and stored transposed: mxfp4."""
        return self.values.dtype == "uint8"

    @property
    def method(self) -> str:
        return "mxfp4" if self.packed else "fp8"

    @property
    def nbytes(self) -> int:
        """Of the weight as it is read."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def stored_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def stored_dtype(self) -> str:
        return self.method if self.packed else self.values.dtype

    @property
    def scale_text(self) -> str:
        return f"{self.scales.dtype}{list(self.scales.shape)}"


def of(catalog: Catalog) -> tuple[Quantised, ...]:
    """The quantised weights of a catalog, in the order of their addresses."""
    found: tuple[Quantised, ...] = catalog.about.get("quantised", ())
    return found


def computed(catalog: Catalog) -> tuple[Quantised | Packed, ...]:
    """Everything whose bytes are not those of a file: quantised weights, and chunks that are compressed."""
    packed: tuple[Packed, ...] = catalog.about.get("packed", ())
    return (*of(catalog), *packed)


def readable(catalog: Catalog, config: Mapping[str, Any], dtype_of: Callable[[Entry], str]) -> Catalog:
    """The same checkpoint with each quantised weight as one entry; `dtype_of(entry)` says what it is read as."""
    settings = _settings(catalog, config)
    table = _Table(catalog)
    found = [*_fp8(table, settings, dtype_of), *_mxfp4(table, dtype_of)]
    if not found:
        return catalog
    spare = {n for n in table.entries if n.endswith(ACTIVATION)} if any(not q.packed for q in found) else set()
    return _replaced(catalog, found, spare)


def described(catalog: Catalog) -> tuple[str, ...]:
    """What was found, in words: `24 weights of fp8 (a scale for 128 x 128 values) are read as bfloat16`."""
    kinds = Counter((q.method, q.block if q.packed or q.block != q.shape[-2:] else None, q.dtype) for q in of(catalog))
    lines = []
    for (method, block, dtype), count in kinds.items():
        shared = "one scale each" if block is None else f"a scale for {block[0]} x {block[1]} values"
        lines.append(f"{count} weights of {method} ({shared}) are read as {dtype}")
    return (*lines, *catalog.about.get("left_out", ()))


def guesses(catalogs: Sequence[Catalog], asked: object) -> list[str]:
    """The dtype that was chosen because nobody asked for one."""
    if asked != "keep" or not any(map(of, catalogs)):
        return []
    return [f"quantised weights become {DEFAULT}; target.dtype=float32 keeps every bit of value times scale"]


def _settings(catalog: Catalog, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config's own words on quantisation; a method that is not read is refused by its name."""
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else repr(settings)
    if settings and method not in METHODS:
        more = f" ({settings['quant_algo']})" if isinstance(settings, dict) and "quant_algo" in settings else ""
        raise CheckpointError(
            f"{catalog.root}: quantised by the method {method!r}{more}, as its config says; {', '.join(METHODS)} are read. "
            "De-quantise it with the library that made it, or take quantization_config out of the config if it is not true."
        )
    bytes_ = {e.name for e in catalog.entries if e.dtype in (*VALUES, "int8", "uint8")}
    for entry in catalog.entries:
        ending = next((m for m in MARKS if entry.name.endswith(m)), None)
        mark = ending if ending != TENSOR_SCALE or entry.name.removesuffix("_scale") in bytes_ else None
        if mark:
            raise CheckpointError(
                f"{catalog.root}: {entry.name!r} belongs to a checkpoint quantised by {MARKS[mark]}; "
                f"{', '.join(METHODS)} are read. De-quantise it with the library that made it."
            )
    return settings


class _Table:
    """Entries of a catalog by name, and where each of them lies whole."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.entries = {e.name: i for i, e in enumerate(catalog.entries)}
        self.parts = np.bincount(catalog.chunks.entry, minlength=len(catalog.entries))
        self.row = np.zeros(len(catalog.entries), np.int64)
        self.row[catalog.chunks.entry] = np.arange(len(catalog.chunks))

    def entry(self, name: str) -> Entry:
        return self.catalog.entries[self.entries[name]]

    def stored(self, name: str) -> Stored:
        index, chunks = self.entries[name], self.catalog.chunks
        if self.parts[index] != 1:
            raise self.wrong(name, f"is stored in {self.parts[index]} parts; a quantised array is read from one")
        row, entry = self.row[index], self.catalog.entries[index]
        return Stored(int(chunks.file[row]), int(chunks.offset[row]), entry.dtype, entry.shape)

    def wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.catalog.root}: {name!r} {what}. Fetch the checkpoint again.")


def _fp8(table: _Table, settings: Mapping[str, Any], dtype_of: Callable[[Entry], str]) -> list[Quantised]:
    """Each `w_scale_inv` with its `w`; a float8 matrix without scales, or scales without a matrix, are refused."""
    scales = [n for n in table.entries if n.endswith(SCALE_INV)]
    weights = {n.removesuffix(SCALE_INV) for n in scales}
    if scales or settings.get("quant_method") in ("fp8", "mxfp8"):
        for name in table.entries:
            entry = table.entry(name)
            if entry.dtype in VALUES and len(entry.shape) > 1 and name not in weights:
                raise table.wrong(name, f"is {entry.dtype}, and its scales {name + SCALE_INV!r} are missing")
    size = settings.get("weight_block_size", FP8_BLOCK)
    if size is not None and not (
        isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        raise CheckpointError(
            f"{table.catalog.root}: weight_block_size is {size!r}; it is two numbers, like [128, 128]."
        )
    return [_fp8_pair(table, n, size, dtype_of) for n in scales]


def _fp8_pair(table: _Table, scale: str, size: Sequence[int] | None, dtype_of: Callable[[Entry], str]) -> Quantised:
    name = scale.removesuffix(SCALE_INV)
    if name not in table.entries:
        raise table.wrong(scale, f"has nothing to scale: {name!r} is missing")
    values, scales = table.stored(name), table.stored(scale)
    if values.dtype not in VALUES or len(values.shape) < 2:
        raise table.wrong(scale, f"scales {name!r}, which is {values.dtype}{list(values.shape)}, no float8 matrix")
    *lead, rows, columns = values.shape
    block = (rows, columns) if size is None else (size[0], size[1])
    grid = (*lead, *(-(-n // max(b, 1)) for n, b in zip((rows, columns), block, strict=True)))
    fits = scales.shape == grid or (size is None and prod(scales.shape) == prod(grid))
    if not fits or scales.dtype not in SCALES:
        raise table.wrong(
            scale,
            f"is {scales.dtype}{list(scales.shape)}; {name!r} of {list(values.shape)} in blocks of "
            f"{block[0]} x {block[1]} has {list(grid)} scales, of {', '.join(SCALES)}",
        )
    return _pair(name, values.shape, values, scales, block, dtype_of)


def _mxfp4(table: _Table, dtype_of: Callable[[Entry], str]) -> list[Quantised]:
    """Each `w_blocks` of bytes with its `w_scales`."""
    bytes_ = [n for n in table.entries if table.entry(n).dtype == "uint8"]
    blocks = {n.removesuffix(BLOCKS) for n in bytes_ if n.endswith(BLOCKS)}
    alone = [n for n in bytes_ if n.endswith(BLOCK_SCALES) and n.removesuffix(BLOCK_SCALES) not in blocks]
    if alone:
        raise table.wrong(
            alone[0], f"has nothing to scale: {alone[0].removesuffix(BLOCK_SCALES) + BLOCKS!r} is missing"
        )
    return [_mxfp4_pair(table, n.removesuffix(BLOCKS), dtype_of) for n in bytes_ if n.endswith(BLOCKS)]


def _mxfp4_pair(table: _Table, name: str, dtype_of: Callable[[Entry], str]) -> Quantised:
    blocks, scale = name + BLOCKS, name + BLOCK_SCALES
    if scale not in table.entries:
        raise table.wrong(blocks, f"are fp4 values, and their scales {scale!r} are missing")
    if name in table.entries:
        raise table.wrong(blocks, f"and {name!r} both are the weight {name!r}")
    values, scales = table.stored(blocks), table.stored(scale)
    if len(values.shape) != 4 or 2 * values.shape[-1] != MXFP4_BLOCK:
        raise table.wrong(blocks, f"is uint8{list(values.shape)}; fp4 blocks are [experts, columns, blocks, 16]")
    if scales.shape != values.shape[:-1] or scales.dtype != "uint8":
        raise table.wrong(
            scale, f"is {scales.dtype}{list(scales.shape)}; {list(values.shape)} have uint8{list(values.shape[:-1])}"
        )
    experts, columns, count, _ = values.shape
    return _pair(name, (experts, count * MXFP4_BLOCK, columns), values, scales, (MXFP4_BLOCK, 1), dtype_of)


def _pair(
    name: str,
    shape: tuple[int, ...],
    values: Stored,
    scales: Stored,
    block: tuple[int, int],
    dtype_of: Callable[[Entry], str],
) -> Quantised:
    asked = dtype_of(Entry(name, DEFAULT, shape, (name,)))
    return Quantised(name, asked if asked in READ_AS else "float32", shape, values, scales, block)


def _replaced(catalog: Catalog, found: Sequence[Quantised], spare: set[str]) -> Catalog:
    """Values and scales go, the weights come, end to end in one computed file for each file that holds values."""
    placed, files = _placed(catalog, found)
    gone = {q.name + end for q in found for end in ((BLOCKS, BLOCK_SCALES) if q.packed else ("", SCALE_INV))} | spare
    stay = np.array([e.name not in gone for e in catalog.entries], bool)
    number = np.cumsum(stay) - 1
    chunks = catalog.chunks.take(np.flatnonzero(stay[catalog.chunks.entry]))
    kept = [e for e, k in zip(catalog.entries, stay, strict=True) if k]
    made = [Entry(q.name, q.dtype, q.shape, (q.name,)) for q in placed]
    more = whole(made, [q.file for q in placed], [q.offset for q in placed])
    width = max(chunks.start.shape[1], more.start.shape[1])
    both = (replace(chunks, entry=number[chunks.entry]), replace(more, entry=more.entry + len(kept)))
    start, stop, strides = (
        stacked([getattr(c, n) for c in both], width, n == "stop") for n in ("start", "stop", "strides")
    )
    entry, file, offset = (np.concatenate([getattr(c, n) for c in both]) for n in ("entry", "file", "offset"))
    joined = Chunks(entry, start, stop, strides, file, offset)
    left_out = (f"{len(spare)} scales of activations are left out: {min(spare)}, ...",) if spare else ()
    about = {**catalog.about, "quantised": tuple(placed), "left_out": left_out}
    return replace(catalog, files=files, entries=(*kept, *made), chunks=joined, about=about)


def _placed(catalog: Catalog, found: Sequence[Quantised]) -> tuple[list[Quantised], tuple[str, ...]]:
    """Each weight with its address; the files, and once more those that are also read as computed ones."""
    holders = sorted({q.values.file for q in found})
    used = dict.fromkeys(holders, 0)
    placed = []
    for q in sorted(found, key=lambda q: (q.values.file, q.values.offset)):
        at = used[q.values.file]
        placed.append(replace(q, file=len(catalog.files) + holders.index(q.values.file), offset=at))
        used[q.values.file] += q.nbytes
    return placed, (*catalog.files, *(catalog.files[f] for f in holders))
