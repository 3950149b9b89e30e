"""Parallel layouts: which axis or dim is divided, and where.

FSDP rows, tensor, pipeline and expert parallelism are all intervals of an axis; here are the rules by which
frameworks cut them. Invariant: the parts of one cut are disjoint, in order and complete; integers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, product

from ckpt_dist.box import Box

Interval = tuple[int, int]
Placement = tuple[object, ...]  # ("shard", dim), ("strided", dim, split_factor), ("replicate",), ("partial",)


def chunked(length: int, parts: int) -> list[Interval]:
    """As torch.chunk and FSDP2 cut: `chunked(5, 4)` -> `[(0, 2), (2, 4), (4, 5), (5, 5)]`."""
    step = max(-(-length // parts), 1)
    return [(min(r * step, length), min((r + 1) * step, length)) for r in range(parts)]


def even(length: int, parts: int) -> list[Interval]:
    """Equal parts; a remainder is refused: `even(6, 3)` -> `[(0, 2), (2, 4), (4, 6)]`."""
    if length % parts:
        raise ValueError(f"{length} cannot be divided evenly by {parts}")
    step = length // parts
    return [(r * step, (r + 1) * step) for r in range(parts)]


def bounds(lengths: Sequence[int]) -> list[Interval]:
    """Parts of given lengths: `bounds([3, 4])` -> `[(0, 3), (3, 7)]`."""
    ends = list(accumulate(lengths, initial=0))
    return list(pairwise(ends))


def placed(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> list[tuple[Box, tuple[int, ...]]]:
    """The boxes of a DTensor that one rank holds, each with its place in the rank's local tensor.

    `placed((5, 7), (4,), (2,), [("shard", 0)])` -> `[(((4, 5), (0, 7)), (0, 0))]`. There is more than one box only
    for a strided shard whose rows are not together (a fused tensor).
    """
    runs = [[(0, n)] for n in shape]
    for mesh_dim, placement in _order(mesh, placements):
        dim = int(str(placement[1]))
        factor = int(str(placement[2])) if placement[0] == "strided_apart" else 1
        runs[dim] = _cut(runs[dim], mesh[mesh_dim], coordinate[mesh_dim], factor)
    local = [list(zip(run, accumulate((t - s for s, t in run), initial=0), strict=False)) for run in runs]
    found = []
    for parts in product(*local):
        found.append((tuple(interval for interval, _ in parts), tuple(at for _, at in parts)))
    return found


def _order(mesh: Sequence[int], placements: Sequence[Placement]) -> list[tuple[int, Placement]]:
    """Placements in the order in which they cut: a strided shard cuts inside the shards to its right on the same dim."""
    ordered: list[tuple[int, Placement]] = []
    waiting: dict[object, list[tuple[int, Placement]]] = {}
    for mesh_dim, placement in enumerate(placements):
        if placement[0] == "strided":
            waiting.setdefault(placement[1], []).append((mesh_dim, placement))
        elif placement[0] == "shard":
            ordered.append((mesh_dim, placement))
            ordered.extend(reversed(waiting.pop(placement[1], [])))
    for group in waiting.values():  # nothing to the right: its rows are interleaved
        ordered.extend((mesh_dim, ("strided_apart", *p[1:])) for mesh_dim, p in group)
    return ordered


def _cut(runs: list[Interval], parts: int, rank: int, factor: int) -> list[Interval]:
    """The rank's part of some runs of indices; with a factor, every parts-th of `parts * factor` pieces."""
    total = sum(t - s for s, t in runs)
    pieces = chunked(total, parts * factor)[rank::parts]
    found: list[Interval] = []
    for lo, hi in pieces:
        at = 0
        for s, t in runs:
            first, last = max(lo, at), min(hi, at + t - s)
            if first < last:
                found.append((s + first - at, s + last - at))
            at += t - s
    merged: list[Interval] = []
    for s, t in found:
        if merged and merged[-1][1] == s:
            merged[-1] = (merged[-1][0], t)
        else:
            merged.append((s, t))
    return merged or [(0, 0)]
