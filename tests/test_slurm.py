"""Contract: the batch scripts run any verb on the nodes of a slurm allocation, pass every key on untouched, fail when the job
fails, stop before the time limit and go on when queued again. Against a real slurm: a controller and two nodes on this machine,
started for this file; skipped where slurm is not installed. Not checked here: memory limits of cgroups, GPUs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckpt_dist
from tests.conftest import ROOT
from tests.test_resume import checkpoints, noted, same
from tests.test_resume import wait as until

CONF = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldPidFile={place}/run/slurmctld.pid
SlurmdPidFile={place}/run/slurmd.%n.pid
SlurmctldLogFile={place}/log/slurmctld.log
SlurmdLogFile={place}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=600
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(p) is None for p in ("slurmctld", "slurmd", "munged")),
    reason="needs root and slurm: apt-get install slurm-wlm munge",
)


def _ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds the cluster."""
    place = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool.n1", "spool.n2", "run", "log"):
        (place / name).mkdir()
    port, one, two = _ports(3)
    host = socket.gethostname().partition(".")[0]
    (place / "slurm.conf").write_text(CONF.format(host=host, place=place, port=port, one=one, two=two))
    env = {**os.environ, "SLURM_CONF": str(place / "slurm.conf"), "PYTHON": sys.executable}
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge"], check=True)
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged") or "munged"], check=True)
    for daemon in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
        subprocess.run(daemon, env=env, check=True, capture_output=True)
    try:
        end = time.monotonic() + 30
        while (
            subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=env, capture_output=True).stdout.strip()
            != b"2"
        ):
            assert time.monotonic() < end, (place / "log/slurmctld.log").read_text()
            time.sleep(0.2)
        yield env
    finally:
        for pid in place.glob("run/*.pid"):
            subprocess.run(["kill", pid.read_text().strip()], check=False)


def submit(env: dict[str, str], folder: Path, *words: str) -> str:
    """The number of the job; its output goes to `log-<job>` in the folder."""
    command = ["sbatch", "--parsable", f"--output={folder}/log-%j", "--chdir", str(folder), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(env: dict[str, str], job: str) -> dict[str, str]:
    done = subprocess.run(["scontrol", "show", "job", "-o", job], env=env, capture_output=True, text=True)
    return dict(word.split("=", 1) for line in done.stdout.splitlines() for word in line.split() if "=" in word)


def ended(env: dict[str, str], job: str, folder: Path, seconds: float = 120) -> tuple[str, str]:
    """(state, log) of a job when it has come to its end."""
    end = time.monotonic() + seconds
    while (now := state(env, job)["JobState"]) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
        assert time.monotonic() < end, now
        time.sleep(0.2)
    return now, "".join(p.read_text() for p in sorted(folder.glob("log-*")))


def again(env: dict[str, str], job: str) -> None:
    """Start a job that is queued again, which slurm itself would do in two minutes. It counts in seconds: within one of
    the requeue it takes the new start for the old one, and refuses it."""
    until(lambda: state(env, job)["JobState"] == "PENDING")
    time.sleep(3)
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], env=env, check=True)


SCRIPT = str(ROOT / "launch/slurm/convert.sbatch")
SWEEP = str(ROOT / "launch/slurm/sweep.sbatch")


def stand_in(folder: Path, *lines: str) -> str:
    """In the place of Python, to see the words that reach it without the seconds that torch takes."""
    path = folder / "stand_in"
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def test_words_arrive_untouched(slurm: dict[str, str], tmp_path: Path) -> None:
    """From a checkout with a space in its path, too; our memory comes first, because the last word of a key wins."""
    shutil.copytree(ROOT / "launch", tmp_path / "my home/launch")
    shutil.copytree(ROOT / "jobs", tmp_path / "my home/jobs")
    words = ["x=a b  c", "y='q' \"d\" \\", "z=[1, *]", "++engine.memory=1GiB", "w=$HOME", "empty=", "n=1\n2"]
    env = {**slurm, "PYTHON": stand_in(tmp_path, "printf '%s\\0' \"$@\" >words")}
    script = str(tmp_path / "my home/launch/slurm/convert.sbatch")
    found, log = ended(slurm, submit(env, tmp_path, "--mem-per-cpu=500", script, "convert", *words), tmp_path)
    assert found == "COMPLETED", log
    arrived = (tmp_path / "words").read_text().split("\0")[:-1]
    assert arrived[-len(words) - 2 :] == [str(tmp_path / "my home/jobs/convert.py"), "engine.memory=250MiB", *words]


def test_a_convert_on_two_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    run = checkpoints(tmp_path / "run", 1) / "step-1"
    words = ["convert", f"source.path={run}", f"target.path={tmp_path / 'out'}", "target.format=dcp"]
    found, log = ended(slurm, submit(slurm, tmp_path, "--nodes=2", SCRIPT, *words), tmp_path)
    assert found == "COMPLETED", log
    ckpt_dist.convert(run, tmp_path / "straight", format="dcp", quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight")


def test_an_average_on_two_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    run = checkpoints(tmp_path / "my run [1]", 3)
    words = ["average", f"source.path={run}", "steps=[1,3]", f"target.path={tmp_path / 'o=u,t'}"]
    found, log = ended(slurm, submit(slurm, tmp_path, "--nodes=2", "--mem=4000", SCRIPT, *words), tmp_path)
    assert found == "COMPLETED", log
    ckpt_dist.average(run, tmp_path / "straight", steps=[1, 3], quiet=True)
    assert same(tmp_path / "o=u,t", tmp_path / "straight")
    recipe = (tmp_path / "o=u,t/ckpt_dist.json").read_text()
    assert '"memory": "2000MiB"' in recipe or '"memory": 2097152000' in recipe
    assert "in the largest of 2 ranks" in log


def test_a_job_that_fails_fails_in_slurm(slurm: dict[str, str], tmp_path: Path) -> None:
    words = ["convert", f"source.path={tmp_path / 'nothing'}", f"target.path={tmp_path / 'out'}"]
    found, log = ended(slurm, submit(slurm, tmp_path, "--nodes=2", SCRIPT, *words), tmp_path)
    assert found == "FAILED" and log.count("No checkpoint at") == 1


def test_a_sweep_is_one_job_for_each_line(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    save_file({"w": torch.arange(12.0).reshape(3, 4)}, tmp_path / "a b/model.safetensors")
    lines = [
        f"convert 'source.path={tmp_path}/a b' target.path={tmp_path}/{t} target.dtype={t}" for t in ("bf16", "fp16")
    ]
    (tmp_path / "jobs.txt").write_text("\n".join(lines) + "\n")
    job = submit(slurm, tmp_path, "--array=1-2", SWEEP, str(tmp_path / "jobs.txt"))
    for task in (f"{job}_1", f"{job}_2"):
        found, log = ended(slurm, task, tmp_path)
        assert found == "COMPLETED", log
    assert (tmp_path / "bf16/model.safetensors").exists() and (tmp_path / "fp16/model.safetensors").exists()


@pytest.mark.parametrize(
    ("line", "index", "says"),
    [("average 'steps=1", "1", "not quoted well"), ("convert", "2", "no line 2"), ("convert", "0", "no line 0")],
)
def test_a_line_that_cannot_be_read_runs_nothing(
    slurm: dict[str, str], tmp_path: Path, line: str, index: str, says: str
) -> None:
    (tmp_path / "jobs.txt").write_text(line + "\n")
    env = {**slurm, "PYTHON": stand_in(tmp_path, "touch ran")}
    job = submit(env, tmp_path, f"--array={index}", SWEEP, "jobs.txt")
    found, log = ended(slurm, job, tmp_path)
    assert found == "FAILED" and says in log and not (tmp_path / "ran").exists()


def test_one_task_of_an_array_stops_alone(slurm: dict[str, str], tmp_path: Path) -> None:
    """The last task has the id of the whole array."""
    (tmp_path / "jobs.txt").write_text("convert\nconvert\n")
    lines = ["trap 'exit 75' TERM", "touch ran-$SLURM_ARRAY_TASK_ID", "while [ ! -f end ]; do sleep 0.1; done"]
    job = submit({**slurm, "PYTHON": stand_in(tmp_path, *lines)}, tmp_path, "--array=1-2", SWEEP, "jobs.txt")
    until(lambda: len(list(tmp_path.glob("ran-*"))) == 2)
    assert state(slurm, f"{job}_2")["JobId"] == job
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{job}_2"], env=slurm, check=True)
    until(lambda: state(slurm, f"{job}_2")["JobState"] == "PENDING")
    assert state(slurm, f"{job}_1")["JobState"] == "RUNNING"
    (tmp_path / "end").touch()
    again(slurm, f"{job}_2")
    for task, restarts in ((f"{job}_1", "0"), (f"{job}_2", "1")):
        assert ended(slurm, task, tmp_path)[0] == "COMPLETED"
        assert state(slurm, task)["Restarts"] == restarts


def test_without_requeue_the_job_ends_with_the_code_of_the_ranks(slurm: dict[str, str], tmp_path: Path) -> None:
    env = {**slurm, "CKPT_DIST_REQUEUE": "0"}
    env["PYTHON"] = stand_in(tmp_path, "trap 'exit 75' TERM", "touch ran", "while :; do sleep 0.1; done")
    job = submit(env, tmp_path, SCRIPT, "convert")
    until((tmp_path / "ran").exists)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True)
    found, log = ended(slurm, job, tmp_path)
    assert found == "FAILED" and state(slurm, job)["ExitCode"] == "75:0" and "Submit the same command again" in log


def test_a_job_stops_before_its_limit_and_goes_on_when_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    """The warning that slurm gives before the limit comes here from scancel, which sends the same signal to the same place."""
    run = checkpoints(tmp_path / "run", 2)
    home = tmp_path / "home"
    shutil.copytree(ROOT / "launch", home / "launch")
    (home / "jobs").mkdir()
    slow = ROOT / "tests/slow.py"
    lines = [
        "import runpy, sys",
        "sys.argv[1:1] = ['0.05', 'average']",
        f"runpy.run_path({str(slow)!r}, run_name='__main__')",
    ]
    (home / "jobs/average.py").write_text("\n".join(lines))
    words = ["average", f"source.path={run}", f"target.path={tmp_path / 'out'}", "engine.workers=1"]
    job = submit({**slurm, "CKPT_DIST_HOME": str(home)}, tmp_path, "--nodes=2", SCRIPT, *words)
    staged, end = tmp_path / ".out.ckpt_dist", time.monotonic() + 60
    while noted(staged) < 3:
        assert time.monotonic() < end, "".join(p.read_text() for p in tmp_path.glob("log-*"))
        time.sleep(0.05)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True)
    again(slurm, job)
    found, log = ended(slurm, job, tmp_path)
    assert found == "COMPLETED", log
    assert state(slurm, job)["Restarts"] == "1" and "is queued again" in log and "tiles were there already" in log
    ckpt_dist.average(run, tmp_path / "straight", quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight")
