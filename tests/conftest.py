"""Checkpoints made by real training, built once for each test session: `real("fsdp2")` is the folder of that case."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUR_RANKS = ("fsdp2", "bf16", "buffers", "tied", "dim1", "hsdp", "tp_fsdp", "fsdp1", "steps")
TWO_RANKS = ("tp",)


def torchrun(num_ranks: int, *argv: str | Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """A script or module under torchrun, as a person starts it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
        *map(str, argv),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)


def _train(out: Path, num_ranks: int, cases: tuple[str, ...]) -> Path:
    done = torchrun(num_ranks, "-m", "tests.real.train", out, *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case of `tests/real/train.py`."""
    made: dict[int, Path] = {}

    def folder(case: str) -> Path:
        num_ranks = 2 if case in TWO_RANKS else 4
        if num_ranks not in made:
            made[num_ranks] = _train(
                tmp_path_factory.mktemp("real"), num_ranks, TWO_RANKS if num_ranks == 2 else FOUR_RANKS
            )
        return made[num_ranks] / case

    return folder
