"""What a job will cost, from its plan alone: bytes read, exchanged and written, memory and seconds, for each transport.

Bytes are counted from the very moves that the engine would make, so they are exact, except for the headers that are
read to find addresses. Seconds are bytes over bandwidths, which are given, measured (engine.calibrate) or assumed.

Invariant: nothing is read or written, except by a calibration that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import plan, task
from ckpt_dist.box import Ints, ints, row_major, volume
from ckpt_dist.catalog import Chunks, Views
from ckpt_dist.engine import calibrate, exchange
from ckpt_dist.engine.fill import Combine, digest, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.moves import Array, read_bytes, simplify
from ckpt_dist.errors import UsageError
from ckpt_dist.files.dtypes import is_floating, itemsize
from ckpt_dist.files.zips import crc32
from ckpt_dist.formats import Layout
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Bound, Model
from ckpt_dist.report import size, table

BLOCK = 1 << 17  # tiles looked at together, to bound the memory of a count
ASSUMED = {"read": 2e9, "exchange": 1e9, "write": 1e9, "sum": 4e9}  # bytes/s of a node: one NVMe disk, one 10G port
START_S = 0.05  # of a job's work: threads, files, the journal
HOW = ("direct", "collective")


@dataclass(frozen=True)
class World:
    """The ranks that the plan is for; `imagined` ones see all files."""

    ranks: int
    nodes: int
    imagined: bool

    def by_node(self, of_ranks: Ints) -> Ints:
        """The sums of each node's ranks."""
        return ints(of_ranks.reshape(self.nodes, -1).sum(axis=1))


@dataclass(frozen=True)
class Job:
    """The parts of a prepared job that its cost depends on."""

    models: Sequence[Model]
    design: task.Design
    views: Sequence[Views]
    target_views: Views
    layout: Layout
    combine: Combine
    digests: bool
    verify: bool


@dataclass(frozen=True)
class Traffic:
    """Bytes of one transport, one number for each rank. `wanted` is what its tiles are made of, `summed` the part of it
    that is cast, summed or digested, `checked` what engine.verify reads again."""

    read: Ints
    wanted: Ints
    summed: Ints
    sent: Ints
    written: Ints
    checked: Ints


def world_of(group: Group, engine: Mapping[str, Any]) -> World:
    """The ranks there are, or those that engine.ranks and engine.nodes ask to plan for."""
    ranks, nodes = engine.get("ranks"), engine.get("nodes")
    if ranks is None and nodes is None:
        return World(group.world, max(group.world // group.local_world, 1), False)
    ranks, nodes = int(ranks or nodes or 1), int(nodes or 1)
    if ranks % nodes:
        raise UsageError(f"engine.ranks={ranks} cannot be spread evenly over engine.nodes={nodes}.")
    return World(ranks, nodes, True)


def estimate(group: Group, job: Job, engine: Mapping[str, Any], target: Path) -> tuple[dict[str, Any], list[str]]:
    """The cost as data and as lines; `target` is where a calibration may write."""
    world = world_of(group, engine)
    readers = [_readers(group, m, world) for m in job.models]
    everywhere = all(r.everywhere for r in readers)
    for reader in readers:  # as task.run_tiles has them: what is not asked for is done only as far as needed
        reader.balanced = everywhere or engine.get("transport") == "collective"
    traffic = dict(zip(HOW, _traffic(job, world, readers), strict=True))
    speed, origin = _speed(group, job, engine, target)
    local = world.ranks // world.nodes
    workers = task.worker_count(engine, local)
    found = {}
    for how in HOW if everywhere else HOW[1:]:
        t = traffic[how]
        found[how] = {
            "bytes_read": int((t.read + t.checked).sum()),
            "bytes_read_node": int(world.by_node(t.read + t.checked).max()),
            "amplification": float(f"{t.read.sum() / max(t.wanted.sum(), 1):.4g}"),
            "bytes_exchanged": int(t.sent.sum()),
            "bytes_written": int(t.written.sum()),
            "memory": _memory(how, workers, int(engine["memory"])),
            "seconds": float(f"{_seconds(how, t, world, speed):.3g}"),
        }
    auto, why = _choice(str(engine.get("transport", "auto")), everywhere)
    facts = {
        "ranks": world.ranks,
        "nodes": world.nodes,
        "transport": auto,
        "why": why,
        "transports": found,
        "bandwidth": {k: {"bytes_s": int(v), "from": origin[k]} for k, v in speed.items()},
    }
    return facts, _lines(facts)


def _lines(facts: Mapping[str, Any]) -> list[str]:
    head = ("transport", "read", "by a node", "amplified", "exchanged", "written", "memory a rank", "seconds")
    rows = [
        (
            how,
            size(t["bytes_read"]),
            size(t["bytes_read_node"]),
            f"{t['amplification']:.2f}x",
            size(t["bytes_exchanged"]),
            size(t["bytes_written"]),
            size(t["memory"]),
            f"{t['seconds']:.3g}",
        )
        for how, t in facts["transports"].items()
    ]
    speeds = [f"{k} {v['bytes_s'] / 1e9:.2f} GB/s ({v['from']})" for k, v in facts["bandwidth"].items()]
    return [
        *table(head, rows),
        f"{facts['transport']}: {facts['why']}",
        f"bandwidth of a node: {', '.join(speeds)}",
    ]


def _choice(asked: str, everywhere: bool) -> tuple[str, str]:
    """(transport, reason): the rule that the job itself goes by."""
    if not everywhere:
        return "collective", "not every node sees all files, so what one lacks is sent to it"
    if asked != "auto":
        return asked, f"engine.transport={asked}"
    return (
        "direct",
        "auto: every node sees all files, so each byte is read once without an exchange, which saves nothing",
    )


def _memory(how: str, workers: int, memory: int) -> int:
    """Most bytes of data that a rank holds: its threads' tiles, and for an exchange two waves each way."""
    waves = 4 * min(memory // 4, exchange.WAVE_BYTES) if how == "collective" else 0
    return workers * task.WORKER_BYTES + waves


# ---- bytes


def _readers(group: Group, m: Model, world: World) -> exchange.Readers:
    if world.imagined or "saved" in m.catalog.about:
        seen = np.ones((world.ranks, len(m.catalog.files)), bool)
        return exchange.Readers(seen, task.file_lengths(m.catalog), True)
    return task._readers(group, m, True)


def _traffic(job: Job, world: World, readers: Sequence[exchange.Readers]) -> tuple[Traffic, Traffic]:
    """What each rank does in a direct and in a collective job."""
    canon = job.design.canon
    tiles = plan.tiles(canon.entries)
    numel = volume(tiles.start, tiles.stop)
    runs = plan.share(numel * task.item_bytes(canon.entries, tiles), world.ranks)
    owner = np.repeat(np.arange(world.ranks), [last - first for first, last in runs])
    direct, collective = _nothing(world.ranks), _nothing(world.ranks)
    for first in range(0, len(tiles), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(tiles)))
        tiled, mine = canon.views(tiles.take(rows)), owner[rows]
        out = _Moves(job.target_views, job.layout.catalog.chunks, job.design.target, tiled)
        for t in (direct, collective):
            np.add.at(t.written, mine[out.moves.tile], out.nbytes)
        out_dtype = out.dtype(len(rows))
        for m, bound, views, reader in zip(job.models, job.design.sources, job.views, readers, strict=True):
            got = _Moves(plan.unique(views), m.catalog.chunks, bound, tiled)
            of, tile = mine[got.moves.tile], got.moves.tile
            at_work = (got.dtype(len(rows)) != out_dtype)[tile] | _all_tiles(job)
            who = reader.of(got.file, got.moves.at, of)
            moves = got.moves
            np.add.at(direct.read, of, _read(moves.extent, moves.stride, moves.tile_stride, got.item))
            np.add.at(collective.read, who, _read(moves.extent, moves.stride, row_major(moves.extent), got.item))
            np.add.at(collective.sent, who[who != of], exchange._padded(got.nbytes)[who != of])
            for t in (direct, collective):
                np.add.at(t.wanted, of, got.nbytes)
                np.add.at(t.summed, of, got.nbytes * at_work)
    for t in (direct, collective) if job.verify else ():
        t.checked[:] = t.written
    return direct, collective


def _nothing(ranks: int) -> Traffic:
    return Traffic(*(np.zeros(ranks, np.int64) for _ in range(6)))


def _all_tiles(job: Job) -> bool:
    """Whether every tile is worked on, or only those that change their dtype."""
    return job.combine is not keep or job.digests or bool(job.layout.crcs)


class _Moves:
    """The moves between some tiles and one side, with the file, the bytes of an element and all bytes of each."""

    def __init__(self, views: Views, chunks: Chunks, bound: Bound, tiled: Views) -> None:
        items = task.item_bytes(bound.entries, chunks)
        self.moves = plan.moves(views, chunks, items, tiled, alternatives=False)
        self.file, self.item = chunks.file[self.moves.chunk], items[self.moves.chunk]
        self.nbytes: Ints = np.prod(self.moves.extent, axis=1, dtype=np.int64) * self.item
        self.entry, self.names = chunks.entry[self.moves.chunk], [e.dtype for e in bound.entries]

    def dtype(self, count: int) -> NDArray[Any]:
        """The dtype of each of `count` tiles."""
        found = np.full(count, "", "<U16")
        found[self.moves.tile] = np.array(self.names, "<U16")[self.entry]
        return found


def _read(extent: Ints, stride: Ints, tile_stride: Ints, item: Ints) -> Ints:
    """Bytes that are read for each move. What is dense in its file is read as it is; of other shapes there are few."""
    found: Ints = np.prod(extent, axis=1, dtype=np.int64) * item
    odd = np.flatnonzero(((extent != 1) & (stride != row_major(extent))).any(axis=1))
    if len(odd):
        width = extent.shape[1]
        rows = np.hstack([extent[odd], stride[odd], tile_stride[odd], item[odd, None]])
        kinds, which = np.unique(rows, axis=0, return_inverse=True)
        each = [
            read_bytes(simplify(k[:width], k[width : 2 * width], k[2 * width : 3 * width]), k[-1])
            for k in kinds.tolist()
        ]
        found[odd] = np.array(each, np.int64)[which.reshape(-1)]
    return found


# ---- seconds


def _seconds(how: str, t: Traffic, world: World, speed: Mapping[str, float]) -> float:
    """A thread reads, combines and writes one after the other; in an exchange, waves are read, sent and made at once."""
    read, sent = world.by_node(t.read) / speed["read"], world.by_node(t.sent) / speed["exchange"]
    made = world.by_node(t.summed) / speed["sum"] + world.by_node(t.written) / speed["write"]
    each = read + made if how == "direct" else np.maximum(np.maximum(read, sent), made)
    again = world.by_node(t.checked) * (1 / speed["read"] + 1 / speed["sum"])
    return START_S + float((each + again).max())


def _speed(group: Group, job: Job, engine: Mapping[str, Any], target: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Bytes/s of each kind of work by one node, and where each number is from."""
    given = {k: float(v) for k, v in (engine.get("bandwidth") or {}).items() if v is not None}
    measured = _measured(group, job, engine, target) if engine.get("calibrate") else {}
    speed = ASSUMED | measured | given
    return speed, {k: "given" if k in given else "measured" if k in measured else "assumed" for k in speed}


def _measured(group: Group, job: Job, engine: Mapping[str, Any], target: Path) -> dict[str, float]:
    for m in job.models:
        needs_data(m.catalog)
    workers = task.worker_count(engine, group.local_world) * group.local_world
    dtypes, want = [_main_dtype(bound) for bound in job.design.sources], _main_dtype(job.design.target)
    kernel = _kernel(job, dtypes, want)
    block, made = (plan.TILE * item for item in (max(map(itemsize, dtypes)), itemsize(want)))

    def measure() -> dict[str, float]:
        samples = [
            calibrate.sample(m.catalog.root, m.catalog.files, itemsize(d), block)
            for m, d in zip(job.models, dtypes, strict=True)
        ]
        return calibrate.rates(samples, target, workers, block, made, kernel, bool(engine.get("fsync", True)))

    found = group.on_first(measure)
    return found | ({"exchange": calibrate.exchange(group)} if group.world > 1 else {})


def _main_dtype(bound: Bound) -> str:
    """The dtype of most bytes."""
    held: dict[str, int] = {}
    for entry, rule in zip(bound.entries, bound.rules, strict=True):
        if rule is not None:
            held[entry.dtype] = held.get(entry.dtype, 0) + int(np.prod(entry.shape, dtype=np.int64)) * itemsize(
                entry.dtype
            )
    return max(sorted(held), key=lambda d: held[d]) if held else "uint8"


def _kernel(job: Job, dtypes: Sequence[str], want: str) -> Callable[[list[Array]], Array] | None:
    """What is done to a tile between reading and writing; None if its bytes only pass."""
    floats = all(is_floating(d) for d in (*dtypes, want))
    if not _all_tiles(job) and (dtypes[0] == want or not floats):
        return None
    largest = max(range(len(job.design.canon.entries)), key=lambda e: np.prod(job.design.canon.entries[e].shape))
    tile = int(np.searchsorted(plan.tiles(job.design.canon.entries).entry, largest))

    def kernel(values: list[Array]) -> Array:
        result = job.combine(tile, iter(values), dtypes, want)
        assert result is not None
        for value in (*values, result) if job.digests else ():
            digest(value)
        if job.layout.crcs:
            crc32(memoryview(result.view(np.uint8)))
        return result

    return kernel
