"""Contract: shards on disks that only their own node sees are converted and averaged as if all were in one place, and a shard
that no node has is named. The nodes are mount namespaces, in which one path shows another folder. Not checked here: other formats
than DCP, which need all their files on the first node.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ckpt_dist
from tests.conftest import ROOT
from tests.test_resume import same

Real = Callable[[str], Path]


def _isolated() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not _isolated(), reason="mount namespaces need root and unshare")


def on_nodes(place: Path, folders: list[Path], num_ranks: int, verb: str, *words: str) -> list[tuple[int, str]]:
    """One torchrun on each of some nodes, of which each sees its own folder at `place`: (exit code, stderr)."""
    place.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank, folder in enumerate(folders):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            str(len(folders)),
            "--node-rank",
            str(rank),
        ]
        launch += ["--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node", str(num_ranks)]
        inner = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(folder), str(place)]
        command = ["unshare", "-m", *inner, *launch, str(ROOT / f"jobs/{verb}.py"), *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT))
    said = [job.communicate(timeout=240)[1] for job in started]
    return [(job.returncode, text) for job, text in zip(started, said, strict=True)]


def halves(checkpoint: Path, out: Path) -> list[Path]:
    """The shards of a checkpoint on two nodes; what is no shard is on the first."""
    nodes = [out / "node0", out / "node1"]
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        shard = int(path.stem.split("_")[2]) if path.suffix == ".distcp" else 0
        to = nodes[shard % 2] / path.relative_to(checkpoint)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    return nodes


@pytest.mark.parametrize(("case", "verb"), [("fsdp2/dcp", "convert"), ("steps", "average")])
@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_shards_on_two_nodes(tmp_path: Path, real: Real, case: str, verb: str, transport: str) -> None:
    name, _, inner = case.partition("/")
    source = real(name) / inner
    nodes = halves(source, tmp_path)
    place = tmp_path / "local"
    words = [f"source.path={place}", f"target.path={tmp_path / 'out'}", f"engine.transport={transport}"]
    ended = on_nodes(place, nodes, 2, verb, *words)
    assert [code for code, _ in ended] == [0, 0], ended
    if transport == "auto":
        assert "transport collective: not every node sees all files" in ended[0][1]
    getattr(ckpt_dist, verb)(source, tmp_path / "whole", quiet=True)
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_shard_that_no_node_has_is_named(tmp_path: Path, real: Real) -> None:
    nodes = halves(real("fsdp2") / "dcp", tmp_path)
    lost = next(nodes[1].rglob("*.distcp"))
    lost.unlink()
    ended = on_nodes(
        tmp_path / "local", nodes, 1, "convert", f"source.path={tmp_path / 'local'}", f"target.path={tmp_path / 'out'}"
    )
    said = "".join(text for _, text in ended)
    assert all(code for code, _ in ended)
    assert said.count(f"{lost.name} is missing") == 1, said
    assert not (tmp_path / "out").exists()


def test_direct_is_refused_where_a_node_is_blind(tmp_path: Path, real: Real) -> None:
    nodes = halves(real("fsdp2") / "dcp", tmp_path)
    words = [f"source.path={tmp_path / 'local'}", f"target.path={tmp_path / 'out'}", "engine.transport=direct"]
    ended = on_nodes(tmp_path / "local", nodes, 1, "convert", *words)
    assert all(code for code, _ in ended)
    assert "not every node sees all files" in "".join(text for _, text in ended)
