"""Weights that are stored in low precision, read as if they were stored as what they mean: value times scale.

A run of such a weight is cut into boxes of one matrix; for each the stored bytes and the scales of the blocks it
touches are read, multiplied in float32, and rounded once. Nothing is kept between two reads.

Invariant: the bytes of an element depend on its value and its scale only, not on how it is asked for; scratch memory
of a thread stays below 12 MiB.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from ckpt_dist.averages.tensors import tensor
from ckpt_dist.box import ints, split_interval
from ckpt_dist.engine.files import Files
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.quantised import VALUES, Quantised, Stored

PART = 1 << 19  # elements that are made at once
SPAN = 1 << 20  # bytes of packed rows that are read at once to pick some columns out of
FP4 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)  # twice the value,
PAIRS = torch.tensor([(FP4[byte & 15], FP4[byte >> 4]) for byte in range(256)])  # the low half of a byte comes first
PAIRS = PAIRS.reshape(-1).view(torch.float64)  # each as one word: it is looked up in a fifth of the time
FP8 = {name: tensor(np.arange(256, dtype=np.uint8), name).to(torch.float32) for name in VALUES}
POWERS, HALVES = (  # of 2 by a scale in one byte; half of it for fp4: 2 ** 128 is no float32, 0 times it must be 0
    torch.from_numpy(np.float64(2.0) ** (np.arange(256) - bias)).to(torch.float32) for bias in (127.0, 128.0)
)


class Dequantised:
    """Files of which some are computed; to a tile it is a reader like any other."""

    def __init__(self, files: Files, weights: Sequence[Quantised]) -> None:
        self.files = files
        self.weights: dict[int, list[Quantised]] = {}
        for q in weights:
            self.weights.setdefault(q.file, []).append(q)
        self.begins = {file: [q.offset for q in those] for file, those in self.weights.items()}

    @property
    def bytes_read(self) -> int:
        return self.files.bytes_read

    def close(self) -> None:
        self.files.close()

    def read(self, file: int, offset: int, into: memoryview) -> None:
        if file not in self.weights:
            self.files.read(file, offset, into)
            return
        q = self.weights[file][bisect_right(self.begins[file], offset) - 1]
        out = torch.frombuffer(into, dtype=getattr(torch, q.dtype))
        first = (offset - q.offset) // itemsize(q.dtype)
        for low in range(0, len(out), PART):
            part = out[low : low + PART]
            self._run(q, first + low, part)

    def _run(self, q: Quantised, first: int, out: torch.Tensor) -> None:
        """The elements from `first` on of a weight, as boxes of one row or of whole rows of one matrix."""
        *lead, rows, columns = q.shape
        lengths = (int(np.prod(lead, dtype=np.int64)), rows, columns)
        _, starts, stops = split_interval(lengths, ints([first]), ints([first + len(out)]))
        done = 0
        make = self._fp4 if q.packed else self._fp8
        for (low, *start), (high, *stop) in zip(starts.tolist(), stops.tolist(), strict=True):
            for matrix in range(low, high):
                product = make(q, matrix, (start[0], stop[0]), (start[1], stop[1])).reshape(-1)
                piece = out[done : done + len(product)].copy_(product)
                done += len(product)
                if product.sum().isnan():  # libraries do not agree on the bits of what is no number
                    piece.masked_fill_(product.isnan(), float("nan"))

    def _fp8(self, q: Quantised, matrix: int, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """Value times scale of a box; it is one row, or whole rows, so its values are one run."""
        (height, width), (down, right) = q.shape[-2:], q.block
        (top, bottom), (left, end) = rows, columns
        bytes_ = self._grid(q.values, matrix * height + top, (bottom - top, end - left), width, left).view(torch.uint8)
        grid = (-(-height // down), -(-width // right))
        first, across = top // down, left // right
        shape = (-(-bottom // down) - first, -(-end // right) - across)
        scales = self._grid(q.scales, matrix * grid[0] + first, shape, grid[1], across)
        spread = _wide(scales).index_select(1, torch.arange(left, end) // right - across)
        return _looked_up(FP8[q.values.dtype], bytes_).mul_(
            spread.index_select(0, torch.arange(top, bottom) // down - first)
        )

    def _fp4(self, q: Quantised, matrix: int, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """The same, of fp4 values: a column of the weight is a row of what is stored, in bytes of two values."""
        (height, width), down = q.shape[-2:], q.block[0]
        (top, bottom), (left, end) = rows, columns
        byte, length, first = top // 2, -(-bottom // 2) - top // 2, top // down
        across = torch.arange(top, bottom) // down - first
        made = torch.empty(end - left, bottom - top)
        step = max(1, min(2 * SPAN // height, PART // (bottom - top)))
        for low in range(left, end, step):
            count = min(step, end - low)
            packed = self._grid(q.values, matrix * width + low, (count, length), height // 2, byte)
            scales = self._grid(
                q.scales, matrix * width + low, (count, -(-bottom // down) - first), height // down, first
            )
            values = _looked_up(PAIRS, packed).view(torch.float32)[:, top - 2 * byte : bottom - 2 * byte]
            torch.mul(values, _wide(scales, HALVES).index_select(1, across), out=made[low - left : low - left + count])
        return made.t()

    def _grid(self, stored: Stored, row: int, shape: tuple[int, int], width: int, column: int) -> torch.Tensor:
        """Some rows and columns of a stored array of rows of `width` elements, by one read from the first to the last."""
        item = itemsize(stored.dtype)
        span = np.empty(((shape[0] - 1) * width + shape[1]) * item, np.uint8)
        self.files.read(stored.file, stored.offset + (row * width + column) * item, memoryview(span))
        return tensor(span, stored.dtype).as_strided(shape, (width, 1))


def _wide(scales: torch.Tensor, powers: torch.Tensor = POWERS) -> torch.Tensor:
    """Scales as float32; a byte is an exponent."""
    return _looked_up(powers, scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)


def _looked_up(table: torch.Tensor, bytes_: torch.Tensor) -> torch.Tensor:
    """What each byte stands for, in the same shape."""
    return table.index_select(0, bytes_.reshape(-1).to(torch.int32)).reshape(bytes_.shape)
