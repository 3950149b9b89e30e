"""Contract: everything that torch, safetensors and transformers write in the formats we know is read bit for bit, and what
we write is read by them. Real training is in test_real, damaged files in test_bad_input.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt_dist
from ckpt_dist.errors import CheckpointError, UsageError
from tests.test_real import equal_trees, same


def state() -> dict[str, torch.Tensor]:
    """Every kind of tensor: wide and narrow, scalar, empty, strided, integer, boolean, complex."""
    generator = torch.Generator().manual_seed(5)
    rand = torch.randn(6, 5, generator=generator)
    return {
        "a.weight": rand,
        "a.bf16": rand.bfloat16(),
        "a.half": rand.half(),
        "a.double": rand.double(),
        "b.transposed": torch.randn(5, 7, generator=generator).t(),
        "b.slice": torch.randn(8, 8, generator=generator)[2:5, 1:7],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(5),
        "short": torch.arange(5, dtype=torch.int16),
        "byte": torch.arange(5, dtype=torch.uint8),
        "mask": torch.tensor([True, False, True]),
        "wave": torch.complex(rand, rand),
        "fp8": rand.to(torch.float8_e4m3fn),
        "fp8b": rand.to(torch.float8_e5m2),
        "unsigned": torch.arange(4).to(torch.uint16),
    }


def close(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    got = load_file(folder / "model.safetensors")
    assert sorted(got) == sorted(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert torch.equal(
            got[name].contiguous().view(-1).view(torch.uint8), value.contiguous().view(-1).view(torch.uint8)
        ), name


WRITERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three files": dict(thread_count=3),
    "a file per item": dict(single_file_per_rank=False),
}


@pytest.mark.parametrize("writer", list(WRITERS))
@pytest.mark.parametrize("nested", [True, False])
def test_dcp_of_every_kind_of_tensor(tmp_path: Path, writer: str, nested: bool) -> None:
    saved = {"model": state()} if nested else state()
    dcp.save(saved, storage_writer=FileSystemWriter(tmp_path / "dcp", **WRITERS[writer]), no_dist=True)
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "hf")
    close(tmp_path / "hf", state())


def test_dcp_serialised_as_safetensors(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    saved = {k: v.contiguous() for k, v in state().items()}
    dcp.save(
        saved,
        storage_writer=FileSystemWriter(tmp_path / "dcp", serialization_format=SerializationFormat.SAFETENSORS),
        no_dist=True,
    )
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "hf")
    close(tmp_path / "hf", state())


def test_nested_containers_and_values_that_are_no_tensors(tmp_path: Path) -> None:
    saved = {
        "model": {k: v for k, v in state().items() if k != "b.transposed"},
        "optim": {
            "state": [{"m": torch.ones(3)}, {"m": torch.zeros(2)}],
            "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": ["a"]}],
        },
        "train_state": {
            "step": 7,
            "name": "x",
            "none": None,
            "flag": True,
            "list": [1, 2, {"a": 3}],
            "text": "ä" * 300,
        },
    }
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    keep = ["weights", "optimizer", "state"]
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "theirs.pt")
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "ours.pt", format="torch", keep=keep)
    assert equal_trees(torch.load(tmp_path / "ours.pt", weights_only=True), theirs)
    ckpt_dist.convert(tmp_path / "ours.pt", tmp_path / "dcp2", format="dcp", keep=keep)
    dcp_to_torch_save(tmp_path / "dcp2", tmp_path / "again.pt")
    assert equal_trees(torch.load(tmp_path / "again.pt", weights_only=True), theirs)
    facts = ckpt_dist.inspect(tmp_path / "dcp")
    assert facts["optimizer"] and "train_state.step" in facts["extras"]


def test_ranks_that_saved_without_collectives(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(12.0).view(3, 4)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp/.metadata").rename(tmp_path / "dcp/__0.metadata")
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "hf")
    close(tmp_path / "hf", {"w": torch.arange(12.0).view(3, 4)})


@pytest.mark.parametrize("wrapped", [False, True])
def test_pt_files_plain_and_nested(tmp_path: Path, wrapped: bool) -> None:
    shared = torch.arange(24.0).view(4, 6)
    tensors = {**state(), "view": shared[1:3, ::2], "same": shared}
    torch.save({"model": tensors, "epoch": 3} if wrapped else tensors, tmp_path / "model.pt")
    ckpt_dist.convert(tmp_path / "model.pt", tmp_path / "hf")
    close(tmp_path / "hf", tensors)
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "back.pt", format="torch", key="model" if wrapped else "auto")
    back = torch.load(tmp_path / "back.pt", weights_only=True, mmap=True)
    for name, value in (back["model"] if wrapped else back).items():
        assert torch.equal(
            value.contiguous().view(-1).view(torch.uint8), tensors[name].contiguous().view(-1).view(torch.uint8)
        ), name


def test_hf_shards_and_index_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from tests.real.train import model

    m = model()
    m.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "one")
    same(load_file(tmp_path / "one/model.safetensors"), {k: v for k, v in m.state_dict().items()})
    for more in ({"max_shard_size": "20KB"}, {"safetensors": False}, {"safetensors": False, "max_shard_size": "20KB"}):
        out = tmp_path / "-".join(map(str, more.values()))
        ckpt_dist.convert(tmp_path / "one", out, **more)
        loaded, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        same(dict(loaded.state_dict()), dict(m.state_dict()))
        ckpt_dist.verify(out, tmp_path / "hf")
    index = json.loads((tmp_path / "20KB/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in m.state_dict().values())
    assert max(p.stat().st_size for p in (tmp_path / "20KB").glob("*.safetensors")) < 22_000


def test_hf_shards_as_torchs_distributed_writer_leaves_them(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    tensors = {"w": torch.randn(6, 4), "b": torch.randn(3)}
    dcp.save(
        tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "hf"), save_distributed=True), no_dist=True
    )
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "one")
    close(tmp_path / "one", tensors)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "tied"])
def test_relatives_of_llama_are_recognised_and_go_through_other_formats(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    sizes = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
    )
    config = {
        "qwen2": lambda: Qwen2Config(**sizes),
        "qwen3": lambda: Qwen3Config(**sizes, head_dim=8),
        "mistral": lambda: MistralConfig(**sizes),
        "tied": lambda: LlamaConfig(**sizes, tie_word_embeddings=True),
    }[kind]()
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    m = AutoModelForCausalLM.from_config(config)
    m.save_pretrained(tmp_path / "hf")
    facts = ckpt_dist.inspect(tmp_path / "hf")
    assert (facts["family"], facts["dialect"]) == ("qwen3" if kind == "qwen3" else "llama", "hf") and facts[
        "parameters"
    ] == sum(p.numel() for p in m.parameters())
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "dcp", format="dcp")
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "back", **{"model.config": str(tmp_path / "hf")})
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_tied_head_is_written_where_the_target_stores_both(tmp_path: Path) -> None:
    from tests.real.train import model

    model(tied=True).save_pretrained(tmp_path / "hf")
    config = {"model.config": str(tmp_path / "hf")}
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta.pt", format="torch", dialect="meta")
    meta = torch.load(tmp_path / "meta.pt", weights_only=True)
    assert torch.equal(meta["output.weight"], meta["tok_embeddings.weight"])
    ckpt_dist.convert(tmp_path / "meta.pt", tmp_path / "back", **config)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    assert ckpt_dist.fingerprint(tmp_path / "meta.pt", **config) == ckpt_dist.fingerprint(tmp_path / "hf")
    meta["output.weight"][0, 0] += 1
    torch.save(meta, tmp_path / "untied.pt")
    done = ckpt_dist.convert(tmp_path / "untied.pt", tmp_path / "untied", **config)
    assert any("differ although" in w for w in done["warnings"])
    assert json.loads((tmp_path / "untied/config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "untied/model.safetensors")


def test_dtypes_by_rule(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(4, 4),
        "norm.weight": torch.randn(4),
        "mlp.gate.weight": torch.randn(2, 4).bfloat16(),
        "ids": torch.arange(3),
    }
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    ckpt_dist.convert(
        tmp_path / "hf", tmp_path / "out", dtype={"default": "bfloat16", "*norm*": "float32", "*gate*": "float32"}
    )
    got = load_file(tmp_path / "out/model.safetensors")
    assert {k: v.dtype for k, v in got.items()} == {
        "a.weight": torch.bfloat16, "norm.weight": torch.float32, "mlp.gate.weight": torch.float32, "ids": torch.int64,
    }  # fmt: skip
    assert torch.equal(got["a.weight"], tensors["a.weight"].bfloat16()) and torch.equal(
        got["mlp.gate.weight"], tensors["mlp.gate.weight"].float()
    )


def test_files_that_travel_along(tmp_path: Path) -> None:
    from tests.real.train import model

    model().save_pretrained(tmp_path / "hf")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "special_tokens_map.json",
    ):
        (tmp_path / f"hf/{name}").write_text(name)
    (tmp_path / "hf/notes.txt").write_text("not mine")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "dcp", format="dcp")
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "out", dtype="bfloat16", **{"model.config": str(tmp_path / "hf")})
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
    } <= names
    assert "notes.txt" not in names and json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


PUBLISHED = (  # beside the weights of models on the hub
    *("tekken.json", "qwen.tiktoken", "tiktoken.model", "source.spm", "additional_chat_templates/tool_use.jinja"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    *("modeling_own.py", "attention.py", "vocab.json", "video_preprocessor_config.json"),
)


def test_a_step_is_found_beside_the_last_model_and_no_other_is_taken_for_it(tmp_path: Path) -> None:
    """As transformers' Trainer leaves them: the steps lie in the folder of the last model."""
    for number, folder in enumerate(("run", "run/checkpoint-500", "run/checkpoint-1000")):
        (tmp_path / folder).mkdir()
        save_file({"w": torch.full((3,), float(number))}, tmp_path / folder / "model.safetensors")

    def found(path: str, step: Any) -> float:
        ckpt_dist.convert(tmp_path / path, tmp_path / "out.pt", format="torch", overwrite=True, **{"source.step": step})
        return float(torch.load(tmp_path / "out.pt")["w"][0])

    assert [found("run", step) for step in ("latest", 500, 1000)] == [0, 1, 2]
    assert found("run/checkpoint-500", 500) == 1
    for path, said in (("run", "of no step"), ("run/checkpoint-500", "of step 500"), ("out.pt", "of no step")):
        with pytest.raises(UsageError, match=f"source.step=20: .*{path} is one checkpoint, {said}"):
            ckpt_dist.inspect(tmp_path / path, **{"source.step": 20})
    with pytest.raises(CheckpointError, match=r"out\.pt is one of format torch, not hf"):
        ckpt_dist.inspect(tmp_path / "out.pt", **{"source.format": "hf"})


def test_files_of_a_snapshot_in_a_hub_cache(tmp_path: Path) -> None:
    """The cache of huggingface_hub has links to blobs. Code of a model's own may import any module beside it."""
    from tests.real.train import model

    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123abcd"
    model().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Own"}}))
    for name in (*PUBLISHED, "README.md", "consolidated.safetensors"):
        (tmp_path / "hf" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hf" / name).write_text(name)
    blobs.mkdir(parents=True)
    for k, path in enumerate(sorted(p for p in (tmp_path / "hf").rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(tmp_path / "hf")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path.rename(blobs / f"{k:040x}"), link.parent))
    report = ckpt_dist.convert(snapshot, tmp_path / "out", quiet=True)
    for name in (*PUBLISHED, "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (snapshot / name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()
    assert "beside the model and not carried: README.md, consolidated.safetensors" in report["notes"]
    assert not any("links lead" in text for text in report["warnings"])
    (tmp_path / "secret").write_text("mine")
    (snapshot / "vocab.json").unlink()
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret")
    report = ckpt_dist.convert(snapshot, tmp_path / "led", quiet=True)
    assert f"vocab.json: carried from where links lead, first from {tmp_path / 'secret'}" in report["warnings"]
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps(config))
    report = ckpt_dist.convert(snapshot, tmp_path / "plain", quiet=True)
    assert (tmp_path / "plain/modeling_own.py").exists() and not (tmp_path / "plain/attention.py").exists()
    assert "beside the model and not carried: README.md, attention.py, consolidated.safetensors" in report["notes"]


def test_values_of_foreign_classes_are_listed_and_left_out(tmp_path: Path) -> None:
    import argparse

    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1), "step": 4}, tmp_path / "model.pt")
    done = ckpt_dist.convert(tmp_path / "model.pt", tmp_path / "out.pt", format="torch", keep=["weights", "state"])
    assert any("dropped, of a class that is not written: args" in n for n in done["notes"])
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert got["step"] == 4 and torch.equal(got["model"]["w"], torch.ones(2)) and "args" not in got


def test_several_models_in_one_file_stay_where_they_are(tmp_path: Path) -> None:
    """Of an unknown model; what a script calls its optimizers does not matter, and what is no tensor is state."""
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}
    slots = {"exp_avg": torch.randn(4), "step": torch.tensor(3.0)}
    opt_g = {"state": {0: slots}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    state = {"model": weights, "ema": {k: v + 1 for k, v in weights.items()}, "loss": torch.tensor(0.5)}
    state |= {"opt_g": opt_g, "optimizer_states": [opt_g], "sched": {"last_epoch": 7}, "cfg": {"lr": [0.1, 0.2]}}
    torch.save(state, tmp_path / "run.pt")
    ckpt_dist.convert(tmp_path / "run.pt", tmp_path / "weights.pt", format="torch", quiet=True)
    found = torch.load(tmp_path / "weights.pt")
    assert {k: v if k == "loss" else sorted(v) for k, v in found.items()} == {
        "model": sorted(weights), "ema": sorted(weights), "loss": state["loss"]
    }  # fmt: skip
    assert found["ema"]["a.bias"].equal(state["ema"]["a.bias"])
    whole = ["weights", "optimizer", "state"]
    ckpt_dist.convert(tmp_path / "run.pt", tmp_path / "all.pt", format="torch", keep=whole, quiet=True)
    kept = torch.load(tmp_path / "all.pt")
    assert kept["optimizer_states"][0]["state"][0]["exp_avg"].equal(slots["exp_avg"])
    assert kept["opt_g"]["param_groups"] == opt_g["param_groups"] and kept["cfg"] == state["cfg"]
    ckpt_dist.convert(tmp_path / "run.pt", tmp_path / "dcp", format="dcp", keep=whole, quiet=True)
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "again.pt", format="torch", keep=whole, quiet=True)
    again = torch.load(tmp_path / "again.pt")
    assert again["cfg"] == state["cfg"] and again["sched"] == state["sched"]
    assert again["opt_g"]["param_groups"] == opt_g["param_groups"]
    assert again["optimizer_states"][0]["state"]["0"]["exp_avg"].equal(slots["exp_avg"])  # DCP's keys are texts
    assert again["ema"]["a.weight"].equal(state["ema"]["a.weight"])
    assert ckpt_dist.inspect(tmp_path / "run.pt")["optimizer"]


def test_what_torchtitan_would_compute_otherwise_is_said(tmp_path: Path) -> None:
    """Names of Llama do not make it one: torchtitan has no multipliers, and no norms around 0."""
    from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    for config, said in ((LlamaConfig, False), (GraniteConfig, True)):
        source = tmp_path / config.model_type
        AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(source)
        report = ckpt_dist.convert(source, tmp_path / f"out-{said}", format="dcp", dialect="torchtitan", quiet=True)
        assert any("does not compute" in w and "'granite'" in w for w in report["warnings"]) is said


def test_a_file_per_tensor_of_an_unknown_model_is_recognised(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.randn(3, 2), "scale": torch.randn(3)}, tmp_path / "all.pt")
    ckpt_dist.convert(tmp_path / "all.pt", tmp_path / "single", format="sfpt")
    assert ckpt_dist.inspect(tmp_path / "single")["format"] == "sfpt"
    assert ckpt_dist.verify(tmp_path / "all.pt", tmp_path / "single")["bit_equal"]
    torch.save({"other": torch.randn(3)}, tmp_path / "single/features.0.weight.pt")
    with pytest.raises(CheckpointError, match="No checkpoint recognised"):
        ckpt_dist.inspect(tmp_path / "single")


@pytest.mark.parametrize(
    ("format", "name", "said"),
    [("zarr", "a/b", "'a/b' is no name of a folder"), ("merak", "features.2.weight", "lacks layer 1")],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, format: str, name: str, said: str) -> None:
    torch.save({"features.0.weight": torch.ones(2, 2), name: torch.ones(3)}, tmp_path / "all.pt")
    with pytest.raises(UsageError, match=said):
        ckpt_dist.convert(tmp_path / "all.pt", tmp_path / "out", format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["all.pt"]
