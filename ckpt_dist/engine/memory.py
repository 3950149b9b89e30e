"""Tensors in memory, read and written at byte offsets as files are: a running program as a side of a fill.

A tensor's "file" is its whole storage, so that its own strides and its storage offset say where each element lies.

Invariant: memory that is not on the CPU is filled and read by whole runs of bytes; nothing here changes a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ckpt_dist.engine.files import Reader


class Memory:
    """The storages of some tensors, by number. What is written is there when `write` returns."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.storages = [_storage(t) for t in tensors]
        self.arrays: list[Any] = [s.numpy() if s.device.type == "cpu" else None for s in self.storages]

    def read(self, file: int, offset: int, into: memoryview) -> None:
        array = self.arrays[file]
        if array is not None:
            into[:] = memoryview(array)[offset : offset + len(into)]
        else:
            np.frombuffer(into, np.uint8)[:] = self.storages[file][offset : offset + len(into)].cpu().numpy()

    def write(self, file: int, offset: int, data: memoryview) -> None:
        array = self.arrays[file]
        if array is not None:
            memoryview(array)[offset : offset + len(data)] = data
        else:
            self.storages[file][offset : offset + len(data)].copy_(torch.frombuffer(data, dtype=torch.uint8))

    def copy(
        self, source: Reader, from_file: int, from_at: int, file: int, at: int, nbytes: int, buffer: memoryview
    ) -> None:
        """Bytes of a file straight into the tensor's memory; a device gets them by way of the CPU's."""
        array = self.arrays[file]
        place = memoryview(np.empty(nbytes, np.uint8) if array is None else array[at : at + nbytes])
        source.read(from_file, from_at, place)
        if array is None:
            self.write(file, at, place)


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the storage that a tensor is a view of."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())
