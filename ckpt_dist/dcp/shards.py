"""The shards of a running program as one side of a fill: boxes of named tensors that lie in this rank's memory.

Invariant: a tile is a part of one shard, so each rank fills or empties its own shards, and no rank waits for another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ckpt_dist import part, plan, task
from ckpt_dist.box import Ints, ints, row_major
from ckpt_dist.catalog import Views, padded
from ckpt_dist.engine.files import Writer
from ckpt_dist.engine.fill import Crew, Done, Job, Side, fill, keep
from ckpt_dist.engine.memory import Memory
from ckpt_dist.report import parse_size
from ckpt_dist.spelling import Bound


@dataclass(frozen=True)
class Shards:
    """Some tensors of this rank, the tiles they are cut into (`side` says where these lie), and what those are of a model."""

    memory: Memory
    side: Side
    tiles: Views
    numel: Ints


def shards(bound: Bound, starts: Sequence[Sequence[int]], places: Sequence[torch.Tensor]) -> Shards:
    """Entry i of `bound` is the whole tensor of which `places[i]` is the box that begins at `starts[i]`."""
    entries = [replace(e, dtype=str(p.dtype).partition(".")[2]) for e, p in zip(bound.entries, places, strict=True)]
    boxes = [replace(e, shape=tuple(p.shape)) for e, p in zip(entries, places, strict=True)]
    cut = plan.tiles(boxes)
    shift = padded(starts, cut.start.shape[1], 0)[cut.entry]
    tiles = replace(bound, entries=tuple(entries)).views(replace(cut, start=cut.start + shift, stop=cut.stop + shift))
    extent = cut.stop - cut.start
    strides = padded([p.stride() for p in places], extent.shape[1], 0)[cut.entry]
    begin: Ints = ints([p.storage_offset() for p in places])[cut.entry]
    at = (begin + np.sum(cut.start * strides, axis=1, dtype=np.int64)) * part.item_bytes(entries, cut)
    moves = plan.Moves(np.arange(len(cut)), cut.entry, extent, at, strides, at * 0, row_major(extent))
    memory = Memory(places)
    side = Side(memory, moves, np.arange(len(places)), [entries[e].dtype for e in cut.entry.tolist()])
    return Shards(memory, side, tiles, np.prod(extent, axis=1, dtype=np.int64))


def run(
    mine: Shards,
    source: Side,
    target: Side,
    out: Writer,
    engine: Mapping[str, Any],
    crc_files: frozenset[int] = frozenset(),
) -> Done:
    """Make all tiles of a rank's shards, from memory or into it."""
    count = len(mine.numel)
    job = Job(0, 0, count, mine.numel, np.zeros(count, bool), [source], target, out, keep, crc_files=crc_files)
    settings = {**engine, "memory": parse_size(engine["memory"])}
    with Crew(task.worker_count(settings, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) as crew:
        return fill(job, crew)
