"""Contract: both transports and any number of ranks give the same bytes, for every job and format; every byte is read once; the
memory bound holds; a failure on one rank is everyone's. Not checked here: nodes that see different files (test_nodes.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import ckpt_dist
from tests.conftest import ROOT, torchrun
from tests.test_resume import same

Real = Callable[[str], Path]
JOBS = {
    "fsdp2 -> hf": ("convert", "fsdp2/dcp", "target.format=hf"),
    "tp x fsdp -> dcp": ("convert", "tp_fsdp/dcp", "target.format=dcp"),
    "ranks -> torch": ("convert", "fsdp1/ranks", "target.format=torch"),
    "average": ("average", "steps", "target.format=hf", "target.dtype=bfloat16"),
}


def sweep(out: Path, verb: str, source: Path, words: tuple[str, ...], num_ranks: int) -> dict[str, object]:
    """One torchrun, one job in the collective transport; its report."""
    given = [f"source.path={source}", f"target.path={out}", "engine.transport=collective", "json=true", *words]
    done = torchrun(num_ranks, ROOT / f"jobs/{verb}.py", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("job", JOBS)
def test_both_transports_and_any_number_of_ranks_give_the_same_bytes(
    tmp_path: Path, real: Real, job: str, num_ranks: int
) -> None:
    verb, case, *words = JOBS[job]
    name, _, inner = case.partition("/")
    source = real(name) / inner
    report = sweep(tmp_path / "out", verb, source, tuple(words), num_ranks)
    keys = dict(w.removeprefix("target.").split("=") for w in words)
    direct = getattr(ckpt_dist, verb)(source, tmp_path / "direct", quiet=True, **keys)
    assert same(tmp_path / "out", tmp_path / "direct")
    assert report["bytes_read"] == direct["bytes_read"]
