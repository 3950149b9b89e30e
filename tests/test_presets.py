"""Contract: a preset is a config.json that ships with us. It says what torchtitan 0.3.0 builds that model with
(tests/real/flavours.py) and transformers counts the same parameters; where it does not fit the tensors it is refused.

Not checked here: the published config.json files themselves, which are not in the repository.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_dist
from ckpt_dist import cli, config, configs, initial
from tests.conftest import ROOT
from tests.real.flavours import FLAVOURS as NAMES

FLAVOURS = json.loads((ROOT / "tests/data/torchtitan-0.3.0/flavours.json").read_text())
OTHER_WORDS = {"gpt_oss": {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}}
TINY = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    rope_theta=777.0,
    rms_norm_eps=1e-3,
    max_position_embeddings=64,
)


@pytest.mark.parametrize("name", configs.presets())
def test_a_preset_says_what_torchtitan_builds(name: str) -> None:
    preset = configs.presets()[name]
    words = OTHER_WORDS.get(preset["model_type"], {})
    theirs = {words.get(k, k): v for k, v in FLAVOURS[name].items()}
    theirs.pop("norm_topk_prob", None) if words else None  # which gpt-oss always does and has no key for
    ours = {"head_dim": preset["hidden_size"] // preset["num_attention_heads"], **preset}
    assert {k: ours.get(k) for k in theirs} == theirs


def test_a_config_says_torchtitans_flavour() -> None:
    named = {name: configs.flavour(config) for name, config in configs.presets().items()}
    assert named == {preset: f"{m} {flavour}" for m, known in NAMES.items() for flavour, preset in known.items()}
    assert configs.flavour({**configs.presets()["llama3.1-8b"], "num_hidden_layers": 31}) is None
    report = ckpt_dist.seed(
        "qwen3-0.6b", "none", format="dcp", dialect="torchtitan", dtype="bfloat16", dry_run=True, quiet=True
    )
    assert "note: torchtitan builds this model as qwen3, flavour 0.6B" in report["text"]


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-0.6b", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_transformers_reads_it_and_counts_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(configs.presets()[name]))
    given = AutoConfig.from_pretrained(tmp_path)
    preset = configs.presets()[name]
    assert given.rope_parameters["rope_theta"] == preset["rope_theta"]
    assert given.rope_parameters["rope_type"] == preset.get("rope_scaling", {}).get("rope_type", "default")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(given)
    cfg = config.fill("seed", {"model.config": name, "target.path": "none"})
    entries = initial.checkpoint(cfg).catalog.entries
    assert sum(torch.Size(e.shape).numel() for e in entries) == sum(p.numel() for p in model.parameters())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model without a config, in torchtitan's names; `tiny` is its preset, others are not quite."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    ckpt_dist.seed(tmp_path / "config.json", tmp_path / "run/step-1", format="dcp", dialect="torchtitan", quiet=True)
    ckpt_dist.seed(tmp_path / "config.json", tmp_path / "hf", quiet=True)
    table = {"tiny": TINY, "deep": {**TINY, "num_hidden_layers": 3}, "wordy": {**TINY, "vocab_size": 64}}
    known = {**configs.presets(), **table}
    monkeypatch.setattr(configs, "presets", lambda: known)
    return tmp_path / "run/step-1"


def test_a_checkpoint_without_a_config_becomes_a_model(tiny: Path, tmp_path: Path) -> None:
    report = ckpt_dist.convert(tiny, tmp_path / "out", format="hf", **{"model.config": "tiny"}, quiet=True)
    written: dict[str, Any] = json.loads((tmp_path / "out/config.json").read_text())
    assert {**written, **TINY} == written
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "hf"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert any("such models were published" in guess for guess in report["guesses"])


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("deep", 3, "3 layers, the tensors have 2"),
        ("wordy", 3, "64 rows in the vocabulary, the tensors have 50"),
        ("llama3.1-8b", 3, "4096.*32|32.*4096"),
        ("gpt-oss-20b", 3, "unknown to gpt_oss"),
        ("llama3.1-8B", 2, "Did you mean 'llama3.1-8b'"),
        ("nowhere", 2, "no model that is known by name"),
    ],
)
def test_a_wrong_name_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, says: str
) -> None:
    words = [f"source.path={tiny}", f"target.path={tmp_path / 'out'}", f"model.config={name}"]
    assert cli.main("convert", words) == code
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_that_name_goes_first(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wordy").mkdir()
    (tmp_path / "wordy/config.json").write_text(json.dumps({**TINY, "rope_theta": 5.0}))
    monkeypatch.chdir(tmp_path)
    ckpt_dist.convert(tiny, tmp_path / "out", format="hf", **{"model.config": "wordy"}, quiet=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 5.0


def test_names_of_no_family_have_no_preset(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "some.safetensors")
    words = [f"source.path={tmp_path / 'some.safetensors'}", f"target.path={tmp_path / 'out'}", "model.config=tiny"]
    assert cli.main("convert", words) == 3
    assert "not those of llama" in capsys.readouterr().err
