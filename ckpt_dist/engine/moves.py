"""One tile: gathering it from the files of a checkpoint, and scattering it into the files of another.

A tile is a dense run of elements in memory; a move says which box of it lies where in a file. Runs that are
contiguous on both sides are read or written in place; anything else is one strided copy through a small scratch.

Invariant: every byte of a file that is asked for is read once, gaps of GAP bytes and more are not read, and scratch
memory stays below SPAN bytes plus one tile. An exact gather leaves out smaller gaps too, where they are a tenth of a box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import row_major
from ckpt_dist.plan import Moves

SPAN = 4 << 20  # bytes of a file read at once to pick strided elements out of
GAP = 1 << 10  # bytes between strided elements that are worth a call to leave out
EXACT_GAP = 128  # the same for a gather that is exact
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}

Array = NDArray[Any]
Dim = tuple[int, int, int]  # extent, stride in the file, stride in the tile; elements


class Move(NamedTuple):
    """A box: `dims` outermost first as the tile sees it, `at` in bytes of a file, `tile_at` in elements."""

    file: int
    at: int
    tile_at: int
    dims: tuple[Dim, ...]

    @property
    def run(self) -> int:
        """The elements of a move that is one contiguous run on both sides, else 0."""
        if len(self.dims) != 1:
            return 0
        extent, stride, tile_stride = self.dims[0]
        return extent if stride == tile_stride == 1 else 0


def simplify(extent: list[int], stride: list[int], tile_stride: list[int]) -> tuple[Dim, ...]:
    """The same box with as few dims as possible: `simplify([2, 3], [3, 1], [3, 1])` -> `((6, 1, 1),)`."""
    dims = [d for d in zip(extent, stride, tile_stride, strict=True) if d[0] != 1]
    dims.sort(key=lambda d: -d[2])
    merged: list[Dim] = []
    for n, s, t in reversed(dims):
        if merged and s == merged[-1][1] * merged[-1][0] and t == merged[-1][2] * merged[-1][0]:
            merged[-1] = (n * merged[-1][0], merged[-1][1], merged[-1][2])
        else:
            merged.append((n, s, t))
    return tuple(reversed(merged)) or ((1, 1, 1),)


def by_tile(moves: Moves, file_of_chunk: NDArray[np.int64], first: int, last: int) -> Iterator[list[Move]]:
    """The moves of each tile from first to last, in order; a tile that nothing touches gives an empty list."""
    cuts = np.searchsorted(moves.tile, np.arange(first, last + 1)).tolist()
    part = slice(cuts[0], cuts[-1])
    extent, stride, tile_stride = moves.extent[part], moves.stride[part], moves.tile_stride[part]
    dense = row_major(extent)
    alike = (extent == 1) | ((stride == dense) & (tile_stride == dense))
    run = np.where(alike.all(axis=1), extent.prod(axis=1), 0).tolist()  # most are one, and simplify takes its time
    file, at, tile_at = file_of_chunk[moves.chunk[part]].tolist(), moves.at[part].tolist(), moves.tile_at[part].tolist()

    def dims(row: int) -> tuple[Dim, ...]:
        return simplify(extent[row].tolist(), stride[row].tolist(), tile_stride[row].tolist())

    for lo, hi in pairwise(cut - cuts[0] for cut in cuts):
        yield [Move(file[i], at[i], tile_at[i], ((run[i], 1, 1),) if run[i] else dims(i)) for i in range(lo, hi)]


def gather(
    tile: Array, moves: list[Move], read: Callable[[int, int, memoryview], None], *, exact: bool = False
) -> None:
    """Fill a tile (a 1-D array of words) from files; `read(file, offset, into)` reads exactly what it is told."""
    item = tile.itemsize
    raw = memoryview(tile.view(np.uint8)) if tile.size else memoryview(b"")
    for move in moves:
        if move.run:
            read(move.file, move.at, raw[move.tile_at * item : (move.tile_at + move.run) * item])
        else:
            _gather_strided(tile, move.file, move.at, move.tile_at, move.dims, read, exact)


def _gather_strided(
    tile: Array,
    file: int,
    at: int,
    tile_at: int,
    dims: tuple[Dim, ...],
    read: Callable[[int, int, memoryview], None],
    exact: bool,
) -> None:
    item, span = tile.itemsize, _span(dims)
    if _in_steps(dims, item, exact):
        (n, s, t), rest = _outermost(dims)
        for i in range(n):
            _gather_strided(tile, file, at + i * s * item, tile_at + i * t, rest, read, exact)
        return
    scratch = np.empty(span, tile.dtype)
    read(file, at, memoryview(scratch.view(np.uint8)))
    shape = tuple(n for n, _, _ in dims)
    source: Array = np.ndarray(shape, tile.dtype, scratch, 0, tuple(s * item for _, s, _ in dims))
    target: Array = np.ndarray(shape, tile.dtype, tile, tile_at * item, tuple(t * item for _, _, t in dims))
    target[...] = source


def _span(dims: tuple[Dim, ...]) -> int:
    """Elements of the file from a box's first to its last."""
    return sum((n - 1) * s for n, s, _ in dims) + 1


def _in_steps(dims: tuple[Dim, ...], item: int, exact: bool = False) -> bool:
    """Whether a box is read step by step instead of at once: it is too long, or the gaps are wide."""
    (n, step, _), rest = _outermost(dims)
    gap, span = (step - _span(rest)) * item, _span(dims)
    wasteful = exact and gap >= EXACT_GAP and span * 10 > prod(m for m, *_ in dims) * 11
    wide = n > 1 and (gap >= GAP or wasteful)
    return wide or (span * item > SPAN and (len(dims) > 1 or step * item > SPAN))


def _outermost(dims: tuple[Dim, ...]) -> tuple[Dim, tuple[Dim, ...]]:
    """The dim with the longest stride in the file, and the others."""
    outer = max(range(len(dims)), key=lambda k: dims[k][1])
    return dims[outer], dims[:outer] + dims[outer + 1 :] or ((1, 1, 1),)


def read_bytes(dims: tuple[Dim, ...], item: int) -> int:
    """Bytes that `gather` reads for a box: `read_bytes(((3, 100, 1),), 2)` -> 402, of which 6 are wanted."""
    if _in_steps(dims, item):
        (n, _, _), rest = _outermost(dims)
        return n * read_bytes(rest, item)
    return _span(dims) * item


def scatter(tile: Array, moves: list[Move], write: Callable[[int, int, memoryview], None]) -> None:
    """Write a tile to where its boxes lie; `write(file, offset, data)` writes all of data."""
    item = tile.itemsize
    raw = memoryview(tile.view(np.uint8)) if tile.size else memoryview(b"")
    for move in moves:
        if move.run:
            write(move.file, move.at, raw[move.tile_at * item : (move.tile_at + move.run) * item])
            continue
        dims = sorted(move.dims, key=lambda d: -d[1])
        source: Array = np.ndarray(
            tuple(n for n, *_ in dims), tile.dtype, tile, move.tile_at * item, tuple(t * item for *_, t in dims)
        )
        dense = np.ascontiguousarray(source)
        cut, length = _dense_suffix(dims)
        bytes_ = memoryview(dense.reshape(-1).view(np.uint8))
        for row, index in enumerate(product(*(range(n) for n, *_ in dims[:cut]))):
            offset = sum(i * s for i, (_, s, _) in zip(index, dims[:cut], strict=True))
            write(move.file, move.at + offset * item, bytes_[row * length * item : (row + 1) * length * item])


def _dense_suffix(dims: list[Dim]) -> tuple[int, int]:
    """How many outer dims are left when the innermost ones are one run in the file, and the run's length."""
    cut, length = len(dims), 1
    while cut and dims[cut - 1][1] == length:
        length *= dims[cut - 1][0]
        cut -= 1
    return cut, length
