"""Contract: shards on disks that only their own node sees are converted and averaged as if all were in one place, and a shard
that no node has is named.
The nodes are namespaces, in which one path shows another folder; when one dies, the other ends in bounded time. Checked for DCP and for
DeepSpeed's runs; other formats need all their files on the first node.

The nodes have networks of their own too, joined by a cable (veth), so nothing goes through the loopback device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ckpt_dist
from tests.conftest import ROOT
from tests.test_resume import checkpoints, noted, same, wait

Real = Callable[[str], Path]
DEEPSPEED = ROOT / "tests/data/deepspeed-0.19.8"


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _isolated() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    name = f"ckpt-try{os.getpid()}"  # two workers of one suite try at once
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not _isolated(), reason="namespaces need root, ip (iproute2) and unshare")


@pytest.fixture(scope="module")
def nets() -> Iterator[list[str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2."""
    names = [f"ckpt{os.getpid()}n{k}" for k in (0, 1)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run(
            "ip",
            "link",
            "add",
            "cable0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable1",
            "netns",
            names[1],
        )
        for k, name in enumerate(names):
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", f"cable{k}")
            for device in ("lo", f"cable{k}"):
                _run("ip", "-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_nodes(
    nets: list[str], place: Path, folders: list[Path], num_ranks: int, *job: str
) -> list[subprocess.Popen[str]]:
    """launch/torchrun.sh, or a script, on each of two nodes, of which each sees its own folder at `place`."""
    place.mkdir(exist_ok=True)
    started = []
    for rank, (net, folder) in enumerate(zip(nets, folders, strict=True)):
        env = {**os.environ, "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "10.77.0.1", "NPROC": str(num_ranks)}
        env |= {"PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": f"cable{rank}"}
        inner = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(folder), str(place)]
        command = ["ip", "netns", "exec", net, "unshare", "-m", *inner, *job]
        started.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)
        )
    return started


def on_nodes(nets: list[str], place: Path, folders: list[Path], num_ranks: int, *words: str) -> list[tuple[int, str]]:
    """(exit code, stderr) of each node."""
    started = start_nodes(nets, place, folders, num_ranks, str(ROOT / "launch/torchrun.sh"), *words)
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
def test_shards_on_two_nodes(nets: list[str], tmp_path: Path, real: Real, case: str, verb: str, transport: str) -> None:
    name, _, inner = case.partition("/")
    source = real(name) / inner
    nodes = halves(source, tmp_path)
    place = tmp_path / "local"
    words = [f"source.path={place}", f"target.path={tmp_path / 'out'}", f"engine.transport={transport}"]
    ended = on_nodes(nets, place, nodes, 2, verb, *words)
    assert [code for code, _ in ended] == [0, 0], ended
    if transport == "auto":
        assert "transport collective: not every node sees all files" in ended[0][1]
    getattr(ckpt_dist, verb)(source, tmp_path / "whole", quiet=True)
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_shard_that_no_node_has_is_named(nets: list[str], tmp_path: Path, real: Real) -> None:
    nodes = halves(real("fsdp2") / "dcp", tmp_path)
    lost = next(nodes[1].rglob("*.distcp"))
    lost.unlink()
    ended = on_nodes(
        nets,
        tmp_path / "local",
        nodes,
        1,
        "convert",
        f"source.path={tmp_path / 'local'}",
        f"target.path={tmp_path / 'out'}",
    )
    said = "".join(text for _, text in ended)
    assert all(code for code, _ in ended)
    assert said.count(f"{lost.name} is missing") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_direct_is_refused_where_a_node_is_blind(nets: list[str], tmp_path: Path, real: Real, dry_run: bool) -> None:
    nodes = halves(real("fsdp2") / "dcp", tmp_path)
    words = [f"source.path={tmp_path / 'local'}", f"target.path={tmp_path / 'out'}", "engine.transport=direct"]
    ended = on_nodes(nets, tmp_path / "local", nodes, 1, "convert", *words, f"dry_run={dry_run}".lower())
    assert all(code for code, _ in ended)
    said = "".join(text for _, text in ended)
    assert said.count("engine.transport=direct, but not every node sees all files") == 1, said


LAUNCHER = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nnodes",
    "2",
    "--master-addr",
    "10.77.0.1",
    "--nproc-per-node",
]


def dealt(case: str, out: Path) -> list[Path]:
    """A run of DeepSpeed's on two nodes: the files of odd ranks, stages and experts on the first, the others on the second;
    the first has `latest`, as with DeepSpeed's use_node_local_storage."""
    nodes = [out / "node0", out / "node1"]
    for path in sorted(p for p in (DEEPSPEED / case).rglob("*_states.pt") if "universal" not in p.parts):
        number = re.search(r"(?:pp_rank_|expert_|layer_0|mp_rank_0)(\d+)", path.name)
        assert number
        to = nodes[1 - int(number[1]) % 2] / case / path.parent.name
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    shutil.copy(DEEPSPEED / case / "latest", nodes[0] / case)
    return nodes


def test_deepspeed_shards_on_two_nodes(nets: list[str], tmp_path: Path) -> None:
    """The first node has the model's file of no rank but the second at stage 3, and not all layers or experts of others."""
    cases, master, place = ("two-3", "three-2", "experts-4", "tied-4"), "source.weights=master", tmp_path / "local"
    for case in (*cases, "robin-3"):
        nodes = dealt(case, tmp_path)
    (main,) = (tmp_path / "node1/two-3").rglob(
        "*model_states.pt"
    )  # both nodes have one: not with the same places in it
    copy = tmp_path / "node0" / main.relative_to(tmp_path / "node1")
    torch.save({**torch.load(main, weights_only=True), "node": "0" * 1000}, copy)
    assert copy.stat().st_size > main.stat().st_size
    lost = sorted((tmp_path / "node1/robin-3").rglob("*optim_states.pt"))
    for path in lost:
        path.unlink()
    jobs = [
        ["convert", f"source.path={place / c}", f"target.path={tmp_path / c}", "target.format=torch", master]
        for c in (*cases, "robin-3")
    ]
    jobs.append(
        ["convert", f"source.path={place}/two-3", f"target.path={tmp_path}/own", "target.format=torch", "keep=weights"]
    )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    inner = [
        "sh",
        "-c",
        'exec "$@" --node-rank "$NODE_RANK" ' + f"{ROOT}/tests/real/several.py {tmp_path}/jobs.json",
        "sh",
    ]
    started = start_nodes(nets, place, nodes, 1, *inner, *LAUNCHER, "1")
    said = [job.communicate(timeout=90)[1] for job in started]
    assert "CODES [0, 0, 0, 0, 3, 0]" in said[0], said
    assert said[0].count("transport collective: not every node sees all files") >= 4
    for case in cases:
        ckpt_dist.convert(DEEPSPEED / case, tmp_path / "whole" / case, format="torch", **{"source.weights": "master"})
        assert same(tmp_path / case, tmp_path / "whole" / case), case
    ckpt_dist.convert(DEEPSPEED / "two-3", tmp_path / "whole/own", format="torch")
    assert same(tmp_path / "own", tmp_path / "whole/own")
    assert f"the shards of ranks 0, 2 are missing ({lost[0].name}, {lost[1].name})" in said[0]
    assert not (tmp_path / "robin-3").exists()


@pytest.mark.parametrize(("victim", "whole"), [(0, True), (1, True), (0, False)], ids=["node 0", "node 1", "agent 0"])
def test_a_node_that_dies_ends_the_job_on_the_other(nets: list[str], tmp_path: Path, victim: int, whole: bool) -> None:
    """The agent of another node than the first is not missed by anyone: its ranks finish the job."""
    run = checkpoints(tmp_path / "run", 2)
    launcher = [*LAUNCHER, "2", "--master-port", "29411"]
    words = [
        "2.5",
        "average",
        f"source.path={run}",
        f"target.path={tmp_path / 'out'}",
        "engine.workers=1",
        "engine.timeout=4",
    ]
    inner = ["sh", "-c", 'exec "$@" --node-rank "$NODE_RANK" ' + f"{ROOT / 'tests/slow.py'} {' '.join(words)}", "sh"]
    jobs = start_nodes(nets, tmp_path / "local", [tmp_path, tmp_path], 2, *inner, *launcher)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 1)
    begin = time.monotonic()
    if whole:
        os.killpg(jobs[victim].pid, signal.SIGKILL)
        for pid in subprocess.run(["ip", "netns", "pids", nets[victim]], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
    else:
        jobs[victim].kill()
    other = jobs[1 - victim].communicate(timeout=60)[1]
    took = time.monotonic() - begin
    for net in nets:  # ranks whose agent was killed end by themselves, or are done by now
        wait(lambda net=net: not subprocess.run(["ip", "netns", "pids", net], capture_output=True).stdout.strip())
    jobs[victim].communicate()
    print(f"node {victim}, whole={whole}: the other ended after {took:.1f} s with {jobs[1 - victim].returncode}")
    assert jobs[1 - victim].returncode != 0 and "to go on from here" in other and not (tmp_path / "out").exists()
    assert took < 40
    ckpt_dist.average(run, tmp_path / "out", quiet=True)
    ckpt_dist.average(run, tmp_path / "straight", quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight")
