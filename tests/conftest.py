"""Checkpoints made by real training, built once for each test session: `real("fsdp2")` is the folder of that case."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUR_RANKS = ("fsdp2", "bf16", "buffers", "tied", "dim1", "hsdp", "tp_fsdp", "fsdp1", "steps")
TWO_RANKS = ("tp",)
LONG = (
    "resume", "megatron", "transport", "cost", "slurm", "nodes", "real", "local_target", "seed", "megatron_optimizer", "memory", "local",
    "average", "reader", "cli", "packaging", "scale", "docs",
)  # fmt: skip


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
    """The folder of a case of `tests/real/train.py`; the workers of pytest-xdist share what one of them has trained."""
    top = tmp_path_factory.getbasetemp()
    top = top.parent if "PYTEST_XDIST_WORKER" in os.environ else top

    def folder(case: str) -> Path:
        num_ranks, cases = (2, TWO_RANKS) if case in TWO_RANKS else (4, FOUR_RANKS)
        made = top / f"real{num_ranks}"
        with open(top / f"{made.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                _train(top / f"{made.name}.part", num_ranks, cases).rename(made)
        return made / case

    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first, so that at the end no worker waits for another's."""
    order = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))
