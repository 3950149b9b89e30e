"""What a transport reads and sends, counted from the very moves that it would make; nothing is moved.

Invariant: what is counted for a rank is what the engine counts when it runs, to the byte; except for quantised weights,
where the scales of a block that two tiles share are read twice and counted once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import Ints, ints, row_major
from ckpt_dist.engine.exchange import Wanted, padded
from ckpt_dist.engine.moves import read_bytes, simplify
from ckpt_dist.report import size

Part: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True)
class Traffic:
    """Bytes of each rank: `read` from files, `sent` to other ranks, and the part of these that go to other nodes."""

    read: Ints
    sent: Ints
    left: Ints

    def __add__(self, more: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(Traffic)))

    def busiest(self, node: Ints) -> int:
        """Bytes that the node with most to do reads and sends away; `node` is where each rank is."""
        return int(by_node(self.read + self.left, node).max())


def node_of(ranks: int, nodes: int) -> Ints:
    """The node of each rank where all have as many: `node_of(4, 2)` -> `[0, 0, 1, 1]`."""
    return ints(np.arange(ranks) * nodes // ranks)


def by_node(of_ranks: Ints, node: Ints) -> Ints:
    """The sums of each node's ranks."""
    found = np.zeros(int(node.max()) + 1, np.int64)
    np.add.at(found, node, of_ranks)
    return found


def none(ranks: int) -> Traffic:
    return Traffic(*(np.zeros(ranks, np.int64) for _ in fields(Traffic)))


def cheaper(each: Traffic, once: Traffic, node: Ints) -> tuple[bool, str]:
    """Whether to read each byte once and exchange it rather than to read directly, and both numbers in words."""
    alone, together = each.busiest(node), once.busiest(node)
    what = f"a node reads at most {size(alone)} directly; reads and sends {size(together)} if each byte is read once"
    return together < alone, what


def direct(want: Wanted, owner: Ints, ranks: int, stored: Part) -> Traffic:
    """Each owner of a move reads it into its tile; `stored` is as of `part.stored`."""
    found = none(ranks)
    np.add.at(found.read, owner, _read(want, want.moves.tile_stride, stored))
    return found


def exchanged(want: Wanted, owner: Ints, ranks: int, stored: Part) -> Traffic:
    """The reader of a move packs and sends it, or reads it into its own tile."""
    found, reader, node = none(ranks), want.reader(owner), want.readers.node
    packed = np.where((reader == owner)[:, None], want.moves.tile_stride, row_major(want.moves.extent))
    np.add.at(found.read, reader, _read(want, packed, stored))
    space = padded(want.nbytes)
    np.add.at(found.sent, reader, space * (reader != owner))
    np.add.at(found.left, reader, space * (node[reader] != node[owner]))
    return found


def _read(want: Wanted, memory_stride: Ints, stored: Part) -> Ints:
    """Bytes read for each move. What is dense in its file is read as it is; of other shapes there are few."""
    extent, stride, found = want.moves.extent, want.moves.stride, want.nbytes
    odd = np.flatnonzero(((extent != 1) & (stride != row_major(extent))).any(axis=1))
    if len(odd):
        rows = np.stack([extent[odd], stride[odd], memory_stride[odd]], 1)
        shapes = np.hstack([rows.reshape(len(odd), -1), want.item[odd, None]])
        kinds, which = np.unique(shapes, axis=0, return_inverse=True)
        each = [read_bytes(simplify(*k[:-1].reshape(3, -1).tolist()), int(k[-1])) for k in kinds]
        found[odd] = np.array(each, np.int64)[which.reshape(-1)]
    return ints(np.rint(found * stored[want.file]))
