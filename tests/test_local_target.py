"""Contract: `target.shared=false` leaves on each node's disk what the ranks there load, and no more; torch loads it bit for bit
where each node sees its own folder only; bytes are those of a shared target and of the plan; whole on all nodes or on none.

Nodes are folders of their own for the ranks of one torchrun, and once namespaces in which one path shows them. Not
checked here: Megatron's own loader (test_megatron.py loads the very same files from one folder).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader

import ckpt_dist
from ckpt_dist.engine import staging
from ckpt_dist.errors import CheckpointError, UsageError
from tests.conftest import ROOT, torchrun
from tests.test_cost import BYTES
from tests.test_local import _isolated, nets, on_nodes, start_nodes
from tests.test_resume import same

__all__ = ["nets"]
Real = Callable[[str], Path]
RANK_FILES = {"target.format": "megatron", "target.vocab_size": 132, "target.tp": 2}
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dcp": ("convert", "fsdp2/dcp", {"target.format": "dcp", "engine.verify": True}),
    "buffers": ("convert", "buffers/dcp", {"target.format": "dcp", "keep": ["weights", "optimizer", "state"]}),
    "dcp, exchanged": ("convert", "fsdp2/dcp", {"target.format": "dcp", "engine.transport": "collective"}),
    "dcp, mixed": ("convert", "fsdp2/dcp", {"target.format": "dcp", "target.placement": "1,0,0,1"}),
    "stages": ("convert", "fsdp2/hf", {**RANK_FILES, "target.pp": 2, "engine.verify": True}),
    "replicas": ("convert", "fsdp2/hf", {**RANK_FILES, "engine.verify": True}),
    "hf": ("convert", "fsdp2/dcp", {"engine.verify": True}),
    "average": ("average", "steps", {"target.format": "dcp", "target.dtype": "bf16"}),
    "torch_dist": ("convert", "fsdp2/hf", {"target.format": "torch_dist"}),
}


def keys(real: Real, case: str, target: Path) -> dict[str, Any]:
    name, _, inner = JOBS[case][1].partition("/")
    return {"source.path": str(real(name) / inner), "target.path": str(target), **JOBS[case][2]}


@pytest.fixture(scope="module")
def made(real: Real, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Each job by four ranks on two nodes: HERE/node0/CASE and HERE/node1/CASE; and its report."""
    here = tmp_path_factory.mktemp("nodes")
    jobs: list[Any] = []
    for case, (verb, *_) in JOBS.items():
        jobs.append((verb, keys(real, case, here / "node{node}" / case) | {"target.shared": False}, 2))
    again = {**keys(real, "dcp", here / "node{node}/again"), "target.shared": False, "engine.verify": False}
    taken = {**again, "target.path": str(here / "node{node}/taken")}
    below = {**again, "target.path": str(here / "node{node}/a/file/out")}
    (here / "node1/a").mkdir(parents=True)
    (here / "node1/a/file").write_text("no folder")
    (here / "node1/taken").mkdir(parents=True)
    jobs += [("convert", again, 2, 3), ("convert", again, 2), ("convert", taken, 2)]
    jobs += [("convert", {**taken, "target.placement": "0,0,2,2", "target.path": str(here / "none")}, 2)]
    jobs += [("convert", below, 2)]
    (here / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(4, ROOT / "tests/real/reports.py", here / "jobs.json", here / "reports.json")
    assert done.returncode == 0, done.stderr[-3000:]
    names = [*JOBS, "stopped", "again", "taken", "placed wrong", "below"]
    return here, dict(zip(names, json.loads((here / "reports.json").read_text()), strict=True))


def files(folder: Path) -> dict[str, bytes]:
    """What a checkpoint is made of; records of the job aside."""
    own = ("ckpt_dist.json", "average.yaml")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}


def test_torch_loads_on_each_node_from_its_own_folder(made: Any, real: Real) -> None:
    here, reports = made
    words = []
    for case in ("dcp", "dcp, exchanged", "dcp, mixed", "buffers"):
        assert "error" not in reports[case]
        placement = str(JOBS[case][2].get("target.placement", "0,0,1,1"))
        reference = real(JOBS[case][1].split("/")[0]) / "reference.safetensors"
        words += [f"{here}/node{{node}}/{case}", reference, placement]
        rows = [{int(n.split("_")[2]) for n in files(here / node / case) if n.endswith(".distcp")} for node in NODES]
        assert rows == [{r for r, n in enumerate(placement.split(",")) if n == node[-1]} for node in NODES]
    done = torchrun(4, "-m", "tests.real.load_local", *words)
    assert done.returncode == 0 and done.stderr.count("loaded") == 4, done.stderr[-3000:]


NODES = ("node0", "node1")


def test_what_is_no_tensor_is_on_every_node(made: Any) -> None:
    here, _ = made
    listed = [FileSystemReader(here / node / "buffers").read_metadata() for node in NODES]
    assert listed[0].state_dict_metadata.keys() == listed[1].state_dict_metadata.keys()
    for node, metadata in zip(NODES, listed, strict=True):
        has = files(here / node / "buffers")
        objects = [i for i in metadata.storage_data if i.offset is None]
        vectors = [i for i in metadata.storage_data if i.fqn.endswith(("norm.weight", "temperature", "count"))]
        assert objects and vectors
        for index in (*objects, *vectors):
            assert metadata.storage_data[index].relative_path in has, (node, index)


def test_a_ranks_file_is_on_the_nodes_that_load_it(made: Any, real: Real, tmp_path: Path) -> None:
    here, _ = made
    for case, per_node in (("stages", (1, 1)), ("replicas", (2, 2)), ("hf", (2, 2)), ("torch_dist", (2, 2))):
        words = keys(real, case, tmp_path / case)
        source, target = words.pop("source.path"), words.pop("target.path")
        ckpt_dist.convert(source, target, **words)
        whole, nodes = files(Path(target)), [files(here / node / case) for node in NODES]
        assert whole == nodes[0] | nodes[1] if case != "torch_dist" else whole.keys() == nodes[0].keys(), case
        assert all(one.items() <= whole.items() for one in nodes) or case == "torch_dist"
        if case == "stages":
            assert {n[:-3].split("/")[1] for n in nodes[0] if "mp_rank" in n} == {"mp_rank_00_000", "mp_rank_01_000"}
            assert {n.split("/")[1] for n in nodes[1] if "mp_rank" in n} == {"mp_rank_00_001", "mp_rank_01_001"}
        else:
            assert nodes[0].keys() == nodes[1].keys() and per_node == (2, 2)


def test_the_fingerprint_is_that_of_a_shared_target(made: Any, real: Real, tmp_path: Path) -> None:
    here, reports = made
    words = keys(real, "average", tmp_path / "out")
    source, target = words.pop("source.path"), words.pop("target.path")
    whole = ckpt_dist.average(source, target, **words)
    for key in ("fingerprint", "source_fingerprints"):
        assert reports["average"][key] == whole[key]
    assert (here / "node1/average/average.yaml").read_text() == (here / "node0/average/average.yaml").read_text()


@pytest.mark.parametrize("case", JOBS)
def test_the_plan_says_what_is_read_exchanged_and_written(made: Any, real: Real, tmp_path: Path, case: str) -> None:
    _, reports = made
    words = keys(real, case, tmp_path / "out") | {"target.shared": False, "dry_run": True}
    source, target = words.pop("source.path"), words.pop("target.path")
    plan = getattr(ckpt_dist, JOBS[case][0])(source, target, **words, **{"engine.ranks": 4, "engine.nodes": 2})
    found = plan["transports"][plan["transport"]]
    assert {k: found[k] for k in BYTES} == {k: reports[case][k] for k in BYTES}
    assert ("node 0" in "".join(plan["text"])) == (case not in ("hf", "torch_dist"))


def test_a_job_that_was_stopped_goes_on_on_all_nodes(made: Any) -> None:
    here, reports = made
    assert "go on" in reports["stopped"]["error"]
    assert any("tiles were there already" in note for note in reports["again"]["notes"])
    for node in NODES:
        assert files(here / node / "again") == files(here / node / "dcp")


def test_a_target_that_one_node_has_is_refused_by_all(made: Any) -> None:
    here, reports = made
    assert "node1/taken exists" in reports["taken"]["error"]
    assert not (here / "node0/taken").exists() and not list((here / "node1/taken").iterdir())
    assert not list(here.rglob(".*.ckpt_dist*"))
    assert "names node 2" in reports["placed wrong"]["error"]
    assert "Cannot write to" in reports["below"]["error"] and not list((here / "node0").glob("a/file/.*"))


# ---- one node: what happens between the nodes' renames


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file({"w": torch.randn(8, 6), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def failing(error: Exception, words: int = 1) -> Callable[..., None]:
    def settle(*given: Any) -> None:
        assert len(given) == words
        raise error

    return settle


def test_what_was_published_is_taken_back_if_another_node_fails(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"format": "dcp", "target.shared": False, "overwrite": True}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    monkeypatch.setattr(staging, "settle", failing(CheckpointError("no space on node 1")))
    with pytest.raises(CheckpointError, match="node 1"):
        ckpt_dist.convert(source, tmp_path / "out", **keys)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    assert not list(tmp_path.glob(".*"))


def test_a_job_that_ends_between_the_renames_is_published_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"format": "dcp", "target.shared": False}
    with monkeypatch.context() as patch:
        patch.setattr(staging, "settle", failing(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            ckpt_dist.convert(source, tmp_path / "out", **keys)
    assert (tmp_path / "out/.metadata").exists()
    report = ckpt_dist.convert(source, tmp_path / "out", **keys)
    assert any("were there already" in note for note in report["notes"])
    ckpt_dist.convert(source, tmp_path / "straight", **keys)
    assert same(tmp_path / "out", tmp_path / "straight") and not list(tmp_path.glob(".*"))
    with pytest.raises(UsageError, match="exists"):
        ckpt_dist.convert(source, tmp_path / "out", **keys)


@pytest.mark.parametrize("shared", [True, False])
def test_what_was_there_comes_back_after_an_end_between_two_renames(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    keys: dict[str, Any] = {"format": "dcp", "target.shared": shared, "overwrite": True}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    rename = os.rename

    def ended(a: Path, b: Path) -> None:
        if str(b).endswith("/out"):
            raise RuntimeError("killed")
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "rename", ended)
        with pytest.raises(RuntimeError):
            ckpt_dist.convert(source, tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(staging, "finish", failing(CheckpointError("no space"), 4))
        with pytest.raises(CheckpointError, match="no space"):
            ckpt_dist.convert(source, tmp_path / "out", **keys)
    assert (tmp_path / "out/old").read_text() == "old" and not list(tmp_path.glob(".*"))


def test_what_is_not_yet_everywhere_is_left_to_its_job(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"format": "dcp", "target.shared": False}
    settle = staging.settle

    def another(place: Any) -> None:  # begins while this one waits for other nodes
        with pytest.raises(UsageError, match="Another job is making"):
            ckpt_dist.convert(source, tmp_path / "out", **keys)
        settle(place)

    monkeypatch.setattr(staging, "settle", another)
    ckpt_dist.convert(source, tmp_path / "out", **keys)
    assert (tmp_path / "out/.metadata").exists() and not list(tmp_path.glob(".*"))


def test_replacing_has_to_be_asked_for_again(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"format": "dcp", "target.shared": False}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "settle", failing(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            ckpt_dist.convert(source, tmp_path / "out", overwrite=True, **keys)
    with pytest.raises(UsageError, match="exists"):
        ckpt_dist.convert(source, tmp_path / "out", **keys)
    ckpt_dist.convert(source, tmp_path / "out", overwrite=True, **keys)
    assert not (tmp_path / "out/old").exists() and not list(tmp_path.glob(".*"))


def test_what_makes_no_sense_is_refused(tmp_path: Path, source: Path) -> None:
    for words, said in (
        ({"target.placement": "all"}, "needs target.shared=false"),
        ({"target.shared": False, "target.format": "torch", "target.path": str(tmp_path / "x.pt")}, "of its own"),
    ):
        target = words.pop("target.path", tmp_path / "out")
        with pytest.raises(UsageError, match=said):
            ckpt_dist.convert(source, target, **words)


# ---- two nodes in earnest


@pytest.mark.skipif(not _isolated(), reason="namespaces need root, ip (iproute2) and unshare")
def test_two_nodes_that_see_only_their_own_disk(nets: list[str], tmp_path: Path, real: Real) -> None:
    place, folders = tmp_path / "local", [tmp_path / node for node in NODES]
    for folder in folders:
        folder.mkdir()
    reference = real("fsdp2") / "reference.safetensors"
    words = [f"source.path={real('fsdp2') / 'dcp'}", f"target.path={place / 'out'}", "target.format=dcp"]
    ended = on_nodes(nets, place, folders, 1, "convert", *words, "target.shared=false")
    assert [code for code, _ in ended] == [0, 0], ended
    assert not place.exists() or not list(place.iterdir())
    words = [f"a.path={place / 'out'}", f"b.path={reference}", f"model.config={real('fsdp2') / 'hf'}"]
    ended = on_nodes(nets, place, folders, 1, "verify", *words)
    assert [code for code, _ in ended] == [0, 0], ended
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", "10.77.0.1", "--master-port", "29411"]
    script = ["-m", "tests.real.load_local", str(place / "out"), str(reference), "0,1"]
    inner = ["sh", "-c", 'exec "$@" --node-rank "$NODE_RANK" ' + " ".join(script), "sh"]
    jobs = start_nodes(nets, place, folders, 1, *inner, *launcher)
    said = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "loaded" in said[0]
