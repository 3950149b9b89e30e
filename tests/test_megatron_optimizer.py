"""Optimizers of Megatron's runs: what megatron-core saved in each of its ways is one state, and it goes on from ours.

What it saved is kept in tests/data (tests/real/keep_megatron_optimizer.py), with the digests of what it itself calls by
weights' names. Where it is installed, it also trains on from what we made, as it does from its own.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

import ckpt_dist
from ckpt_dist.errors import CheckpointError, UsageError
from tests.conftest import ROOT, torchrun
from tests.real.keep_megatron_optimizer import ITER, SAVED, digest, job, tensors

KEPT = ROOT / "tests/data/megatron-core-0.16.1-optimizer.tar.xz"
Said = dict[str, dict[str, str]]
KEEP: dict[str, Any] = {"keep": ["weights", "optimizer"]}
COPY = {"bf16": "optimizer.state.fp32_param.", "sharded": "optimizer.state.param.", "experts": "optimizer.state.param."}
STACKED: dict[str, Any] = {"experts": {"target.dialect": "megatron_local_stacked"}}  # as its own modules call it


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    with tarfile.open(KEPT) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


@pytest.fixture(scope="module")
def said(data: Path) -> Said:
    """The digests of what megatron-core calls by weights' names, by kind of optimizer."""
    found: Said = json.loads((data / "digests.json").read_text())
    return found


def digests(folder: Path) -> dict[str, str]:
    return {n: digest(t) for n, t in tensors(folder).items()}


def optimizer(folder: Path) -> Any:
    return torch.load(folder / "common.pt", weights_only=False)["optimizer"]


@pytest.mark.parametrize("saved", SAVED)
def test_every_way_of_saving_is_the_same_state(data: Path, said: Said, tmp_path: Path, saved: str) -> None:
    kind = SAVED[saved]
    ckpt_dist.convert(data / saved, tmp_path / "out", format="torch_dist", **KEEP, **STACKED.get(kind, {}))
    assert digests(tmp_path / "out" / ITER) == said[kind]
    common = torch.load(tmp_path / "out" / ITER / "common.pt", weights_only=False)
    assert common["args"].no_save_optim is False and common["args"].no_save_rng is True
    assert common["opt_param_scheduler"]["num_steps"] == (0 if kind == "experts" else 3) and common["iteration"] == 7
    both = common["optimizer"]
    for optimizer in both.values() if kind == "experts" else [both]:
        inner = optimizer["optimizer"]
        if kind == "bf16":
            assert torch.equal(inner["state"]["common_step"], torch.tensor(3.0))
        else:
            assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
            assert optimizer["param_state_sharding_type"] == "fully_reshardable"
            assert {g["step"] for g in inner["param_groups"]} == {1.0 if kind == "experts" else 3.0}
        assert {g["wd_mult"] for g in inner["param_groups"]} <= {1.0, 0.0} and "params" not in inner["param_groups"][0]
    if kind == "experts":
        assert [o["optimizer"]["param_groups"][0]["is_expert_parallel"] for o in both.values()] == [False, True]


@pytest.mark.parametrize("saved", SAVED)
def test_master_weights(data: Path, said: Said, tmp_path: Path, saved: str) -> None:
    kind, master = SAVED[saved], {"source.weights": "master"}
    report = ckpt_dist.convert(data / saved, tmp_path / "out", format="torch_dist", **master, **STACKED.get(kind, {}))
    wanted = {n.removeprefix(COPY[kind]): d for n, d in said[kind].items() if n.startswith(COPY[kind])}
    assert digests(tmp_path / "out" / ITER) == wanted
    assert "weights: the optimizer's own copies in fp32" in report["notes"]


@pytest.fixture(scope="module")
def named(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of them with names."""
    out = tmp_path_factory.mktemp("named") / "out"
    ckpt_dist.convert(data / "sharded-tp2", out, format="torch_dist", **KEEP)
    return out


def test_stacked_layers_and_single_ones(said: Said, named: Path, tmp_path: Path) -> None:
    single: dict[str, Any] = {"target.dialect": "megatron", **KEEP}
    ckpt_dist.convert(named, tmp_path / "single", format="torch_dist", **single)
    state, stacked = tensors(tmp_path / "single" / ITER), tensors(named / ITER)
    name = "self_attention.linear_qkv.weight"
    for slot in ("", "optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        for layer in range(2):
            assert torch.equal(
                state[f"{slot}decoder.layers.{layer}.{name}"], stacked[f"{slot}decoder.layers.{name}"][layer]
            )
    assert len(state) == 4 * (3 + 2 * 6)
    ckpt_dist.convert(tmp_path / "single", tmp_path / "back", format="torch_dist", **KEEP)
    assert digests(tmp_path / "back" / ITER) == said["sharded"]
    assert optimizer(tmp_path / "back" / ITER) == optimizer(named / ITER)


def test_other_formats_and_other_names(said: Said, named: Path, tmp_path: Path) -> None:
    ckpt_dist.convert(named, tmp_path / "dcp", format="dcp", **KEEP)
    assert digests(tmp_path / "dcp") == said["sharded"]
    assert "optimizer" in FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    ckpt_dist.convert(named, tmp_path / "hf.pt", format="torch", **{"target.dialect": "hf", **KEEP})
    tree, stacked = torch.load(tmp_path / "hf.pt"), tensors(named / ITER)
    slot = "optimizer.state.exp_avg."
    fused = stacked[f"{slot}decoder.layers.mlp.linear_fc1.weight"][1]
    gate, up = (tree[f"{slot}model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), fused) and tree["optimizer"] == optimizer(named / ITER)


def test_a_weight_with_one_of_two_moments(named: Path, tmp_path: Path) -> None:
    state = tensors(named / ITER)
    del state["optimizer.state.exp_avg.decoder.final_layernorm.weight"]
    shutil.copytree(named, tmp_path / "lacks", ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "lacks" / ITER), no_dist=True)
    lost = "first 'decoder.final_layernorm.weight', 'optimizer.state' has exp_avg or exp_avg_sq only;"
    for source, count in ((tmp_path / "lacks", 1), (named, 0)):
        report = ckpt_dist.convert(source, tmp_path / f"out{count}", format="torch_dist", **KEEP)
        assert [lost in text for text in report["warnings"]] == [True] * count


def test_a_longer_vocabulary_has_moments_of_zeros(named: Path, tmp_path: Path) -> None:
    ckpt_dist.convert(named, tmp_path / "out", format="torch_dist", **{"target.vocab_size": 40, **KEEP})
    moment = tensors(tmp_path / "out" / ITER)["optimizer.state.exp_avg.output_layer.weight"]
    assert moment.shape == (40, 16) and moment[:32].any() and not moment[32:].any()


def test_a_checkpoint_without_copies(named: Path, tmp_path: Path) -> None:
    ckpt_dist.convert(named, tmp_path / "weights", format="torch_dist")
    with pytest.raises(UsageError, match=f"{ITER} holds no fp32 copies of weights"):
        ckpt_dist.convert(tmp_path / "weights", tmp_path / "no", **{"source.weights": "master"})
    report = ckpt_dist.convert(tmp_path / "weights", tmp_path / "none", format="torch_dist", **KEEP)
    assert "9 of 9 stored tensors are written" in report["notes"]


def test_odd_names_of_tensors(named: Path, tmp_path: Path) -> None:
    """Two copies of a weight are refused, and the moments of a tied copy, which is left out, are left out by name."""
    state, head, embedding = tensors(named / ITER), "output_layer.weight", "embedding.word_embeddings.weight"
    copies = {**state, f"optimizer.state.fp32_param.{head}": state[f"optimizer.state.param.{head}"]}
    tied = {n: state[n.replace(head, embedding)] for n in state}
    for folder, held in (("copies", copies), ("tied", tied)):
        shutil.copytree(named, tmp_path / folder, ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
        dcp.save(held, storage_writer=dcp.FileSystemWriter(tmp_path / folder / ITER), no_dist=True)
    with pytest.raises(CheckpointError, match="both are the copy of one weight"):
        ckpt_dist.convert(tmp_path / "copies" / ITER, tmp_path / "no", **{"source.weights": "master"})
    report = ckpt_dist.convert(tmp_path / "tied", tmp_path / "out", format="torch_dist", **KEEP)
    assert "32 of 36 stored tensors are written" in report["notes"]
    assert any(n.startswith(f"dropped, tied to {embedding}: ") and "and 1 more" in n for n in report["notes"])


@pytest.mark.parametrize("format", ["megatron", "zarr", "sfpt"])
def test_formats_that_hold_no_optimizer(named: Path, tmp_path: Path, format: str) -> None:
    with pytest.raises(UsageError, match=f"target.format={format}: no optimizer state is written in it"):
        ckpt_dist.convert(named, tmp_path / "no", format=format, **KEEP)
    assert not (tmp_path / "no").exists()


def rewritten(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    for path in folder.rglob(name):
        tree = torch.load(path, weights_only=False)
        change(tree)
        torch.save(tree, path)


def a_frozen_weight(tree: Any) -> None:
    tree["optimizer"]["optimizer"]["param_groups"][0]["params"].pop()


def two_groups_of_a_kind(tree: Any) -> None:
    inner = tree["optimizer"]["optimizer"]
    inner["param_groups"].append(inner["param_groups"][0])
    tree["optimizer"]["fp32_from_fp16_params"].append(tree["optimizer"]["fp32_from_fp16_params"][0])


def no_steps(tree: Any) -> None:
    tree["optimizer"]["optimizer"]["state"] = {}


def another_shape(tree: Any) -> None:
    tree["optimizer"]["fp32_from_fp16_params"][0][0] = torch.ones(3)


def more_than_the_model(tree: Any) -> None:
    inner = tree["optimizer"]["optimizer"]
    inner["param_groups"][0]["params"].append(0)


def another_optimizer(tree: Any) -> None:
    tree["optimizer"] = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (a_frozen_weight, "could be the next of 0 groups"),
        (two_groups_of_a_kind, "could be the next of 2 groups"),
        (no_steps, "Was it saved before a step"),
        (another_shape, r"fp32_param of .* is \[3\], the weight"),
        (more_than_the_model, "parameters of its optimizer are none of the model's"),
        (another_optimizer, "a dict .or several. is expected"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_lists_that_fit_no_model_or_too_many(
    data: Path, tmp_path: Path, change: Callable[[Any], None], says: str
) -> None:
    shutil.copytree(data / "bf16-tp2pp2", tmp_path / "it")
    rewritten(tmp_path / "it", "model_optim_rng.pt", change)
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", format="torch_dist", **KEEP)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "weights", format="torch_dist")
    assert ckpt_dist.inspect(tmp_path / "it")["optimizer"] is True


def longer(tree: Any) -> None:
    (buffer,) = tree[0].values()
    buffer["numel_unpadded"] += 3
    for slot in ("param", "exp_avg", "exp_avg_sq"):
        buffer[slot] = torch.cat([buffer[slot], torch.zeros(3)])


def not_coalesced(tree: Any) -> None:
    del tree["buckets_coalesced"]


@pytest.mark.parametrize(
    ("change", "says"),
    [(longer, "flat buffer has .* its parameters need"), (not_coalesced, "a tensor for each bucket")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_flat_tensors_that_do_not_fit(data: Path, tmp_path: Path, change: Callable[[Any], None], says: str) -> None:
    shutil.copytree(data / "sharded-tp2", tmp_path / "it")
    rewritten(tmp_path / "it", "distrib_optim.pt", change)
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", format="torch_dist", **KEEP)
    for path in (tmp_path / "it").rglob("distrib_optim.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"whose distrib_optim.pt is not beside it"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", **{"source.weights": "master"})


def test_buckets_of_another_layout(data: Path, tmp_path: Path) -> None:
    """Args that say another layout than the one that saved."""
    shutil.copytree(data / "sharded-buckets", tmp_path / "it")
    rewritten(tmp_path / "it", "common.pt", lambda tree: setattr(tree["args"], "tensor_model_parallel_size", 1))
    with pytest.raises(UsageError, match="name no weights, and cannot be told apart: buckets of"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", format="torch_dist", **KEEP)
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "out", format="torch_dist", unmatched="drop", **KEEP)
    assert any(n.startswith("dropped, state") and "gbuf_idx_0" in n for n in report["notes"])
    assert not any("optimizer" in n for n in tensors(tmp_path / "out" / ITER))
    common = torch.load(tmp_path / "out" / ITER / "common.pt", weights_only=False)
    assert common["args"].no_save_optim is True and "optimizer" not in common
    assert ckpt_dist.inspect(tmp_path / "it")["optimizer"] is True


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tensor_model_parallel_size", 3, "by args 3 tensor- and 1 expert-parallel ranks share its tensors"),
        ("virtual_pipeline_model_parallel_size", 1 << 20, "of 1048576 chunks, .*: such stages are not known"),
        ("pipeline_model_parallel_layout", "t*999999999", "pipeline_model_parallel_layout: such stages are not known"),
        ("decoder_first_pipeline_num_layers", "two", "args are damaged: decoder_first_pipeline_num_layers is 'two'"),
    ],
)
def test_buckets_of_args_that_no_run_has(data: Path, tmp_path: Path, key: str, value: Any, says: str) -> None:
    """Nothing is said of a target, which was not asked for; and a checkpoint can be looked at."""
    shutil.copytree(data / "sharded-buckets", tmp_path / "it")
    rewritten(tmp_path / "it", "common.pt", lambda tree: setattr(tree["args"], key, value))
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.convert(tmp_path / "it" / ITER, tmp_path / "no", format="torch_dist", **KEEP)
    if value != "two":
        assert ckpt_dist.inspect(tmp_path / "it" / ITER)["optimizer"] is True


def test_a_plan_by_a_saved_catalog(data: Path, tmp_path: Path) -> None:
    """Its settings are not in it, which is no fault of the checkpoint."""
    ckpt_dist.inspect(data / "sharded-buckets", save_catalog=tmp_path / "saved")
    made = [
        ckpt_dist.convert(source, tmp_path / "no", format="torch_dist", dry_run=True, **KEEP)["bytes"]
        for source in (data / "sharded-buckets", tmp_path / "saved")
    ]
    assert made[0] == made[1]


# ---- with megatron-core


LIVE = {"bf16": ("dist", "legacy", "other"), "fp32": ("legacy",), "sharded": ("dist", "legacy", "other")}
Ran = Callable[[str], Path]


def jobs(top: Path) -> list[dict[str, Any]]:
    """Each kind of optimizer trains, saves, and trains two steps on; then others do so from what we made of that."""
    found, more, made = [], [], []
    keys = {**KEEP, "target.format": "torch_dist", "quiet": True}
    for kind in LIVE:
        here, layout = top / kind, {} if kind == "sharded" else {"tp": 2}
        way, other = ("dp_reshardable", {"tp": 2}) if kind == "sharded" else (None, {})
        saves = {str(here / f"dist/{ITER}"): way}
        on = str(here / "on.json")
        found.append(job(kind, kind, layout, steps=3, dist=saves, legacy=str(here / "legacy"), losses=on))
        for source, name, where in (("dist", "dist", layout), ("legacy", "legacy", layout), ("dist", "other", other)):
            if name in LIVE[kind]:
                made.append((str(here / source), str(here / f"from_{name}"), keys))
                load, losses = str(here / f"from_{name}" / ITER), str(here / f"{name}.json")
                more.append(job(f"{kind} {name}", kind, where, load=load, losses=losses))
    more[0]["convert"] = made
    return found + more


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed")
    top = tmp_path_factory.mktemp("optimizers")
    (top / "jobs.json").write_text(json.dumps(jobs(top)))
    done = torchrun(2, "-m", "tests.real.megatron_optimizer", top / "jobs.json")
    assert done.returncode == 0, done.stderr[-20_000:]
    return lambda kind: top / kind


@pytest.mark.parametrize(("kind", "source"), [(kind, source) for kind in LIVE for source in LIVE[kind]])
def test_a_run_goes_on(ran: Ran, kind: str, source: str) -> None:
    on, again = (json.loads((ran(kind) / f"{n}.json").read_text()) for n in ("on", source))
    assert again == (on if source != "other" else pytest.approx(on, rel=2e-3))
    assert on[1] < on[0]
