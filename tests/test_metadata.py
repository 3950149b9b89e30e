"""Contract: `.metadata` read as arrays, without objects for its chunks, says exactly what unpickling all of it says; for
what torch writes, for what it could write, and for damaged files. Not checked here: what a catalog is made of (test_formats).
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import metadata
from ckpt_dist.files.streams import Unknown
from ckpt_dist.formats import dcp
from tests.conftest import ROOT

COLUMNS = ("owner", "start", "size", "is_tensor", "at", "offset", "length")


def facts(tables: dcp._Tables) -> list[Any]:
    """Everything a reading says, comparable."""
    texts = [[tables.texts[k] for k in ids] for ids in (tables.names, tables.relative)]
    return [*(getattr(tables, c).tolist() for c in COLUMNS), *texts, repr(tables.described), repr(tables.paths)]


def both(data: bytes) -> tuple[dcp._Tables, int]:
    """The reading of a file that both ways understand in the same way; how many records became no object."""
    found, lanes = metadata.short(data, "short")
    fast = dcp._arrays(found, lanes, "short")
    assert facts(fast) == facts(dcp._arrays(*metadata.whole(data, "whole"), "whole"))
    return fast, len(lanes.lanes)


def made(rng: random.Random, tensors: int, ranks: int, shared: bool = False, more: bool = False) -> Metadata:
    """What `ranks` write of some tensors; `shared`: by one process, whose objects refer to each other."""
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for t in range(tensors):
        name = f"model.layers.{t}." + rng.choice(["weight", "bias", "x" * 300, "ünïcode"])
        dims = rng.choice([0, 1, 2, 2, 2, 3, 4, 5])
        rows = [rng.choice([1, 7, 300, 70_000, 1 << 33]) for _ in range(dims)]
        boxes = []
        for r in range(ranks if dims else 1):
            offset = torch.Size([r * rows[0], *[0] * (dims - 1)] if dims else [])
            boxes.append(ChunkStorageMetadata(offset, torch.Size(rows)))
            key = offset if shared else torch.Size(list(offset))
            at = rng.choice([0, 200, 60_000, 1 << 31, 1 << 40])
            info = _StorageInfo(f"__{r}_0.distcp", at, rng.choice([3, 1 << 20, 1 << 34]))
            stored[MetadataIndex(name, key, rng.choice([None, r]))] = info
        whole = torch.Size([rows[0] * ranks, *rows[1:]] if dims else [])
        described[name] = TensorStorageMetadata(TensorProperties(torch.float32), whole, boxes)
    if more:
        for k in range(5):
            described[f"state.{k}"] = BytesStorageMetadata()
            stored[MetadataIndex(f"state.{k}")] = _StorageInfo("__0_0.distcp", k, 10)
    items = list(stored.items())
    if not shared:
        rng.shuffle(items)  # the ranks' parts come in any order
    paths = {n: tuple(n.split(".")) for n in described} if more else None
    return Metadata(described, paths, dict(items))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shared", [False, True])
def test_both_ways_say_the_same(seed: int, shared: bool) -> None:
    rng = random.Random(seed)
    made_ = made(rng, rng.choice([1, 3, 40]), rng.choice([1, 2, 17, 700]), shared, more=seed % 2 == 1)
    _, cut = both(pickle.dumps(made_, protocol=4 + seed % 2))
    assert cut > 0.8 * len(made_.storage_data) or len(made_.storage_data) < 100  # type: ignore[arg-type]


def test_what_ranks_send_each_other_is_read_too() -> None:
    """torch pickles each rank's part for rank 0, so that nothing of one rank is shared with another's."""
    one = made(random.Random(1), 30, 1)
    parts = [pickle.loads(pickle.dumps(made(random.Random(1), 30, 8))) for _ in range(2)]
    one.storage_data = {**parts[0].storage_data, **{k: v for k, v in parts[1].storage_data.items()}}
    one.state_dict_metadata = parts[0].state_dict_metadata
    both(pickle.dumps(one))


@pytest.mark.parametrize("path", sorted((ROOT / "tests/data").rglob(".metadata")), ids=lambda p: str(p.parent.name))
def test_kept_files_of_other_versions(path: Path) -> None:
    both(path.read_bytes())


@pytest.mark.parametrize("case", ["fsdp2", "hsdp", "tp_fsdp", "fsdp1", "tp", "dim1"])
def test_files_of_real_training(real: Callable[[str], Path], case: str) -> None:
    paths = list(real(case).rglob(".metadata"))
    assert paths
    for path in paths:
        both(path.read_bytes())


def test_no_object_for_a_chunk() -> None:
    data = pickle.dumps(made(random.Random(3), 8, 6000))
    found, lanes = metadata.short(data, "x")
    assert len(lanes.lanes) > 3 * 6000 * 5  # of up to 8 x 3 x 6000 records, tensors without dims have one each
    kept = sum(type(c) is not metadata.Run for d in found[0]["state_dict_metadata"].values() for c in d[0]["chunks"])
    assert kept < 200


def outcome(read: Callable[[], dcp._Tables]) -> Any:
    try:
        return facts(read())
    except (CheckpointError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        return type(error).__name__


WRITTEN = b"K\x00\x86\x94\x85\x94R"  # the end of torch.Size((k, 0))


@pytest.mark.parametrize(
    "wrong",
    [
        b"K\x00\x85\x94\x85\x94R",  # a tuple of one, and a number that is left behind
        b"\x8a\x00\x86\x94\x85\x94R",  # 0 as a number of no bytes
        b"\x8a\x09" + b"\x01" * 9 + b"\x86\x94\x85\x94R",  # a number of nine bytes
    ],
)
def test_numbers_and_tuples_that_nobody_writes(wrong: bytes) -> None:
    boxes = [ChunkStorageMetadata(torch.Size([k, 0]), torch.Size([1, 7])) for k in range(12)]
    described: Any = {"w": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([12, 7]), boxes)}
    stored = {MetadataIndex("w", torch.Size([k, 0])): _StorageInfo("__0_0.distcp", k * 28, 28) for k in range(12)}
    data = pickle.dumps(Metadata(described, storage_data=stored))
    places = [at for at in range(len(data)) if data.startswith(WRITTEN, at)]
    assert len(places) == 24 and both(data)[1] > 10
    for at in places:
        bad = data[:at] + wrong + data[at + len(WRITTEN) :]
        bad = bad[:3] + (len(bad) - 11).to_bytes(8, "little") + bad[11:]  # the length of the frame
        fast = outcome(lambda bad=bad: dcp._tables(bad, "x"))  # type: ignore[misc]
        assert fast == outcome(lambda bad=bad: dcp._arrays(*metadata.whole(bad, "x"), "x"))  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_read_as_the_general_way_reads_it_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    data = pickle.dumps(made(rng, 3, 12, shared=seed % 2 == 0, more=True))
    for _ in range(300):
        at = rng.randrange(len(data))
        wrong = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        fast = outcome(lambda wrong=wrong: dcp._tables(wrong, "x"))  # type: ignore[misc]
        slow = outcome(lambda wrong=wrong: dcp._arrays(*metadata.whole(wrong, "x"), "x"))  # type: ignore[misc]
        assert fast == slow, at
    for cut in rng.sample(range(len(data)), 100):
        assert isinstance(outcome(lambda cut=cut: dcp._tables(bytes(data[:cut]), "x")), str)  # type: ignore[misc]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_foreign_code_and_forged_references_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    record = made(random.Random(0), 2, 50)
    record.state_dict_metadata["evil"] = Evil()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="print"):
        dcp._tables(pickle.dumps(record), "x")
    assert capsys.readouterr().out == ""

    class Forger(pickle._Pickler):  # type: ignore[name-defined,misc]
        def persistent_id(self, value: Any) -> Any:
            return -1 if isinstance(value, ChunkStorageMetadata) else None

    out = io.BytesIO()
    Forger(out, 4).dump(made(random.Random(0), 2, 50))
    with pytest.raises((CheckpointError, Unknown)):
        dcp._tables(out.getvalue(), "x")


def test_texts_that_differ_late_are_not_taken_for_equal() -> None:
    record = made(random.Random(5), 1, 400)
    for k, info in enumerate(record.storage_data.values()):  # type: ignore[union-attr]
        info.relative_path = "a" * 40 + str(k % 7)
    tables, _ = both(pickle.dumps(record))
    assert len(np.unique(tables.relative)) == 7
