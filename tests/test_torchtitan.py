"""Contract: the dialect `torchtitan` of each family is torchtitan's: its own adapter makes the same Hugging Face tensors,
bit for bit, its model loads every tensor that it has, and computes what transformers computes. Where torchtitan cannot be
imported, the names, shapes and digests that version 0.3.0 gave (tests/real/titan.py --record) are compared with.

Not checked here: Llama under torchrun (test_seed), training, layers that predict further tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt_dist
from ckpt_dist.errors import UsageError
from tests.conftest import ROOT
from tests.real.titan import CONFIGS, TOKENS, digest, filled

Tensors = dict[str, torch.Tensor]
RECORDED = json.loads((ROOT / "tests/data/torchtitan-0.3.0/names.json").read_text())


def loaded(folder: Path) -> Tensors:
    """All that a dcp folder holds."""
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {n: torch.full(m.size, float("nan")) for n, m in held.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def of_transformers(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in CONFIGS[family].items() if k != "model_type"}
    config = AutoConfig.for_model(CONFIGS[family]["model_type"], **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())


# ---- with what torchtitan 0.3.0 gave


@pytest.mark.parametrize("family", CONFIGS)
def test_names_shapes_and_places_are_those_of_torchtitan(family: str, tmp_path: Path) -> None:
    of_transformers(family).save_pretrained(tmp_path / "hf")
    stored = load_file(tmp_path / "hf/model.safetensors")
    save_file({n: filled(n, tuple(t.shape)) for n, t in stored.items()}, tmp_path / "hf/model.safetensors")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "titan", format="dcp", dialect="torchtitan", quiet=True)
    ours = loaded(tmp_path / "titan")
    assert {n: list(t.shape) for n, t in ours.items()} == {n: shape for n, (shape, _) in RECORDED[family].items()}
    told = {n: print_ for n, (_, print_) in RECORDED[family].items() if print_}
    assert {n: digest(ours[n]) for n in told} == told
    untold = {n for n in ours if n not in told}
    assert not any("attention" in n for n in untold)
    assert all(torch.equal(ours[n], torch.zeros_like(ours[n])) for n in untold if n.endswith("expert_bias_E"))


def test_the_optimizer_comes_along_where_names_stay(tmp_path: Path) -> None:
    """From torchtitan to torchtitan: torch's own converter makes the same file of both folders, all of it."""
    of_transformers("llama").save_pretrained(tmp_path / "hf")
    config = {"model.config": str(tmp_path / "hf"), "quiet": True}
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "start", recipe="hf_to_torchtitan", **config)
    weights = loaded(tmp_path / "start")
    moments = {f"state.{n}.{k}": torch.randn_like(t) for n, t in weights.items() for k in ("exp_avg", "exp_avg_sq")}
    steps = {f"state.{n}.step": torch.tensor(3.0) for n in weights}
    groups = {f"param_groups.{n}.lr": 0.5 for n in weights}
    full = {**weights, "optimizer": {**moments, **steps, **groups}, "train_state": {"step": 3}}
    dcp.save(full, checkpoint_id=tmp_path / "full", no_dist=True)
    keep = {"keep": ["weights", "optimizer", "state"], **config}
    report = ckpt_dist.convert(tmp_path / "full", tmp_path / "again", format="dcp", **keep, **{"engine.verify": True})
    assert report["fingerprint"] == ckpt_dist.fingerprint(tmp_path / "hf")
    found = []
    for folder in ("full", "again"):
        dcp_to_torch_save(tmp_path / folder, tmp_path / f"{folder}.pt")
        found.append(torch.load(tmp_path / f"{folder}.pt", weights_only=True))
    ours, theirs = ({**f.pop("optimizer"), **f} for f in reversed(found))
    assert ours.keys() == theirs.keys() and ours.pop("train_state") == theirs.pop("train_state") == {"step": 3}
    assert all(torch.equal(torch.as_tensor(ours[n]), torch.as_tensor(t)) for n, t in theirs.items())
    for more in ({"dialect": "hf"}, {"target.vocab_size": 64}):
        with pytest.raises(UsageError, match="only under the same names and shapes"):
            ckpt_dist.convert(tmp_path / "full", tmp_path / "no", format="dcp", **keep, **more)
    del full["optimizer"]["state.norm.weight.exp_avg_sq"]
    dcp.save(full, checkpoint_id=tmp_path / "lacks", no_dist=True)
    said = "weights, first 'norm.weight', 'optimizer.state' has exp_avg or exp_avg_sq only; if its optimizer keeps both"
    plan = ckpt_dist.convert(tmp_path / "lacks", tmp_path / "no", format="dcp", dry_run=True, **keep)
    assert any(said in line for line in plan["text"])
    assert any(said in note for note in ckpt_dist.inspect(tmp_path / "lacks")["notes"])
    for source, more, count in (("lacks", keep, 1), ("lacks", config, 0), ("full", keep, 0)):
        report = ckpt_dist.convert(tmp_path / source, tmp_path / f"{source}{count}", format="dcp", **more)
        assert [said in text for text in report["warnings"]] == [True] * count


def test_recipes(tmp_path: Path) -> None:
    """Meta's folder and transformers' become one start, which becomes both again; and all of a checkpoint a .pt file."""
    of_transformers("llama").save_pretrained(tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta", quiet=True)
    config = {"model.config": str(tmp_path / "hf"), "quiet": True}
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "start", recipe="hf_to_torchtitan", quiet=True)
    ckpt_dist.convert(tmp_path / "meta", tmp_path / "same", recipe="llama_to_dcp", quiet=True)
    start = loaded(tmp_path / "start")
    assert same(loaded(tmp_path / "same"), start) and "layers.0.attention.qkv_linear.wq.weight" in start
    ckpt_dist.convert(tmp_path / "start", tmp_path / "back", recipe="torchtitan_to_hf", **config)
    assert same(load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "hf/model.safetensors"))

    full = {**start, "optimizer": {"state": {"norm.weight": {"exp_avg": torch.ones(32)}}}, "train_state": {"step": 7}}
    dcp.save(full, checkpoint_id=tmp_path / "full", no_dist=True)
    ckpt_dist.convert(tmp_path / "full", tmp_path / "all", recipe="dcp_to_torch", **config)
    made = torch.load(tmp_path / "all/model.pt", weights_only=True)
    assert made.keys() == full.keys() and same({n: made[n] for n in start}, start)
    assert made["train_state"] == {"step": 7}
    assert torch.equal(made["optimizer"]["state"]["norm.weight"]["exp_avg"], torch.ones(32))


# ---- with torchtitan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    top = tmp_path_factory.mktemp("titan")
    words = [sys.executable, "-m", "tests.real.titan", str(top)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
    if done.stderr.startswith("SKIP"):
        pytest.skip(f"torchtitan cannot be imported: {done.stderr[5:].strip()}")
    assert done.returncode == 0, done.stderr[-3000:]

    def of(family: str) -> Path:
        (top / family / "config.json").write_text(json.dumps(CONFIGS[family]))
        return top / family

    return of


@pytest.mark.parametrize("family", CONFIGS)
def test_its_adapter_says_the_same_and_transformers_computes_the_same(
    family: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = made(family)
    config = {"model.config": str(folder)}
    report = ckpt_dist.convert(folder / "titan", tmp_path / "hf", format="hf", **config, quiet=True)
    ours, theirs = load_file(tmp_path / "hf/model.safetensors"), load_file(folder / "theirs.safetensors")
    logits = theirs.pop("logits")
    if family == "gpt_oss":  # its adapter still has the experts' names of before its own model renamed them
        assert not any("experts" in n for n in theirs)
        assert same({n: t for n, t in ours.items() if "experts" not in n}, theirs)
    else:
        assert same(ours, theirs)
    zeros = any("zeros in the dialect hf" in note and "expert_bias_E" in note for note in report["notes"])
    assert zeros == (family in ("qwen3_moe", "gpt_oss"))

    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_it_loads_all_that_its_model_has(family: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made(family)
    config = {"model.config": str(folder)}
    for step, format in (("there", "hf"), ("back", "dcp"), ("again", "torch")):
        source = {"there": folder / "titan", "back": tmp_path / "there", "again": tmp_path / "back"}[step]
        dialect = {} if format == "hf" else {"dialect": "torchtitan"}
        ckpt_dist.convert(source, tmp_path / step, format=format, **dialect, **config, quiet=True)
    first = loaded(folder / "titan")
    assert same(loaded(tmp_path / "back"), first)
    assert same(torch.load(tmp_path / "again/model.pt", weights_only=True), first)
    everywhere = (folder / "titan", *(tmp_path / step for step in ("there", "back", "again")))
    prints = {ckpt_dist.fingerprint(p, **config) for p in everywhere}
    assert len(prints) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_its_optimizer_goes_on(family: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """Its own container of optimizers loads what it saved, after it was converted, and has what it had."""
    folder = made(family)
    keep = {"keep": ["weights", "optimizer"], "model.config": str(folder), "quiet": True}
    ckpt_dist.convert(folder / "trained", tmp_path / "again", format="dcp", **keep)
    words = [sys.executable, "-m", "tests.real.titan", "--same", family, folder / "trained", tmp_path / "again"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 3 * len(loaded(folder / "titan"))


def test_what_only_torchtitan_has_stays_among_its_own(made: Callable[[str], Path], tmp_path: Path) -> None:
    """The balance of experts: in an average of its checkpoints it is the last one's, in no other dialect is it there."""
    folder, paths = made("qwen3_moe"), []
    for k in (1, 2):
        state = {n: t + k if "bias" in n else t for n, t in loaded(folder / "titan").items()}
        paths.append(tmp_path / f"step-{k}")
        dcp.save(state, checkpoint_id=paths[-1], no_dist=True)
    config = {"model.config": str(folder)}
    report = ckpt_dist.average(tmp_path, tmp_path / "mean", format="dcp", **config, quiet=True)
    mean = loaded(tmp_path / "mean")
    assert mean.keys() == state.keys()
    assert all(torch.equal(mean[n], state[n]) for n in mean if n.endswith("expert_bias_E"))
    assert report["fingerprint"] == ckpt_dist.fingerprint(folder / "titan", **config)


# ---- with torchtune


@pytest.mark.parametrize(("kind", "tied"), [("LLAMA3", False), ("LLAMA3_2", True)])
def test_torchtunes_checkpointer_takes_one_file(kind: str, tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {k: v for k, v in CONFIGS["llama"].items() if k not in ("model_type", "tie_word_embeddings")}
    model = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=tied)).float().eval()
    model.save_pretrained(tmp_path / "hf")
    config = {"model.config": str(tmp_path / "hf"), "quiet": True}
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "titan", recipe="hf_to_torchtitan", **config)
    ckpt_dist.convert(tmp_path / "titan", tmp_path / "all.pt", format="torch", dialect="meta", **config)
    words = ["all.pt", kind, "hf/config.json", "logits"]
    words = [str(tmp_path / w) if w != kind else w for w in words]
    done = subprocess.run([sys.executable, "-m", "tests.real.tune", *words], capture_output=True, text=True, cwd=ROOT)
    if done.stderr.startswith("SKIP") or "\nSKIP" in done.stderr:
        pytest.skip(f"torchtune cannot be imported: {done.stderr.split('SKIP')[1].strip()}")
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), model(TOKENS).logits, rtol=1e-5, atol=1e-5)
