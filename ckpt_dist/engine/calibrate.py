"""How fast this machine does what a job is made of: its own loop, over a part of its own sources, for a second or two.

Each thread reads, combines and writes as the engine's threads do, and all of them do it at the same time, while one more
flushes what they have written, as a journal does. So a rate is that of one node with its ranks at work: the seconds on
the clock are divided among the kinds of work as the threads' own seconds are.

Invariant: reads only the sources; writes one file of at most MOST bytes, again and again, which is removed in any case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckpt_dist.engine.files import PIECE, Files, reserve
from ckpt_dist.engine.fill import Crew
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.moves import WORDS, Array
from ckpt_dist.errors import CheckpointError

MOST = 240 << 20
FIRST, LAST = 16 << 20, 64 << 20  # written between flushes: twice as much each time
ENOUGH_S = 1.5
SENT = 8 << 20  # bytes to each rank

Kernel = Callable[[list[Array]], Array]


@dataclass(frozen=True)
class Sample:
    """Blocks of a source, evenly spaced over its files: file and offset of each; words of `item` bytes."""

    root: str
    files: Sequence[str]
    item: int
    places: Sequence[tuple[int, int]]


@dataclass
class Spent:
    """Seconds and bytes of one thread, or of all, for each kind of work."""

    read_s: float = 0.0
    sum_s: float = 0.0
    write_s: float = 0.0
    read: int = 0
    sum: int = 0
    written: int = 0

    def add(self, other: Spent) -> None:
        for name in ("read_s", "sum_s", "write_s", "read", "sum", "written"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def sample(root: str, files: Sequence[str], item: int, block: int) -> Sample:
    """`block` bytes from places as far apart as can be, in an order that jumps; files shorter than a block are left out."""
    sizes = [os.path.getsize(os.path.join(root, f)) // block for f in files]
    every = [(f, k * block) for f, count in enumerate(sizes) for k in range(count)]
    count = min(len(every), MOST // block)
    chosen = [every[i * len(every) // count] for i in range(count)]
    return Sample(root, files, item, [p for k in range(7) for p in chosen[k::7]])


def rates(
    samples: Sequence[Sample], beside: Path, workers: int, block: int, made: int, kernel: Kernel | None, fsync: bool
) -> dict[str, float]:
    """Bytes/s of `read`, `write` and `sum` (of the sources' bytes; only with a kernel, which makes `made` of a `block`)."""
    number = min(MOST // max(block, made), *(len(s.places) for s in samples))
    if number == 0:
        raise CheckpointError(
            "engine.calibrate=true: the source is too small to measure with. Give engine.bandwidth.*."
        )
    folder = next(p for p in beside.absolute().parents if p.is_dir())
    place = folder / f".{beside.name}.ckpt_dist-calibrate"
    sources, out = [Files(s.root, s.files) for s in samples], Files(folder, [place.name], writable=True)
    total, first, goal, clock, over = Spent(), number, FIRST, 0.0, False
    flush = out.sync if fsync else lambda: None
    try:
        start = time.perf_counter()
        with Crew(workers) as crew, ThreadPoolExecutor(1) as journal:
            flushing = journal.submit(flush)
            while not over:
                if first >= number:
                    first = 0
                    _make_anew(place, number * max(made, block))
                now = range(first, min(first + (goal // made or 1), number))
                first = now.stop
                begin = time.perf_counter()
                parts = [
                    crew.pool.submit(_work, samples, sources, out, block, kernel, now[k::workers])
                    for k in range(workers)
                ]
                for part in parts:
                    total.add(part.result())
                done = time.perf_counter()
                flushing.result()
                over = time.perf_counter() - start > ENOUGH_S
                flushing = journal.submit(flush)
                if over or first >= number:  # nothing is written beside the last flush, nor while a file is made anew
                    flushing.result()
                total.write_s += (time.perf_counter() - done) * workers
                clock += time.perf_counter() - begin
                goal = min(goal * 2, LAST)
    except OSError as error:
        raise CheckpointError(f"engine.calibrate=true: cannot write beside the target: {error}.") from None
    finally:
        for opened in (*sources, out):
            opened.close()
        place.unlink(missing_ok=True)
    found = {"read": total.read / total.read_s, "write": total.written / total.write_s}
    found |= {"sum": total.sum / total.sum_s} if kernel else {}
    spent = total.read_s + total.sum_s + total.write_s
    return {kind: rate * spent / clock for kind, rate in found.items()}


def _make_anew(place: Path, nbytes: int) -> None:
    """An empty file with space for what is written, as a job makes its targets: pages of an old one would be faster."""
    with open(place, "wb") as file:
        file.truncate(nbytes)
        reserve(file.fileno(), nbytes)


def _work(
    samples: Sequence[Sample],
    sources: Sequence[Files],
    out: Files,
    block: int,
    kernel: Kernel | None,
    numbers: Sequence[int],
) -> Spent:
    """One thread's part: as `fill` copies what does not change, or as it makes a tile."""
    spent, piece = Spent(), memoryview(np.empty(PIECE, np.uint8))
    values: list[Array] = [np.empty(block // s.item, WORDS[s.item]) for s in samples]
    for k in numbers:
        begin = time.perf_counter()
        if kernel is None:
            timed = _Timed(sources[0])
            out.copy(timed, *samples[0].places[k], 0, k * block, block, piece)
            spent.read_s += timed.seconds
            spent.write_s += time.perf_counter() - begin - timed.seconds
            spent.read += block
            spent.written += block
            continue
        for s, source, value in zip(samples, sources, values, strict=True):
            source.read(*s.places[k], memoryview(value.view(np.uint8)))
        read = time.perf_counter()
        result = memoryview(kernel(values).view(np.uint8))
        combined = time.perf_counter()
        out.write(0, k * len(result), result)
        spent.read_s, spent.sum_s = spent.read_s + read - begin, spent.sum_s + combined - read
        spent.write_s += time.perf_counter() - combined
        spent.read, spent.sum = spent.read + block * len(samples), spent.sum + block * len(samples)
        spent.written += len(result)
    return spent


class _Timed:
    """A reader that knows how long it has read."""

    def __init__(self, files: Files) -> None:
        self.files, self.seconds = files, 0.0

    def read(self, file: int, offset: int, into: memoryview) -> None:
        begin = time.perf_counter()
        self.files.read(file, offset, into)
        self.seconds += time.perf_counter() - begin


def exchange(group: Group, device: str) -> float:
    """Bytes/s that the ranks of a node send, when all ranks send to all at once; every rank calls this."""
    sizes = np.full(group.world, SENT)
    with group.carrier(device) as wire:
        send, into = wire.room(SENT * group.world), wire.room(SENT * group.world)
        send[:] = 1
        group.all_to_all(send, sizes, into, sizes, wire)  # connections are made by the first
        begin = time.perf_counter()
        for _ in range(2):
            group.all_to_all(send, sizes, into, sizes, wire)
        seconds = max(group.gather(time.perf_counter() - begin))
    return 2 * SENT * (group.world - 1) * group.local_world / seconds
