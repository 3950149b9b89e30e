"""The plan: which boxes of the source become which boxes of the target, proven complete before a byte is read.

All weights are laid end to end on one number line of elements, row-major; each box covers a bounding interval
of it. Boxes that meet have intervals that meet, so one sorted search joins millions of boxes, whatever is
sharded how. The work is cut into *tiles*: row-major blocks of the canonical spelling, the same for every
rank count, so memory is that of a few tiles, whatever a model's size.

Invariant: pure integers. No files, no tensors, no process group; the same answer on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_dist.box import Ints, distinct, expand, ints, row_major, volume, wider
from ckpt_dist.catalog import Chunks, Entry, Views, padded
from ckpt_dist.errors import CheckpointError

TILE = 1 << 19  # elements: 1 MiB of bf16; part of the definition of a fingerprint
HELD = 4  # tiles of as many sources are in a thread's memory at a time, to be summed at once
CANDIDATES = 1 << 22  # pairs examined at a time, to bound the memory of a join


class Uncovered(CheckpointError):
    """Some element of the target has no source, or two sources disagree about who holds it."""


class TooBig(CheckpointError):
    """The memory limit is below what one thread needs."""

    exit_code = 2


@dataclass(frozen=True)
class Hits:
    """Pairs of views that share a box: rows of the first and the second table, and the box."""

    a: Ints
    b: Ints
    start: Ints
    stop: Ints

    def __len__(self) -> int:
        return len(self.a)


def align(a: Views, b: Views) -> tuple[Views, Views]:
    """Both tables over the same list of weights and the same number of axes."""
    keys = tuple(dict.fromkeys((*a.keys, *b.keys)))
    ids = {key: i for i, key in enumerate(keys)}
    width = max(a.sizes.shape[1], b.sizes.shape[1])
    sizes = np.ones((len(keys), width), np.int64)
    for views in (b, a):
        rows = ints([ids[k] for k in views.keys])
        sizes[rows, : views.sizes.shape[1]] = views.sizes
    for views in (a, b):
        rows = ints([ids[k] for k in views.keys])
        wrong = np.flatnonzero((sizes[rows, : views.sizes.shape[1]] != views.sizes).any(axis=1))
        for w in wrong[:1]:
            have, need = sizes[rows[w]], views.sizes[w]
            raise CheckpointError(
                f"{views.keys[w]}: one side has axis lengths {have.tolist()}, the other {need.tolist()}."
            )
    return tuple(_widened(v, ints([ids[k] for k in v.keys]), keys, sizes) for v in (a, b))  # type: ignore[return-value]


def _widened(views: Views, ids: Ints, keys: tuple[str, ...], sizes: Ints) -> Views:
    start, stop, stride = (wider(getattr(views, c), sizes.shape[1], c == "stop") for c in ("start", "stop", "stride"))
    weight = ids[views.weight] if len(views) else views.weight
    return Views(keys, sizes, weight, views.chunk, start, stop, stride, views.origin)


def _line(views: Views) -> tuple[Ints, Ints]:
    """The bounding interval of each box on the number line of all weights."""
    totals = np.prod(views.sizes, axis=1, dtype=np.int64)
    base = np.cumsum(totals) - totals
    steps = row_major(views.sizes)[views.weight]
    first = base[views.weight] + np.sum(views.start * steps, axis=1, dtype=np.int64)
    last = base[views.weight] + np.sum((views.stop - 1) * steps, axis=1, dtype=np.int64)
    return first, last + 1


def unique(views: Views) -> Views:
    """Equal boxes of one weight (replicas) are alternatives: the first is kept. Empty boxes go."""
    views = views.take(np.flatnonzero(volume(views.start, views.stop) > 0))
    begin, end = _line(views)
    order = np.lexsort((np.arange(len(views)), end, begin))
    same = np.zeros(len(views), bool)
    if len(views) > 1:
        one, two = order[:-1], order[1:]
        same[1:] = (begin[one] == begin[two]) & (end[one] == end[two])
        for column in (views.start, views.stop):
            same[1:] &= (column[one] == column[two]).all(axis=1)
    return views.take(np.sort(order[~same]))


def join(a: Views, b: Views) -> Hits:
    """All pairs of boxes that overlap, ordered by the row of `b`. Both must be aligned."""
    begin, end = _line(a)
    order = np.argsort(begin, kind="stable")
    begin, reach = begin[order], np.maximum.accumulate(end[order]) if len(end) else end
    b_begin, b_end = _line(b)
    low = np.searchsorted(reach, b_begin, side="right")
    counts = np.maximum(np.searchsorted(begin, b_end, side="left") - low, 0)
    parts = [_overlaps(a, b, order, rows, low, counts) for rows in _batches(counts)]
    if not parts:
        none = np.zeros(0, np.int64)
        return Hits(none, none, *(np.zeros((0, a.start.shape[1]), np.int64),) * 2)
    return Hits(*(np.concatenate(c) for c in zip(*parts, strict=True)))


def _batches(counts: Ints) -> Iterator[Ints]:
    """Rows in runs of at most CANDIDATES pairs."""
    total = np.cumsum(counts)
    cuts = distinct(np.searchsorted(total, np.arange(0, int(total[-1]) if len(total) else 0, CANDIDATES)[1:], "right"))
    for rows in np.split(np.arange(len(counts)), cuts):
        if len(rows):
            yield rows


def _overlaps(a: Views, b: Views, order: Ints, rows: Ints, low: Ints, counts: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    local, found = expand(low[rows], counts[rows])
    i, j = order[found], rows[local]
    start = np.maximum(a.start[i], b.start[j])
    stop = np.minimum(a.stop[i], b.stop[j])
    keep = np.flatnonzero((a.weight[i] == b.weight[j]) & (stop > start).all(axis=1))
    return i[keep], j[keep], start[keep], stop[keep]


def disjoint(views: Views) -> bool:
    """Whether no two boxes overlap: nearly always seen from the number line alone."""
    begin, end = _line(views)
    order = np.argsort(begin, kind="stable")
    if len(views) < 2 or (np.maximum.accumulate(end[order])[:-1] <= begin[order][1:]).all():
        return True
    return len(join(views, views)) == len(views)


def prove(source: Views, target: Views) -> Hits:
    """Each element of the target has exactly one source, or Uncovered names the worst ten boxes.

    The proof is a sum: source boxes are disjoint, so their overlaps with a target box count each element once.
    """
    source, target = align(unique(source), target)
    hits = join(source, target)
    if not disjoint(source):
        raise Uncovered(_clash(source))
    have = np.zeros(len(target), np.int64)
    np.add.at(have, hits.b, volume(hits.start, hits.stop))
    need = volume(target.start, target.stop)
    short = np.flatnonzero(have != need)
    if len(short):
        raise Uncovered(_holes(target, have, need, short))
    return hits


def _text(views: Views, row: int) -> str:
    box = ", ".join(f"{s}:{t}" for s, t in zip(views.start[row].tolist(), views.stop[row].tolist(), strict=True))
    return f"{views.keys[views.weight[row]]}[{box}]"


def _holes(target: Views, have: Ints, need: Ints, short: Ints) -> str:
    worst = short[np.argsort((have - need)[short], kind="stable")][:10]
    lines = [f"  {_text(target, r)}: {need[r] - have[r]} of {need[r]} elements have no source" for r in worst.tolist()]
    more = f"\n  and {len(short) - 10} more boxes" if len(short) > 10 else ""
    return "The source does not hold all of the target; a shard or a layer is missing:\n" + "\n".join(lines) + more


def _clash(views: Views) -> str:
    hits = join(views, views)
    pair = int(np.flatnonzero(hits.a != hits.b)[0])
    return (
        f"Two stored arrays claim the same elements: {_text(views, int(hits.a[pair]))} and {_text(views, int(hits.b[pair]))}. "
        "The checkpoint mixes files of different runs, or its metadata is damaged."
    )


@dataclass(frozen=True)
class Cuts:
    """How each entry is cut into tiles: along its dim `depth`, every `step`, `counts` tiles in all."""

    shape: Ints
    inner: Ints
    depth: Ints
    step: Ints
    per: Ints  # blocks along the dim that is cut
    outer: Ints
    counts: Ints


def _cuts(entries: Sequence[Entry], elements: int) -> Cuts:
    width = max((len(e.shape) for e in entries), default=0)
    shape = padded([e.shape for e in entries], width, 1)
    inner = row_major(shape)
    depth = np.argmax(np.hstack([inner, np.ones((len(shape), 1), np.int64)]) <= elements, axis=1)
    depth = np.minimum(depth, max(width - 1, 0))
    rows = np.arange(len(shape))
    if width == 0:
        one = rows * 0 + 1
        return Cuts(shape, inner, depth, one, one, shape, one)
    step = np.maximum(elements // np.maximum(inner[rows, depth], 1), 1)
    per = np.where((shape == 0).any(axis=1), 0, -(-shape[rows, depth] // step))  # no elements, no tiles
    outer = np.where(np.arange(width)[None, :] < depth[:, None], shape, 1)
    return Cuts(shape, inner, depth, step, per, outer, np.prod(outer, axis=1, dtype=np.int64) * per)


def tile_counts(entries: Sequence[Entry]) -> Ints:
    """How many tiles each entry has."""
    return _cuts(entries, TILE).counts


def tile_names(entries: Sequence[Entry]) -> Callable[[int], str]:
    """The entry that a tile is of, by its name."""
    ends = np.cumsum(tile_counts(entries))
    return lambda tile: entries[int(np.searchsorted(ends, tile, "right"))].name


def tile_numel(entries: Sequence[Entry]) -> Ints:
    """Elements of every tile: `step` rows each, and what is left at the end of a dim."""
    cuts = _cuts(entries, TILE)
    if cuts.shape.shape[1] == 0:
        return cuts.counts
    rows = np.arange(len(cuts.counts))
    inner, length = cuts.inner[rows, cuts.depth], cuts.shape[rows, cuts.depth]
    entry, index = expand(np.zeros_like(cuts.counts), cuts.counts)
    numel = (cuts.step * inner)[entry]
    at_end = index % np.maximum(cuts.per, 1)[entry] == (cuts.per - 1)[entry]
    left = (length - (cuts.per - 1) * cuts.step) * inner
    numel[at_end] = left[entry[at_end]]
    return ints(numel)


def tiles(entries: Sequence[Entry], elements: int = TILE, first: int = 0, last: int | None = None) -> Chunks:
    """Row-major blocks of at most `elements` elements, in the order of the entries, or a run of them; `file` is unused.

    `tiles([Entry("w", "float32", (5, 4))], 8)` -> rows 0:2, 2:4 and 4:5; `offset` counts elements from the start.
    """
    cuts = _cuts(entries, elements)
    ends = np.cumsum(cuts.counts)
    number = np.arange(first, (ends[-1] if len(ends) else 0) if last is None else last)
    entry = np.searchsorted(ends, number, side="right")
    index = number - (ends - cuts.counts)[entry]
    shape, width = cuts.shape, cuts.shape.shape[1]
    if width == 0:
        return Chunks.dense(entry, shape[entry], shape[entry], entry * 0, entry * 0)
    block = index % np.maximum(cuts.per[entry], 1)
    rest = index // np.maximum(cuts.per[entry], 1)
    position = rest[:, None] // row_major(cuts.outer)[entry] % cuts.outer[entry]
    cut, column = cuts.depth[entry][:, None], np.arange(width)[None, :]
    low = (block * cuts.step[entry])[:, None]
    stop = shape[entry]
    high = np.minimum(low + cuts.step[entry][:, None], stop)
    start = np.where(column < cut, position, np.where(column == cut, low, 0))
    stop = np.where(column < cut, position + 1, np.where(column == cut, high, stop))
    return Chunks.dense(entry, start, stop, entry * 0, np.sum(start * cuts.inner[entry], axis=1, dtype=np.int64))


def share(nbytes: Ints, world: int) -> list[tuple[int, int]]:
    """For each rank its run of tiles, half-open: contiguous and balanced by bytes.

    `share([4, 4, 4, 4], 2)` -> `[(0, 2), (2, 4)]`.
    """
    total = np.concatenate([[0], np.cumsum(nbytes)])
    bounds = [int(np.searchsorted(total, int(total[-1]) * r // world)) for r in range(world)] + [len(nbytes)]
    return list(itertools.pairwise(bounds))


@dataclass(frozen=True)
class Moves:
    """Strided copies between tiles and chunks: one row each, ordered by tile.

    `at` (bytes) and `stride` (elements) address the chunk's file, `tile_at` and `tile_stride` (elements) the tile.
    """

    tile: Ints
    chunk: Ints
    extent: Ints
    at: Ints
    stride: Ints
    tile_at: Ints
    tile_stride: Ints

    def take(self, rows: Ints) -> Moves:
        columns = ("tile", "chunk", "extent", "at", "stride", "tile_at", "tile_stride")
        return Moves(*(getattr(self, c)[rows] for c in columns))


def moves(views: Views, chunks: Chunks, itemsize: Ints, tiled: Views, *, alternatives: bool = True) -> Moves:
    """What to copy between each tile and the chunks that `views` lies in; `itemsize` is per chunk.

    Equal boxes of a source are alternatives, of which one is read; those of a target are all written."""
    views, tiled = align(unique(views) if alternatives else views, tiled)
    hits = join(views, tiled)
    order = np.argsort(tiled.chunk[hits.b], kind="stable")
    a, b, start = hits.a[order], hits.b[order], hits.start[order]
    chunk = views.chunk[a]
    element = views.origin[a] + np.sum((start - views.start[a]) * views.stride[a], axis=1, dtype=np.int64)
    within = tiled.origin[b] + np.sum((start - tiled.start[b]) * tiled.stride[b], axis=1, dtype=np.int64)
    return Moves(
        tiled.chunk[b],
        chunk,
        hits.stop[order] - start,
        chunks.offset[chunk] + element * itemsize[chunk],
        views.stride[a],
        within,
        tiled.stride[b],
    )
