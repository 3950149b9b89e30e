"""Contract: a rank's memory stays below what it has after its imports, plus `engine.memory`, plus 256 MiB, for checkpoints
ten times as large as `engine.memory`; for a conversion (plain, permuted and cast) and for an average of 8; also where two nodes exchange what they read.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import weakref
from math import prod
from pathlib import Path
from subprocess import PIPE
from threading import Event

import pytest
import torch
from safetensors.torch import save_file

import ckpt_dist
from ckpt_dist import run
from ckpt_dist.files.safetensors import lay_out
from tests.conftest import ROOT

MEMORY = 48 << 20
SIZES = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=14,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=8192,
)
MEASURE = """
import json, resource, sys
import torch, torch.distributed.checkpoint, numpy, rich.progress, hydra, safetensors
import ckpt_dist, ckpt_dist.run, ckpt_dist.check, ckpt_dist.averages.tensors, ckpt_dist.config
from ckpt_dist.report import peak_memory
verb, args, keys = json.loads(sys.argv[1])
before = peak_memory()
held = b"1" * keys.pop("held", 0)
getattr(ckpt_dist, verb)(*args, **keys)
print(json.dumps([before, peak_memory()]))
"""


def model(folder: Path) -> Path:
    """A Llama of 0.5 GB of bf16 zeros, sparse on disk: addresses are what matters here, not values."""
    e, f, v = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, e), "lm_head.weight": (v, e), "model.norm.weight": (e,)}
    for layer in range(SIZES["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.self_attn.{n}_proj.weight": (e, e) for n in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{n}_proj.weight": (f, e) for n in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (e, f)
        shapes |= {f"model.layers.{layer}.{n}_layernorm.weight": (e,) for n in ("input", "post_attention")}
    header, _ = lay_out([(n, "bfloat16", s) for n, s in shapes.items()], {"format": "pt"})
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(2 * prod(s) for s in shapes.values()))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    assert (folder / "model.safetensors").stat().st_size >= 10 * MEMORY
    return folder


def peak(verb: str, *args: object, **keys: object) -> tuple[int, int]:
    """Memory before and at most: of one process, or, collective, of that of two on two nodes that needs more."""
    settings = {"engine.memory": MEMORY, "engine.fsync": False, **keys}
    words = json.dumps([verb, [str(a) for a in args], settings])
    command, envs = [sys.executable, "-c", MEASURE, words], [{**os.environ}]
    if keys.get("engine.transport") == "collective":
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
        envs = [{**os.environ, **shared, "RANK": k, "GROUP_RANK": k} for k in ("0", "1")]
    jobs = [subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT, env=env) for env in envs]
    ended = [job.communicate(timeout=300) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), ended[0][1][-3000:]
    found = [tuple(json.loads(out.splitlines()[-1])) for out, _ in ended]
    return max(found, key=lambda pair: pair[1] - pair[0])


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"format": "dcp"},
        {"format": "dcp", "dialect": "torchtitan"},
        {"dtype": "float32"},
        {"engine.transport": "collective", "format": "dcp", "dialect": "torchtitan"},
    ],
    ids=["copy", "dcp", "permuted", "cast", "collective"],
)
def test_a_conversion_stays_within_its_memory(tmp_path: Path, way: dict[str, str]) -> None:
    before, after = peak("convert", model(tmp_path / "source"), tmp_path / "target", **way)
    print(f"{way}: {before >> 20} MiB after imports, {after >> 20} MiB at the peak")
    assert after - before < MEMORY + (256 << 20)


@pytest.mark.parametrize("transport", ["direct", "collective"])
def test_an_average_of_8_stays_within_its_memory(tmp_path: Path, transport: str) -> None:
    for step in range(8):
        model(tmp_path / f"run/step-{step}")
    before, after = peak("average", tmp_path / "run", tmp_path / "target", **{"engine.transport": transport})
    print(f"average of 8, {transport}: {before >> 20} MiB after imports, {after >> 20} MiB at the peak")
    assert after - before < MEMORY + (256 << 20)


def test_a_job_that_took_more_would_be_seen(tmp_path: Path) -> None:
    before, after = peak(
        "convert", model(tmp_path / "source"), tmp_path / "no", dry_run=True, held=MEMORY + (256 << 20)
    )
    assert after - before > MEMORY + (256 << 20)


def test_a_program_that_converts_in_a_loop_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program throws away between two jobs is still found by its garbage collector."""

    class Loop:
        def __init__(self) -> None:
            self.me = self

    monkeypatch.setattr(run, "COMMAND", Event())
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    thrown = []
    gc.disable()  # when it looks by itself depends on how many objects a job makes, so it is asked to look
    try:
        for turn in range(3):
            thrown.append(weakref.ref(Loop()))
            ckpt_dist.convert(tmp_path / "w.safetensors", tmp_path / f"{turn}.pt", format="torch", quiet=True)
            gc.collect(0)  # only where new objects are, which is where it looks in time
    finally:
        gc.enable()
    assert [one() for one in thrown] == [None] * 3 and gc.get_freeze_count() <= run.FROZEN


def test_a_job_of_the_command_is_not_slowed_by_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "COMMAND", Event())
    with run._frozen():
        assert gc.get_freeze_count() <= run.FROZEN
    run.COMMAND.set()
    with run._frozen():
        assert gc.get_freeze_count() > run.FROZEN + 1000  # also where the interpreter has frozen some by itself
        with run._frozen():
            pass
        assert gc.get_freeze_count() > run.FROZEN + 1000  # who froze them lets them go
    assert gc.get_freeze_count() <= run.FROZEN
