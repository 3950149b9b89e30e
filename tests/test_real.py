"""Contract: what real training under FSDP1, FSDP2, HSDP and tensor parallelism saves becomes a Hugging Face model that is
bit-equal to what torch itself gathers, loads in transformers, and computes the same logits; and the way back loads with
`dcp.load`. Not checked here: bad input (test_bad_input), averages (test_average).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt_dist
from tests.conftest import FOUR_RANKS, ROOT, TWO_RANKS, torchrun

Real = Callable[[str], Path]
CASES = [c for c in (*FOUR_RANKS, *TWO_RANKS) if c != "steps"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", ["dcp", "ranks"])
@pytest.mark.parametrize("case", CASES)
def test_every_parallelism_becomes_what_torch_gathers(real: Real, tmp_path: Path, case: str, kind: str) -> None:
    folder = real(case)
    reference = load_file(folder / "reference.safetensors")
    if case == "tied":
        reference.pop("lm_head.weight")  # as transformers saves a tied model
    ckpt_dist.convert(folder / kind, tmp_path / "hf", **{"model.config": str(folder / "hf"), "engine.verify": True})
    same(load_file(tmp_path / "hf/model.safetensors"), reference)


@pytest.mark.parametrize("case", [c for c in CASES if c != "buffers"])
def test_transformers_loads_it_saves_the_same_file_and_computes_the_same_logits(
    real: Real, tmp_path: Path, case: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = real(case)
    out = ckpt_dist.merge(folder / "dcp", tmp_path / "hf", **{"model.config": str(folder / "hf")})
    assert (out / "model.safetensors").read_bytes() == (folder / "hf/model.safetensors").read_bytes()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    kept = torch.load(folder / "logits.pt", weights_only=True)
    with torch.no_grad():
        logits = model.float().eval()(kept["ids"]).logits
    assert torch.equal(logits, kept["logits"])


def test_it_equals_torchs_converter_and_save_pretrained(real: Real, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = real("tp_fsdp")
    dcp_to_torch_save(folder / "dcp", tmp_path / "theirs.pt")
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)["model"]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "hf"))
    model.load_state_dict(theirs)
    model.save_pretrained(tmp_path / "theirs")
    ckpt_dist.convert(folder / "dcp", tmp_path / "ours", **{"model.config": str(folder / "hf")})
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()


def test_the_legacy_rule_is_met_where_it_is_right_and_not_where_it_is_wrong(real: Real, tmp_path: Path) -> None:
    """Today's scripts concatenate all ranks on dim 0; that is right for plain FSDP2 only."""

    def legacy(folder: Path) -> dict[str, torch.Tensor]:
        import torch.distributed.tensor

        shards = [torch.load(p, weights_only=True) for p in sorted((folder / "ranks").iterdir())]
        return {k: torch.cat([s[k]._local_tensor for s in shards]) for k in shards[0]}

    for case in ("fsdp2", "hsdp", "dim1", "tp_fsdp"):
        ckpt_dist.convert(real(case) / "ranks", tmp_path / case, **{"model.config": str(real(case) / "hf")})
        ours = load_file(tmp_path / case / "model.safetensors")
        theirs = legacy(real(case))
        equal = all(theirs[k].shape == ours[k].shape and torch.equal(theirs[k], ours[k]) for k in ours)
        assert equal == (case == "fsdp2"), case
        same(ours, load_file(real(case) / "reference.safetensors"))


@pytest.mark.parametrize("version", ["2.3.1", "2.6.0"])
@pytest.mark.parametrize("kind", ["dcp", "ranks"])
def test_checkpoints_of_old_torch_versions(tmp_path: Path, version: str, kind: str) -> None:
    folder = ROOT / "tests/data" / f"torch-{version}"
    ckpt_dist.convert(folder / kind, tmp_path / "hf")
    same(load_file(tmp_path / "hf/model.safetensors"), torch.load(folder / "reference.pt", weights_only=True))


def equal_trees(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and list(map(str, sorted(a, key=str))) == list(map(str, sorted(b, key=str)))
            and all(equal_trees(a[k], b[k]) for k in a)
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal_trees, a, b))
    return bool(a == b)


@pytest.mark.parametrize("case", ["fsdp2", "tp_fsdp", "buffers"])
def test_one_pt_file_equals_dcp_to_torch_optimizer_and_all(real: Real, tmp_path: Path, case: str) -> None:
    dcp_to_torch_save(real(case) / "dcp", tmp_path / "theirs.pt")
    ckpt_dist.convert(real(case) / "dcp", tmp_path / "ours.pt", format="torch", keep=["weights", "optimizer", "state"])
    theirs, ours = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("theirs", "ours"))
    assert equal_trees(theirs, ours)
    assert zipfile.ZipFile(tmp_path / "ours.pt").testzip() is None


def test_a_training_checkpoint_survives_dcp_to_dcp_with_its_optimizer(real: Real, tmp_path: Path) -> None:
    folder = real("tp_fsdp")
    ckpt_dist.convert(folder / "dcp", tmp_path / "dcp", format="dcp", keep=["weights", "optimizer", "state"])
    for name in ("theirs", "ours"):
        dcp_to_torch_save(folder / "dcp" if name == "theirs" else tmp_path / "dcp", tmp_path / f"{name}.pt")
    theirs, ours = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("theirs", "ours"))
    assert equal_trees(theirs, ours)


def test_round_trips_are_bit_equal_and_keep_the_fingerprint(real: Real, tmp_path: Path) -> None:
    start = real("bf16") / "hf"
    config = {"model.config": str(start)}
    ways = {
        "dcp": dict(format="dcp"),
        "torch.pt": dict(format="torch"),
        "titan": dict(format="dcp", dialect="torchtitan"),
        "meta.pt": dict(format="torch", dialect="meta"),
        "bin": dict(format="hf", safetensors=False),
        "shards": dict(format="hf", max_shard_size="8KB"),
    }
    prints = {ckpt_dist.fingerprint(start)}
    for name, way in ways.items():
        ckpt_dist.convert(start, tmp_path / name, **way, **({} if "hf" in way.values() else config))
        ckpt_dist.convert(tmp_path / name, tmp_path / f"{name}-back", **config)
        assert (tmp_path / f"{name}-back/model.safetensors").read_bytes() == (
            start / "model.safetensors"
        ).read_bytes(), name
        prints.add(ckpt_dist.fingerprint(tmp_path / name, **config))
        ckpt_dist.verify(start, tmp_path / name, **config)
    assert len(prints) == 1


def test_meta_to_torchtitan_to_hf(real: Real, tmp_path: Path) -> None:
    """Meta's files, made by the reference rule for rotary rows, not by us."""
    start = real("fsdp2") / "hf"
    model = load_file(start / "model.safetensors")
    heads = {"q": 4, "k": 2}
    names = {"q": "wq", "k": "wk", "v": "wv", "o": "wo", "gate": "w1", "up": "w3", "down": "w2"}
    meta = {
        "tok_embeddings.weight": model["model.embed_tokens.weight"],
        "norm.weight": model["model.norm.weight"],
        "output.weight": model["lm_head.weight"],
    }
    for layer in range(2):
        for short, theirs in names.items():
            part, block = ("self_attn", "attention") if short in "qkvo" else ("mlp", "feed_forward")
            w = model[f"model.layers.{layer}.{part}.{short}_proj.weight"]
            if short in heads:
                w = w.view(heads[short], 2, 4, 24).transpose(1, 2).reshape(-1, 24)
            meta[f"layers.{layer}.{block}.{theirs}.weight"] = w
        meta[f"layers.{layer}.attention_norm.weight"] = model[f"model.layers.{layer}.input_layernorm.weight"]
        meta[f"layers.{layer}.ffn_norm.weight"] = model[f"model.layers.{layer}.post_attention_layernorm.weight"]
    (tmp_path / "meta").mkdir()
    torch.save(
        {k: v.contiguous() for k, v in meta.items()} | {"rope.freqs": torch.ones(4)},
        tmp_path / "meta/consolidated.00.pth",
    )
    config = {"model.config": str(start)}
    ckpt_dist.convert(tmp_path / "meta", tmp_path / "titan", format="dcp", dialect="torchtitan", **config)
    loaded = {"layers.1.attention.qkv_linear.wk.weight": torch.zeros(16, 24)}
    dcp.load(loaded, checkpoint_id=tmp_path / "titan", no_dist=True)
    assert torch.equal(loaded["layers.1.attention.qkv_linear.wk.weight"], meta["layers.1.attention.wk.weight"])
    ckpt_dist.convert(tmp_path / "titan", tmp_path / "hf", **config)
    same(load_file(tmp_path / "hf/model.safetensors"), model)


def test_what_we_write_as_dcp_loads_under_any_sharding(real: Real, tmp_path: Path) -> None:
    start = real("fsdp2") / "hf"
    ckpt_dist.convert(start, tmp_path / "dcp", format="dcp", key="model")
    done = torchrun(4, "-m", "tests.real.load", tmp_path / "dcp", start / "model.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded under 5 shardings" in done.stdout


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_rank_count_writes_the_same_bytes(real: Real, tmp_path: Path, num_ranks: int) -> None:
    folder = real("tp_fsdp")
    config = f"model.config={folder / 'hf'}"
    ckpt_dist.convert(folder / "dcp", tmp_path / "one", **{"model.config": str(folder / "hf")})
    ckpt_dist.convert(folder / "dcp", tmp_path / "one-pt/all.pt", format="torch", keep=["weights", "optimizer"])
    for target, more in (("hf", []), ("pt/all.pt", ["target.format=torch", "keep=weights,optimizer"])):
        done = torchrun(
            num_ranks,
            "jobs/convert.py",
            f"source.path={folder / 'dcp'}",
            f"target.path={tmp_path / target}",
            config,
            *more,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()
    assert (tmp_path / "pt/all.pt").read_bytes() == (tmp_path / "one-pt/all.pt").read_bytes()


def test_merge_finds_the_latest_complete_step_and_its_ema(real: Real, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    for step, case in ((9, "fsdp2"), (10, "hsdp"), (11, "dim1")):
        shutil.copytree(real(case) / "ranks", run / f"checkpoint-{step}/pytorch_model_fsdp_0")
        shutil.copytree(
            real("tied" if case == "hsdp" else case) / "ranks", run / f"checkpoint-{step}/pytorch_ema_model_fsdp_0"
        )
        shutil.copy(real(case) / "hf/config.json", run / f"checkpoint-{step}/config.json")
        (run / f"checkpoint-{step}/tokenizer.json").write_text("{}")
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-11/pytorch_model_fsdp_0/model_world_size_4_rank_2.pt").unlink()
    out = ckpt_dist.merge(run)
    assert out == run / "checkpoint-10"
    same(load_file(out / "model.safetensors"), load_file(real("hsdp") / "reference.safetensors"))
    assert (out / "tokenizer.json").exists() and json.loads((out / "config.json").read_text())["model_type"] == "llama"
    ema = ckpt_dist.merge(run / "checkpoint-9", tmp_path / "ema", weights="ema")
    same(load_file(ema / "model.safetensors"), load_file(real("fsdp2") / "reference.safetensors"))
    assert (ema / "tokenizer.json").exists()
