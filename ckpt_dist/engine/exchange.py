"""The collective transport: every byte of the sources is read once, by a node that sees its file, and sent to the
rank whose tile it belongs to, if that is on another node.

The files of a source are laid end to end and cut into equal runs, one for each rank that sees them, so each node reads
large contiguous parts. What a rank would read for another of its own node that one reads itself, straight into its
tiles: then it is neither sent nor copied. Tiles are made in waves; before each wave all ranks exchange what it needs
(`all_to_all`), while the next wave is read and the one before is written. To `fill` a wave is a source like any other:
one whose file is what arrived.

Invariant: sums are taken by the owner of a tile, in the order of the sources, exactly as without an exchange, so the
bytes are the same; memory is four waves, whose size `engine.memory` bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import Ints, ints, row_major, wider
from ckpt_dist.engine.files import Files, Reader
from ckpt_dist.engine.fill import Crew, Done, Job, Side, fill
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.moves import WORDS, Move, gather, simplify
from ckpt_dist.engine.wire import Wire
from ckpt_dist.errors import STOP, CheckpointError, listed
from ckpt_dist.plan import Moves

WAVE_BYTES = 48 << 20  # more would leave the caches and gain nothing; less than that only if memory is short
ALIGN = 64  # boxes begin at multiples of it in what is sent
HEAD = 6  # columns of a request before its extents: wave, source, file, at, itemsize, bytes
Bytes = NDArray[np.uint8]


class Readers:
    """Which rank reads which byte of a source: `seen[rank, file]` says who could, `length[file]` how much there is,
    `node[rank]` where each rank is.

    A rank reads for itself what it sees, unless `balanced` asks for equal runs of the files for all; then what is in
    the runs of its node.
    """

    def __init__(self, seen: NDArray[np.bool_], length: Ints, node: Ints, balanced: bool) -> None:
        self.seen, self.length, self.node, self.balanced = seen, length, node, balanced
        self.everywhere = bool(seen.all())
        patterns, self.kind = np.unique(seen.T, axis=0, return_inverse=True)
        self.ranks = [np.flatnonzero(p) for p in patterns]
        self.base, self.ends = np.zeros(len(length), np.int64), list[Ints]()
        for kind, ranks in enumerate(self.ranks):
            mine = np.flatnonzero(self.kind == kind)
            line = np.cumsum(length[mine])
            self.base[mine] = line - length[mine]
            parts = max(len(ranks), 1)
            self.ends.append(int(line[-1] if len(line) else 0) * np.arange(1, parts) // parts)

    def evenly(self) -> Readers:
        """The same files, read in equal runs."""
        return Readers(self.seen, self.length, self.node, True)

    def of(self, file: Ints, at: Ints, owner: int | Ints) -> Ints:
        """Who reads for `owner` what begins at byte `at` of each file."""
        found = np.zeros(len(file), np.int64)
        for kind, (ranks, ends) in enumerate(zip(self.ranks, self.ends, strict=True)):
            mine = np.flatnonzero(self.kind[file] == kind)
            if len(mine):
                found[mine] = ranks[np.searchsorted(ends, self.base[file[mine]] + at[mine], side="right")]
        itself = self.seen[owner, file] & (~np.bool_(self.balanced) | (self.node[found] == self.node[owner]))
        return np.where(itself, owner, found)


@dataclass(frozen=True)
class Wanted:
    """What one rank needs of one source: moves to its tiles; the file and the bytes of an element, one for each move.

    `place` is where a move begins as the catalog has it, without the headers that only the files know: by that it is
    decided who reads, so that a plan without the files decides the same.
    """

    moves: Moves
    file: Ints
    place: Ints
    item: Ints
    dtypes: Sequence[str]
    readers: Readers

    def reader(self, owner: int | Ints) -> Ints:
        """Who reads each move for its owner."""
        return self.readers.of(self.file, self.place, owner)

    @property
    def nbytes(self) -> Ints:
        return ints(np.prod(self.moves.extent, axis=1, dtype=np.int64) * self.item)


@dataclass(frozen=True)
class Source:
    """One source to `fill`: its own files, and what has arrived by wave, which count down from -1."""

    files: Reader
    waves: dict[int, Bytes]

    def read(self, file: int, offset: int, into: memoryview) -> None:
        if file >= 0:
            self.files.read(file, offset, into)
        else:
            np.copyto(np.frombuffer(into, np.uint8), self.waves[~file][offset : offset + len(into)])  # without the GIL


def _rows(rank: int, wanted: Sequence[Wanted], wave_of_tile: Callable[[Ints], Ints], width: int) -> tuple[Ints, Ints]:
    """(requests, reader of each) for all moves; a request is HEAD columns, the extents, the strides in the file."""
    rows: list[Ints] = [np.zeros((0, HEAD + 2 * width), np.int64)]
    who: list[Ints] = [np.zeros(0, np.int64)]
    for k, want in enumerate(wanted):
        m = want.moves
        head = (wave_of_tile(m.tile), np.full(len(m.tile), k), want.file, m.at, want.item, want.nbytes)
        rows.append(np.hstack([np.stack(head, 1), wider(m.extent, width, 1), wider(m.stride, width, 0)]))
        who.append(want.reader(rank))
    return np.concatenate(rows), np.concatenate(who)


def padded(nbytes: Ints) -> Ints:
    """The bytes that a piece takes in what is sent."""
    return -(-nbytes // ALIGN) * ALIGN


def _wave_tiles(group: Group, wanted: Sequence[Wanted], count: int, budget: int) -> tuple[int, int]:
    """(tiles of a wave, waves): as many as no rank sends or gets more than `budget` bytes in a wave."""
    per = max(1, *group.gather(count))
    while True:
        waves = max(group.gather(-(-count // per)))
        sent = np.zeros((max(waves, 1), group.world), np.int64)
        for want in wanted:
            reader = want.reader(group.rank)
            np.add.at(sent, (want.moves.tile // per, reader), padded(want.nbytes) * (reader != group.rank))
        got = int(sent.sum(axis=1).max())
        everyone = group.gather((sent, got))
        most = max(int(np.sum([s for s, _ in everyone], axis=0).max()), *(g for _, g in everyone))
        if most <= budget or per == 1:
            return per, waves
        per = max(1, min(per // 2, per * budget // most))


def run(
    group: Group,
    job: Job,
    wanted: Sequence[Wanted],
    files: Sequence[Files],
    crew: Crew,
    memory: int,
    advance: Callable[[int], None],
    wire: Wire,
) -> Done:
    """Make the tiles of a job whose sources arrive in waves; every rank calls this together, also one without tiles."""
    per, waves = _wave_tiles(group, wanted, job.last - job.first, min(memory // 4, WAVE_BYTES))
    width = max((w.moves.extent.shape[1] for w in wanted), default=0)
    width = max(group.gather(width))
    rows, who = _rows(group.rank, wanted, lambda tile: tile // per, width)
    away = np.flatnonzero(who != group.rank)
    order = away[np.lexsort((rows[away, 3], rows[away, 2], rows[away, 1], who[away], rows[away, 0]))]
    asked, asked_of = rows[order], who[order]
    space = padded(asked[:, 5])
    before = np.cumsum(space) - space
    begins = np.searchsorted(asked[:, 0], np.arange(waves + 1))
    start = np.append(before, space.sum())[begins]
    at = np.zeros(len(rows), np.int64)
    at[order] = before - start[asked[:, 0]]  # where each piece lies in what arrives with its wave
    arriving = np.zeros((waves, group.world), np.int64)
    np.add.at(arriving, (asked[:, 0], asked_of), space)

    arrived_by_wave: dict[int, Bytes] = {}
    room = [wire.room(int(arriving.sum(axis=1).max(initial=0))) for _ in range(2)]
    sides, first = [], 0
    for want, own in zip(wanted, files, strict=True):
        mine = slice(first, first + len(want.moves.tile))
        first = mine.stop
        sides.append(_side(want, Source(own, arrived_by_wave), who[mine] != group.rank, rows[mine, 0], at[mine]))

    served = [
        part.reshape(-1, HEAD + 2 * width) for part in group.swap([asked[asked_of == r] for r in range(group.world)])
    ]
    outbox = _Outbox(served, waves, width, files, crew.size, wire)
    total, passed_on = Done(), 0

    def make(wave: int) -> None:
        lo = min(job.first + wave * per, job.last)
        part = replace(job, first=lo, last=min(lo + per, job.last), sources=sides)
        total.add(fill(part, crew, advance))
        del arrived_by_wave[wave]

    with ThreadPoolExecutor(2) as pool, outbox.pool:
        serving = pool.submit(outbox.serve, 0)
        making: Future[None] | None = None
        for wave in range(waves):
            failed = serving.exception() or (making.exception() if making and making.done() else None)
            group.all_well(failed, STOP.is_set())
            sent, sizes = serving.result()
            if wave + 1 < waves:
                serving = pool.submit(outbox.serve, wave + 1)
            arrived = room[wave % 2][: arriving[wave].sum()]
            group.all_to_all(sent, sizes, arrived, arriving[wave], wire)
            passed_on += int(sizes.sum())
            arrived_by_wave[wave] = arrived
            if making is None or making.exception() is None:  # waits: no more than two waves are held
                making = pool.submit(make, wave)
        group.all_well(making.exception() if making else None, False)
    total.bytes_sent = passed_on
    return total


def _side(want: Wanted, source: Source, away: NDArray[np.bool_], wave: Ints, at: Ints) -> Side:
    """One source as its tiles are made: moves from its files, and those that others read from what arrives."""
    m, dense = want.moves, row_major(want.moves.extent)
    moves = replace(m, at=np.where(away, at, m.at), stride=np.where(away[:, None], dense, m.stride))
    return Side(source, moves, np.where(away, ~wave, want.file), want.dtypes)


class _Outbox:
    """What this rank reads for the others: `requests[owner]`, sorted by wave, is packed in their order."""

    def __init__(
        self, requests: Sequence[Ints], waves: int, width: int, files: Sequence[Files], workers: int, wire: Wire
    ) -> None:
        self.requests, self.width, self.files = requests, width, files
        self.pool = ThreadPoolExecutor(workers, "reads")
        self.workers = workers
        self.cuts = [np.searchsorted(r[:, 0], np.arange(waves + 1)) for r in requests]
        sizes = np.zeros(waves, np.int64)
        for rows in requests:
            np.add.at(sizes, rows[:, 0], padded(rows[:, 5]))
        self.room = [wire.room(int(sizes.max(initial=0))) for _ in range(2)]

    def serve(self, wave: int) -> tuple[Bytes, Ints]:
        """(bytes, how many for each rank) of a wave."""
        parts = [r[c[wave] : c[wave + 1]] for r, c in zip(self.requests, self.cuts, strict=True)]
        sizes = np.array([padded(p[:, 5]).sum() for p in parts], np.int64)
        rows = np.concatenate(parts)
        space = padded(rows[:, 5])
        place = np.cumsum(space) - space
        out = self.room[wave % 2][: space.sum()]
        order = np.lexsort((rows[:, 3], rows[:, 2], rows[:, 1]))  # through each file from its begin to its end

        def read(mine: Ints) -> None:
            for i in mine.tolist():
                self._read(rows[i].tolist(), out[place[i] : place[i] + rows[i, 5]])

        list(self.pool.map(read, np.array_split(order, self.workers)))
        return out, sizes

    def _read(self, row: list[int], into: Bytes) -> None:
        _, source, file, at, item, _ = row[:HEAD]
        extent, stride = row[HEAD : HEAD + self.width], row[HEAD + self.width :]
        dense = row_major(extent).tolist()
        gather(into.view(WORDS[item]), [Move(file, at, 0, simplify(extent, stride, dense))], self.files[source].read)


def missing(seen: NDArray[np.bool_], names: Sequence[str], root: str) -> None:
    """Refuse a source some of whose files no rank sees, with their names."""
    lost = [names[f] for f in np.flatnonzero(~seen.any(axis=0)).tolist()]
    if lost:
        raise CheckpointError(f"{root}: no node sees {listed(lost, 10)}, {len(lost)} of {len(names)} files.")
