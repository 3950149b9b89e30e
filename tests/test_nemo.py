"""Contract: NeMo's checkpoints are found by their folder, by what is in it and by the folder of the run; they are the
models that they were made of; and averages are what NeMo's scripts are meant to make, without their faults.

Every file is written by torch, under the names and keys that NeMo gives it. Not checked here: zarr (test_zarr.py).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import types
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf

import ckpt_dist
from ckpt_dist import nemo
from ckpt_dist.cli import main
from ckpt_dist.engine import staging
from ckpt_dist.errors import CheckpointError, UsageError
from tests.test_megatron import OLDER, rank_files, transformer

NAME = "megatron_gpt--val_loss=2.35-step={}-consumed_samples={}.0"
NAME2 = "default--reduced_train_loss=0.0112-epoch=2-step={}"
SETTINGS = dict(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    normalization="rmsnorm", activation="fast-swiglu", layernorm_epsilon=1e-6, max_position_embeddings=64, bias=False,
    share_embeddings_and_output_weights=False, rotary_base=10000.0, init_method_std=0.3,
)  # fmt: skip
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    transformer("llama", folder)
    return folder


@pytest.fixture(scope="module")
def stacked(llama: Path) -> State:
    """The model as Megatron's distributed checkpoints have it."""
    file = llama.parent / "stacked.pt"
    ckpt_dist.convert(llama, file, format="torch", dialect="megatron_stacked", quiet=True)
    found: State = torch.load(file)
    return found


def lightning(step: int, **more: Any) -> dict[str, Any]:
    """What a trainer puts around a model; settings are of classes that only the framework has."""
    told = OmegaConf.create({"cfg": SETTINGS, "list": [1, {"a": None}], "text": "${cfg.num_layers}"})
    return {"state_dict": {}, "epoch": 0, "global_step": step, "pytorch-lightning_version": "2.0.7", "loops": {}} | {
        "hyper_parameters": told, "optimizer_states": [{"state": {0: {"step": 1}}}], "lr_schedulers": [{}]
    } | more  # fmt: skip


def distributed(folder: Path, state: State, step: int, key: str) -> Path:
    """A distributed checkpoint as megatron-core leaves it for NeMo."""
    keyed: dict[str, Any] = {f"{key}.{name}": tensor for name, tensor in state.items()}
    keyed |= {f"optimizer.state.exp_avg.{key}.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    keyed[f"{key}.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"] = [f"state of step {step}"]
    dcp.save(keyed, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save(lightning(step), folder / "common.pt")
    return folder


def nemo2(run: Path, state: State, step: int) -> Path:
    folder = run / NAME2.format(step)
    distributed(folder / "weights", state, step, "module")
    context = folder / "context"
    (context / "nemo_tokenizer").mkdir(parents=True)
    (context / "io.json").write_text("{}")
    (context / "nemo_tokenizer/tokenizer.json").write_text('{"version": "1.0"}')
    told = {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel",
        "config": {"_target_": "x.LlamaConfig", **SETTINGS},
    }
    (context / "model.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(told)))
    return folder


def class_of_lightning() -> type[dict[str, Any]]:
    """The class that Lightning keeps hyper-parameters in, as far as a pickle knows it."""
    name = "lightning_fabric.utilities.data"
    made = type("AttributeDict", (dict,), {"__module__": name})
    for k in range(1, 4):
        sys.modules.setdefault(".".join(name.split(".")[:k]), types.ModuleType(name))
    sys.modules[name].AttributeDict = made  # type: ignore[attr-defined]
    return made


def nearby(state: State, step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    return {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def mean(states: list[State]) -> State:
    return {n: torch.stack([s[n].double() for s in states]).mean(0).to(t.dtype) for n, t in states[0].items()}


def loaded(folder: Path, names: list[str], like: State, key: str) -> State:
    """What torch itself reads of a distributed checkpoint."""
    state = {f"{key}.{n}": torch.zeros_like(like[n]) for n in names}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {n.removeprefix(key + "."): t for n, t in state.items()}


def close(found: State, wanted: State) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.allclose(found[name], value, rtol=2e-7, atol=1e-8), name


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---- distributed checkpoints


def test_a_checkpoint_of_nemo_2_is_found_by_any_of_its_folders(llama: Path, stacked: State, tmp_path: Path) -> None:
    folder, wanted = nemo2(tmp_path / "run", stacked, 10), ckpt_dist.fingerprint(llama)
    for path in (folder, folder / "weights", tmp_path / "run"):
        assert ckpt_dist.fingerprint(path) == wanted and ckpt_dist.inspect(path)["step"] == 10
    (tmp_path / "run" / (NAME2.format(12) + "-last")).mkdir()
    found = ckpt_dist.inspect(tmp_path / "run")
    assert found["step"] == 10 and any("step=12-last is passed over" in n for n in found["notes"])
    ckpt_dist.convert(tmp_path / "run", tmp_path / "back", quiet=True)
    config, first = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "back", llama))
    same = (
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
        "model_type",
        "head_dim",
    )
    assert {k: config[k] for k in same} == {k: first[k] for k in same}


def test_a_checkpoint_of_nemo_1_has_its_settings_in_the_run(llama: Path, stacked: State, tmp_path: Path) -> None:
    folder = tmp_path / "version_0/checkpoints" / NAME.format(10, 80)
    distributed(folder, stacked, 10, "model")
    (tmp_path / "version_0/hparams.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"cfg": SETTINGS})))
    for path in (folder, folder.parent):
        assert ckpt_dist.fingerprint(path) == ckpt_dist.fingerprint(llama)
    (tmp_path / "version_0/hparams.yaml").write_text("cfg: !!python/object/apply:os.system [exit 1]")
    assert ckpt_dist.inspect(folder)["sizes"].get("g") is None  # not plain, so it says nothing; nothing was run
    assert ckpt_dist.fingerprint(folder, **{"model.config": str(llama)}) == ckpt_dist.fingerprint(llama)


@pytest.mark.parametrize(("key", "place"), [("module", "weights"), ("model", "")])
@pytest.mark.parametrize("format", ["torch_dist", "zarr"])
def test_a_model_becomes_a_checkpoint_for_nemo(llama: Path, tmp_path: Path, key: str, place: str, format: str) -> None:
    ckpt_dist.convert(llama, tmp_path / "made", format=format, quiet=True, **{"target.key": key})
    folder = tmp_path / "made" / place
    common = torch.load(folder / "common.pt")
    assert common["state_dict"] == {} and "args" not in common
    assert ckpt_dist.fingerprint(tmp_path / "made", **{"model.config": str(llama)}) == ckpt_dist.fingerprint(llama)
    assert not (tmp_path / "made/latest_checkpointed_iteration.txt").exists()
    if format == "torch_dist":
        names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        assert f"{key}.decoder.layers.mlp.linear_fc1._extra_state/shard_3_4" in names
        assert all(n.startswith(f"{key}.") for n in names)


def run_of(top: Path, stacked: State, make: Callable[[Path, State, int], Path]) -> dict[int, State]:
    """Steps 10, 20, 30, a copy of the last, a save that did not end, and what else lies in such a folder."""
    states = {step: nearby(stacked, step) for step in (30, 10, 20)}  # not in the order of their numbers
    for step, state in states.items():
        last = make(top, state, step)
    make(top, nearby(stacked, 3), 40)
    (top / (NAME2.format(40) + "-unfinished")).write_text("")
    shutil.copytree(top / NAME2.format(30), top / (NAME2.format(30) + "-last"))
    (top / "notes.txt").write_text("of a person")
    assert last.exists()
    return states


def test_the_command_of_the_readme_averages_steps_of_nemo_2(stacked: State, tmp_path: Path) -> None:
    run = tmp_path / "run"
    states = run_of(run, stacked, nemo2)
    assert main("average", ["recipe=nemo_average", "name=gpt", f"source.path={run}", "steps=10,30", "quiet=true"]) == 0
    made, last = run / "gpt-10_30-averaged", run / NAME2.format(30)
    close(loaded(made / "weights", list(stacked), stacked, "module"), mean([states[10], states[30]]))
    for part in ("weights/common.pt", *(f"context/{n}" for n in files(last / "context"))):
        assert (made / part).read_bytes() == (last / part).read_bytes()
    names = dcp.FileSystemReader(made / "weights").read_metadata().state_dict_metadata
    assert not any(n.startswith("optimizer") for n in names)
    kept = {"module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4": io.BytesIO()}
    dcp.load(kept, checkpoint_id=made / "weights", no_dist=True)
    assert kept["module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"] == ["state of step 30"]

    assert main("average", ["recipe=nemo_average", "name=gpt", f"source.path={run}", "quiet=true"]) == 0
    said = json.loads((run / "gpt-averaged/ckpt_dist.json").read_text())["report"]["notes"]
    assert [n for n in said if n.startswith("step ")] == [f"step {s}: weight 0.333333" for s in (10, 20, 30)]
    close(
        loaded(run / "gpt-averaged/weights", list(stacked), stacked, "module"), mean([states[s] for s in (10, 20, 30)])
    )


@pytest.mark.parametrize("format", ["torch_dist", "zarr"])
@pytest.mark.parametrize("keys", [{"recipe": "nemo_average"}, {"target.format": "same"}], ids=["recipe", "same"])
def test_an_average_of_what_was_made_for_nemo_is_for_nemo(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, keys: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    for step in (10, 20):
        ckpt_dist.convert(llama, run / f"gpt-step={step}", format=format, quiet=True, **{"target.key": "module"})
    monkeypatch.chdir(run)
    ckpt_dist.average(".", quiet=True, **keys)
    made = (run if "recipe" in keys else tmp_path) / "run-averaged"
    assert files(made / "weights") == files(run / "gpt-step=20/weights")
    config = {"model.config": str(llama)}
    assert ckpt_dist.fingerprint(made, **config) == ckpt_dist.fingerprint(llama)
    if format == "torch_dist":
        names = [
            dcp.FileSystemReader(f / "weights").read_metadata().state_dict_metadata for f in (made, run / "gpt-step=20")
        ]
        assert set(names[0]) == set(names[1])


@pytest.mark.parametrize(
    ("steps", "says"), [([10, 25], "no step 25"), ([1, 10], "no step 1"), ([10, 40], "step 40.*unfinished")]
)
def test_a_step_that_is_not_there_is_refused(stacked: State, tmp_path: Path, steps: list[int], says: str) -> None:
    run_of(tmp_path, stacked, nemo2)
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.average(tmp_path, recipe="nemo_average", name="gpt", steps=steps, quiet=True)
    assert not list(tmp_path.glob("gpt*"))


def test_megatron_reads_the_average(stacked: State, tmp_path: Path) -> None:
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed")
    states = [nearby(stacked, s) for s in (1, 2)]
    for step, state in enumerate(states):
        nemo2(tmp_path, state, step + 1)
    ckpt_dist.average(tmp_path, recipe="nemo_average", name="gpt", quiet=True)
    command = [
        sys.executable,
        "-m",
        "tests.real.plain_tensors",
        str(tmp_path / "gpt-averaged/weights"),
        str(tmp_path / "out.pt"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # as NeMo loads its common.pt
    subprocess.run(command, check=True, env=env, timeout=240)
    found = {n.removeprefix("module."): t for n, t in torch.load(tmp_path / "out.pt").items()}
    close({n: found[n] for n in stacked}, mean(states))


def test_settings_of_both_tools_become_args() -> None:
    one = nemo.settings({"cfg": {**SETTINGS, "encoder_seq_length": 64, "scale_positional_embedding": True}})
    two = nemo.settings({"config": {**SETTINGS, "seq_length": 64, "scale_factor": 32.0, "old_context_len": 8192}})
    assert one["normalization"] == two["normalization"] == "RMSNorm" and one["swiglu"] and one["norm_epsilon"] == 1e-6
    assert one["untie_embeddings_and_output_weights"] is True and one["seq_length"] == 64
    assert one["use_rope_scaling"] and two["use_rope_scaling"] and two["rope_scaling_factor"] == 32.0
    strange = nemo.settings({"config": {**SETTINGS, "scale_factor": 4.0, "low_freq_factor": 2}})
    assert strange["scale_factor"] == 4.0 and "use_rope_scaling" not in strange  # stays, and is said to be lost
    assert nemo.settings({"cfg": {"sample_rate": 16000}}) == nemo.settings({"cfg": [1]}) == nemo.settings({}) == {}


FUNCTION = {"_target_": "torch.nn.functional.silu", "_call_": False}
BRIDGE = dict(  # of a run_config.yaml that Megatron Bridge 0.1 wrote of Llama 3.2, but for the sizes
    _target_="megatron.bridge.models.llama.llama_provider.Llama31ModelProvider", activation_func=FUNCTION,
    add_bias_linear=False, add_qkv_bias=False, ffn_hidden_size=48, gated_linear_unit=True, hidden_size=32,
    high_freq_factor=4.0, init_method_std=0.3, kv_channels=8, layernorm_epsilon=1e-6, layernorm_zero_centered_gamma=False,
    low_freq_factor=1.0, moe_layer_freq=1, moe_router_topk=2, normalization="RMSNorm", num_attention_heads=4, num_layers=4,
    num_moe_experts=None, num_query_groups=2, old_context_len=8192, position_embedding_type="rope", qk_layernorm=False,
    recompute_modules=["core_attn"], rotary_base=500000.0, rotary_interleaved=False, rotary_percent=1.0, scale_factor=32.0,
    seq_length=131072, share_embeddings_and_output_weights=False, vocab_size=64, window_size=None,
)  # fmt: skip
ROPE = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192, rope_theta=500000.0)  # fmt: skip
READ = (  # what `load_args_from_checkpoint` of Megatron-LM takes over of a dense model, where it is there
    "num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "num_query_groups",
    "group_query_attention", "kv_channels", "max_position_embeddings", "position_embedding_type", "add_position_embedding",
    "rotary_base", "rotary_percent", "rotary_interleaved", "add_bias_linear", "add_qkv_bias", "swiglu",
    "untie_embeddings_and_output_weights", "normalization", "padded_vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("tool", ["bridge", "nemo 2"])
def test_megatron_is_told_of_other_tools_models_what_it_is_told_of_hugging_faces(
    llama: Path, stacked: State, tmp_path: Path, tool: str
) -> None:
    from transformers import AutoConfig

    shutil.copytree(llama, tmp_path / "hf")
    config = json.loads((llama / "config.json").read_text())
    config |= dict(max_position_embeddings=131072, rope_parameters=ROPE)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    if tool == "bridge":
        folder = tmp_path / "run/iter_0000003"
        distributed(folder, stacked, 3, "module")
        torch.save({"iteration": 3, "content_metadata": {}}, folder / "common.pt")
        (folder / "run_config.yaml").write_text(OmegaConf.to_yaml({"model": BRIDGE, "train": {"train_iters": 3}}))
    else:
        folder = nemo2(tmp_path / "run", stacked, 3)
        (folder / "context/model.yaml").write_text(OmegaConf.to_yaml({"config": BRIDGE}))
    assert ckpt_dist.convert(folder, tmp_path / "back")["warnings"] == []
    theirs, ours = (AutoConfig.from_pretrained(tmp_path / p) for p in ("hf", "back"))
    for key in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "num_key_value_heads", "head_dim"):
        assert getattr(ours, key) == getattr(theirs, key), key
    told = []
    for name, source in (("one", tmp_path / "hf"), ("two", folder)):
        ckpt_dist.convert(source, tmp_path / name, format="megatron", **{"target.tp": 2})
        told.append(vars(torch.load(rank_files(tmp_path / name)[0], weights_only=False)["args"]))
    assert {k: told[1].get(k) for k in READ} == {k: told[0].get(k) for k in READ}
    assert told[1]["use_rope_scaling"] and told[1]["rope_scaling_factor"] == 32.0


def test_settings_with_lists_and_functions() -> None:
    def words(**more: Any) -> dict[str, Any]:
        return nemo.settings({"config": {**BRIDGE, **more}})

    assert words(moe_layer_freq=[0, 1, 1, 1])["moe_layer_freq"] == [0, 1, 1, 1]
    assert words(window_size=[4096, 0])["window_size"] == [4096, 0]
    assert words()["swiglu"] and not words()["squared_relu"]
    square = words(activation_func={"_target_": "megatron.core.activations.squared_relu"}, gated_linear_unit=False)
    assert square["squared_relu"] and not square["swiglu"]
    assert words(activation_func={"_target_": "torch.nn.functional.gelu"})["activation"] == "gelu"  # gated, no swiglu
    assert words(layernorm_zero_centered_gamma=True)["apply_layernorm_1p"] is True
    assert words(max_position_embeddings="${.encoder_seq_length}")["max_position_embeddings"] == 131072


def test_which_layers_have_no_experts_is_seen(tmp_path: Path) -> None:
    """Settings of NeMo may not say it, and a config.json that says another number makes transformers draw weights."""
    from transformers import AutoConfig

    transformer("deepseek_v3", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="torch_dist")
    one = next((tmp_path / "it").rglob("common.pt"))
    common = torch.load(one, weights_only=False)
    del common["args"].moe_layer_freq
    torch.save(common, one)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert AutoConfig.from_pretrained(tmp_path / "back").first_k_dense_replace == 1
    ckpt_dist.convert(tmp_path / "it", tmp_path / "files", format="megatron")
    args = torch.load(rank_files(tmp_path / "files")[0], weights_only=False)["args"]
    assert args.moe_layer_freq == [0, 1, 1, 1]


# ---- files of ranks


LAYOUTS: dict[str, dict[str, int]] = {
    "alone": {},
    "tp2": {"target.tp": 2},
    "tp2pp2": {"target.tp": 2, "target.pp": 2},
    "vpp2": {"target.pp": 2, "target.vpp": 2},
}


def old(name: str) -> str:
    """A name of before megatron-core."""
    for new, before in OLDER.items():
        name = name.replace(new, before)
    return "language_model." + name.replace("decoder.", "encoder.")


def nemo1(source: Path, run: Path, step: int, layout: str, spell: Callable[[str], str], scratch: Path) -> None:
    """The ranks' files of Megatron as NeMo 1 would have saved them."""
    shutil.rmtree(scratch, ignore_errors=True)
    keys: dict[str, Any] = {**LAYOUTS[layout], "target.spec": "local"}
    ckpt_dist.convert(source, scratch, format="megatron", quiet=True, **keys)
    pp = LAYOUTS[layout].get("target.pp", 1)
    for path in rank_files(scratch):
        tree = torch.load(path, weights_only=False)
        models = {k: {f"model.{spell(n)}": t for n, t in v.items()} for k, v in tree.items() if k.startswith("model")}
        state = models if "model0" in models else {"state_dict": models["model"]}
        number = path.parent.name.removeprefix("mp_rank_").split("_")
        folder = {
            1: "." if layout == "alone" else f"mp_rank_{number[0]}",
            2: "tp_rank_{}_pp_rank_{}".format(*number, ""),
        }[pp]
        target = run / folder / (NAME.format(step, step * 8) + ".ckpt")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(lightning(step, **state), target)
    (run.parent / "hparams.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"cfg": SETTINGS})))


@pytest.mark.parametrize("spell", [old, str], ids=["old names", "mcore names"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_ranks_are_the_model(llama: Path, tmp_path: Path, layout: str, spell: Callable[[str], str]) -> None:
    run = tmp_path / "version_0/checkpoints"
    nemo1(llama, run, 10, layout, spell, tmp_path / "scratch")
    first = sorted(run.rglob("*.ckpt"))[0]
    wanted = ckpt_dist.fingerprint(llama)
    for path in (run, first):
        assert ckpt_dist.fingerprint(path) == wanted
    assert ckpt_dist.inspect(first)["format"] == "nemo"


@pytest.mark.parametrize("layout", ["alone", "tp2pp2"])
def test_what_nemo_stores_of_rotary_embeddings_is_no_weight(llama: Path, tmp_path: Path, layout: str) -> None:
    """A buffer in the file of each rank, of all stages, as NeMo 1 made it of `register_buffer`."""
    nemo1(llama, tmp_path / "run", 10, layout, old, tmp_path / "scratch")
    for file in (tmp_path / "run").rglob("*.ckpt"):
        tree = torch.load(file, weights_only=False)
        tree["state_dict"]["model.language_model.rotary_pos_emb.inv_freq"] = torch.ones(4)
        torch.save(tree, file)
    ckpt_dist.convert(tmp_path / "run", tmp_path / "hf")
    assert ckpt_dist.fingerprint(tmp_path / "hf") == ckpt_dist.fingerprint(llama)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_of_files_is_a_file_more_in_each_folder(
    stacked: State, llama: Path, tmp_path: Path, layout: str
) -> None:
    run, sources = tmp_path / "version_0/checkpoints", []
    for step in (10, 20, 30):
        torch.save(nearby(stacked, step), tmp_path / f"{step}.pt")
        sources.append(tmp_path / f"{step}")
        keys: dict[str, Any] = {"model.config": str(llama), "model.family": "llama"}
        ckpt_dist.convert(tmp_path / f"{step}.pt", sources[-1], dtype="bfloat16", quiet=True, **keys)
        nemo1(sources[-1], run, step, layout, old, tmp_path / "scratch")
    for path in list(run.rglob("*-step=30-*.ckpt")):
        shutil.copy(path, path.with_name(path.stem + "-last.ckpt"))
    before = files(run)
    ckpt_dist.average(run, recipe="nemo_average", name="gpt", steps=[10, 30], quiet=True)
    folders = sorted({str(Path(f).parent) for f in before})
    new = [str(Path(folder) / "gpt-10_30-averaged.ckpt") for folder in folders]
    assert sorted(set(files(run)) - set(before)) == sorted(
        [*new, "gpt-10_30-averaged.average.yaml", "gpt-10_30-averaged.ckpt_dist.json"]
    )
    for file in new:
        made = torch.load(run / file)
        each = [torch.load(next((run / file).parent.glob(f"*-step={s}-*0.ckpt")), weights_only=False) for s in (10, 30)]
        keys_of = [k for k in each[0] if k.startswith("model")] or ["state_dict"]
        assert sorted(made) == sorted({"state_dict", *keys_of})
        for key in keys_of:
            wanted = mean([e[key] for e in each])
            assert list(made[key]) == list(wanted)
            assert all(torch.equal(made[key][n], t) and t.dtype == torch.bfloat16 for n, t in wanted.items())
    with pytest.raises(UsageError, match=r"already holds .*gpt-10_30-averaged.ckpt; nothing was written"):
        ckpt_dist.average(run, recipe="nemo_average", name="gpt", steps=[10, 30], quiet=True)
    given = {"recipe": "nemo_average", "name": "all", "engine.verify": True}
    ckpt_dist.average(run, quiet=True, **given)  # of the copy and the average above nothing
    notes = json.loads((run / "all-averaged.ckpt_dist.json").read_text())["report"]["notes"]
    assert [n for n in notes if n.startswith("step ")] == [f"step {s}: weight 0.333333" for s in (10, 20, 30)]


# ---- a file more for each rank appears whole or not at all


def averageable(run: Path) -> dict[str, bytes]:
    """Two steps of two ranks; what lies there."""
    for step in (1, 2):
        for rank in range(2):
            state = {"model.w": torch.full((4,), float(step + rank)), "model.decoder.layers.0.x": torch.ones(2)}
            path = run / f"mp_rank_{rank:02d}" / (NAME.format(step, step) + ".ckpt")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(lightning(step, state_dict=state), path)
    return contents(run)


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def average(run: Path, **keys: Any) -> None:
    ckpt_dist.average(run, recipe="nemo_average", name="gpt", quiet=True, **keys)


def failing(error: Exception, number: int) -> Callable[[Any, Any], None]:
    """`os.rename`, of which one call fails."""
    numbers = count()

    def rename(*paths: Any) -> None:
        if next(numbers) == number:
            raise error
        os.replace(*paths)

    return rename


RENAMES = {"new": 5, "overwrite": 9}  # two files and two records, each after what it takes the place of; then the end


def begun(run: Path, way: str) -> dict[str, Any]:
    averageable(run)
    if way == "overwrite":
        average(run, weights=[0.25, 0.75])
    return {"overwrite": way == "overwrite"}


@pytest.mark.parametrize("way", RENAMES)
def test_a_rename_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    run = tmp_path / "run"
    keys = begun(run, way)
    before = contents(run)
    for number in range(RENAMES[way]):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Cannot publish"):
            patch.setattr(staging.os, "rename", failing(OSError(28, "No space left on device"), number))
            average(run, **keys)
        assert contents(run) == before and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("then", ["the same", "another"])
@pytest.mark.parametrize("way", RENAMES)
def test_a_job_that_was_killed_between_two_renames_is_not_seen_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, then: str
) -> None:
    averageable(tmp_path / "whole")
    quick: dict[str, Any] = {"engine.fsync": False}
    average(tmp_path / "whole", **quick)
    wanted = {n: b for n, b in contents(tmp_path / "whole").items() if n.endswith(".ckpt")}
    for number in range(RENAMES[way]) if then == "the same" else (1, RENAMES[way] - 1):
        run = tmp_path / f"{number}/run"
        keys = begun(run, way) | quick
        before = contents(run)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(staging.os, "rename", failing(RuntimeError("killed"), number))
            average(run, **keys)
        seen = (run / "mp_rank_00/gpt-averaged.ckpt").exists()  # by which all others are found
        assert way == "overwrite" or seen == (number == 4)
        if then == "another":
            ckpt_dist.average(run, recipe="nemo_average", name="other", quiet=True, **quick)
            assert {n: b for n, b in contents(run).items() if "other-averaged" not in n} == before
        else:
            average(run, **keys)
            assert {n: b for n, b in contents(run).items() if n.endswith(".ckpt")} == wanted
        assert [p.name for p in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("killed")])
def test_links_that_were_there_are_put_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Relative ones, as in a cache of Hugging Face's: they lead nowhere from the place where they are kept meanwhile."""

    def links() -> dict[str, str]:
        return {str(p.relative_to(run)): os.readlink(p) for p in run.rglob("*") if p.is_symlink()}

    run = tmp_path / "run"
    averageable(run)
    average(run)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(run.rglob("*averaged*"))):
        os.replace(path, tmp_path / f"blobs/{number}")
        path.symlink_to(os.path.relpath(tmp_path / f"blobs/{number}", path.parent))
    before = links()
    for number in (1, 4, 7):
        with monkeypatch.context() as patch, pytest.raises((CheckpointError, RuntimeError)):
            patch.setattr(staging.os, "rename", failing(error, number))
            average(run, overwrite=True)
        if isinstance(error, RuntimeError):  # the next job takes back what a killed one has done
            with pytest.raises(UsageError, match="already holds"):
                average(run)
            ckpt_dist.average(run, recipe="nemo_average", name="other", quiet=True)
        assert links() == before and len(before) == 4
        for path in run.rglob("other-averaged*"):
            path.unlink()


def test_a_link_to_a_folder_on_another_disk_is_joined_there(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other disk")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        averageable(Path(folder) / "run")
        (tmp_path / "run").symlink_to(Path(folder) / "run")
        average(tmp_path / "run")
        assert (Path(folder) / "run/mp_rank_01/gpt-averaged.ckpt").is_file()
        averageable(tmp_path / "half")
        shutil.rmtree(tmp_path / "half/mp_rank_01")
        (tmp_path / "half/mp_rank_01").symlink_to(Path(folder) / "run/mp_rank_01")
        with pytest.raises(UsageError, match="is on another disk than"):
            average(tmp_path / "half")


def test_what_cannot_be_taken_back_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    averageable(run)
    average(run)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(staging.os, "rename", failing(RuntimeError("killed"), 4))
        average(run, overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"What was there before is in .*/old"):
        patch.setattr(staging.os, "rename", failing(PermissionError(13, "Permission denied"), 0))
        average(run, overwrite=True)
    average(run, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_in_a_new_folder_all_of_it_appears_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, renamed = tmp_path / "run", []
    averageable(run)
    average(run)
    rename = os.rename
    monkeypatch.setattr(staging.os, "rename", lambda *paths: (renamed.append(paths), rename(*paths)))
    average(run, **{"target.path": str(tmp_path / "new")})
    assert [to for _, to in renamed if not to.name.startswith(".")] == [tmp_path / "new"]
    made, new = ({n: b for n, b in contents(p).items() if n.endswith("averaged.ckpt")} for p in (run, tmp_path / "new"))
    assert new == made and len(made) == 2


def test_counts_are_copied_and_never_summed(tmp_path: Path) -> None:
    told = class_of_lightning()(cfg=OmegaConf.create(SETTINGS), sizes=(1, 2))
    for step in (1, 2, 3):
        state = {"model.norm.num_batches_tracked": torch.tensor(step * 7), "model.w": torch.full((4,), float(step))}
        state["model.decoder.layers.0.ids"] = torch.tensor([5, 6])
        torch.save(lightning(step, state_dict=state, hyper_parameters=told), tmp_path / f"asr--step={step}.ckpt")
    ckpt_dist.average(tmp_path, recipe="nemo_average", name="asr", quiet=True)
    made = torch.load(tmp_path / "asr-averaged.ckpt")["state_dict"]
    assert made["model.norm.num_batches_tracked"].item() == 21 and made["model.decoder.layers.0.ids"].tolist() == [5, 6]
    assert made["model.w"].tolist() == [2.0] * 4


def test_ranks_that_are_missing_or_of_other_steps_are_named(llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "version_0/checkpoints"
    nemo1(llama, run, 10, "tp2pp2", old, tmp_path / "scratch")
    file = run / "tp_rank_01_pp_rank_001" / (NAME.format(10, 80) + ".ckpt")
    tree = torch.load(file, weights_only=False)
    torch.save({**tree, "global_step": 9}, file)
    with pytest.raises(CheckpointError, match=r"of iteration 9, tp_rank_00_pp_rank_000.* of 10"):
        ckpt_dist.inspect(run)
    torch.save({**tree, "state_dict": {}}, file)
    with pytest.raises(CheckpointError, match=r"tp_rank_01_pp_rank_001.* holds no model"):
        ckpt_dist.inspect(run)
    shutil.copy(file, file.with_name("other.ckpt"))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tp_rank_01_pp_rank_001.* is missing"):
        ckpt_dist.inspect(run)
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError, match="lack tensor rank 1 of stage 1 of 2 x 2 ranks"):
        ckpt_dist.inspect(run)


def test_a_step_that_the_first_rank_lacks_is_missed_and_not_left_out(llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "version_0/checkpoints"
    for step in (10, 20, 30):
        nemo1(llama, run, step, "tp2", old, tmp_path / "scratch")
    (run / "mp_rank_00" / (NAME.format(20, 160) + ".ckpt")).unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_00/.*step=20-.*does not exist"):
        ckpt_dist.average(run, recipe="nemo_average", name="gpt", quiet=True)
    (run / "mp_rank_00" / (NAME.format(30, 240) + ".ckpt")).unlink()
    found = ckpt_dist.inspect(run)
    assert found["step"] == 10 and any("step 30 passed over" in note for note in found["notes"])


def test_a_model_is_not_written_as_files_of_nemo(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"target.format=torch_dist with target.key=module"):
        ckpt_dist.convert(llama, tmp_path / "no", format="nemo", quiet=True)


# ---- archives


def packed(folder: Path, file: Path, mode: Any = "w:") -> Path:
    with tarfile.open(file, mode) as archive:
        archive.add(folder, arcname=".")  # names start with ./, as those that NeMo makes
    return file


def settings_of(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(SETTINGS)))


@pytest.mark.parametrize("kind", ["file", "ranks", "torch_dist", "zarr"])
def test_archives_are_read_in_place(llama: Path, stacked: State, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "unpacked"
    settings_of(folder)
    if kind == "torch_dist":
        distributed(folder / "model_weights", stacked, 1, "model")
    elif kind == "zarr":
        ckpt_dist.convert(llama, folder / "model_weights", format="zarr", quiet=True, **{"target.key": "model"})
    else:
        nemo1(llama, tmp_path / "run/c", 1, "alone" if kind == "file" else "tp2pp2", old, tmp_path / "scratch")
        for path in (tmp_path / "run/c").rglob("*.ckpt"):
            target = folder / path.parent.relative_to(tmp_path / "run/c") / "model_weights.ckpt"
            target.parent.mkdir(exist_ok=True)
            torch.save(torch.load(path, weights_only=False)["state_dict"], target)  # no dict of Lightning's around it
    wanted = ckpt_dist.fingerprint(llama)
    assert ckpt_dist.fingerprint(folder) == wanted
    file = packed(folder, tmp_path / "gpt.nemo")
    assert ckpt_dist.fingerprint(file) == wanted
    ckpt_dist.convert(file, tmp_path / "hf", quiet=True)
    assert ckpt_dist.fingerprint(tmp_path / "hf") == wanted and files(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"packed with gzip.*mkdir old && tar -xf old.nemo -C old"):
        ckpt_dist.inspect(packed(folder, tmp_path / "old.nemo", "w:gz"))


def member(name: str, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


BAD = {
    "above": (member("../x", size=3), "lies outside"),
    "absolute": (member("/etc/x", size=3), "lies outside"),
    "link": (member("model_weights.ckpt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
    "hard link": (member("model_weights.ckpt", type=tarfile.LNKTYPE, linkname="a"), "is a link"),
    "device": (member("model_weights.ckpt", type=tarfile.CHRTYPE), "is a link, a device"),
    "backwards": (member("a", pax_headers={"size": "-512"}), r"'a' is -512 bytes long|no tar archive"),
    "huge": (member("a", pax_headers={"size": "9" * 30}), "is truncated|no tar archive"),
    "words": (member("a", size=3, pax_headers={f"k{k}": "v" for k in range(999)}), "says 999 things of 'a'"),
    "other": (member("a.txt", size=3), "neither model_weights.ckpt nor model_weights/"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_archives_are_refused(tmp_path: Path, what: str) -> None:
    info, says = BAD[what]
    with tarfile.open(tmp_path / "x.nemo", "w:") as archive:
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.inspect(tmp_path / "x.nemo")


def test_what_an_archive_says_of_all_its_members_is_not_kept_for_each(tmp_path: Path) -> None:
    words = {f"k{k}": "v" for k in range(200)}
    with tarfile.open(tmp_path / "x.nemo", "w:", format=tarfile.PAX_FORMAT, pax_headers=words) as archive:
        for k in range(2000):
            archive.addfile(member(f"{k}", pax_headers={"comment": "x"}))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"neither model_weights\.ckpt"):
        ckpt_dist.inspect(tmp_path / "x.nemo")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    settings_of(tmp_path / "f")
    torch.save({"model.language_model.w": torch.ones(4000)}, tmp_path / "f/model_weights.ckpt")
    whole = packed(tmp_path / "f", tmp_path / "x.nemo").read_bytes()
    for data, says in (
        (whole[:9000], "truncated|no tar archive"),
        (b"", "no tar archive"),
        (b"x" * 5000, "no tar archive"),
    ):
        (tmp_path / "x.nemo").write_bytes(data)
        with pytest.raises(CheckpointError, match=says):
            ckpt_dist.inspect(tmp_path / "x.nemo")
    with tarfile.open(tmp_path / "x.nemo", "w:") as archive:
        for _ in range(2):
            archive.addfile(member("model_weights.ckpt", size=3), io.BytesIO(b"abc"))
    with pytest.raises(CheckpointError, match=r"holds 'model_weights.ckpt' twice"):
        ckpt_dist.inspect(tmp_path / "x.nemo")
