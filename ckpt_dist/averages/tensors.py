"""Tiles as torch tensors: the cast, and the weighted mean. Besides `engine.dequantise` the only place where values change.

Invariant: floating values are summed in fp32 (fp64 for fp64) in the order given and rounded once; integers,
booleans and complex numbers are never summed and never cast to floating types.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckpt_dist.averages.fused import Pass, one_pass
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files.dtypes import is_floating, of_torch
from ckpt_dist.plan import HELD

DEVICE = torch.device("cpu")
SUMMED = set[str]()  # how this process has summed since `use`: both ways give the same bytes, and differ in time


class Room(threading.local):
    """What a thread keeps for sums and results: fresh memory would cost more than the sums."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def of(self, use: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """Memory on DEVICE with anything in it, the same for the same use."""
        kept, nbytes = self.kept.get(use), numel * dtype.itemsize
        if kept is None or len(kept) < nbytes or kept.device != DEVICE:
            kept = self.kept[use] = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
        return kept[:nbytes].view(dtype)


ROOM = Room()


def use(device: str, local_rank: int) -> str:
    """Choose where sums and casts are computed, once for a process: `auto` is this rank's GPU if there is one."""
    global DEVICE
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("engine.device=cuda, but torch sees no GPU here. Use engine.device=auto or cpu.")
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    DEVICE = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    SUMMED.clear()
    return str(DEVICE)


def tensor(words: NDArray[Any], dtype: str) -> torch.Tensor:
    """The words of a tile as a tensor that shares their memory."""
    return torch.from_numpy(words).view(of_torch(torch, dtype))


def words(value: torch.Tensor, like: int) -> NDArray[Any]:
    """A tensor's memory as words of some size in bytes."""
    kinds: dict[int, type[Any]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
    return value.cpu().contiguous().view(torch.uint8).numpy().view(kinds[like])


def cast(value: NDArray[Any], dtype: str, want: str) -> NDArray[Any]:
    """One rounding from one floating dtype to another; anything else is refused. It is valid until this thread's next."""
    if not (is_floating(dtype) and is_floating(want)):
        raise CheckpointError(f"A {dtype} tensor cannot become {want}: only floating types are cast.")
    target = of_torch(torch, want)
    return words(ROOM.of("result", target, value.size).copy_(tensor(value, dtype).to(DEVICE)), target.itemsize)


COPIED = (
    "*e_score_correction_bias",
    "*expert_bias",
    "*expert_bias_E",
    "*_extra_state",
    "*num_batches_tracked",
)  # routing bias, scales and counts: the last one's


class Differs(CheckpointError):
    """Values that must not be averaged differ between the sources."""


def mean(
    values: Iterable[NDArray[Any]], dtypes: Sequence[str], coefficients: Sequence[float], want: str
) -> NDArray[Any]:
    """The weighted mean of tiles; coefficients sum to 1. Equal ones are one sum and one division, others are applied before the sum.
    It is valid until this thread's next. HELD values of at most 4 bytes an element must stay as they are at a time.

    >>> import numpy as np
    >>> mean([np.float32([1, 2]).view(np.uint32), np.float32([3, 4]).view(np.uint32)], ["float32"] * 2, [.5, .5], "float32").view(np.float32)
    array([2., 3.], dtype=float32)
    """
    if not is_floating(want):
        return same(values, "complex" if want.startswith("complex") else "integer")
    if any(d.startswith("float8") for d in (want, *dtypes)):
        raise CheckpointError(
            "8-bit floats carry scales of their own and cannot be averaged; de-quantise the checkpoints first."
        )
    uniform, count = len(set(coefficients)) == 1, len(coefficients)
    divide = uniform and count & (count - 1) != 0  # a power of two: the same bits by its inverse, in half the time
    scale = (count if divide else 1 / count) if uniform else 1.0
    factors = [1.0] * count if uniform else coefficients
    if set(dtypes) == {"bfloat16"}:  # as far as fp32, where the least of all, as masks have it, would not fit in twice
        room = 2.0 ** math.ceil(math.log2(max(sum(map(abs, factors)), 1)))
        factors, scale = [f / room for f in factors], scale / room if divide else scale * room
    if DEVICE.type == "cpu" and len(set(dtypes)) == 1 and (run := one_pass(dtypes[0], want, divide)):
        SUMMED.add(f"{want} is summed in one pass, by llvmlite")
        return _at_once(run, iter(values), factors, scale, want)
    SUMMED.add(f"{want} is summed one source after the other, by torch")
    return _one_by_one(values, dtypes, factors, scale, divide, want)


def _at_once(
    run: Pass, values: Iterator[NDArray[Any]], factors: Sequence[float], scale: float, want: str
) -> NDArray[Any]:
    first = next(values)
    numel, more = first.size, len(factors) > HELD
    result = ROOM.of("result", of_torch(torch, want), numel)
    total = ROOM.of("sum", torch.float32, numel).data_ptr() if more else 0
    equal = ROOM.of("equal", torch.bool, numel).data_ptr() if more else 0
    run(itertools.chain([first], values), factors, scale, numel, total, equal, result.data_ptr())
    return words(result, result.itemsize)


def _one_by_one(
    values: Iterable[NDArray[Any]],
    dtypes: Sequence[str],
    factors: Sequence[float],
    scale: float,
    divide: bool,
    want: str,
) -> NDArray[Any]:
    """By torch, on DEVICE: in fp64, on a GPU, without the extra `fast`, or of values of several dtypes."""
    wide = torch.float64 if want == "float64" or "float64" in dtypes else torch.float32
    target = of_torch(torch, want)
    total: torch.Tensor | None = None
    first: torch.Tensor | None = None
    constant: torch.Tensor | None = (
        None  # which elements are equal in all sources: 16-bit rounding finds them again, fp32 does not
    )
    for value, dtype, factor in zip(values, dtypes, factors, strict=True):
        part = tensor(value, dtype).to(DEVICE)
        if total is None:
            total = ROOM.of("sum", wide, value.size).copy_(part)
            if target == wide:
                first = ROOM.of("first", wide, value.size).copy_(total)
                constant = ROOM.of("equal", torch.bool, value.size).fill_(True)
            if factor != 1:
                total.mul_(factor)
            continue
        if constant is not None:
            constant &= first == part
        if part.dtype != wide:  # else torch would, each time in fresh memory
            part = ROOM.of("part", wide, value.size).copy_(part)
        total.add_(part, alpha=factor)
    assert total is not None
    if divide:
        total.div_(scale)
    elif scale != 1:
        total.mul_(scale)
    if constant is not None and first is not None:
        torch.where(constant, first, total, out=total)
    return words(total if target == wide else ROOM.of("result", target, total.numel()).copy_(total), target.itemsize)


def last(values: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """The value of the last source: for what training sets, but not by gradients."""
    *_, value = values
    return value.copy()


def same(values: Iterable[NDArray[Any]], kind: str) -> NDArray[Any]:
    """Integers, booleans and complex numbers: equal in all sources, or Differs."""
    first: NDArray[Any] | None = None
    for value in values:
        if first is None:
            first = value.copy()
        elif not np.array_equal(first, value):
            raise Differs(f"{kind} values differ between the checkpoints; only floating ones are averaged")
    assert first is not None
    return first
