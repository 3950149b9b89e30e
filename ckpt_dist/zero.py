"""ZeRO: which elements of each parameter lie where in the flat tensors of data-parallel ranks.

Facts: DeepSpeed 0.19.8. Stages 1 and 2 put the parameters of a group end to end and cut that line into one slice for
each rank; stage 3 cuts each parameter by itself and puts a rank's parts end to end. Either way a rank holds a run of
the row-major elements of a parameter, and a run is a few boxes of it.

Invariant: pure integers. The runs of one parameter are disjoint and hold all of it, or the caller is told how many
elements there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_dist.box import Ints, expand, ints, row_major, split_interval


@dataclass(frozen=True)
class Runs:
    """Elements `lo` to `hi` of parameter `which`, which begin at element `at` of slice `slice`; one row each."""

    which: Ints
    lo: Ints
    hi: Ints
    slice: Ints
    at: Ints

    def __len__(self) -> int:
        return len(self.which)

    def take(self, rows: Ints) -> Runs:
        return Runs(*(getattr(self, c)[rows] for c in ("which", "lo", "hi", "slice", "at")))


def cut(starts: Sequence[int] | Ints, numels: Sequence[int] | Ints, lengths: Sequence[int] | Ints) -> Runs:
    """A line with a parameter at each of `starts`, cut into slices of these lengths.

    `cut([0, 6], [6, 2], [4, 4])`: parameter 0 is 0:4 of slice 0 and 4:6 of slice 1, parameter 1 is 0:2 from element 2
    of slice 1.
    """
    starts, numels, ends = ints(starts), ints(numels), np.cumsum(ints(lengths))
    begins = ends - ints(lengths)
    first = np.searchsorted(ends, starts, "right")
    which, slice_ = expand(first, np.searchsorted(begins, starts + numels, "left") - first)
    lo = np.maximum(begins[slice_] - starts[which], 0)
    hi = np.minimum(ends[slice_] - starts[which], numels[which])
    runs = Runs(which, lo, hi, slice_, starts[which] + lo - begins[slice_])
    return runs.take(np.flatnonzero(hi > lo))


def parts(numels: Sequence[int] | Ints, world: int, lengths: Sequence[Sequence[int]]) -> Runs:
    """Each parameter cut into `world` equal parts, the last ones short; rank r has its parts end to end, in tensors of
    `lengths[r]`, which count as the slices: rank 0's, then rank 1's.

    `parts([5, 2], 2, [[4], [4]])`: rank 0 has 0:3 and 0:1, rank 1 has 3:5 and, after one element of padding, 1:2.
    """
    numels = ints(numels)
    part = -(-numels // world)
    starts = np.cumsum(part) - part
    which, rank = expand(np.zeros_like(numels), np.full_like(numels, world))
    lo = np.minimum(rank * part[which], numels[which])
    hi = np.minimum(lo + part[which], numels[which])
    totals = ints([sum(of) for of in lengths])
    line = cut((np.cumsum(totals) - totals)[rank] + starts[which], hi - lo, [n for of in lengths for n in of])
    return Runs(which[line.which], lo[line.which] + line.lo, lo[line.which] + line.hi, line.slice, line.at)


def short(numels: Sequence[int] | Ints, runs: Runs) -> Ints:
    """How many elements of each parameter no slice holds."""
    held = np.zeros(len(numels), np.int64)
    np.add.at(held, runs.which, runs.hi - runs.lo)
    return ints(numels) - held


def boxes(shape: Sequence[int], lo: Ints, hi: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Runs of a row-major tensor as boxes: (row of the run, start, stop, elements from the run's first to the box's).

    `boxes((3, 4), [2], [9])` -> rows `[0, 0, 0]`, the boxes `0, 2:4`, `1, 0:4`, `2, 0:1`, elements `[0, 2, 6]`.
    """
    row, start, stop = split_interval(shape, lo, hi)
    return row, start, stop, start @ row_major(shape) - lo[row]
