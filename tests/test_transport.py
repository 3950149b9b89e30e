"""Contract: both transports and any number of ranks give the same bytes, for every job and format; every byte is read once; the
memory bound holds; a failure on one rank is everyone's. Not checked here: nodes that see different files (test_nodes.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckpt_dist
from tests.conftest import ROOT, torchrun
from tests.test_resume import same

Real = Callable[[str], Path]
JOBS = {
    "fsdp2 -> hf": ("convert", "fsdp2/dcp", {"target.format": "hf"}),
    "tp x fsdp -> dcp": ("convert", "tp_fsdp/dcp", {"target.format": "dcp"}),
    "ranks -> torch": ("convert", "fsdp1/ranks", {"target.format": "torch"}),
    "average": ("average", "steps", {"target.format": "hf", "target.dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("num_ranks", "nodes"), [(1, (1,)), (2, (1, 2)), (3, (3,)), (4, (2, 4)), (6, (1, 2, 3))])
def test_both_transports_and_any_number_of_ranks_give_the_same_bytes(
    tmp_path: Path, real: Real, num_ranks: int, nodes: tuple[int, ...]
) -> None:
    """Ranks of one node exchange nothing, those of several what they read for each other."""
    jobs, kinds = [], [(name, n) for name in JOBS for n in nodes]
    for name, n in kinds:
        verb, case, keys = JOBS[name]
        source, _, inner = case.partition("/")
        given = {"source.path": str(real(source) / inner), "target.path": str(tmp_path / f"{name} {n}"), **keys}
        jobs.append((verb, {**given, "engine.transport": "collective"}, n))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(num_ranks, ROOT / "tests/real/reports.py", tmp_path / "jobs.json", tmp_path / "reports.json")
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads((tmp_path / "reports.json").read_text())
    straight = {name: direct(tmp_path / name, real, name) for name in JOBS}
    for (name, n), report in zip(kinds, reports, strict=True):
        assert same(tmp_path / f"{name} {n}", tmp_path / name), (name, n)
        assert report["bytes_read"] == straight[name]["bytes_read"]
        assert (report["bytes_exchanged"] > 0) == (n > 1), (name, n)


def test_the_way_through_devices_gives_the_same_bytes(tmp_path: Path, real: Real) -> None:
    """What NCCL's way adds to gloo's (memory of its own, copies to and from a device, a group, one batch of calls), with the
    CPU as the device; NCCL itself needs GPUs."""
    given = {n: JOBS[n] for n in ("tp x fsdp -> dcp", "average")}
    jobs = [
        (verb, {"source.path": str(real(case.partition("/")[0]) / case.partition("/")[2]),
                "target.path": str(tmp_path / f"{name} staged"), "engine.transport": "collective", **keys}, 2)
        for name, (verb, case, keys) in given.items()
    ]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(4, ROOT / "tests/real/reports.py", tmp_path / "jobs.json", tmp_path / "reports.json", "staged")
    assert done.returncode == 0, done.stderr[-3000:]
    for name, report in zip(given, json.loads((tmp_path / "reports.json").read_text()), strict=True):
        direct(tmp_path / name, real, name)
        assert same(tmp_path / f"{name} staged", tmp_path / name), report
        assert report["bytes_exchanged"] >= report["staged"] > 0


def direct(out: Path, real: Real, name: str) -> dict[str, Any]:
    """The same job by one process that reads and writes what it needs."""
    verb, case, keys = JOBS[name]
    source, _, inner = case.partition("/")
    report: dict[str, Any] = getattr(ckpt_dist, verb)(real(source) / inner, out, quiet=True, **keys)
    return report
