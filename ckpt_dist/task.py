"""The common course of all jobs: open, understand, lay out, prove, fill, publish.

    open_models   rank 0 scans, every rank gets the catalogs
    settle_ties   tied copies are compared once and one of them is left
    Design        what is read (source), how tiles are cut (canon), what is written (target), all as bound entries
    run_tiles     each rank makes its share of the tiles
    digests       per weight, from the digests of its tiles

Invariant: up to `run_tiles` nothing is written and no tensor is read, except for the ties.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import family as families
from ckpt_dist import formats, model, plan
from ckpt_dist.box import Ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Views
from ckpt_dist.engine import exchange
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, Crew, Done, Job, Side, fill, keep, tile_dtypes
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.journal import Journal
from ckpt_dist.engine.moves import Array
from ckpt_dist.errors import CheckpointError, Missing, UsageError
from ckpt_dist.files.dtypes import is_floating, itemsize, known
from ckpt_dist.formats import Layout
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Bound, Model
from ckpt_dist.report import Progress, Report, size
from ckpt_dist.sources import Source, open_source

T = TypeVar("T")
WORKER_BYTES = (
    24 << 20
)  # what one thread may hold: a tile of each width, a sum, a result and the scratch of a strided copy


@dataclass(frozen=True)
class Design:
    """Sources, tiles and target as bound entries over the same weights."""

    sources: tuple[Bound, ...]
    canon: Bound
    target: Bound
    dialect: str


def scanned(group: Group, scan: Callable[[Mapping[str, Any]], T]) -> T:
    """What rank 0 finds, on all ranks. Files that its node lacks are looked for on the others, and it scans again.

    `scan` gets what to add to the keys of a source: the sizes of files `elsewhere`, -1 for one that nobody has.
    """
    sizes: dict[str, int] = {}

    def attempt() -> tuple[T | None, tuple[str, ...]]:
        try:
            return scan({"elsewhere": sizes} if group.world > 1 else {}), ()
        except Missing as error:
            if group.world == 1 or set(error.paths) <= set(sizes):
                raise
            return None, error.paths

    while True:
        found, lost = group.on_first(attempt)
        if not lost:
            return found  # type: ignore[return-value]
        sizes |= dict.fromkeys(lost, -1)
        for seen in group.gather({p: os.path.getsize(p) for p in lost if os.path.isfile(p)}):
            sizes |= seen


def open_model(keys: Mapping[str, Any], cfg: Mapping[str, Any]) -> Model:
    """Find, scan and recognise one source."""
    settings = cfg.get("model") or {}
    return understand(open_source(keys, settings.get("config")), keys, cfg)


def understand(source: Source, keys: Mapping[str, Any], cfg: Mapping[str, Any]) -> Model:
    settings = cfg.get("model") or {}
    return model.recognise(
        source,
        family=settings.get("family", "auto"),
        dialect=keys.get("dialect", "auto"),
        keep=cfg.get("keep", ["weights"]),
        unmatched=cfg.get("unmatched", "error"),
    )


def design(models: Sequence[Model], cfg_target: Mapping[str, Any]) -> Design:
    """Which spelling the target has, and what is what on each side."""
    first = models[0]
    dialect = _target_dialect(first, cfg_target)
    same = all(m.dialect == first.dialect for m in models)
    if same and dialect == first.dialect and (model.canonical(dialect) or first.unresolved):
        bounds = tuple(model.bind_plain(m) for m in models)
        canon = _plain_entries(first)
        return Design(bounds, canon, _with_paths(canon, first, cfg_target), dialect)
    return _family_design(models, dialect, cfg_target)


def _target_dialect(first: Model, cfg_target: Mapping[str, Any]) -> str:
    asked = str(cfg_target.get("dialect", "auto"))
    if first.family is None:
        if asked != "auto":
            raise UsageError(
                f"target.dialect={asked}: the source is of no known family, so its names cannot be translated. Give model=FAMILY."
            )
        return ""
    if asked == "auto":
        return families.CANONICAL if cfg_target.get("format") == "hf" else first.dialect
    if asked not in first.family.dialects:
        raise UsageError(f"target.dialect={asked}: {first.family.name} has {', '.join(first.family.dialects)}.")
    return asked


def _plain_entries(first: Model) -> Bound:
    picked = [
        (replace(first.catalog.entries[e], name=n, frame=()), n) for e, n in enumerate(first.names) if n is not None
    ]
    entries = tuple(e for e, _ in picked)
    return Bound(entries, tuple(families.plain(e, n) for e, n in picked), {}, {})


def _family_design(models: Sequence[Model], dialect: str, cfg_target: Mapping[str, Any]) -> Design:
    for m in models:
        if m.family is None or m.unresolved:
            what = m.unresolved or "the model's family"
            raise UsageError(
                f"{m.source.folder}: {what} cannot be read from the checkpoint, and names in {m.dialect or 'an unknown dialect'} cannot become "
                f"{dialect or 'others'} without. Give model.config=PATH of its config.json or params.json."
            )
        if any(n is not None and m.catalog.entries[e].role != "weight" for e, n in enumerate(m.names)):
            raise UsageError(
                f"Optimizer state is carried only under the same names; {m.dialect} becomes {dialect}. Use keep=[weights]."
            )
    first = models[0]
    assert first.family is not None
    bounds = tuple(model.bind_family(m) for m in models)
    views = bounds[0].views(first.catalog.chunks)
    present = model.corners(bounds[0], views)
    dtype_of = _dtypes(bounds[0])
    canon = model.spelled(first.family, families.CANONICAL, present, first.sizes, dtype_of)
    ties = {
        copy: of
        for copy, of in first.family.ties.items()
        if dialect != families.CANONICAL and copy not in present and tied(first)
    }
    target = model.spelled(
        first.family,
        dialect,
        present | {c: present[o] for c, o in ties.items()},
        first.sizes,
        dtype_of_tied(dtype_of, ties),
    )
    rules = tuple(
        r if r is None else replace(r, weights=tuple(ties.get(w, w) for w in r.weights)) for r in target.rules
    )
    return Design(bounds, canon, _with_paths(replace(target, rules=rules), first, cfg_target), dialect)


def dtype_of_tied(dtype_of: Callable[[Any], str], ties: Mapping[str, str]) -> Callable[[Any], str]:
    return lambda rule: dtype_of(replace(rule, weights=tuple(ties.get(w, w) for w in rule.weights)))


def _dtypes(bound: Bound) -> Callable[[Any], str]:
    """The stored dtype of a rule's first weight, at its layer where layers are told apart."""
    exact: dict[tuple[str, tuple[tuple[str, int], ...]], str] = {}
    loose: dict[str, str] = {}
    for entry, rule in zip(bound.entries, bound.rules, strict=True):
        for weight in rule.weights if rule else ():
            exact[weight, tuple(sorted(rule.fixed))] = entry.dtype  # type: ignore[union-attr]
            loose.setdefault(weight, entry.dtype)
    return lambda rule: exact.get((rule.weights[0], tuple(sorted(rule.fixed))), loose[rule.weights[0]])


def _with_paths(target: Bound, first: Model, cfg_target: Mapping[str, Any]) -> Bound:
    """Names and nesting as the target stores them: `hf` is flat; others keep the dicts around the model, or get target.key."""
    key = cfg_target.get("key", "auto")
    keeps = cfg_target.get("format") in ("dcp", "torch") and first.catalog.format in ("dcp", "torch")
    around: tuple[str | int, ...] = (
        (first.wrapper if keeps else ()) if key == "auto" else tuple(str(key).split(".")) if key else ()
    )
    entries = []
    for entry in target.entries:
        path = entry.path if entry.role != "weight" else (*around, entry.name)
        name = entry.name if entry.role != "weight" else ".".join(map(str, path))
        entries.append(replace(entry, name=name, path=path, dtype=target_dtype(cfg_target.get("dtype", "keep"), entry)))
    return replace(target, entries=tuple(entries))


def target_dtype(rules: str | Mapping[str, str], entry: Entry) -> str:
    """The dtype that `target.dtype` gives an entry: the first pattern that fits, else `default`; integers stay."""
    if not is_floating(entry.dtype) or entry.role != "weight":
        return entry.dtype
    if isinstance(rules, str):
        rules = {"default": rules}
    fits = [d for pattern, d in rules.items() if pattern != "default" and fnmatch.fnmatch(entry.name, pattern)]
    dtype = fits[0] if fits else rules.get("default", "keep")
    if dtype != "keep" and not (known(dtype) and is_floating(dtype)):
        raise UsageError(f"target.dtype: {dtype!r} is no floating dtype.")
    return entry.dtype if dtype == "keep" else dtype


def tied(m: Model) -> bool:
    return bool(m.source.config.get("tie_word_embeddings"))


@dataclass(frozen=True)
class Work:
    """What one rank needs to make its tiles."""

    tiles: Chunks
    first: int
    last: int
    job: Job
    names: Sequence[str]


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
    sources: Sequence[tuple[Model, Bound, Views]],
    target: tuple[Bound, Layout, Files, Views] | None,
    combine: Combine,
    *,
    digests: bool,
    quiet: bool,
    staged: Staged | None = None,
) -> Done:
    """Make all tiles; this rank its share. The result holds this rank's runs and everyone's byte counts and digests."""
    for m, _, _ in sources:
        needs_data(m.catalog)
    tiles = plan.tiles(canon.entries)
    numel = np.prod(tiles.stop - tiles.start, axis=1, dtype=np.int64)
    finished = np.zeros(len(tiles), bool)
    for lo, hi in staged.finished if staged else ():
        finished[lo:hi] = True
    weight = numel * item_bytes(canon.entries, tiles) * ~finished
    first, last = plan.share(weight, group.world)[group.rank]
    workers = worker_count(engine, group.local_world)
    fsync = bool(engine.get("fsync", True))
    transport = str(engine.get("transport", "auto"))
    plans = [_readers(group, m, transport == "collective") for m, _, _ in sources]
    collective = group.together(lambda: _collective(transport, group, report, plans))

    def work() -> Done:
        mine = canon.views(tiles.take(np.arange(first, last)))
        opened = [Files(m.catalog.root, m.catalog.files) for m, _, _ in sources]
        sync = target[2].sync if target and fsync else lambda: None

        def flush() -> None:  # a disk may have much to write down
            group.patiently(sync)

        journal = Journal(staged.folder, flush) if staged else None
        try:
            wanted = [
                _wanted(group, r, m, b, v, mine, finished[first:last])
                for r, (m, b, v) in zip(plans, sources, strict=True)
            ]
            out = group.together(lambda: _target_side(target, mine, last - first) if target else None)
            job = Job(
                first,
                first,
                last,
                numel[first:last],
                finished[first:last],
                [Side(f, w.moves, w.file, w.dtypes) for f, w in zip(opened, wanted, strict=True)],
                out,
                target[2] if target else None,
                _named(combine, canon, tiles),
                digests,
                frozenset(c.file for c in target[1].crcs) if target else frozenset(),
                journal.note if journal else lambda lo, hi, done: None,
            )
            total = int(weight[first:last].sum()) * len(sources)
            with Progress(what, total * group.world, quiet) as progress, group.busy() as moved, Crew(workers) as crew:

                def advance(nbytes: int) -> None:
                    moved()
                    progress.advance(nbytes * group.world)

                if collective:
                    memory = int(engine["memory"])
                    done = exchange.run(group, job, wanted, opened, crew, memory, advance)
                else:
                    done = fill(job, crew, advance)
            flush()
            done.bytes_read = sum(files.bytes_read for files in opened)
            return done
        finally:
            if journal:
                journal.close()
            for files in opened:
                files.close()
            if target:
                target[2].close()

    done = group.together(work)
    parts = group.gather((done.bytes_read, done.bytes_written, done.digests, done.bytes_sent))
    report.bytes_read += sum(p[0] for p in parts)
    report.bytes_written += sum(p[1] for p in parts)
    report.bytes_exchanged += sum(p[3] for p in parts)
    done.digests = {key: d for part in parts for key, d in part[2].items()}
    if staged:
        done.digests.update(staged.done.digests)
        done.runs += staged.done.runs if group.rank == 0 else []
    return done


def _named(combine: Combine, canon: Bound, tiles: Chunks) -> Combine:
    """The same combination, with the tensor's name in front of its errors."""
    if combine is keep:
        return keep

    def named(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Array | None:
        try:
            return combine(tile, values, dtypes, want)
        except CheckpointError as error:
            raise type(error)(f"{canon.entries[tiles.entry[tile]].name}: {error}") from None

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


def _readers(group: Group, m: Model, balanced: bool) -> exchange.Readers:
    """Who reads what of a source: every node looks which of its files it sees; one that nobody sees is refused."""
    catalog, length = m.catalog, file_lengths(m.catalog)
    if group.world == 1:
        return exchange.Readers(np.ones((1, len(length)), bool), length, balanced)
    looked = group.gather(_visible(catalog.root, catalog.files) if group.local_rank == 0 else [])
    node = 0
    for rank, row in enumerate(looked):  # ranks of a node see what its first one sees
        node = rank if row else node
        looked[rank] = looked[node]
    table = np.array(looked, bool)
    exchange.missing(table, catalog.files, catalog.root)
    return exchange.Readers(table, length, balanced)


def file_lengths(catalog: Catalog) -> Ints:
    """Of each file, the bytes up to the end of its last chunk."""
    length = np.zeros(len(catalog.files), np.int64)
    nbytes = np.prod(catalog.chunks.stop - catalog.chunks.start, axis=1) * item_bytes(catalog.entries, catalog.chunks)
    np.maximum.at(length, catalog.chunks.file, catalog.chunks.offset + nbytes)
    return length


def _visible(root: str, files: Sequence[str]) -> list[bool]:
    """Which files are there: one look at each folder, not at each file."""
    folders: dict[str, set[str]] = {}
    for folder in {os.path.dirname(f) for f in files}:
        try:
            folders[folder] = set(os.listdir(os.path.join(root, folder)))
        except OSError:
            folders[folder] = set()
    return [os.path.basename(f) in folders[os.path.dirname(f)] for f in files]


def _collective(asked: str, group: Group, report: Report, plans: Sequence[exchange.Readers]) -> bool:
    """Whether ranks exchange what they read: if asked to, or if some rank does not see some file."""
    blind = not all(readers.everywhere for readers in plans)
    if asked == "direct" and blind:
        raise UsageError(
            "engine.transport=direct, but not every node sees all files of the source. Use engine.transport=auto."
        )
    if group.world > 1 and asked == "auto" and blind:
        report.notes.append("transport collective: not every node sees all files")
    return asked == "collective" or blind


def _wanted(
    group: Group,
    readers: exchange.Readers,
    m: Model,
    bound: Bound,
    views: Views,
    mine: Views,
    finished: NDArray[np.bool_],
) -> exchange.Wanted:
    """What this rank's tiles need of a source; exact addresses are looked up only for the chunks they touch."""
    catalog = m.catalog
    chunks = catalog.chunks
    locate = getattr(formats.load(catalog.format), "locate", None)
    if locate is not None:
        needed, tiled = plan.align(plan.unique(views), mine)
        rows = np.unique(needed.chunk[plan.join(needed, tiled).a])
        chunks = locate(catalog, rows) if readers.everywhere else _located(group, readers, catalog, rows, locate)
        views = bound.views(chunks)

    def wanted() -> exchange.Wanted:
        items = item_bytes(catalog.entries, chunks)
        moves = plan.moves(views, chunks, items, mine)
        names = [e.name for e in catalog.entries]
        dtypes = tile_dtypes(moves, chunks.entry, [e.dtype for e in catalog.entries], 0, len(finished), names)
        moves = moves.take(np.flatnonzero(~finished[moves.tile]))
        file, item = chunks.file[moves.chunk], items[moves.chunk]
        return exchange.Wanted(replace(moves, chunk=np.arange(len(file))), file, item, dtypes, readers)

    return group.together(wanted)


def _located(
    group: Group, readers: exchange.Readers, catalog: Catalog, rows: Ints, locate: Callable[[Catalog, Ints], Chunks]
) -> Chunks:
    """`locate`, where each chunk's file is seen: rows are sent there, addresses come back."""
    chunks = catalog.chunks.take(rows)
    who = readers.of(chunks.file, chunks.offset, group.rank)
    asked = group.swap([rows[who == r] for r in range(group.world)])
    found = group.together(lambda: [locate(catalog, r) for r in asked])
    answers = group.swap([np.column_stack([c.offset, c.strides]) for c in found])
    offset, strides = chunks.offset.copy(), chunks.strides.copy()
    for r, answer in enumerate(answers):
        table = answer.reshape(-1, 1 + strides.shape[1])
        offset[who == r], strides[who == r] = table[:, 0], table[:, 1:]
    return replace(chunks, offset=offset, strides=strides)


def _target_side(target: tuple[Bound, Layout, Files, Views], mine: Views, count: int) -> Side:
    bound, layout, files, views = target
    chunks, entries = layout.catalog.chunks, bound.entries
    items = item_bytes(entries, chunks)
    moves = plan.moves(views, chunks, items, mine, alternatives=False)
    return Side(
        files,
        moves,
        chunks.file,
        tile_dtypes(moves, chunks.entry, [e.dtype for e in entries], 0, count, [e.name for e in entries]),
    )


def item_bytes(entries: Sequence[Entry], chunks: Chunks) -> Ints:
    """Bytes of an element, for each chunk."""
    return np.array([itemsize(e.dtype) for e in entries], np.int64)[chunks.entry]


def weight_digests(canon: Bound, done: Done, which: int, dtypes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A digest of each canonical tensor of one source (or of the result), from the digests of its tiles in order."""
    import xxhash

    tiles = plan.tiles(canon.entries)
    cuts = np.searchsorted(tiles.entry, np.arange(len(canon.entries) + 1)).tolist()
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


def settle_ties(group: Group, report: Report, m: Model, engine: Mapping[str, Any]) -> Model:
    """Where the config ties two weights and both are stored: leave the copy out if it is equal, keep both if not."""
    if m.family is None or not tied(m):
        return m
    rules = [None if n is None else families.match(m.family, m.dialect, n) for n in m.names]
    where = {r.weights[0]: e for e, r in enumerate(rules) if r is not None and len(r.weights) == 1}
    for copy, of in m.family.ties.items():
        if copy not in where or of not in where:
            continue
        one, two = where[copy], where[of]
        saved = "saved" in m.catalog.about
        if saved:
            report.guesses.append(f"{m.names[one]} and {m.names[two]} are equal, as the config says")
        if saved or equal_entries(group, report, m, one, two, engine):
            names = tuple(None if e == one else n for e, n in enumerate(m.names))
            m = replace(
                m, names=names, dropped={**m.dropped, f"tied to {m.names[two]}": (m.catalog.entries[one].name,)}
            )
        else:
            report.warnings.append(
                f"{m.names[one]} and {m.names[two]} differ although the config ties them; both are kept, untied"
            )
    return m


def equal_entries(group: Group, report: Report, m: Model, one: int, two: int, engine: Mapping[str, Any]) -> bool:
    """Whether two stored tensors have the same shape, dtype and bytes."""
    a, b = m.catalog.entries[one], m.catalog.entries[two]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    canon = Bound((replace(a, name="tied"),), (families.plain(a, "tied"),), {}, {})
    sides = []
    for e in (one, two):
        rules = tuple(families.plain(a, "tied") if i == e else None for i in range(len(m.names)))
        bound = Bound(m.catalog.entries, rules, {}, {})
        views = bound.views(m.catalog.chunks)
        plan.prove(views, canon.views(plan.tiles(canon.entries)))
        sides.append((m, bound, views))
    different: list[int] = []

    def compare(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        kept = next(values).copy()
        if not np.array_equal(kept, next(values)):
            different.append(tile)

    run_tiles(group, report, engine, "compare tied weights", canon, sides, None, compare, digests=False, quiet=True)
    return not any(group.gather(bool(different)))


def prove_all(d: Design, models: Sequence[Model], target_chunks: Chunks) -> tuple[list[Views], Views]:
    """Views of every source and of the target; each source covers all of the target, or the worst holes are named."""
    target = d.target.views(target_chunks)
    found = []
    for m, bound in zip(models, d.sources, strict=True):
        views = bound.views(m.catalog.chunks)
        try:
            plan.prove(views, target)
        except CheckpointError as error:
            raise type(error)(f"{m.source.folder}: {error}") from None
        found.append(views)
    return found, target
