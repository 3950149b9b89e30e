"""The common course of all jobs: open, understand, lay out, prove, fill, publish.

    scanned       rank 0 scans, every rank gets the names; then `part` says what each rank needs
    ties          tied copies are compared once and one of them is left
    Design        what is read (source), how tiles are cut (canon), what is written (target), all as bound entries
    run_tiles     each rank makes its share of the tiles
    digests       per weight, from the digests of its tiles

Invariant: up to `run_tiles` nothing is written and no tensor is read, except for the ties.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import plan, quantised
from ckpt_dist.catalog import Chunks, Views
from ckpt_dist.design import Design
from ckpt_dist.engine import exchange, traffic
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, Crew, Done, Job, Side, fill, keep, tile_dtypes
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.journal import Journal
from ckpt_dist.engine.moves import Array
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.formats import Layout
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Model
from ckpt_dist.part import Part, item_bytes, located, parts, readers, share, stored, tile_bytes, wanted, wholly
from ckpt_dist.report import Progress, Report, parse_size, size
from ckpt_dist.spelling import Bound

OWN = "own"  # a transport by which ranks read what they see, and exchange only what somebody does not
KEPT = 1 << 30  # of compressed chunks, by a reader without an engine
# what one thread may hold: HELD tiles, of which one may be wide, a sum, a result and the scratch of a strided copy
WORKER_BYTES = 24 << 20


@dataclass(frozen=True)
class Staged:
    """A target that is being made: where its journal is, and what earlier attempts have done."""

    folder: Path
    finished: Sequence[tuple[int, int]]
    done: Done


def run_tiles(
    group: Group,
    report: Report,
    engine: Mapping[str, Any],
    what: str,
    canon: Bound,
    sources: Sequence[tuple[Model, Bound]],
    target: tuple[Bound, Layout, Files, Views] | None,
    combine: Combine,
    *,
    digests: bool,
    quiet: bool,
    staged: Staged | None = None,
    proof: Proof | None = None,
    here: NDArray[np.bool_] | None = None,
) -> Done:
    """Make all tiles; this rank its share. The result holds this rank's runs and everyone's byte counts and digests.

    Where nodes have targets of their own, `here` are the tiles for that of this node, which its ranks make.
    `proof` saves a second look at the sources. Raises Uncovered, before any tile, if a source does not hold all of them.
    """
    for m, _ in sources:
        needs_data(m.catalog)
    nbytes = tile_bytes(canon)
    finished = _finished(len(nbytes), staged, here)
    first, last = share(canon, finished, group, local=here is not None)
    mine = canon.views(plan.tiles(canon.entries, first=first, last=last))
    needed = (
        parts(group, sources, mine) if proof is None or here is not None or finished.any() else proof.parts
    )  # another share, other parts
    kept, engine = divided(engine, [m for m, _ in sources])
    workers = worker_count(engine, group.local_world)
    fsync = bool(engine.get("fsync", True))
    transport = str(engine.get("transport", "auto"))
    plans = readers(group, [m for m, _ in sources], transport == "collective")
    unseen = group.together(lambda: blind(transport, plans))
    if unseen and transport == "auto" and target:
        report.notes.append("transport collective: not every node sees all files")

    def work() -> Done:
        files_of = [opened(m, kept) for m, _ in sources]
        flush = target[2].sync if target and fsync else lambda: None
        journal = Journal(staged.folder, flush) if staged else None
        with ExitStack() as closing:  # all of them, whatever one of them says
            for files in [*files_of, *([target[2]] if target else [])]:
                closing.callback(files.close)
            if journal:
                closing.callback(journal.close)
            there = [located(group, r, b, p, mine) for r, (_, b), p in zip(plans, sources, needed, strict=True)]
            needs = group.together(
                lambda: [wanted(r, p, mine, finished[first:last]) for r, p in zip(plans, there, strict=True)]
            )
            collective = unseen or transport == "collective"
            if transport == "auto" and group.nodes > 1 and not unseen:
                collective, needs, said = _cheaper(group, needs, [stored(m) for m, _ in sources])
                report.notes += [said] if target else []
            bound_layout = target and (target[0], target[1].catalog.chunks, *target[2:])
            out = group.together(lambda: target_side(*bound_layout, mine, last - first) if bound_layout else None)
            job = Job(
                first,
                first,
                last,
                plan.tile_numel(canon.entries)[first:last],
                finished[first:last],
                [Side(f, w.moves, w.file, w.dtypes) for f, w in zip(files_of, needs, strict=True)],
                out,
                target[2] if target else None,
                _named(combine, canon),
                digests,
                frozenset(c.file for c in target[1].crcs) if target else frozenset(),
                journal.note if journal else lambda lo, hi, done: None,
            )
            total = int((nbytes * ~finished)[first:last].sum()) * len(sources)
            with Progress(what, total * group.world, quiet) as progress, Crew(workers) as crew:
                done = _made(group, engine, job, crew, progress, (needs, files_of) if collective else None)
            done.bytes_read = sum(files.bytes_read for files in files_of)
            return done

    done = group.together(work)
    if staged and (group.rank == 0 or (here is not None and group.local_rank == 0)):  # who has read the journal
        done.digests = staged.done.digests | done.digests
        done.runs += staged.done.runs
    _share_out(group, report, done)
    return done


def _finished(count: int, staged: Staged | None, here: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which of so many tiles this job need not make: earlier attempts have, or they are for other nodes."""
    found = np.zeros(count, bool) if here is None else ~here
    for lo, hi in staged.finished if staged else ():
        found[lo:hi] = True
    return found


def _made(
    group: Group,
    engine: Mapping[str, Any],
    job: Job,
    crew: Crew,
    progress: Progress,
    exchanged: tuple[Sequence[exchange.Wanted], Sequence[Files]] | None,
) -> Done:
    """The tiles of a job, from files, or from what the ranks exchange."""
    with group.busy() as moved:

        def advance(nbytes: int) -> None:
            moved()
            progress.advance(nbytes * group.world)

        if exchanged is None:
            return fill(job, crew, advance)
        with group.carrier(str(engine["device"])) as wire:
            return exchange.run(group, job, *exchanged, crew, int(engine["memory"]), advance, wire)


def _share_out(group: Group, report: Report, done: Done) -> None:
    """Everyone's byte counts into the report, and everyone's digests and overflows to all."""
    all_done = group.gather((done.bytes_read, done.bytes_written, done.digests, done.bytes_sent, done.beyond))
    report.bytes_read += sum(p[0] for p in all_done)
    report.bytes_written += sum(p[1] for p in all_done)
    report.bytes_exchanged += sum(p[3] for p in all_done)
    done.beyond = {tile for one in all_done for tile in one[4]}
    done.digests = {}
    for key, d in ((key, d) for one in all_done for key, d in one[2].items()):
        if done.digests.setdefault(key, d) != d:  # two nodes have made one tile, and one of them wrongly
            done.digests[key] = b""


def divided(engine: Mapping[str, Any], models: Sequence[Model]) -> tuple[int, dict[str, Any]]:
    """What compressed chunks of each source may take of `engine.memory` once they are opened, in bytes, 0 if there are
    none; and the engine with the rest of it.

    Raises TooBig if one of them needs more, or if too little is left.
    """
    packed = [m for m in models if m.catalog.about.get("packed")]
    half = int(engine["memory"]) // 2 if packed else 0
    memory = half // len(models)
    if packed and half < WORKER_BYTES:
        raise plan.TooBig(
            f"engine.memory={size(2 * half)} is too little: half of it is for compressed chunks, and one thread needs "
            f"{size(WORKER_BYTES)}. Give at least {size(2 * WORKER_BYTES)}."
        )
    for m in packed:
        opened(m, memory).close()
    return memory, {**engine, "memory": int(engine["memory"]) - memory * len(models)}


def opened(m: Model, memory: int = KEPT) -> Any:
    """What the bytes of a source come from: its files, or what computes them, within some memory."""
    if m.source.reader:
        return m.source.reader
    files = Files(m.catalog.root, m.catalog.files)
    if not quantised.computed(m.catalog):
        return files
    if packed := m.catalog.about.get("packed"):
        from ckpt_dist.engine.unpack import Unpacked

        return Unpacked(files, packed, memory)
    from ckpt_dist.engine.dequantise import Dequantised

    return Dequantised(files, quantised.of(m.catalog))


def _named(combine: Combine, canon: Bound) -> Combine:
    """The same combination, with the tensor's name in front of its errors."""
    if combine is keep:
        return keep

    name = plan.tile_names(canon.entries)

    def named(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Array | None:
        try:
            return combine(tile, values, dtypes, want)
        except CheckpointError as error:
            raise type(error)(f"{name(tile)}: {error}") from None

    return named


def worker_count(engine: Mapping[str, Any], local_world: int) -> int:
    """Threads of a rank: as asked, else by the CPUs; fewer where `engine.memory` demands it."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = int(engine.get("workers") or max(1, min(8, -(-cpus // local_world))))
    memory = int(engine["memory"])
    if memory < WORKER_BYTES:
        raise plan.TooBig(
            f"engine.memory={size(memory)} is too little: one thread needs {size(WORKER_BYTES)}. Give at least that."
        )
    return min(wanted, memory // WORKER_BYTES)


def blind(asked: str, plans: Sequence[exchange.Readers]) -> bool:
    """Whether some rank does not see some file, so that ranks must exchange what they read. Raises UsageError if
    engine.transport asks them not to."""
    unseen = not all(readers.everywhere for readers in plans)
    if asked == "direct" and unseen:
        raise UsageError(
            "engine.transport=direct, but not every node sees all files of the source. Use engine.transport=auto."
        )
    return unseen


def _cheaper(
    group: Group, needs: list[exchange.Wanted], held: Sequence[traffic.Part]
) -> tuple[bool, list[exchange.Wanted], str]:
    """Whether an exchange moves less than reading directly, which all nodes could; who then reads what, and what to say."""
    evenly = [replace(w, readers=w.readers.evenly()) for w in needs]
    each, once = (traffic.none(group.world) for _ in range(2))
    for w, balanced, of in zip(needs, evenly, held, strict=True):
        owner = np.full(len(w.file), group.rank)
        each += traffic.direct(w, owner, group.world, of)
        once += traffic.exchanged(balanced, owner, group.world, of)
    every = group.gather((each, once))
    each, once = (sum((e[k] for e in every), traffic.none(group.world)) for k in range(2))
    collective, numbers = traffic.cheaper(each, once, needs[0].readers.node)
    return (
        collective,
        evenly if collective else needs,
        f"transport {'collective' if collective else 'direct'}: {numbers}",
    )


def target_side(bound: Bound, chunks: Chunks, files: Files, views: Views, mine: Views, count: int) -> Side:
    """Where each tile goes: into all chunks that hold any of it."""
    entries = bound.entries
    moves = plan.moves(views, chunks, item_bytes(entries, chunks), mine, alternatives=False)
    names = [e.name for e in entries]
    return Side(
        files, moves, chunks.file, tile_dtypes(moves, chunks.entry, [e.dtype for e in entries], 0, count, names)
    )


def weight_digests(canon: Bound, done: Done, which: int, dtypes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A digest of each canonical tensor of one source (or of the result), from the digests of its tiles in order."""
    import xxhash

    cuts = [0, *np.cumsum(plan.tile_counts(canon.entries)).tolist()]
    found = {}
    for e, entry in enumerate(canon.entries):
        if entry.role != "weight":
            continue
        text = b"".join(done.digests.get((which, t), b"") for t in range(cuts[e], cuts[e + 1]))
        dtype = (dtypes or {}).get(entry.name, entry.dtype)
        found[entry.name] = xxhash.xxh3_128_hexdigest(f"{dtype}{list(entry.shape)}".encode() + text)
    return found


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """One digest for a model: of its weights' names and digests, sorted by name."""
    import xxhash

    return xxhash.xxh3_128_hexdigest("\n".join(f"{n} {d}" for n, d in sorted(digests.items())).encode())


@dataclass(frozen=True)
class Proof:
    """What was looked up to prove a plan: each source's part of this rank, and the views of the target."""

    parts: Sequence[Part]
    target: Views


def prove_all(group: Group, d: Design, models: Sequence[Model], target_chunks: Chunks) -> Proof:
    """Each source holds all of the tiles, and the tiles all of the target; or the worst holes are named."""
    target = d.target.views(target_chunks)
    group.together(lambda: plan.prove(wholly(d.canon), target))
    first, last = share(d.canon, np.zeros(len(tile_bytes(d.canon)), bool), group)
    mine = d.canon.views(plan.tiles(d.canon.entries, first=first, last=last))
    return Proof(parts(group, list(zip(models, d.sources, strict=True)), mine), target)


def engine_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's settings with sizes in bytes."""
    engine = dict(cfg["engine"])
    engine["memory"] = parse_size(engine["memory"])
    return engine
