"""How planning grows: a catalog of millions of chunks, planned for one rank's share, without any file.

    python -m benchmarks.scale --layers 61 --experts 256 --rows 352 --world 1024

makes the catalog of a mixture-of-experts model (61 layers of 256 experts of three matrices, each cut into 352 chunks, as
on thousands of FSDP ranks: 16.5 million chunks, 1.4 T parameters) and plans a conversion to Hugging Face as rank 0 of
such a job does: it answers all ranks, which ask for the chunks their tiles touch, and proves and looks up its own.
Another rank holds no catalog and does only the last part. Prints seconds of CPU and the peak of memory as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import design, formats, part, plan, task
from ckpt_dist.box import Ints
from ckpt_dist.catalog import Catalog, Chunks, Entry
from ckpt_dist.engine.group import Group
from ckpt_dist.formats import Spec
from ckpt_dist.model import Model, recognise
from ckpt_dist.sources import Source


class Alone(Group):
    """Rank 0 of a world whose other ranks are computed here: what they ask for is asked, what they get is dropped."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.others = world

    def deal(self, make: Callable[[int], Ints]) -> Ints:
        for rank in range(1, self.others):
            make(rank)
        return make(0)


def catalog(layers: int, experts: int, rows: int) -> Catalog:
    shape = (rows * 6, 7168)
    entries = tuple(
        Entry(name, "bfloat16", shape, (name,))
        for layer in range(layers)
        for x in range(experts)
        for w in ("gate_proj", "up_proj", "down_proj")
        for name in [f"model.layers.{layer}.mlp.experts.{x}.{w}.weight"]
    )
    entry = np.repeat(np.arange(len(entries)), rows)
    row = np.tile(np.arange(rows), len(entries))
    start = np.zeros((len(entry), 2), np.int64)
    start[:, 0] = row * 6
    stop = np.full_like(start, 7168)
    stop[:, 0] = row * 6 + 6
    nbytes = 6 * 7168 * 2
    offset = entry * nbytes
    files = tuple(f"__{r}_0.distcp" for r in range(rows))
    chunks = Chunks.dense(entry, start, stop, row, offset)
    return Catalog("dcp", "/none", files, entries, chunks, about={"length": np.full(len(entry), nbytes)})


def lap(laps: dict[str, Any], what: str, since: float) -> float:
    now = time.process_time()
    laps[what] = round(now - since, 2)
    return now


def peak(anew: bool = False) -> int:
    """MiB at the peak since it was last begun anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def as_first(m: Model, world: int, laps: dict[str, Any]) -> None:
    """What rank 0 does: its own plan, and what the others ask for."""
    group = Alone(world)
    t = time.process_time()
    d = design.of([m], {"format": "hf"})
    options = {"max_shard_size": 5 << 30, "safetensors": True}
    layout = formats.load("hf").lay_out(Spec(d.target.entries, (), m.catalog, options))
    t = lap(laps, "design and layout", t)
    bounds = plan.share(part.tile_bytes(d.canon), world)
    entry = np.repeat(np.arange(len(d.canon.entries)), plan.tile_counts(d.canon.entries))
    # names are the same on both sides, so this is what they ask
    asked = [[np.unique(entry[lo:hi])] for lo, hi in bounds]
    t = time.process_time()
    group.gather = lambda value: asked  # type: ignore[assignment,method-assign]
    group.world, group.together = world, lambda work: work()  # type: ignore[method-assign,assignment]
    proof = task.prove_all(group, d, [m], layout.catalog.chunks)
    t = lap(laps, "prove, and answer all ranks", t)
    first, last = bounds[0]
    mine = d.canon.views(plan.tiles(d.canon.entries, first=first, last=last))
    found = proof.parts[0]
    items = part.item_bytes(found.catalog.entries, found.catalog.chunks)
    moves = plan.moves(found.views, found.catalog.chunks, items, mine)
    lap(laps, "copies of this rank", t)
    laps["chunks of this rank"], laps["tiles of this rank"] = len(found.catalog.chunks), last - first
    laps["copies"] = len(moves.tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=352)
    parser.add_argument("--world", type=int, default=128)
    args = parser.parse_args()
    made = catalog(args.layers, args.experts, args.rows)
    laps: dict[str, Any] = {
        "chunks": len(made.chunks),
        "entries": len(made.entries),
        "MiB before planning": peak(anew=True),
    }
    t = time.process_time()
    m = replace(recognise(Source(made, Path("/none"), Path("/none")), family="identity"), apart=True)
    lap(laps, "recognise", t)
    as_first(m, args.world, laps)
    laps["MiB at the peak of planning"] = peak()
    laps["seconds of planning"] = round(sum(v for v in laps.values() if isinstance(v, float)), 2)
    print(json.dumps(laps, indent=1))


if __name__ == "__main__":
    main()
