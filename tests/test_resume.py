"""Contract: a job that is ended at any moment, in any way, publishes nothing, and the same command goes on from there, with any
number of ranks, to the same bytes; a rank that dies or hangs ends the job on all ranks in bounded time, with one message
that names it. Not checked here: several nodes (test_nodes.py, test_local.py) and slurm (test_slurm.py).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ckpt_dist
from ckpt_dist import task, writing
from ckpt_dist.altered import ZEROS
from ckpt_dist.catalog import Catalog, Chunks
from ckpt_dist.cli import main
from ckpt_dist.engine import fill, journal
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Done
from ckpt_dist.errors import STOP, STOPPED, CheckpointError, Stopped, UsageError
from ckpt_dist.model import Model
from ckpt_dist.sources import Source
from ckpt_dist.writing import saved
from tests.conftest import ROOT

SLOW = ROOT / "tests/slow.py"
TENSORS, NUMEL = 12, 1 << 19  # one tile each, 12 MiB


def checkpoints(folder: Path, count: int = 2) -> Path:
    for step in range(1, count + 1):
        (folder / f"step-{step}").mkdir(parents=True)
        torch.manual_seed(step)
        state = {f"w{k:02}": torch.randn(NUMEL // 64, 64).bfloat16() for k in range(TENSORS)}
        save_file(state, folder / f"step-{step}/model.safetensors")
    return folder


def start(num_ranks: int, pause: float, *words: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(SLOW), str(pause), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)


def noted(staged: Path) -> int:
    """Lines in all journals of a staging folder."""
    return sum(p.read_text().count("\n") for p in staged.glob(".ckpt_dist/*.jsonl"))


def kill_all(job: subprocess.Popen[str]) -> None:
    """Kill an agent of torchrun and its ranks, the last one first."""
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for pid in (*map(int, reversed(ranks)), job.pid):
        os.kill(pid, signal.SIGKILL)


def wait(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def same(one: Path, two: Path) -> bool:
    """Whether two folders hold the same checkpoint files, byte for byte; the records of the job have paths and times in them."""
    names = [{p.name for p in f.iterdir()} - {"ckpt_dist.json", "average.yaml"} for f in (one, two)]
    return names[0] == names[1] and all((one / n).read_bytes() == (two / n).read_bytes() for n in names[0])


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A shell lets what it starts in the background ignore Ctrl-C, and jobs inherit that from the suite."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


WAYS = {
    "hf": ("convert", "target.format=hf"),
    "dcp": ("convert", "target.format=dcp"),
    "average": ("average", "target.format=torch"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGINT])
def test_a_job_that_was_ended_goes_on(tmp_path: Path, way: str, how: signal.Signals) -> None:
    run, (verb, format) = checkpoints(tmp_path / "run"), WAYS[way]
    source = run if verb == "average" else run / "step-1"
    words = [verb, f"source.path={source}", f"target.path={tmp_path / 'out'}", format, "engine.workers=2"]
    staged = tmp_path / ".out.ckpt_dist"
    job = start(1, 0.02, *words)
    wanted = random.Random(f"{way}{how}").randint(2, TENSORS - 4)
    wait(lambda: noted(staged) >= wanted or job.poll() is not None)
    job.send_signal(how)
    _, said = job.communicate(timeout=60)
    assert job.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}.get(how, 75), said
    assert not (tmp_path / "out").exists() and staged.exists()
    if how in (signal.SIGTERM, signal.SIGUSR1):
        assert said.count("Run the same command again to go on from here") == 1
    done = noted(staged)
    assert wanted <= done < TENSORS
    again = start(1, 0, *words)
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert f"resumed: {done} tiles were there already" in said
    getattr(ckpt_dist, verb)(source, tmp_path / "straight", format=format.partition("=")[2], quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight")
    assert not staged.exists() and not (tmp_path / "out/.ckpt_dist").exists()


def test_a_job_that_is_stopped_after_its_last_tile_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_summed", lambda p: STOP.set() or [])
        with pytest.raises(Stopped):
            ckpt_dist.convert(source, tmp_path / "out", quiet=True)
    STOP.clear()
    assert not (tmp_path / "out").exists()
    done = ckpt_dist.convert(source, tmp_path / "out", quiet=True)
    assert f"resumed: {TENSORS} tiles were there already" in done["notes"]
    assert ckpt_dist.verify(tmp_path / "out", source)["bit_equal"]


@pytest.mark.parametrize(("who", "how"), [("launcher", "SIGUSR1"), ("launcher", "SIGTERM"), ("rank 1", "SIGKILL")])
def test_nproc_ends_all_its_ranks_and_says_that_the_job_goes_on(tmp_path: Path, who: str, how: str) -> None:
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    (tmp_path / "convert.py").write_text(
        f"import runpy, sys\nsys.argv[:1] = [{str(SLOW)!r}, '0.5', 'convert']\nrunpy.run_path({str(SLOW)!r}, run_name='__main__')"
    )
    code = f"""import pathlib; from ckpt_dist import cli, config
folder = config.folder
config.folder = lambda name: pathlib.Path({str(tmp_path)!r}) if name == "jobs" else folder(name)
exit(cli.console())"""
    words = ["convert", f"source.path={source}", f"target.path={tmp_path / 'out'}", "nproc=2", "engine.workers=1"]
    command = [sys.executable, "-c", code, *words, "engine.timeout=60"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    killed_at = time.monotonic()
    os.kill(job.pid if who == "launcher" else int(children[1]), signal.Signals[how])
    _, said = job.communicate(timeout=120)
    assert time.monotonic() - killed_at < 20, said  # torchrun asks the others to end, and kills them 30 s later
    assert job.returncode == 75 and said.count("Run the same command again to go on from here.") == 1, said
    assert all(line.startswith(("convert: ", "Error: ")) for line in said.splitlines()), said
    killed = f"Error: rank 1 ({socket.gethostname()}) was ended by signal 9."
    assert who == "launcher" or (said.count(killed) == 1 and "lower engine.memory" in said), said
    assert not any(Path(f"/proc/{pid}").exists() for pid in children) and not (tmp_path / "out").exists()


def test_other_ranks_go_on_where_killed_ones_were(tmp_path: Path) -> None:
    run = checkpoints(tmp_path / "run")
    words = ["average", f"source.path={run}", f"target.path={tmp_path / 'out'}", "engine.workers=1"]
    job = start(2, 0.05, *words)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 4)
    os.killpg(job.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(tmp_path / "out")], check=False)
    job.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    again = start(3, 0, *words)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0 and "tiles were there already" in said
    ckpt_dist.average(run, tmp_path / "straight", quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize("change", ["target.dtype=float32", "resume=false", "source"])
def test_another_job_does_not_go_on_with_it(tmp_path: Path, change: str) -> None:
    run = checkpoints(tmp_path / "run", 1)
    words = ["convert", f"source.path={run / 'step-1'}", f"target.path={tmp_path / 'out'}", "engine.workers=1"]
    job = start(1, 0.02, *words)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 3)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    if change == "source":
        os.utime(run / "step-1/model.safetensors", (1, 1))
    again = start(1, 0, *words, *([change] if "=" in change else []))
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0 and "resumed" not in said


def stopped(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path, **keys: object) -> None:
    """A conversion that is stopped after its last tile."""

    def fills(*given: object) -> Done:
        fill.fill(*given)  # type: ignore[arg-type]
        raise Stopped(STOPPED)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(task, "fill", fills)
        ckpt_dist.convert(source, target, quiet=True, **keys)


def test_a_config_that_was_corrected_starts_the_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of heads decides the order of rows, and no stored shape."""
    right = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 96,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    }
    wrong = {**right, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    rows = {"wq": 32, "wk": 16, "wv": 16, "wo": 32}
    torch.manual_seed(0)
    state = {f"layers.0.attention.{name}.weight": torch.randn(n, 32) for name, n in rows.items()}
    state |= {f"layers.0.feed_forward.{name}.weight": torch.randn(96, 32) for name in ("w1", "w3")}
    state |= {"layers.0.feed_forward.w2.weight": torch.randn(32, 96), "norm.weight": torch.randn(32)}
    state |= {f"layers.0.{name}_norm.weight": torch.randn(32) for name in ("attention", "ffn")}
    state |= {name: torch.randn(64, 32) for name in ("tok_embeddings.weight", "output.weight")}
    source = tmp_path / "meta"
    source.mkdir()
    torch.save(state, source / "consolidated.00.pth")
    config = tmp_path / "config/config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(wrong))
    keys = {"model.config": str(config.parent)}
    stopped(monkeypatch, source, tmp_path / "out", **keys)
    config.write_text(json.dumps(right))
    ckpt_dist.convert(source, tmp_path / "out", quiet=True, **keys)
    ckpt_dist.convert(source, tmp_path / "straight", quiet=True, **keys)
    assert same(tmp_path / "out", tmp_path / "straight")


def test_a_job_goes_on_where_its_own_space_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    stopped(monkeypatch, source, tmp_path / "out")
    left = namedtuple("left", "total used free")(0, 0, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: left)
    with pytest.raises(CheckpointError, match="Not enough space"):
        ckpt_dist.convert(source, tmp_path / "other", quiet=True)
    report = ckpt_dist.convert(source, tmp_path / "out", quiet=True)
    assert [note for note in report["notes"] if "resumed" in note]


def test_what_a_disk_lost_of_the_skeleton_is_there_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure only those tiles are known to be on the disk that were noted; headers never were flushed."""
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    stopped(monkeypatch, source, tmp_path / "out")
    with open(tmp_path / ".out.ckpt_dist/model.safetensors", "r+b") as file:
        file.write(bytes(512))
    report = ckpt_dist.convert(source, tmp_path / "out", quiet=True)
    assert [note for note in report["notes"] if "resumed" in note]
    assert ckpt_dist.verify(tmp_path / "out", source)["bit_equal"]


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").write_text('{"model_type": "none"}')
    monkeypatch.setattr(writing, "_summed", lambda p: (source / "tokenizer.json").unlink() or [])
    with pytest.raises(CheckpointError, match=r"Cannot read .*/tokenizer\.json: No such file"):
        ckpt_dist.convert(source, tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("*out*"))


def test_zeros_that_lengthen_a_vocabulary_are_of_no_time(tmp_path: Path) -> None:
    """They are read from a device, whose time is that of the last start of the machine."""
    catalog = Catalog(
        "hf",
        "/",
        ("dev/null", ZEROS),
        (),
        Chunks.dense([], *np.zeros((2, 0, 1), np.int64), *np.zeros((2, 0), np.int64)),
    )
    assert list(saved([Model(Source(catalog, tmp_path, tmp_path), ())])) == ["/dev/null"]


@pytest.mark.parametrize("moment", ["planned", "copied"])
def test_two_saves_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    run = checkpoints(tmp_path / "run", 2)
    place, name = {"planned": (writing, "prepare"), "copied": (task, "fill")}[moment]
    work = getattr(place, name)

    def saved_again(*given: object) -> object:
        done = work(*given)
        (run / "step-1/model.safetensors").write_bytes((run / "step-2/model.safetensors").read_bytes())
        return done

    monkeypatch.setattr(place, name, saved_again)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read; nothing was published"):
        ckpt_dist.convert(run / "step-1", tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("look", ["verify alone", "verify", "fingerprint"])
def test_what_is_said_of_a_checkpoint_is_of_one_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    run = checkpoints(tmp_path / "run", 2)
    shutil.copytree(run / "step-1", tmp_path / "same")
    fill = task.fill

    def saved_again(*given: object) -> object:
        done = fill(*given)  # type: ignore[arg-type]
        (run / "step-1/model.safetensors").write_bytes((run / "step-2/model.safetensors").read_bytes())
        return done

    others = [tmp_path / "same"] if look == "verify" else []
    assert getattr(ckpt_dist, look.split()[0])(run / "step-1", *others)
    monkeypatch.setattr(task, "fill", saved_again)
    for _ in range(2):  # the second time it is another one, so that they differ
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read\. Run the same"):
            getattr(ckpt_dist, look.split()[0])(run / "step-1", *others)


def test_what_was_abandoned_before_its_skeleton_was_whole_goes_away(tmp_path: Path) -> None:
    """But not what a job that goes on is making."""
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    old, live = (tmp_path / f".out.ckpt_dist-new-{name}" for name in ("old", "live"))
    for folder in (old, live):
        journal.begin(folder, "of another job")
    with open(live / ".ckpt_dist/plan") as claimed:
        fcntl.flock(claimed, fcntl.LOCK_EX)
        ckpt_dist.convert(source, tmp_path / "out", quiet=True)
        assert not old.exists() and live.exists()
    assert ckpt_dist.verify(tmp_path / "out", source)["bit_equal"]


@pytest.mark.parametrize("wait_s", [0.0, 0.3])
def test_of_two_jobs_that_begin_together_one_is_done(tmp_path: Path, wait_s: float) -> None:
    """Making the files takes its time, and nobody has begun to anybody who looks meanwhile."""
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    code = f"""import sys, time, ckpt_dist
from ckpt_dist.engine import staging
reserve = staging.reserve
staging.reserve = lambda *given: (time.sleep(0.15), reserve(*given))
ckpt_dist.inspect({str(source)!r})
open(sys.argv[1] + ".ready", "w").close()
import os
while not os.path.exists(sys.argv[2]): time.sleep(0.001)
time.sleep(float(sys.argv[3]))
ckpt_dist.convert({str(source)!r}, {str(tmp_path / "out")!r}, format="dcp", max_shard_size="2MB", quiet=True)"""
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / f"job{k}"), str(tmp_path / "go"), str(k * wait_s)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for k in range(2)
    ]
    wait(lambda: all((tmp_path / f"job{k}.ready").exists() for k in range(2)))
    (tmp_path / "go").touch()
    said = [job.communicate(timeout=60)[1] for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    assert codes[0] == 0 and (codes[1] == 0 or "Another job is making" in "".join(said) or "exists" in "".join(said)), (
        said
    )
    assert ckpt_dist.verify(tmp_path / "out", source)["bit_equal"]
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("verb", ["convert to a file", "convert to a folder", "merge into a folder"])
def test_what_somebody_made_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    source = checkpoints(tmp_path / "run", 1) / "step-1"
    ckpt_dist.convert(source, tmp_path / "dcp", format="dcp", quiet=True)
    out = tmp_path / ("dcp/model.safetensors" if verb.startswith("merge") else "out")
    theirs = out / "theirs" if verb.endswith("to a folder") else out

    def come_first(p: object) -> list[str]:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("of somebody else")
        return []

    monkeypatch.setattr(writing, "_summed", come_first)

    def job() -> object:
        if verb.startswith("merge"):
            return ckpt_dist.merge(tmp_path / "dcp")
        return ckpt_dist.convert(source, out, format="torch" if verb.endswith("file") else "hf", quiet=True)

    with pytest.raises(UsageError, match=r"Somebody has made .* nothing was published.* run the same command again"):
        job()
    assert theirs.read_text() == "of somebody else"
    with pytest.raises(UsageError, match=r"exists|already holds model\.safetensors"):
        job()
    monkeypatch.undo()
    theirs.unlink()
    if verb.endswith("to a folder"):
        out.rmdir()
    done = job()
    assert isinstance(done, Path) or any("resumed: " in note for note in done["notes"])  # type: ignore[index]
    assert ckpt_dist.verify(out, source)["bit_equal"] and not list(tmp_path.glob(".*"))


def test_two_jobs_cannot_make_one_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HURRY", str(tmp_path / "hurry"))  # the others may take long to start
    run = checkpoints(tmp_path / "run", 1)
    words = ["convert", f"source.path={run / 'step-1'}", f"target.path={tmp_path / 'out'}", "engine.workers=1"]
    job = start(1, 0.5, *words)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 1)
    for more in ([], ["resume=false"], ["target.format=dcp"]):
        other = start(1, 0, *words, *more)
        _, said = other.communicate(timeout=60)
        assert other.returncode == 2 and "Another job is making" in said
    (tmp_path / "hurry").touch()
    _, said = job.communicate(timeout=60)
    assert job.returncode == 0, said
    ckpt_dist.convert(run / "step-1", tmp_path / "straight", quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize("no", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no: int) -> None:
    """As Lustre is where it was mounted without them, or NFS whose lock server is away."""

    def flock(fd: int, how: int) -> None:
        raise OSError(no, os.strerror(no))

    source = checkpoints(tmp_path / "run", 1) / "step-1"
    words = ["convert", f"source.path={source}", f"target.path={tmp_path / 'out'}", "engine.workers=1"]
    job = start(1, 0.3, *words)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 1)
    job.kill()
    job.communicate(timeout=60)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UsageError, match="remove this folder"):  # nobody knows whether its job still runs
        ckpt_dist.convert(source, tmp_path / "out", dtype="float32", quiet=True)
    assert noted(tmp_path / ".out.ckpt_dist") >= 1
    done = ckpt_dist.convert(source, tmp_path / "out", quiet=True, **{"engine.workers": 1})
    assert any("tiles were there already" in note for note in done["notes"])
    ckpt_dist.convert(source, tmp_path / "out", quiet=True, overwrite=True)
    ckpt_dist.convert(source, tmp_path / "straight", quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight") and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_collective_transport_goes_on_too(
    tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APART", "1")
    run = checkpoints(tmp_path / "run")
    words = ["average", f"source.path={run}", f"target.path={tmp_path / 'out'}", "engine.workers=1"]
    words += ["engine.transport=collective", "engine.memory=24MiB"]
    job = start(2, 0.3, *words)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 3)
    os.killpg(job.pid, how)
    subprocess.run(["pkill", "-KILL" if how == signal.SIGKILL else "-TERM", "-f", str(tmp_path / "out")], check=False)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and not (tmp_path / "out").exists()
    again = start(2, 0, *words)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0 and "tiles were there already" in said, said
    ckpt_dist.average(run, tmp_path / "straight", quiet=True)
    assert same(tmp_path / "out", tmp_path / "straight")


def ranks(world: int, *words: str) -> list[subprocess.Popen[str]]:
    """Ranks without an agent that would end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SLOW), "0.06", *words]
    return [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **shared, "RANK": str(r)}
        )
        for r in range(world)
    ]


@pytest.mark.parametrize(
    ("victim", "how"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP), (0, signal.SIGKILL)]
)
def test_a_dead_or_hanging_rank_ends_all(tmp_path: Path, victim: int, how: signal.Signals) -> None:
    run = checkpoints(tmp_path / "run", 1)
    words = ["convert", f"source.path={run / 'step-1'}", f"target.path={tmp_path / 'out'}"]
    jobs = ranks(3, *words, "engine.workers=1", "engine.timeout=3")
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 1)
    begin = time.monotonic()
    jobs[victim].send_signal(how)
    said = [j.communicate(timeout=30)[1] for r, j in enumerate(jobs) if r != victim]
    assert time.monotonic() - begin < 20
    codes = [j.returncode for r, j in enumerate(jobs) if r != victim]
    jobs[victim].kill()
    jobs[victim].communicate()
    assert all(c not in (0, None) for c in codes)
    everything = "".join(said)
    if victim != 0 or how == signal.SIGSTOP:
        assert everything.count(f"Error: rank {victim} ({socket.gethostname()})") <= 1
    assert "to go on from here" in everything and "Traceback" not in everything, everything
    assert not (tmp_path / "out").exists()
    assert ckpt_dist.convert(run / "step-1", tmp_path / "out", quiet=True)


def test_the_disk_writes_while_tiles_are_made(tmp_path: Path) -> None:
    """A flush holds nobody up, and what was made meanwhile is noted only by the next one."""
    (tmp_path / journal.FOLDER).mkdir()
    begun, go_on, flushes = threading.Event(), threading.Event(), list[int]()

    def flush() -> None:
        begun.set()
        assert go_on.wait(60)
        flushes.append(noted(tmp_path))

    notes = journal.Journal(tmp_path, flush)
    for k in range(5):
        notes.note(k, k + 1, Done(bytes_written=journal.EVERY_BYTES))
        assert begun.wait(60)
    assert noted(tmp_path) == 0 and not flushes
    go_on.set()
    notes.close()
    assert flushes == [0, 1] and journal.read(tmp_path)[0] == [(k, k + 1) for k in range(5)]


def test_a_flush_that_failed_is_said_at_the_next_note(tmp_path: Path) -> None:
    """Not only when there is as much again to flush."""
    (tmp_path / journal.FOLDER).mkdir()
    notes = journal.Journal(tmp_path, failing)
    notes.note(0, 1, Done(bytes_written=journal.EVERY_BYTES))
    wait(lambda: notes.writing is not None and notes.writing.done())
    for call in (lambda: notes.note(1, 2, Done(bytes_written=1)), notes.close):
        with pytest.raises(CheckpointError, match="no space"):
            call()
    assert noted(tmp_path) == 0


def failing() -> None:
    raise CheckpointError("no space")


MADE = {"first": 1, "last": TENSORS * NUMEL * 2, "end": 1 << 40}  # bytes before a flush


@pytest.mark.parametrize("when", MADE)
def test_a_disk_that_does_not_take_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    """The job ends at the next tile, or at the end if there is none: what the disk lacks is not noted, nor published. Linux
    says so once, and from then on that all is well."""
    run, tiles, left = checkpoints(tmp_path / "run", 1), list[int](), list[int]()
    note, close, fsync = journal.Journal.note, journal.Journal.close, os.fsync
    monkeypatch.setattr(fill, "BATCH", 1)
    monkeypatch.setattr(journal, "EVERY_BYTES", MADE[when])

    def patient(self: journal.Journal, first: int, last: int, done: Done) -> None:
        tiles.append(first)
        note(self, first, last, done)
        wait(lambda: self.writing is None or self.writing.done())

    def closing(self: journal.Journal) -> None:
        try:
            close(self)
        finally:
            left.append(noted(tmp_path / ".out.ckpt_dist"))

    def refused(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal.Journal, "note", patient)
    monkeypatch.setattr(journal.Journal, "close", closing)
    monkeypatch.setattr(os, "fsync", refused)
    words = [f"source.path={run / 'step-1'}", f"target.path={tmp_path / 'out'}", "engine.workers=1", "quiet=true"]
    assert main("convert", words) == 3
    said = capsys.readouterr().err
    assert said.count("Input/output error") == 1 and "Nothing was published" in said
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    assert len(tiles) == (2 if when == "first" else TENSORS) and left == [0]


@pytest.mark.parametrize("moment", ["before the bytes", "after the bytes"])
def test_a_flush_beside_a_write_is_not_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """What is written while a flush goes on is the next one's."""
    (tmp_path / "a").write_bytes(bytes(8))
    flushed, pwrite, fsync = list[bytes](), os.pwrite, os.fsync
    files = Files(tmp_path, ["a"], writable=True)

    def noticed(fd: int) -> None:
        flushed.append((tmp_path / "a").read_bytes())
        if moment == "after the bytes" and len(flushed) == 1:
            files.write(0, 0, b"written2")  # type: ignore[arg-type]
        fsync(fd)

    def interrupted(fd: int, data: bytes, offset: int) -> int:
        if moment == "before the bytes":
            files.sync()
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "fsync", noticed)
    monkeypatch.setattr(os, "pwrite", interrupted)
    files.write(0, 0, memoryview(b"written1"))
    files.sync()
    files.sync()
    files.close()
    assert flushed == ([b"written1"] if moment == "before the bytes" else [b"written1", b"written2"])


def test_only_what_was_written_since_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, flushed, fsync = ["a", "b", "c"], list[str](), os.fsync
    for name in names:
        (tmp_path / name).write_bytes(bytes(8))

    def noticed(fd: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noticed)
    files = Files(tmp_path, names, writable=True)
    files.read(2, 0, memoryview(bytearray(8)))
    for number in (1, 0, 1):
        files.write(number, 0, memoryview(b"12345678"))
    files.sync()
    files.sync()
    files.write(1, 0, memoryview(b"87654321"))
    files.sync()
    files.close()
    assert flushed == ["a", "b", "b"]
