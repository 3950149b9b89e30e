"""What a job will cost, from its plan alone: bytes read, exchanged and written, memory and seconds, for each transport.

Bytes are counted from the very moves that the engine would make, so they are exact, except for the headers that are
read to find addresses. Seconds are bytes over bandwidths, which are given, measured (engine.calibrate) or assumed.

Invariant: nothing is read or written, except by a calibration that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import part, plan, task
from ckpt_dist.box import Ints, ints
from ckpt_dist.catalog import Views
from ckpt_dist.engine import calibrate, exchange, traffic
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, digest, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.moves import Array
from ckpt_dist.engine.traffic import Traffic, by_node, node_of
from ckpt_dist.errors import UsageError
from ckpt_dist.files.dtypes import is_floating, itemsize
from ckpt_dist.files.zips import crc32
from ckpt_dist.formats import Layout, held
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Model
from ckpt_dist.report import Report, size, table
from ckpt_dist.spelling import Bound

BLOCK = 1 << 17  # tiles looked at together, to bound the memory of a count
ASSUMED = {"read": 2e9, "exchange": 1e9, "write": 1e9, "sum": 4e9}  # bytes/s of a node: one NVMe disk, one 10G port
START_S = 0.05  # of a job's work: threads, files, the journal
HOW = ("direct", "collective")
Given = Mapping[str, Any]


@dataclass(frozen=True)
class World:
    """The ranks that the plan is for; `imagined` ones see all files."""

    node: Ints  # of each rank
    imagined: bool

    @property
    def ranks(self) -> int:
        return len(self.node)

    @property
    def nodes(self) -> int:
        return int(self.node.max()) + 1


@dataclass(frozen=True)
class Job:
    """The parts of a prepared job that its cost depends on.

    `on_node` gives the part of the target that a node writes and the tiles it needs for that (None: all of it, on a
    disk of all nodes), `checked` what it reads again, if anything; `local`: each node has a target of its own.
    """

    sources: Sequence[tuple[Model, Bound]]
    canon: Bound
    target: tuple[Bound, Layout, Files]
    on_node: Callable[[int | None], tuple[Views, NDArray[np.bool_] | None]]
    checked: Callable[[int | None], tuple[Model, Bound]] | None
    local: bool
    combine: Combine
    digests: bool

    @property
    def all_worked(self) -> bool:
        """Whether every tile is worked on, or only those that change their dtype."""
        return self.combine is not keep or self.digests or bool(self.target[1].crcs)


@dataclass(frozen=True)
class Disk:
    """What is written to the disk of a node, or of all nodes (None), and the rank that makes each tile for it, or -1."""

    node: int | None
    views: Views
    owner: Ints


@dataclass(frozen=True)
class Work:
    """Bytes of each rank: `wanted` is what its tiles are made of, `worked` the part of it that is cast, summed or
    digested; then the traffic of the job in both ways, and of engine.verify in both."""

    wanted: Ints
    worked: Ints
    written: Ints
    direct: Traffic
    collective: Traffic
    direct_check: Traffic
    collective_check: Traffic

    def __add__(self, more: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(Work)))


def estimate(group: Group, report: Report, job: Job, engine: Given, target: Path) -> tuple[dict[str, Any], list[str]]:
    """The cost as data and as lines; `target` is where a calibration may write, `report` has what planning took."""
    world, models = _world(group, engine), [m for m, _ in job.sources]
    kept, engine = task.divided(engine, models)
    readers = _readers(group, models, world, engine)
    everywhere = not task.blind(str(engine.get("transport", "auto")), readers)
    work = _counted(group, job, world, readers)
    speed, origin = _speed(group, job, engine, target)
    threads = task.worker_count(engine, int(np.bincount(world.node).max()))
    found = {}
    for how in HOW:
        moved: Traffic = getattr(work, how)
        again: Traffic = getattr(work, f"{how}_check")
        seconds = sum(report.phases.values()) + START_S + _seconds(work, moved, again, world, speed)
        found[how] = {
            "bytes_read": int((moved.read + again.read).sum()) + report.bytes_read,
            "bytes_read_node": int(by_node(moved.read + again.read, world.node).max()),
            "amplification": float(f"{int(moved.read.sum()) / max(int(work.wanted.sum()), 1):.4g}"),
            "bytes_exchanged": int((moved.sent + again.sent).sum()),
            "bytes_written": int(work.written.sum()),
            "memory": _memory(how, threads, int(engine["memory"])) + kept * len(models),
            "seconds": float(f"{seconds:.3g}"),
        }
    chosen, why = _choice(str(engine.get("transport", "auto")), everywhere, work, world)
    facts = {
        "ranks": world.ranks,
        "nodes": world.nodes,
        "threads": threads,
        "transport": chosen,
        "why": why,
        "transports": found if everywhere else {HOW[1]: found[HOW[1]]},
        "bandwidth": {k: {"bytes_s": int(v), "from": origin[k]} for k, v in speed.items()},
    }
    return facts, _lines(facts)


def _lines(facts: Given) -> list[str]:
    head = ("transport", "read", "by a node", "amplified", "exchanged", "written", "memory a rank", "seconds")
    rows = [
        (
            how,
            *(size(t[k]) for k in ("bytes_read", "bytes_read_node")),
            f"{t['amplification']:.2f}x",
            *(size(t[k]) for k in ("bytes_exchanged", "bytes_written", "memory")),
            f"{t['seconds']:.3g}",
        )
        for how, t in facts["transports"].items()
    ]
    speeds = [f"{k} {v['bytes_s'] / 1e9:.2f} GB/s ({v['from']})" for k, v in facts["bandwidth"].items()]
    choice = f"transport {facts['transport']}: {facts['why']}"
    return [*table(head, rows), choice, f"bandwidth of a node: {', '.join(speeds)}"]


def _choice(asked: str, everywhere: bool, work: Work, world: World) -> tuple[str, str]:
    """(transport, reason): the rules that `task.run_tiles` goes by."""
    collective, numbers = traffic.cheaper(work.direct, work.collective, world.node)
    if not everywhere:
        return "collective", "not every node sees all files, so what one lacks is sent to it"
    if asked != "auto":
        return asked, f"engine.transport={asked}; {numbers}"
    return "collective" if collective and world.nodes > 1 else "direct", numbers


def _memory(how: str, threads: int, memory: int) -> int:
    """Most bytes of data that a rank holds: its threads' tiles, and for an exchange two waves each way."""
    waves = 4 * min(memory // 4, exchange.WAVE_BYTES) if how == "collective" else 0
    return threads * task.WORKER_BYTES + waves


# ---- bytes


def _world(group: Group, engine: Given) -> World:
    """The ranks there are, or those that engine.ranks and engine.nodes ask to plan for."""
    ranks, nodes = engine.get("ranks"), engine.get("nodes")
    if ranks is None and nodes is None:
        return World(ints(group.gather(group.node)), False)
    ranks, nodes = int(ranks or nodes or 1), int(nodes or 1)
    if ranks % nodes:
        raise UsageError(f"engine.ranks={ranks} cannot be spread evenly over engine.nodes={nodes}.")
    return World(node_of(ranks, nodes), True)


def _readers(group: Group, models: Sequence[Model], world: World, engine: Given) -> list[exchange.Readers]:
    """Who reads in a collective job: everyone evenly, unless that was not asked for and some file of any source is not seen.

    Saved catalogs and imagined ranks have no files to look at; of other sources beside them the ranks look all the same.
    """
    unseen = [world.imagined or "saved" in m.catalog.about for m in models]
    asked = engine.get("transport") == "collective"
    found = part.readers(group, [m for m, u in zip(models, unseen, strict=True) if not u], asked)
    evenly = asked or all(one.everywhere for one in found)
    lengths = part.ends(group, [m for m, u in zip(models, unseen, strict=True) if u])
    believed = (exchange.Readers(np.ones((world.ranks, len(n)), bool), n, world.node, evenly) for n in lengths)
    looked = (one.evenly() if evenly else one for one in found)
    return [next(believed if u else looked) for u in unseen]


def _counted(group: Group, job: Job, world: World, readers: Sequence[exchange.Readers]) -> Work:
    """What the ranks of `world` do, from the tiles of this rank, and then of all."""
    disks = [_disk(job, world, node) for node in (range(world.nodes) if job.local else [None])]
    first, last = part.share(job.canon, np.zeros(len(disks[0].owner), bool), group)
    found = _nothing(world.ranks)
    for _ in range(max(group.gather(-(-(last - first) // BLOCK)))):  # all ranks ask for their parts together
        stop = min(first + BLOCK, last)
        mine = job.canon.views(plan.tiles(job.canon.entries, first=first, last=stop))
        for disk in disks:
            found += _block(group, job, world, readers, mine, disk, disk.owner[first:stop])
        first = stop
    return sum(group.gather(found), _nothing(world.ranks))


def _disk(job: Job, world: World, node: int | None) -> Disk:
    """What is written to one disk, and by whom."""
    views, here = job.on_node(node)
    nbytes = part.tile_bytes(job.canon)
    here = np.ones(len(nbytes), bool) if here is None else here
    ranks = np.arange(world.ranks) if node is None else np.flatnonzero(world.node == node)
    lengths = [last - first for first, last in plan.share(nbytes * here, len(ranks))]
    return Disk(node, views, np.where(here, np.repeat(ranks, lengths), -1))


def _block(
    group: Group, job: Job, world: World, readers: Sequence[exchange.Readers], mine: Views, disk: Disk, owner: Ints
) -> Work:
    """The same of some tiles for one disk; `owner` is the rank of each, or -1."""
    found, none = _nothing(world.ranks), _nothing(world.ranks)
    bound, layout, files = job.target
    out = task.target_side(bound, layout.catalog.chunks, files, disk.views, mine, len(owner))
    items = np.array([itemsize(d) for d in out.dtypes], np.int64)[out.moves.tile]
    np.add.at(found.written, owner[out.moves.tile], np.prod(out.moves.extent, axis=1, dtype=np.int64) * items)

    for (m, _), who, needed in zip(job.sources, readers, part.parts(group, job.sources, mine), strict=True):
        w = part.wanted(who, needed, mine, owner < 0)
        of, tile = owner[w.moves.tile], w.moves.tile
        changed = np.array([a != b for a, b in zip(w.dtypes, out.dtypes, strict=True)], bool) | job.all_worked
        np.add.at(found.wanted, of, w.nbytes)
        np.add.at(found.worked, of, w.nbytes * changed[tile])
        one, two = _both(m, w, of, world)
        found += replace(none, direct=one, collective=two)
    if job.checked:
        m, bound = job.checked(disk.node)
        table = np.stack([held(layout, None if disk.node is None else n) for n in world.node.tolist()])
        (length,), (needed,) = part.ends(group, [m]), part.parts(group, [(m, bound)], mine)
        seen = exchange.Readers(table, length, world.node, disk.node is None)
        w = part.wanted(seen, needed, mine, owner < 0)
        one, two = _both(m, w, owner[w.moves.tile], world)
        if disk.node is not None:  # its own files, whatever the transport of the job
            one = two = one if seen.everywhere else two
        found += replace(none, direct_check=one, collective_check=two)
    return found


def _both(m: Model, w: exchange.Wanted, owner: Ints, world: World) -> tuple[Traffic, Traffic]:
    held = part.stored(m)
    return traffic.direct(w, owner, world.ranks, held), traffic.exchanged(w, owner, world.ranks, held)


def _nothing(ranks: int) -> Work:
    zeros, none = np.zeros((3, ranks), np.int64), traffic.none(ranks)
    return Work(zeros[0], zeros[1], zeros[2], none, none, none, none)


# ---- seconds


def _seconds(work: Work, moved: Traffic, again: Traffic, world: World, speed: Mapping[str, float]) -> float:
    """As if nothing overlapped: threads read, combine and write in turn, and what an exchange overlaps shares the cores."""

    def node(of_ranks: Ints) -> Any:
        return by_node(of_ranks, world.node)

    def moving(t: Traffic) -> Any:
        sent = t.left if world.nodes > 1 else t.sent  # what stays on a node is fast beside what leaves it
        return node(t.read) / speed["read"] + node(sent) / speed["exchange"]

    made = node(work.worked) / speed["sum"] + node(work.written) / speed["write"]
    return float((moving(moved) + made + moving(again) + node(again.read) / speed["sum"]).max())


def _speed(group: Group, job: Job, engine: Given, target: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Bytes/s of each kind of work by one node, and where each number is from."""
    given = {k: float(v) for k, v in (engine.get("bandwidth") or {}).items() if v is not None}
    measured = _measured(group, job, engine, target) if engine.get("calibrate") else {}
    speed = ASSUMED | measured | given
    return speed, {k: "given" if k in given else "measured" if k in measured else "assumed" for k in speed}


def _measured(group: Group, job: Job, engine: Given, target: Path) -> dict[str, float]:
    for m, _ in job.sources:
        needs_data(m.catalog)
        if m.source.reader:
            raise UsageError("engine.calibrate=true reads a part of the source, and a seed is computed. Leave it out.")
    workers = task.worker_count(engine, group.local_world) * group.local_world
    dtypes, want = [_main_dtype(bound) for _, bound in job.sources], _main_dtype(job.target[0])
    kernel = _kernel(job, dtypes, want)
    block, made = (plan.TILE * item for item in (max(map(itemsize, dtypes)), itemsize(want)))

    def measure() -> dict[str, float]:
        samples = [
            calibrate.sample(m.catalog.root, m.catalog.files, itemsize(d), block)
            for (m, _), d in zip(job.sources, dtypes, strict=True)
        ]
        return calibrate.rates(samples, target, workers, block, made, kernel, bool(engine.get("fsync", True)))

    found = group.on_first(measure)
    return found | ({"exchange": calibrate.exchange(group, str(engine["device"]))} if group.world > 1 else {})


def _main_dtype(bound: Bound) -> str:
    """The dtype of most bytes."""
    held: dict[str, int] = {}
    for entry, rule in zip(bound.entries, bound.rules, strict=True):
        if rule is not None:
            nbytes = int(np.prod(entry.shape, dtype=np.int64)) * itemsize(entry.dtype)
            held[entry.dtype] = held.get(entry.dtype, 0) + nbytes
    return max(sorted(held), key=lambda d: held[d]) if held else "uint8"


def _kernel(job: Job, dtypes: Sequence[str], want: str) -> Callable[[list[Array]], Array] | None:
    """What is done to a tile between reading and writing; None if its bytes only pass."""
    floats = all(is_floating(d) for d in (*dtypes, want))
    if not job.all_worked and (dtypes[0] == want or not floats):
        return None
    from ckpt_dist.averages import tensors  # noqa: F401  torch, which is not to be imported while the clock runs

    largest = max(range(len(job.canon.entries)), key=lambda e: np.prod(job.canon.entries[e].shape))
    tile = int(plan.tile_counts(job.canon.entries)[:largest].sum())

    def kernel(values: list[Array]) -> Array:
        result = job.combine(tile, iter(values), dtypes, want)
        assert result is not None
        for value in (*values, result) if job.digests else ():
            digest(value)
        if job.target[1].crcs:
            crc32(memoryview(result.view(np.uint8)))
        return result

    return kernel
