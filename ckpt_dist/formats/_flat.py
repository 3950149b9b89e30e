"""Runs of a model-parallel rank's tensor in the flat tensors of its optimizer, as boxes of the whole tensor.

Invariant: a box lies in one run and in one piece of what the rank holds of the whole; a tensor is all there or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from ckpt_dist import zero
from ckpt_dist.box import ints
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.inert import TensorRef, strides_of
from ckpt_dist.ranks import Part, Piece


@dataclass(frozen=True)
class Run:
    """Elements `lo` to `hi` of a rank's tensor lie at an address in a file."""

    lo: int
    hi: int
    file: int
    address: int
    dtype: str


def dense(ref: TensorRef, name: str) -> TensorRef:
    """The same tensor as if it lay row by row, which is how its runs count its elements, in a storage of that name."""
    return TensorRef(replace(ref.storage, key=name), ref.dtype, 0, ref.shape, strides_of(ref.shape))


def boxes(where: Path, part: Part, runs: Sequence[Run]) -> Iterator[tuple[Part, int, int]]:
    """The boxes of the whole tensor that the runs of a rank's hold, with their files and addresses; `part` says where a
    dense one would lie."""
    shape = part.ref.shape
    if (have := sum(run.hi - run.lo for run in runs)) != prod(shape):
        raise CheckpointError(
            f"{where}: the optimizer's files have {have} elements of {part.name!r}, the model's file has {list(shape)}. They are of "
            "two runs."
        )
    if any(tuple(steps) != strides_of(shape) for *_, steps in part.pieces):
        raise CheckpointError(
            f"{where}: the rows of {part.name!r} lie in an order of their own (checkpoint version 1), of which only the model's own "
            "weights are read. Leave source.weights out."
        )
    for run in runs:
        _, start, stop, past = zero.boxes(shape, ints([run.lo]), ints([run.hi]))
        rows = zip(start.tolist(), stop.tolist(), past.tolist(), strict=True)
        pieces = [piece for lo, hi, at in rows for whole in part.pieces if (piece := _shared(whole, shape, lo, hi, at))]
        yield Part(part.name, run.dtype, part.shape, pieces, part.ref, part.alike), run.file, run.address


def _shared(whole: Piece, shape: Sequence[int], lo: Sequence[int], hi: Sequence[int], at: int) -> Piece | None:
    """What of a box of a rank's tensor, whose first element is `at` elements from an address, is in one piece of the whole."""
    strides = strides_of(shape)
    here = [int(n) for n in np.unravel_index(whole[2], shape)] if shape else []
    first = [max(a, b) for a, b in zip(lo, here, strict=True)]
    last = [min(a, b + n - m) for a, b, m, n in zip(hi, here, whole[0], whole[1], strict=True)]
    if any(a >= b for a, b in zip(first, last, strict=True)):
        return None
    move = [m - b for m, b in zip(whole[0], here, strict=True)]
    offset = at + sum((f - a) * s for f, a, s in zip(first, lo, strides, strict=True))
    return (
        [f + d for f, d in zip(first, move, strict=True)],
        [n + d for n, d in zip(last, move, strict=True)],
        offset,
        strides,
    )
