"""Tiles in, tiles out: a few threads gather each tile from all sources, combine, and scatter the result.

Threads overlap reading, computing and writing: all three release the interpreter. A tile is small, so memory is
a handful of tiles whatever the model's size, and it does not depend on ranks, so neither does any byte written.

Invariant: each tile is made once, by one thread, from its sources in the order given.
"""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import Ints
from ckpt_dist.engine.files import PIECE, Reader, Writer
from ckpt_dist.engine.moves import WORDS, Array, Move, by_tile, gather, scatter
from ckpt_dist.errors import STOP, STOPPED, CheckpointError, Stopped
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.zips import crc32
from ckpt_dist.plan import HELD, TILE, Moves

BATCH = 32  # tiles a thread takes at a time; also the longest run that is copied by one call
Combine: TypeAlias = "Callable[[int, Iterator[Array], Sequence[str], str], Array | None]"
"""(tile, its values from each source in turn, their dtypes, the dtype wanted) -> the result, or None for no result.

A value is valid until the next one is asked for, or, where elements take at most 4 bytes in all sources, until HELD
more are; a result until the thread's next tile."""


@dataclass(frozen=True)
class Side:
    """One checkpoint as seen by a rank's tiles `first..last`: moves, the file of each chunk, the dtype of each tile.

    Of a source that is read `exact`, gaps between what is needed are left out.
    """

    files: Reader
    moves: Moves
    file_of_chunk: Ints
    dtypes: Sequence[str]
    exact: bool = False


@dataclass
class Done:
    """What a fill did: bytes moved, digests of tiles (per source, then of the result), CRCs of written runs."""

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_sent: int = 0
    digests: dict[tuple[int, int], bytes] = field(default_factory=dict)
    runs: list[tuple[int, int, int, int]] = field(default_factory=list)  # file, offset, nbytes, crc
    beyond: set[int] = field(default_factory=set)  # tiles with values that became infinite

    def add(self, other: Done) -> None:
        self.bytes_written += other.bytes_written
        self.bytes_sent += other.bytes_sent
        self.digests.update(other.digests)
        self.runs += other.runs
        self.beyond |= other.beyond


@dataclass(frozen=True)
class Job:
    """All that is needed to make the tiles `first..last`; arrays and sides number them from `base`.

    `finished` says which of them are there already; `note` is told of each batch that has been written.
    """

    base: int
    first: int
    last: int
    numel: Ints
    finished: NDArray[np.bool_]
    sources: Sequence[Side]
    target: Side | None
    out: Writer | None
    combine: Combine
    digests: bool = False
    crc_files: frozenset[int] = frozenset()
    note: Callable[[int, int, Done], None] = lambda first, last, done: None


def keep(tile: int, values: Iterator[Array], dtypes: Sequence[str], want: str) -> Array:
    """The combination of a plain conversion: the only source's value, cast where dtypes differ."""
    value = next(values)
    if dtypes[0] == want:
        return value
    from ckpt_dist.averages.tensors import cast

    return cast(value, dtypes[0], want)


class Single:
    """torch uses one thread for each of ours while any crew is at work, and then as many as before: it may be a program's."""

    def __init__(self) -> None:
        self.lock, self.crews, self.before = threading.Lock(), 0, 0

    def change(self, by: int) -> None:
        torch = sys.modules.get("torch")  # who has not imported it, or does so now, computes nothing yet
        torch = torch if hasattr(torch, "get_num_threads") and hasattr(torch, "set_num_threads") else None
        with self.lock:
            if torch and not self.crews:
                self.before = torch.get_num_threads()
            self.crews += by
            if torch and self.before:
                torch.set_num_threads(1 if by > 0 else self.before)  # for this thread, and for those that begin
            self.before = self.before if self.crews else 0


SINGLE = Single()


class Crew:
    """Threads that stay, and what each of them keeps: fresh threads would fault in fresh memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pool = concurrent.futures.ThreadPoolExecutor(size, "tiles")
        self.kept = threading.local()

    def buffers(self) -> list[Array]:
        """This thread's buffers in bytes, which grow as needed: of HELD tiles and, last, of a piece."""
        if not hasattr(self.kept, "buffers"):
            self.kept.buffers = [*(np.empty(0, np.uint8) for _ in range(HELD)), np.empty(PIECE, np.uint8)]
        found: list[Array] = self.kept.buffers
        return found

    def __enter__(self) -> Crew:
        SINGLE.change(1)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.pool.shutdown()
        finally:
            SINGLE.change(-1)


def fill(job: Job, crew: Crew, advance: Callable[[int], None] = lambda n: None) -> Done:
    """Make all tiles of a job with some threads; the first error stops them all and is raised.

    Raises Stopped when a signal has asked for it: what was noted by then is whole.
    """
    lock = threading.Lock()
    step = min(BATCH, max(1, -(-(job.last - job.first) // crew.size)))
    every = range(job.first, job.last, step)
    cursor = iter(
        spread(
            [b for b in every if not job.finished[b - job.base : min(b + step, job.last) - job.base].all()], crew.size
        )
    )
    total, failures = Done(), list[BaseException]()

    def work() -> None:
        worker = _Worker(job, advance, crew.buffers())
        while not failures and not STOP.is_set():
            with lock:
                first = next(cursor, None)
            if first is None:
                break
            try:
                last = min(first + step, job.last)
                done = worker.batch(first, last)
                job.note(first, last, done)
                with lock:
                    total.add(done)
            except BaseException as error:
                failures.append(error)

    tasks = [crew.pool.submit(work) for _ in range(crew.size)]
    try:
        concurrent.futures.wait(tasks)
    except BaseException as error:  # Ctrl-C: no thread may write on after this returns
        failures.append(error)
        concurrent.futures.wait(tasks)
    if failures:
        raise failures[0]
    if STOP.is_set() and next(cursor, None) is not None:
        raise Stopped(STOPPED)
    return total


def spread(batches: Sequence[int], workers: int) -> list[int]:
    """The batches in an order in which neighbours are far apart: threads that write into one file wait for its lock.

    `spread(range(6), 2)` -> `[0, 3, 1, 4, 2, 5]`.
    """
    step = -(-len(batches) // workers)
    return [batch for k in range(step) for batch in batches[k::step]]


@dataclass(frozen=True)
class Run:
    """Bytes that move unchanged: from `at` of a source file to `out_at` of a target file."""

    file: int
    at: int
    out: int
    out_at: int
    nbytes: int

    def joins(self, more: Run) -> bool:
        """Whether `more` goes on where this run ends, on both sides."""
        return (more.file, more.at, more.out, more.out_at) == (
            self.file,
            self.at + self.nbytes,
            self.out,
            self.out_at + self.nbytes,
        )


class _Worker:
    """One thread's buffers and counters."""

    def __init__(self, job: Job, advance: Callable[[int], None], buffers: list[Array]) -> None:
        self.job, self.advance, self.done, self.buffers = job, advance, Done(), buffers
        self.piece = memoryview(buffers[-1])

    def buffer(self, k: int, dtype: str, numel: int) -> Array:
        """For the value of source `k`: those of at most 4 bytes an element take turns, wider ones share one."""
        item = itemsize(dtype)
        k = k % HELD if item <= 4 else 0
        if len(self.buffers[k]) < TILE * item:
            self.buffers[k] = np.empty(TILE * item, np.uint8)
        return self.buffers[k].view(WORDS[item])[:numel]

    def batch(self, first: int, last: int) -> Done:
        """Make the tiles first..last; what that gave."""
        self.done, low = Done(), self.job.base
        sides = [by_tile(s.moves, s.file_of_chunk, first - low, last - low) for s in self.job.sources]
        targets = (
            iter(())
            if self.job.target is None
            else by_tile(self.job.target.moves, self.job.target.file_of_chunk, first - low, last - low)
        )
        run: Run | None = None
        for tile in range(first, last):
            moves, out = [next(s) for s in sides], next(targets, [])
            if self.job.finished[tile - low]:
                self.copy(run)
                run = None
                continue
            more = self.unchanged(tile, moves, out)
            if run is not None and more is not None and run.joins(more):
                run = Run(run.file, run.at, run.out, run.out_at, run.nbytes + more.nbytes)
                continue
            self.copy(run)
            run = more
            if more is None:
                self.tile(tile, moves, out)
        self.copy(run)
        return self.done

    def tile(self, tile: int, moves: list[list[Move]], out: list[Move]) -> None:
        job, numel = self.job, int(self.job.numel[tile - self.job.base])
        if numel == 0:
            return
        dtypes = [s.dtypes[tile - job.base] for s in job.sources]
        want = job.target.dtypes[tile - job.base] if job.target else dtypes[0]
        result = job.combine(tile, self.values(tile, numel, moves, dtypes), dtypes, want)
        if result is None or job.target is None:
            return
        if want == "float16" and {*dtypes} != {want} and (result.view(np.uint16) & 0x7FFF == 0x7C00).any():
            self.done.beyond.add(tile)
        if job.digests:
            self.done.digests[len(job.sources), tile] = digest(result)
        scatter(result, out, self.write)

    def values(self, tile: int, numel: int, moves: list[list[Move]], dtypes: list[str]) -> Iterator[Array]:
        for k, side in enumerate(self.job.sources):
            value = self.buffer(k, dtypes[k], numel)
            gather(value, moves[k], side.files.read, exact=side.exact)
            if self.job.digests:
                self.done.digests[k, tile] = digest(value)
            self.advance(value.nbytes)
            yield value

    def unchanged(self, tile: int, moves: list[list[Move]], out: list[Move]) -> Run | None:
        """Where to copy a tile from and to, if nothing about its bytes changes and nobody looks at them."""
        job, numel = self.job, int(self.job.numel[tile - self.job.base])
        if (
            job.digests
            or job.combine is not keep
            or job.target is None
            or len(moves) != 1
            or len(moves[0]) != 1
            or len(out) != 1
        ):
            return None
        (one,), (two,), dtype = moves[0], out, job.sources[0].dtypes[tile - job.base]
        if (
            one.run != numel
            or two.run != numel
            or dtype != job.target.dtypes[tile - job.base]
            or two.file in job.crc_files
        ):
            return None
        return Run(one.file, one.at, two.file, two.at, numel * itemsize(dtype))

    def copy(self, run: Run | None) -> None:
        if run is None or self.job.out is None:
            return
        self.job.out.copy(self.job.sources[0].files, run.file, run.at, run.out, run.out_at, run.nbytes, self.piece)
        self.done.bytes_written += run.nbytes
        self.advance(run.nbytes)

    def write(self, file: int, offset: int, data: memoryview) -> None:
        assert self.job.out is not None
        self.job.out.write(file, offset, data)
        self.done.bytes_written += len(data)
        if file in self.job.crc_files:
            self.done.runs.append((file, offset, len(data), crc32(data)))


def digest(value: Array) -> bytes:
    """16 bytes that stand for the bytes of a tile."""
    import xxhash

    return xxhash.xxh3_128_digest(memoryview(value.view(np.uint8)))


def tile_dtypes(
    moves: Moves, entry_of_chunk: Ints, dtypes: Sequence[str], first: int, last: int, names: Sequence[str]
) -> list[str]:
    """The dtype each tile has in a checkpoint; a tile put together from several dtypes is refused."""
    table = sorted(set(dtypes))
    code = (
        np.array([table.index(d) for d in dtypes], np.int64)[entry_of_chunk[moves.chunk]]
        if len(moves.tile)
        else np.zeros(0, np.int64)
    )
    low, high = np.full(last - first, len(table)), np.full(last - first, -1)
    np.minimum.at(low, moves.tile - first, code)
    np.maximum.at(high, moves.tile - first, code)
    for tile in np.flatnonzero((high >= 0) & (low != high))[:1].tolist():
        row = int(np.flatnonzero(moves.tile - first == tile)[0])
        name = names[entry_of_chunk[moves.chunk[row]]]
        raise CheckpointError(
            f"{name}: its parts are stored as {table[low[tile]]} and {table[high[tile]]}; one tensor has one dtype."
        )
    return [table[c] if c >= 0 else "uint8" for c in high.tolist()]
