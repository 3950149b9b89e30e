"""Contract: planning a rank's share of a checkpoint of 16 million chunks takes seconds and less than 2 GiB a node, and
what ranks look up of their own adds up to what one rank would look up of the whole. Not checked: the network.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckpt_dist import part, plan
from ckpt_dist.catalog import Catalog, Chunks, Entry
from ckpt_dist.design import plain_entries
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError
from ckpt_dist.model import Model, recognise
from ckpt_dist.sources import Source
from ckpt_dist.spelling import bind_plain
from tests.conftest import ROOT


def test_sixteen_million_chunks() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.scale"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chunks"] > 16e6 and found["copies"] > 1e5
    assert found["MiB at the peak of planning"] < 2048
    assert found["seconds of planning"] < 10  # 3 s when nothing else runs: benchmarks/RESULTS.md


def model(seed: int, rows: int = 37) -> Model:
    """Three tensors in chunks of uneven rows, replicas among them, in no order."""
    rng = np.random.default_rng(seed)
    entries = tuple(Entry(n, "float32", (rows, 50_000), (n,)) for n in ("a", "b", "c"))
    cuts = [0, *sorted(rng.choice(np.arange(1, rows), 9, replace=False).tolist()), rows]
    boxes = [(e, lo, hi) for e in range(3) for lo, hi in itertools.pairwise(cuts)]
    boxes += boxes[3:5]
    boxes = [boxes[i] for i in rng.permutation(len(boxes))]
    start = np.array([(lo, 0) for _, lo, _ in boxes])
    stop = np.array([(hi, 50_000) for *_, hi in boxes])
    row = np.arange(len(boxes))
    chunks = Chunks.dense([e for e, *_ in boxes], start, stop, row * 0, row * (rows * 200_000))
    catalog = Catalog("hf", "/none", ("x",), entries, chunks, about={"length": row + 100})
    return recognise(Source(catalog, Path("/none"), Path("/none")), family="identity")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", [1, 3, 7])
def test_the_parts_of_all_ranks_are_the_whole(seed: int, world: int) -> None:
    m = model(seed)
    bound, canon = bind_plain(m), plain_entries(m)
    everything = plan.tiles(canon.entries)
    assert plan.tile_numel(canon.entries).tolist() == np.prod(everything.stop - everything.start, axis=1).tolist()
    assert plan.tile_counts(canon.entries).sum() == len(everything)
    four = np.full(len(m.catalog.chunks), 4)
    straight = plan.moves(bound.views(m.catalog.chunks), m.catalog.chunks, four, canon.views(everything))
    lines = []
    for first, last in plan.share(part.tile_bytes(canon), world):
        tiles = plan.tiles(canon.entries, first=first, last=last)
        assert all((getattr(tiles, c) == getattr(everything, c)[first:last]).all() for c in ("entry", "start", "stop"))
        mine = canon.views(tiles)
        (found,) = part.parts(Group(), [(m, bound)], mine)
        chunks = found.catalog.chunks
        assert (found.catalog.about["length"] == chunks.offset // (37 * 200_000) + 100).all()  # travels with its chunk
        moves = plan.moves(found.views, chunks, four[: len(chunks)], mine)
        again = part._unflat(part.pick(m.catalog, np.zeros(0, np.int64)), part._flat(found.catalog))
        assert all((getattr(again.chunks, c) == getattr(chunks, c)).all() for c in ("entry", "strides", "offset"))
        lines += list(zip((moves.tile + first).tolist(), moves.at.tolist(), moves.tile_at.tolist(), strict=True))
    assert sorted(lines) == sorted(
        zip(straight.tile.tolist(), straight.at.tolist(), straight.tile_at.tolist(), strict=True)
    )


def test_a_hole_is_seen_by_the_rank_whose_tiles_it_is_in() -> None:
    m = model(0)
    chunks = m.catalog.chunks
    lost = np.flatnonzero((chunks.entry == 1) & (chunks.start[:, 0] == 0))
    catalog = part.pick(m.catalog, np.setdiff1d(np.arange(len(chunks)), lost))
    holed = replace(m, source=replace(m.source, catalog=catalog))
    canon = plain_entries(m)
    refused = []
    for rank, (first, last) in enumerate(plan.share(part.tile_bytes(canon), 3)):
        mine = canon.views(plan.tiles(canon.entries, first=first, last=last))
        try:
            part.parts(Group(), [(holed, bind_plain(holed))], mine)
        except CheckpointError as error:
            assert "have no source" in str(error) and "b[" in str(error)
            refused.append(rank)
    assert refused == [1]
