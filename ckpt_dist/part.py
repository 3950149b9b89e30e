"""What a rank needs of a source: the chunks that its tiles touch, proven to hold all of them.

The catalog of a large checkpoint has millions of chunks, so it stays on rank 0. All ranks know its entries (the names
and shapes); by whole entries a rank finds which of them its tiles touch, and is sent only the chunks of those.

    scanned   rank 0 scans, every rank gets the models, without their chunks
    share     the tiles of this rank
    parts     the chunks these tiles touch; each element of a tile has exactly one source, or all ranks refuse
    wanted    the copies from these chunks to the tiles, at exact addresses

Invariant: what a rank does and holds grows with its own tiles and with the number of entries, not with the chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import formats, plan, quantised
from ckpt_dist.box import Ints, distinct, expand, ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Views, whole
from ckpt_dist.engine import exchange
from ckpt_dist.engine.fill import tile_dtypes
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError, Missing
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.elsewhere import Answers, Question
from ckpt_dist.formats.torch import head
from ckpt_dist.model import Model
from ckpt_dist.spelling import Bound

T = TypeVar("T")
ANSWER: dict[str, Callable[[str], Any]] = {"size": os.path.getsize, "names": os.listdir, "head": head}


def scanned(group: Group, scan: Callable[[Mapping[str, Any]], T]) -> T:
    """What rank 0 finds, on all ranks. What its node lacks is asked of the others, and it scans again.

    `scan` gets what to add to the keys of a source: what was said `elsewhere`.
    """
    said: dict[Question, tuple[Any, ...]] = {}
    found: list[T] = []

    def attempt() -> tuple[T | None, list[Question]]:
        try:
            found[:] = [scan({"elsewhere": Answers(said)} if group.world > 1 else {})]
            return _apart(found[0]), []
        except Missing as error:
            if group.world == 1 or Answers(said).knows(error):
                raise
            return None, error.questions

    while True:
        known, asked = group.on_first(attempt)
        if not asked:
            whole: Any = found[0] if found else known
            return _apart(whole, keep=True) if group.world > 1 else whole  # type: ignore[no-any-return]
        every = group.gather(group.together(partial(_seen, asked if group.local_rank == 0 else [])))
        said |= {q: tuple(of[q] for of in every if q in of) for q in asked}


def _seen(asked: Sequence[Question]) -> dict[Question, Any]:
    """What this node can say to some questions."""
    there = {"names": os.path.isdir}
    return {(what, p): ANSWER[what](p) for what, p in asked if there.get(what, os.path.isfile)(p)}


def _apart(found: Any, keep: bool = False) -> Any:
    """Models marked as having their chunks on rank 0 only, and without them unless this is rank 0."""
    if isinstance(found, Sequence):
        return [_apart(m, keep) for m in found]
    catalog = found.catalog if keep else pick(found.catalog, np.zeros(0, np.int64))
    return replace(found, source=replace(found.source, catalog=catalog), apart=True)


def pick(catalog: Catalog, rows: Ints) -> Catalog:
    """The same catalog with only some of its chunks; arrays in `about` have a value for each chunk."""
    about = {k: v[rows] if isinstance(v, np.ndarray) else v for k, v in catalog.about.items()}
    return replace(catalog, chunks=catalog.chunks.take(rows), about=about)


def _rows(chunks: Chunks, num_entries: int) -> Callable[[Ints], Ints]:
    """Entries -> the rows of their chunks."""
    entry = chunks.entry
    order = None if (entry[1:] >= entry[:-1]).all() else np.argsort(entry, kind="stable")
    cuts = np.searchsorted(entry if order is None else entry[order], np.arange(num_entries + 1))

    def rows(entries: Ints) -> Ints:
        found = expand(cuts[entries], cuts[entries + 1] - cuts[entries])[1]
        return found if order is None else order[found]

    return rows


def fetch(group: Group, models: Sequence[Model], entries: Sequence[Ints]) -> list[Catalog]:
    """The catalogs of sources with only the chunks of some entries of each; all ranks call this together."""
    apart = group.world > 1 and any(m.apart for m in models)
    asked = group.gather(entries) if apart else [entries]

    def cut(k: int, catalog: Catalog) -> Catalog:
        rows = _rows(catalog.chunks, len(catalog.entries))(entries[k])
        return catalog if len(rows) == len(catalog.chunks) else pick(catalog, rows)

    def dealt(k: int, catalog: Catalog) -> Catalog:
        find = _rows(catalog.chunks, len(catalog.entries)) if group.rank == 0 else None
        flat = group.deal(lambda rank: _flat(pick(catalog, find(asked[rank][k]))) if find else entries[k])
        return _unflat(catalog, flat)

    return [(dealt if apart else cut)(k, m.catalog) for k, m in enumerate(models)]


def _columns(catalog: Catalog) -> list[str]:
    return sorted(k for k, v in catalog.about.items() if isinstance(v, np.ndarray))


def _flat(catalog: Catalog) -> Ints:
    c = catalog.chunks
    one = [c.entry, c.file, c.offset, *(catalog.about[k] for k in _columns(catalog))]
    return np.hstack([np.column_stack(one), c.start, c.stop, c.strides]).reshape(-1)


def _unflat(catalog: Catalog, flat: Ints) -> Catalog:
    names, width = _columns(catalog), catalog.chunks.start.shape[1]
    table = flat.reshape(-1, 3 + len(names) + 3 * width)
    entry, file, offset, *more = table.T[: 3 + len(names)]
    start, stop, strides = np.split(table[:, 3 + len(names) :], 3, axis=1)
    about = {**catalog.about, **dict(zip(names, more, strict=True))}
    return replace(catalog, chunks=Chunks(entry, start, stop, strides, file, offset), about=about)


def share(canon: Bound, finished: NDArray[np.bool_], group: Group, local: bool = False) -> tuple[int, int]:
    """This rank's run of the tiles: those that are not there already are divided by bytes, among all ranks or those of
    its node."""
    count, rank = (group.local_world, group.local_rank) if local else (group.world, group.rank)
    return plan.share(tile_bytes(canon) * ~finished, count)[rank]


def on_node(target: Views, chunks: Chunks, here: NDArray[np.bool_]) -> Views:
    """What of a target lies in the files that a node holds."""
    return target.take(np.flatnonzero(here[chunks.file[target.chunk]]))


def needed(canon: Bound, target: Views) -> NDArray[np.bool_]:
    """The tiles that something of a target is made of."""
    tiled = canon.views(plan.tiles(canon.entries))
    found = np.zeros(len(tile_bytes(canon)), bool)
    views, tiled = plan.align(target, tiled)
    found[tiled.chunk[plan.join(views, tiled).b]] = True
    return found


def tile_bytes(canon: Bound) -> Ints:
    """Stored bytes of each tile."""
    items = np.array([itemsize(e.dtype) for e in canon.entries], np.int64)
    return plan.tile_numel(canon.entries) * np.repeat(items, plan.tile_counts(canon.entries))


@dataclass(frozen=True)
class Part:
    """One source as this rank needs it: the chunks its tiles touch, and the views of exactly these.

    `header` is how many bytes lie between the address that the catalog has of a chunk and its first element.
    """

    catalog: Catalog
    views: Views
    header: Ints


def wholly(bound: Bound) -> Views:
    """Views of entries as if each were one chunk: enough to see which weights and layers there are, and where."""
    none = np.zeros(len(bound.entries), np.int64)
    return bound.views(whole(bound.entries, none, none))


def parts(group: Group, sources: Sequence[tuple[Model, Bound]], mine: Views) -> list[Part]:
    """The chunks of each source that the tiles `mine` touch. Raises Uncovered if they do not hold all of a tile."""

    def touched(bound: Bound) -> Ints:
        entries, tiled = plan.align(wholly(bound), mine)
        return distinct(entries.chunk[plan.join(entries, tiled).a])

    asked = group.together(lambda: [touched(bound) for _, bound in sources])
    catalogs = fetch(group, [m for m, _ in sources], asked)

    def proven(m: Model, bound: Bound, catalog: Catalog) -> Part:
        views = bound.views(catalog.chunks)
        try:
            plan.prove(views, mine)
        except CheckpointError as error:
            raise type(error)(f"{m.source.folder}: {error}") from None
        return Part(catalog, views, np.zeros(len(catalog.chunks), np.int64))

    return group.together(lambda: [proven(m, b, c) for (m, b), c in zip(sources, catalogs, strict=True)])


def readers(group: Group, models: Sequence[Model], balanced: bool) -> list[exchange.Readers]:
    """Who reads what of each source: every node looks which of its files it sees; one that nobody sees is refused."""
    first = group.world > 1 and group.local_rank == 0  # ranks of a node see what its first one sees
    looked = group.gather((group.node, [_visible(m.catalog) if first and not m.source.reader else [] for m in models]))
    nodes = ints([node for node, _ in looked])
    found = []
    for k, (m, length) in enumerate(zip(models, ends(group, models), strict=True)):
        table: NDArray[np.bool_] = np.ones((group.world, len(length)), bool)
        if group.world > 1 and not m.source.reader:
            seen = {node: rows[k] for node, rows in looked if rows[k]}
            table = np.array([seen.get(node, []) for node in nodes.tolist()], bool)
            for q in quantised.of(m.catalog):  # its scales may lie in another file
                table[:, q.file] &= table[:, q.scales.file]
            exchange.missing(table, m.catalog.files, m.catalog.root)
        found.append(exchange.Readers(table, length, nodes, balanced))
    return found


def ends(group: Group, models: Sequence[Model]) -> list[Ints]:
    """The last byte of each file of each source that some chunk needs."""

    def work() -> list[Ints]:
        return [_ends(m.catalog) for m in models]

    return group.on_first(work) if any(m.apart for m in models) else work()


def _ends(catalog: Catalog) -> Ints:
    chunks = catalog.chunks
    length = np.zeros(len(catalog.files), np.int64)
    nbytes = np.prod(chunks.stop - chunks.start, axis=1) * item_bytes(catalog.entries, chunks)
    np.maximum.at(length, chunks.file, chunks.offset + nbytes)
    return length


def stored(m: Model) -> NDArray[np.float64]:
    """Of each file, the bytes in files for a byte that is read from it: less than 1 where values are computed."""
    each = np.full(len(m.catalog.files), 0.0 if m.source.reader else 1.0)
    for q in quantised.computed(m.catalog):
        each[q.file] = q.stored_bytes / max(q.nbytes, 1)
    return each


def _visible(catalog: Catalog) -> list[bool]:
    """Which files are there: one look at each folder, not at each file. Where nodes may have files of one name that they wrote
    for themselves (`sizes`), only those that are as long as what was scanned."""
    root, files, sizes = catalog.root, catalog.files, catalog.about.get("sizes")
    if sizes:
        paths = [os.path.join(root, f) for f in files]
        return [os.path.isfile(p) and os.path.getsize(p) == n for p, n in zip(paths, sizes, strict=True)]
    folders: dict[str, set[str]] = {}
    for folder in {os.path.dirname(f) for f in files}:
        try:
            folders[folder] = set(os.listdir(os.path.join(root, folder)))
        except OSError:
            folders[folder] = set()
    return [os.path.basename(f) in folders[os.path.dirname(f)] for f in files]


def located(group: Group, who: exchange.Readers, bound: Bound, needed: Part, mine: Views) -> Part:
    """The same part with exact addresses, where only the files have them: looked up for the chunks that are touched."""
    catalog, views = needed.catalog, needed.views
    locate = getattr(formats.load(catalog.format), "locate", None)
    if locate is None:
        return needed
    boxes, tiled = plan.align(plan.unique(views), mine)
    rows = distinct(boxes.chunk[plan.join(boxes, tiled).a])
    chunks = (
        group.together(lambda: locate(catalog, rows)) if who.everywhere else _located(group, who, catalog, rows, locate)
    )
    header = chunks.offset - catalog.chunks.offset[rows]
    return Part(replace(catalog, chunks=chunks, about={}), bound.views(chunks), header)


def wanted(who: exchange.Readers, needed: Part, mine: Views, finished: NDArray[np.bool_]) -> exchange.Wanted:
    """The copies this rank's tiles need."""
    entries, chunks = needed.catalog.entries, needed.catalog.chunks
    items = item_bytes(entries, chunks)
    moves = plan.moves(needed.views, chunks, items, mine)
    dtypes = tile_dtypes(moves, chunks.entry, [e.dtype for e in entries], 0, len(finished), [e.name for e in entries])
    moves = moves.take(np.flatnonzero(~finished[moves.tile]))
    of = moves.chunk
    moves = replace(moves, chunk=np.arange(len(of)))
    return exchange.Wanted(moves, chunks.file[of], moves.at - needed.header[of], items[of], dtypes, who)


def _located(
    group: Group, who: exchange.Readers, catalog: Catalog, rows: Ints, locate: Callable[[Catalog, Ints], Chunks]
) -> Chunks:
    """`locate`, where each chunk's file is seen: the chunks are sent there, addresses come back."""
    chunks = catalog.chunks.take(rows)
    reader = who.of(chunks.file, chunks.offset, group.rank)
    asked = group.swap([_flat(pick(catalog, rows[reader == r])) for r in range(group.world)])

    def found() -> list[Chunks]:
        tables = [_unflat(catalog, flat) for flat in asked]
        return [locate(t, np.arange(len(t.chunks))) for t in tables]

    answers = group.swap([np.column_stack([c.offset, c.strides]) for c in group.together(found)])
    offset, strides = chunks.offset.copy(), chunks.strides.copy()
    for r, answer in enumerate(answers):
        table = answer.reshape(-1, 1 + strides.shape[1])
        offset[reader == r], strides[reader == r] = table[:, 0], table[:, 1:]
    return replace(chunks, offset=offset, strides=strides)


def item_bytes(entries: Sequence[Entry], chunks: Chunks) -> Ints:
    """Bytes of an element, for each chunk."""
    return np.array([itemsize(e.dtype) for e in entries], np.int64)[chunks.entry]
