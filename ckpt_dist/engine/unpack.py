"""Compressed chunks read as if they were stored as they are: a chunk is opened whole, and a few are kept.

Tiles ask for a chunk piece by piece, one after the other and from several threads at a time.

Invariant: what is kept, and the chunk that is being opened, stay within the memory given.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from ckpt_dist.engine.files import Computed, Files
from ckpt_dist.files.codecs import Packed, unpacked
from ckpt_dist.plan import TooBig
from ckpt_dist.report import size


class Unpacked(Computed):
    """Files of which some are what others hold compressed."""

    def __init__(self, files: Files, packed: Sequence[Packed], memory: int) -> None:
        self.memory, self.packed = memory, {p.file: p for p in packed}
        super().__init__(files, self.packed)
        self.kept: OrderedDict[int, bytes | bytearray] = OrderedDict()
        self.lock = threading.Lock()
        largest = max(packed, key=_needs)
        if _needs(largest) > memory:
            raise TooBig(
                f"{files.paths[largest.file]}: a compressed chunk is opened whole, which takes {size(_needs(largest))}; "
                f"of engine.memory {size(memory)} are for that. Give {-(-_needs(largest) // max(memory, 1))} times as much."
            )

    def compute(self, file: int, offset: int, into: memoryview) -> None:
        with self.lock:  # also while it is copied: what a thread still holds would not be counted
            into[:] = memoryview(self._chunk(file))[offset : offset + len(into)]

    def _chunk(self, file: int) -> bytes | bytearray:
        if file not in self.kept:
            packed = self.packed[file]
            while self.kept and sum(map(len, self.kept.values())) + _needs(packed) > self.memory:
                self.kept.popitem(last=False)
            data = bytearray(packed.stored_bytes)
            self.files.read(file, 0, memoryview(data))
            self.kept[file] = unpacked(packed, data, str(self.files.paths[file]))
        self.kept.move_to_end(file)
        return self.kept[file]


def _needs(packed: Packed) -> int:
    return packed.stored_bytes + packed.nbytes
