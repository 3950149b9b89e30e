"""Boxes: half-open `start, stop` per axis, many at a time, as rows of integer arrays.

Invariant: everything here is exact integer arithmetic on arrays of shape (boxes, axes); no
tensors, no files. A box with `start == stop` on any axis is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = "NDArray[np.int64]"
Box: TypeAlias = "tuple[tuple[int, int], ...]"


def ints(values: Any) -> Ints:
    """Any integers as an int64 array."""
    return np.asarray(values, dtype=np.int64)


def volume(start: Ints, stop: Ints) -> Ints:
    """Elements of each box: `volume([[0, 1]], [[2, 4]])` -> `[6]`; a box without axes holds one element."""
    return ints(np.prod(np.maximum(stop - start, 0), axis=-1, dtype=np.int64))


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes: `intersect(((0, 4),), ((3, 9),))` -> `((3, 4),)`, or None."""
    common = tuple((max(s, u), min(t, v)) for (s, t), (u, v) in zip(a, b, strict=True))
    return common if all(s < t for s, t in common) else None


def row_major(lengths: Sequence[int] | Ints) -> Ints:
    """Strides in elements of a dense array: `row_major([2, 3, 4])` -> `[12, 4, 1]`."""
    sizes = np.maximum(ints(lengths), 1)
    inner = np.cumprod(sizes[..., ::-1], axis=-1, dtype=np.int64)[..., ::-1]
    return np.concatenate([inner[..., 1:], np.ones_like(inner[..., :1])], axis=-1)


def wider(rows: Ints, width: int, fill: int) -> Ints:
    """Boxes with more dims: `wider([[2], [3]], 2, 1)` -> `[[2, 1], [3, 1]]`."""
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=fill)


def stacked(tables: Iterable[Ints], width: int, fill: int) -> Ints:
    """Boxes of differing numbers of dims as one table: `stacked([[[2]], [[3, 4]]], 2, 1)` -> `[[2, 1], [3, 4]]`."""
    return np.concatenate([np.zeros((0, width), np.int64), *(wider(rows, width, fill) for rows in tables)])


def distinct(values: Ints, axis: int | None = None) -> Ints:
    """`numpy.unique`, counting: without that its first call imports numpy.ma, for 40 ms of a look at a checkpoint."""
    return ints(np.unique(values, return_counts=True, axis=axis)[0])


def expand(first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """All `(row, value)` with `first[row] <= value < first[row] + counts[row]`, row by row.

    `expand([5, 0], [2, 1])` -> `([0, 0, 1], [5, 6, 0])`.
    """
    counts = np.maximum(counts, 0)
    rows = np.repeat(np.arange(len(counts)), counts)
    begins = np.cumsum(counts) - counts
    return rows, first[rows] + np.arange(len(rows)) - begins[rows]


def split_interval(lengths: Sequence[int], lo: Ints, hi: Ints) -> tuple[Ints, Ints, Ints]:
    """Intervals of a product of axes, as boxes over those axes: at most `2k - 1` boxes for `k` axes.

    `split_interval([3, 4], [2], [9])` -> rows `[0, 0, 0]`, the boxes `0, 2:4`, `1, 0:4` and `2, 0:1`.
    Returns `(row of the interval, start, stop)`, start and stop of shape (boxes, k); disjoint, in order.
    """
    rows = np.arange(len(lo))
    if len(lengths) == 0:
        keep = rows[hi > lo]
        return keep, np.zeros((len(keep), 0), np.int64), np.zeros((len(keep), 0), np.int64)
    if len(lengths) == 1:
        keep = rows[hi > lo]
        return keep, lo[keep, None], hi[keep, None]
    inner = int(np.prod(ints(lengths[1:])))
    if inner == 0:
        return (
            split_interval([], hi, hi)[0],
            np.zeros((0, len(lengths)), np.int64),
            np.zeros((0, len(lengths)), np.int64),
        )
    first, last = -(-lo // inner), hi // inner  # whole steps of the outermost axis are first <= i < last
    parts = []
    head = (lo % inner != 0) & (hi > lo)
    parts.append(
        _one_step(
            lengths,
            rows[head],
            (lo // inner)[head],
            (lo % inner)[head],
            np.minimum(inner, hi - lo // inner * inner)[head],
        )
    )
    whole = last > first
    count = int(whole.sum())
    start, stop = np.zeros((count, len(lengths)), np.int64), np.tile(ints(lengths), (count, 1))
    start[:, 0], stop[:, 0] = first[whole], last[whole]
    parts.append((rows[whole], start, stop))
    tail = (hi % inner != 0) & (last >= first) & (hi > lo)  # otherwise the head already took it
    parts.append(_one_step(lengths, rows[tail], last[tail], np.zeros_like(last[tail]), (hi % inner)[tail]))
    row, start, stop = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(row, kind="stable")
    return row[order], start[order], stop[order]


def _one_step(lengths: Sequence[int], rows: Ints, step: Ints, lo: Ints, hi: Ints) -> tuple[Ints, Ints, Ints]:
    """Intervals that stay within one step of the outermost axis."""
    row, start, stop = split_interval(lengths[1:], lo, hi)
    outer = step[row][:, None]
    return rows[row], np.hstack([outer, start]), np.hstack([outer + 1, stop])
