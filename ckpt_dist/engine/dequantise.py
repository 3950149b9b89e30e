"""Weights that are stored in low precision, read as if they were stored as what they mean: value times scale.

For a run of such a weight the stored bytes and the scales of the blocks it touches are read, multiplied in float32, and
rounded once. Nothing is kept between two reads.

Invariant: the bytes of an element depend on its value and its scale only, not on how it is asked for; scratch memory
of a thread stays below 10 MiB and four rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from ckpt_dist.averages.tensors import tensor
from ckpt_dist.engine.files import Computed, Files
from ckpt_dist.files.dtypes import itemsize, of_torch
from ckpt_dist.quantised import VALUES, Quantised, Stored

PART, PACKED = 1 << 18, 1 << 19  # elements that are made at once; of packed ones, which lie in columns, more
SPAN = 1 << 19  # bytes of packed values that are read at once to pick some columns out of
FP4 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)  # twice the value,
PAIRS = torch.tensor([(FP4[byte & 15], FP4[byte >> 4]) for byte in range(256)])  # the low half of a byte comes first
PAIRS = PAIRS.reshape(-1).view(torch.float64)  # each as one word: it is looked up in a fifth of the time
FP8 = {name: tensor(np.arange(256, dtype=np.uint8), name).to(torch.float32) for name in VALUES}
POWERS, HALVES = (  # of 2 by a scale in one byte; half of it for fp4: 2 ** 128 is no float32, 0 times it must be 0
    torch.from_numpy(np.float64(2.0) ** (np.arange(256) - bias)).to(torch.float32) for bias in (127.0, 128.0)
)


class Dequantised(Computed):
    """Files of which some are what quantised weights mean."""

    def __init__(self, files: Files, weights: Sequence[Quantised]) -> None:
        self.weights: dict[int, list[Quantised]] = {}
        super().__init__(files, self.weights)
        for q in weights:
            self.weights.setdefault(q.file, []).append(q)
        self.begins = {file: [q.offset for q in those] for file, those in self.weights.items()}

    def compute(self, file: int, offset: int, into: memoryview) -> None:
        q = self.weights[file][bisect_right(self.begins[file], offset) - 1]
        out = torch.frombuffer(into, dtype=of_torch(torch, q.dtype))
        first, size = (offset - q.offset) // itemsize(q.dtype), prod(q.shape[-2:])
        (make, part), done = (self._fp4, PACKED) if q.packed else (self._fp8, PART), 0
        while done < len(out):
            matrix, low = divmod(first + done, size)
            high = min(low + part, low + len(out) - done, size)
            _round(make(q, matrix, low, high), out[done : done + high - low])
            done += high - low

    def _fp8(self, q: Quantised, matrix: int, low: int, high: int) -> torch.Tensor:
        """Elements `low` to `high` of a matrix, a run of the file; of the scales those of all rows that this touches."""
        (height, width), (down, right) = q.shape[-2:], q.block
        top, bottom = low // width, -(-high // width)
        first, stop, across = top // down, -(-bottom // down), -(-width // right)
        values = self._grid(q.values, 0, (1, high - low), 0, matrix * height * width + low)
        scales = self._grid(q.scales, matrix * -(-height // down) + first, (stop - first, across), across, 0)
        spread = _wide(scales).index_select(1, torch.arange(width) // right)
        each = spread.index_select(0, torch.arange(top, bottom) // down - first).reshape(-1)
        return _looked_up(FP8[q.values.dtype], values.view(torch.uint8))[0].mul_(
            each[low - top * width : high - top * width]
        )

    def _fp4(self, q: Quantised, matrix: int, low: int, high: int) -> torch.Tensor:
        """The same, of fp4 values: a row of the weight is a column of what is stored, in bytes of two values."""
        (height, width), down = q.shape[-2:], q.block[0]
        top, bottom = low // width, -(-high // width)
        byte, first = top // 2, top // down
        columns = -(-bottom // 2) - byte, -(-bottom // down) - first
        spread = torch.arange(top, bottom) // down - first
        made = torch.empty(width, bottom - top)
        step = max(1, 2 * SPAN // height)
        for row in range(0, width, step):
            count, at = min(step, width - row), matrix * width + row
            packed = self._grid(q.values, at, (count, columns[0]), height // 2, byte)
            scales = self._grid(q.scales, at, (count, columns[1]), height // down, first)
            values = _looked_up(PAIRS, packed).view(torch.float32)[:, top - 2 * byte : bottom - 2 * byte]
            torch.mul(values, _wide(scales, HALVES).index_select(1, spread), out=made[row : row + count])
        return made.t().reshape(-1)[low - top * width : high - top * width]

    def _grid(self, stored: Stored, row: int, shape: tuple[int, int], width: int, column: int) -> torch.Tensor:
        """Some rows and columns of a stored array of rows of `width` elements, by one read from the first to the last."""
        item = itemsize(stored.dtype)
        span = np.empty(((shape[0] - 1) * width + shape[1]) * item, np.uint8)
        self.files.read(stored.file, stored.offset + (row * width + column) * item, memoryview(span))
        return tensor(span, stored.dtype).as_strided(shape, (width, 1))


def _round(product: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(product)
    if product.sum().isnan():  # libraries do not agree on the bits of what is no number
        out.masked_fill_(product.isnan(), float("nan"))


def _wide(scales: torch.Tensor, powers: torch.Tensor = POWERS) -> torch.Tensor:
    """Scales as float32; a byte is an exponent."""
    return _looked_up(powers, scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)


def _looked_up(table: torch.Tensor, bytes_: torch.Tensor) -> torch.Tensor:
    """What each byte stands for, in the same shape."""
    return table.index_select(0, bytes_.reshape(-1).to(torch.int32)).reshape(bytes_.shape)
