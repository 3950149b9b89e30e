"""Megatron's files as runs leave them: args of classes that are not here, optimizers, trackers, wrappers of a model.

torch itself writes every file, the classes of `megatron` are made up and gone again before anything is read.
"""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import io
import json
import pickle
import random
import re
import shutil
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter

import ckpt_dist
from ckpt_dist import stages
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import pickles
from tests.test_megatron import KINDS, SMALL, rank_files, rewritten, transformer

MODULE = "megatron.core.enums"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    transformer("llama", folder)
    return folder


@contextmanager
def megatron_here() -> Iterator[types.SimpleNamespace]:
    """Classes and a function of a module that only the writer has."""

    class ModelType(enum.Enum):
        encoder_or_decoder = 1

    class Settings:
        def __init__(self) -> None:
            self.a = 1

    def provider(x: int) -> int:
        return x

    names = ["megatron", "megatron.core", MODULE]
    kept = {n: sys.modules.get(n) for n in names}
    sys.modules.update({n: types.ModuleType(n) for n in names})
    made: list[Any] = [ModelType, Settings, provider]
    for one in made:
        one.__module__, one.__qualname__ = MODULE, one.__name__
        setattr(sys.modules[MODULE], one.__name__, one)
    try:
        yield types.SimpleNamespace(**{one.__name__: one for one in made})
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def settings(m: types.SimpleNamespace) -> dict[str, Any]:
    """Values that have been seen in args, and worse ones."""
    return dict(
        model_type=m.ModelType.encoder_or_decoder, transformer_impl=m.Settings(), provider=m.provider,
        bound=functools.partial(m.provider, 1), params_dtype=torch.bfloat16, exit_signal=signal.SIGTERM,
        activation=torch.nn.functional.gelu, other=torch.nn.functional.silu, squared=torch.square,
        init=torch.nn.init.normal_, path=Path("/a/b"), scalar=np.float32(1.5), array=np.arange(3), ranges=range(3),
        part=slice(1, 2), counts=collections.Counter("aab"), lists=collections.defaultdict(list), device=torch.device("cpu"),
        inner=argparse.Namespace(a=1), simple=types.SimpleNamespace(b=2), several=(1, 2), some={1, 2},
    )  # fmt: skip


def te_state() -> io.BytesIO:
    state = io.BytesIO()
    torch.save({"recipe": torch.zeros(3)}, state)
    return state


def full(tree: dict[str, Any], number: int) -> None:
    """What a run with an optimizer and Transformer Engine adds to a rank's file."""
    rng = dict(random_rng_state=random.getstate(), np_rng_state=np.random.get_state(), torch_rng_state=torch.ones(4))
    adam = {"state": {0: {"exp_avg": torch.zeros(3), "step": 1}}, "param_groups": [{"params": [0], "lr": 0.1}]}
    tree |= dict(
        rng_state=[rng | {"rng_tracker_states": {"a": torch.ones(2)}}],
        opt_param_scheduler=dict(max_lr=0.1, lr_decay_style="cosine"),
        optimizer={"optimizer": adam, "fp32_from_fp16_params": [[torch.zeros(3)], [torch.zeros(2)]]},
        num_floating_point_operations_so_far=7,
    )
    own = "decoder.layers.0."
    tree["model"] |= {
        own + "self_attention.linear_qkv._extra_state": None,
        own + "self_attention.core_attention._extra_state": te_state(),
        own + "mlp.linear_fc1._extra_state": torch.zeros(5, dtype=torch.uint8),
        own + "mlp.linear_fc2._extra_state": torch.zeros(0, dtype=torch.uint8),
    }


def test_args_of_classes_that_are_not_here(llama: Path, tmp_path: Path) -> None:
    ckpt_dist.convert(llama, tmp_path / "it", format="megatron", **{"target.tp": 2})
    with megatron_here() as m:

        def enriched(tree: dict[str, Any], number: int) -> None:
            full(tree, number)
            tree["rerun_state_machine"] = {"mode": m.ModelType.encoder_or_decoder, "state": m.Settings()}
            vars(tree["args"]).update(settings(m))

        rewritten(tmp_path / "it", enriched)
        assert "provider" in dir(torch.load(rank_files(tmp_path / "it")[0], weights_only=False)["args"])
    before = set(sys.modules)
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert not [n for n in set(sys.modules) - before if n.startswith("megatron")]
    assert ckpt_dist.fingerprint(tmp_path / "back") == ckpt_dist.fingerprint(llama)
    assert "27 of 27 stored tensors are written" in report["notes"]
    found = ckpt_dist.inspect(tmp_path / "it")
    assert "tp=2, pp=1, vpp=1, ep=1" in found["layout"]
    assert {"optimizer", "rng_state", "decoder.layers.0.mlp.linear_fc1._extra_state"} <= set(found["extras"])
    with pytest.raises(CheckpointError, match="optimizer has no state of each parameter"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", format="dcp", keep=["weights", "optimizer"])
    kept = ckpt_dist.convert(tmp_path / "it", tmp_path / "kept", format="dcp", keep=["weights", "state"])
    assert any("of a class that is not written: " in n and "args" in n for n in kept["notes"])
    stored = FileSystemReader(tmp_path / "kept").read_metadata().state_dict_metadata
    assert "optimizer" not in stored and "num_floating_point_operations_so_far" in stored


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_what_args_call_is_not_called(llama: Path, tmp_path: Path) -> None:
    import os

    ckpt_dist.convert(llama, tmp_path / "it", format="megatron")
    marker = tmp_path / "ran"
    with megatron_here() as m:

        def called(x: Any) -> None:
            marker.write_text("ran")

        called.__module__, called.__qualname__ = MODULE, "provider"
        sys.modules[MODULE].provider = m.provider = called  # type: ignore[attr-defined]
        rewritten(tmp_path / "it", lambda tree, number: setattr(tree["args"], "evil", Evil(called, 1)))
    marker.unlink(missing_ok=True)
    ckpt_dist.inspect(tmp_path / "it")
    assert not marker.exists()
    path = rank_files(tmp_path / "it")[0]
    torch.save({"args": Evil(os.mkdir, str(marker)), "model": {}}, path)
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
        ckpt_dist.inspect(path.parents[1])
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["megatron.core.a..b", "megatron.core.1", "megatron.x y", "megatronx.a", "torch.nn.functional"]
)
def test_names_that_are_none_of_a_framework(name: str) -> None:
    module, _, last = name.rpartition(".")
    with pytest.raises(CheckpointError, match=r"asks for|damaged"):
        pickles.loads(b"c" + module.encode() + b"\n" + last.encode() + b"\n.", "evil")


# ---- the tracker


def trackers(llama: Path, folder: Path) -> Path:
    """Steps 1, 2 and a release; the tracker says that 2 was not saved to its end."""
    ckpt_dist.convert(llama, folder, format="megatron")
    ckpt_dist.convert(llama, folder.parent / "other", format="megatron", dtype="float16")
    shutil.copytree(folder.parent / "other/iter_0000001", folder / "iter_0000002")
    shutil.copytree(folder / "iter_0000001", folder / "release")
    return folder / "latest_checkpointed_iteration.txt"


def test_the_tracker_says_which_is_the_latest(llama: Path, tmp_path: Path) -> None:
    tracker = trackers(llama, tmp_path / "run")

    def dtypes(**keys: Any) -> set[str]:
        return set(ckpt_dist.inspect(tmp_path / "run", **keys)["dtypes"])

    assert dtypes() == {"float32"} and dtypes(**{"source.step": 2}) == {"float16"}
    tracker.write_text("2\n")
    assert dtypes() == {"float16"}
    tracker.unlink()
    assert dtypes() == {"float16"}
    tracker.write_text("release")
    found = ckpt_dist.inspect(tmp_path / "run")
    assert found["path"].endswith("release") and found["notes"] == [
        "release is the latest by latest_checkpointed_iteration.txt"
    ]
    shutil.rmtree(tmp_path / "run/iter_0000001")
    shutil.rmtree(tmp_path / "run/iter_0000002")
    ckpt_dist.convert(tmp_path / "run", tmp_path / "back")
    assert ckpt_dist.fingerprint(tmp_path / "back") == ckpt_dist.fingerprint(llama)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("7", r"says 7, but iter_0000007 is not there.*iter_0000001"),
        ("metadata", "neither a number nor release"),
        ("9" * 250, "which is no file name"),
    ],
)
def test_a_tracker_that_is_wrong(llama: Path, tmp_path: Path, text: str, says: str) -> None:
    trackers(llama, tmp_path / "run").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.inspect(tmp_path / "run")


# ---- distributed checkpoints


def state_of(folder: Path, prefix: str = "") -> dict[str, Any]:
    """All of a checkpoint as torch reads it; objects as [None]."""
    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(d.size, dtype=d.properties.dtype) for k, d in described.items() if hasattr(d, "size")}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return {prefix + k: tensors.get(k, [None]) for k in described}


def saved(folder: Path, state: dict[str, Any], common: dict[str, Any] | None) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    if common is not None:
        torch.save(common, folder / "common.pt")
    return folder


@pytest.fixture(scope="module")
def dist(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("dist") / "run"
    ckpt_dist.convert(llama, top, format="torch_dist")
    return top / "iter_0000001"


BUCKETS = "optimizer.distributed.dp_group_idx_0."
BUCKET = BUCKETS + "gbuf_idx_0.dtype_(torch.bfloat16, torch.bfloat16).bucket_idx_0."


def optimizers(state: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "model space":
        slots = ("exp_avg", "exp_avg_sq", "fp32_param", "param")
        return {f"optimizer.state.{s}.{k}": v for s in slots for k, v in state.items() if torch.is_tensor(v)}
    found = {BUCKET + s: torch.zeros(10) for s in ("param", "exp_avg", "exp_avg_sq")}
    found |= {BUCKETS + "optimizer/shard_0_1": [{"a": 1}], BUCKETS + "per_bucket_numel/shard_0_1": [{"b": [1]}]}
    return {"chained_1." + k: v for k, v in found.items()} if kind == "chained" else found


@pytest.mark.parametrize("kind", ["model space", "buckets", "chained"])
def test_optimizers_are_listed(llama: Path, dist: Path, tmp_path: Path, kind: str) -> None:
    state, common = state_of(dist), torch.load(dist / "common.pt", weights_only=False)
    more = optimizers(state, kind)
    saved(tmp_path / "it", state | more | {"rng_state/shard_0.0_1.1": [{"x": torch.ones(3)}]}, common)
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert ckpt_dist.fingerprint(tmp_path / "back") == ckpt_dist.fingerprint(llama)
    (line,) = (n for n in report["notes"] if n.startswith("dropped, optimizer"))
    names = line.split(": ", 1)[1]
    assert f"and {len(more) - 3} more" in names and names.startswith(next(iter(sorted(more)))[:9])


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.module.", "model.module."])
def test_wrappers_of_a_model(llama: Path, dist: Path, tmp_path: Path, prefix: str) -> None:
    saved(tmp_path / "it", state_of(dist, prefix), None)
    keys = {"model.config": str(llama)}
    assert ckpt_dist.fingerprint(tmp_path / "it", **keys) == ckpt_dist.fingerprint(llama)


def test_common_state_as_an_object(llama: Path, dist: Path, tmp_path: Path) -> None:
    common = torch.load(dist / "common.pt", weights_only=False)
    saved(tmp_path / "it", state_of(dist) | {"common_state/shard_0_1": [common]}, None)
    assert ckpt_dist.fingerprint(tmp_path / "it") == ckpt_dist.fingerprint(llama)


def test_settings_of_megatron_bridge(llama: Path, dist: Path, tmp_path: Path) -> None:
    saved(tmp_path / "it", state_of(dist), {"iteration": 3, "content_metadata": {"a": 1}})
    model = dict(
        num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, layernorm_epsilon=1e-6,
        rotary_base=10000.0, seq_length=64, init_method_std=0.3, activation_func={"_target_": "torch.nn.functional.silu"},
    )  # fmt: skip
    import yaml

    (tmp_path / "it/run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"micro_batch_size": 1}}))
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert ckpt_dist.fingerprint(tmp_path / "back") == ckpt_dist.fingerprint(llama)
    (tmp_path / "it/run_config.yaml").write_text("model: [")
    with pytest.raises(CheckpointError, match="no readable YAML"):
        ckpt_dist.inspect(tmp_path / "it")


def test_metadata_of_older_megatron_core(llama: Path, dist: Path, tmp_path: Path) -> None:
    common = torch.load(dist / "common.pt", weights_only=False)
    path = saved(tmp_path / "it", state_of(dist), common) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    with megatron_here() as m:
        metadata.mcore_data = {key: {} for key in metadata.state_dict_metadata}
        metadata.all_local_plans = [m.Settings()]
        own = type("MCoreMetadata", (type(metadata),), {"__module__": MODULE})
        sys.modules[MODULE].MCoreMetadata = own  # type: ignore[attr-defined]
        metadata.__class__ = own
        path.write_bytes(pickle.dumps(metadata, 4))
    assert ckpt_dist.fingerprint(tmp_path / "it") == ckpt_dist.fingerprint(llama)


# ---- args and config.json


def with_config(llama: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(llama, folder)
    config = json.loads((llama / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def args_in(folder: Path) -> dict[str, Any]:
    found = next(folder.rglob("model_optim_rng.pt"), None) or next(folder.rglob("common.pt"))
    return vars(torch.load(found, weights_only=False)["args"])


LLAMA3 = dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
ROPES: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # config.json, args, what is not translated
    (dict(rope_scaling=LLAMA3, rope_theta=500000), dict(use_rope_scaling=True, rope_scaling_factor=32.0, rotary_base=500000), ""),
    (dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}), dict(use_rope_scaling=True, rotary_base=5e5), ""),
    (dict(rope_scaling={**LLAMA3, "high_freq_factor": 8.0}), dict(use_rope_scaling=True), "rope high_freq_factor=8.0"),
    (dict(rope_scaling=dict(rope_type="linear", factor=4.0)), dict(rotary_seq_len_interpolation_factor=4.0), ""),
    (dict(rope_scaling=dict(type="yarn", factor=4.0)), {}, "rope scaling yarn, factor 4.0"),
    (dict(sliding_window=16), {}, "sliding_window=16"),
    (dict(sliding_window=16, use_sliding_window=False), {}, ""),
    (dict(partial_rotary_factor=0.5), {}, "partial_rotary_factor=0.5"),
    (dict(hidden_act="gelu"), {}, "hidden_act='gelu'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "wanted", "lost"), ROPES)
def test_args_say_what_a_config_says(
    llama: Path, tmp_path: Path, changes: dict[str, Any], wanted: dict[str, Any], lost: str
) -> None:
    from transformers import AutoConfig

    source = with_config(llama, tmp_path / "hf", **{"rope_parameters": None, **changes})
    report = ckpt_dist.convert(source, tmp_path / "it", format="torch_dist")
    args = args_in(tmp_path / "it")
    assert {k: args.get(k) for k in wanted} == wanted
    assert report["warnings"] == ([f"config.json: not translated: {lost}"] if lost else [])
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    if not lost:
        theirs, ours = (AutoConfig.from_pretrained(p) for p in (source, tmp_path / "back"))
        assert theirs.rope_parameters == ours.rope_parameters
        assert theirs.rms_norm_eps == ours.rms_norm_eps and theirs.head_dim == ours.head_dim


UNTOLD = dict(
    window_size=(15, 0), apply_layernorm_1p=True, squared_relu=True, position_embedding_type="yarn", rotary_percent=0.5
)


@pytest.mark.parametrize("key", UNTOLD)
def test_what_a_config_cannot_say_of_args_is_listed(llama: Path, tmp_path: Path, key: str) -> None:
    ckpt_dist.convert(llama, tmp_path / "it", format="megatron")
    rewritten(tmp_path / "it", lambda tree, number: setattr(tree["args"], key, UNTOLD[key]))
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    more = [w for w in report["warnings"] if "Megatron adds 1 to the weights of norms" in w]
    assert len(more) == (key == "apply_layernorm_1p")
    assert report["warnings"] == [*more, f"args: not translated: {key}={UNTOLD[key]!r}"]


COMPUTED: dict[str, Any] = dict(
    apply_layernorm_1p=True, squared_relu=True, window_size=[4, 0], position_embedding_type="rope", softmax_scale=0.3,
    swiglu=True, qk_l2_norm=True, glu_linear_offset=1.0, activation_func_clamp_value=7.0, use_mup=True,
    softmax_type="learnable", moe_apply_probs_on_input=True, moe_router_num_groups=2, moe_router_group_topk=2,
    moe_router_load_balancing_type="sinkhorn",
)  # fmt: skip
OTHERWISE = dict(position_embedding_type="none", swiglu=False, apply_residual_connection_post_layernorm=True)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "llama", "mixtral", "qwen3_moe"])
def test_args_that_change_what_is_computed_are_listed_for_every_family(tmp_path: Path, kind: str) -> None:
    plain = kind in ("gpt2", "bloom")
    if kind == "bloom":
        from transformers import AutoConfig, AutoModelForCausalLM

        small = AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=64)
        AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "hf")
    else:
        transformer(kind, tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron")
    assert ckpt_dist.convert(tmp_path / "it", tmp_path / "same")["warnings"] == []
    changes = COMPUTED | ({} if plain else OTHERWISE)
    rewritten(tmp_path / "it", lambda tree, number: vars(tree["args"]).update(changes))
    adds, lost = ckpt_dist.convert(tmp_path / "it", tmp_path / "other")["warnings"]
    assert "until 1 is added to the weight of each norm" in adds
    assert not [
        key for key, value in changes.items() if f"{key}={value!r}" not in lost and f"{key}={value}" not in lost
    ]
    keys = {"format": "dcp", "target.dialect": "hf"}
    assert ckpt_dist.convert(tmp_path / "it", tmp_path / "dcp", **keys)["warnings"] == [adds]
    assert ckpt_dist.convert(tmp_path / "it", tmp_path / "dist", format="torch_dist")["warnings"] == []


def test_biases_of_llama_are_in_its_config(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SMALL, attention_bias=True, mlp_bias=True), attn_implementation="eager"
    ).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron", **{"target.tp": 2, "target.pp": 2})
    assert ckpt_dist.convert(tmp_path / "it", tmp_path / "back")["warnings"] == []
    ids = torch.arange(24)[None]
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert torch.equal(model(ids).logits, back(ids).logits)


def test_whether_experts_are_weighed_before_they_are_chosen(tmp_path: Path) -> None:
    transformer("qwen3_moe", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron")
    assert args_in(tmp_path / "it")["moe_router_pre_softmax"] is False
    for before in (False, True):
        rewritten(tmp_path / "it", lambda tree, number, b=before: setattr(tree["args"], "moe_router_pre_softmax", b))
        ckpt_dist.convert(tmp_path / "it", tmp_path / str(before))
        assert json.loads((tmp_path / str(before) / "config.json").read_text())["norm_topk_prob"] is not before


def test_args_of_another_layout_do_not_stay(llama: Path, tmp_path: Path) -> None:
    keys = {"target.pp": 2, "target.partition": [1, 3]}
    ckpt_dist.convert(llama, tmp_path / "uneven", format="megatron", **keys)
    with megatron_here() as m:
        rewritten(tmp_path / "uneven", lambda tree, number: vars(tree["args"]).update(settings(m)))
    for made in ("megatron", "torch_dist"):
        ckpt_dist.convert(tmp_path / "uneven", tmp_path / made, format=made, **{"target.vocab_size": 128})
        args = args_in(tmp_path / made)
        assert args["decoder_first_pipeline_num_layers"] is None and args["pipeline_model_parallel_size"] == 1
        assert args["padded_vocab_size"] == 128 and "model_type" not in args
        torch.load(next((tmp_path / made).rglob("*.pt")), weights_only=False)


PIPELINES = [  # layers of each stage, virtual stages, what Megatron calls it
    ([1, 3], 1, dict(decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=3)),
    ([1, 2, 0, 1], 1, dict(pipeline_model_parallel_layout="Et|t*2||tL")),
    ([0, 2, 2], 1, dict(pipeline_model_parallel_layout="E|t*2|t*2L")),
    ([1, 0, 2, 1], 2, dict(pipeline_model_parallel_layout="Et||t*2|tL")),
    ([1, 1, 1, 1], 2, dict(pipeline_model_parallel_layout=None)),
]


def megatron_layout(said: str, pp: int) -> Any:
    """What megatron-core makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    return PipelineParallelLayerLayout(said, pp)


@pytest.mark.parametrize(("partition", "vpp", "wanted"), PIPELINES)
def test_stages_of_any_length(
    llama: Path, tmp_path: Path, partition: list[int], vpp: int, wanted: dict[str, Any]
) -> None:
    keys = {"target.pp": len(partition) // vpp, "target.vpp": vpp, "target.partition": partition}
    ckpt_dist.convert(llama, tmp_path / "it", format="megatron", **keys)
    args = args_in(tmp_path / "it")
    assert {k: args[k] for k in wanted} == wanted
    if args["pipeline_model_parallel_layout"] and find_spec("megatron") is not None:
        theirs = megatron_layout(args["pipeline_model_parallel_layout"], len(partition) // vpp)
        theirs.validate_layer_layout(num_layers=4, mtp_num_layers=None)
        each = [stage for chunk in zip(*theirs.layout, strict=True) for stage in chunk]
        assert [[layer.name for layer in stage].count("decoder") for stage in each] == partition
    assert ckpt_dist.fingerprint(tmp_path / "it") == ckpt_dist.fingerprint(llama)
    words = [["decoder"] * n for n in partition]
    for said in (words, [["embedding", *words[0]], *words[1:-1], [*words[-1], "loss"]]):
        rewritten(
            tmp_path / "it", lambda tree, number, w=said: vars(tree["args"]).update(pipeline_model_parallel_layout=w)
        )
        assert ckpt_dist.fingerprint(tmp_path / "it") == ckpt_dist.fingerprint(llama)


LAYOUTS = ["Et*3|t*4||tttmL", "Ett,(tt|)*2,tL", "E|(t|tt|)*3t|L", "Ettt|(tt|)*29,m|L", "E" + "t" * 12 + "L", "(E)*1t|L"]


@pytest.mark.parametrize("text", LAYOUTS)
def test_layouts_are_read_as_megatron_reads_them(text: str) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    theirs = megatron_layout(text, 1).layout[0]
    assert stages.read(text) == [sum(x.name == "decoder" for x in row) for row in theirs]


def test_a_layout_with_layers_that_predict_further_tokens() -> None:
    said = stages.spelled([3, 4, 0, 3], 1)
    assert said == "Et*3|t*4||t*3mL" and stages.read(said) == [3, 4, 0, 3]
    pytest.importorskip("megatron.core", reason="megatron-core is not installed; the rest of this test has passed")
    megatron_layout(said, 4).validate_layer_layout(num_layers=10, mtp_num_layers=1)


@pytest.mark.parametrize("said", ["Ett|t|tL", "Ex|L", "(t)*999999|" * 9, "E" + "(((t)*99)*99)*99" + "L"])
def test_layouts_that_are_not_those_of_the_files(llama: Path, tmp_path: Path, said: str) -> None:
    ckpt_dist.convert(llama, tmp_path / "it", format="megatron", **{"target.pp": 2})
    rewritten(tmp_path / "it", lambda tree, number: vars(tree["args"]).update(pipeline_model_parallel_layout=said))
    with pytest.raises(CheckpointError, match=r"stages hold \[2, 2\] layers, by args \[2, 1, 1\]|args are damaged"):
        ckpt_dist.inspect(tmp_path / "it")


VOCABULARIES = [  # words, rows, tensor-parallel ranks, what Megatron divides by
    (64, None, 1, 64), (64, 128, 1, 128), (60, 64, 2, 32), (60, 60, 2, 2), (63, 63, 1, 1), (64, 256, 1, 256), (64, 200, 2, None),
]  # fmt: skip


@pytest.mark.parametrize(("words", "rows", "tp", "wanted"), VOCABULARIES)
def test_args_make_megatron_pad_to_what_is_stored(
    llama: Path, tmp_path: Path, words: int, rows: int | None, tp: int, wanted: int | None
) -> None:
    source = with_config(llama, tmp_path / "hf", vocab_size=words)
    tensors = load_file(llama / "model.safetensors")
    cut = {
        n: t[:words].contiguous() for n, t in tensors.items() if t.shape[0] == 64 and ("embed" in n or "lm_head" in n)
    }
    save_file(tensors | cut, source / "model.safetensors")
    more = {"target.vocab_size": rows} if rows else {}
    ckpt_dist.convert(source, tmp_path / "it", format="megatron", **{"target.tp": tp}, **more)
    args = args_in(tmp_path / "it")
    assert (args["vocab_size"], args["padded_vocab_size"]) == (words, rows or words)
    assert args.get("make_vocab_size_divisible_by") == wanted
    if wanted:  # Megatron-LM, training/vocab_utils.py
        multiple = wanted * tp
        assert -(-words // multiple) * multiple == args["padded_vocab_size"]
    assert "tokenizer_type" not in args
    (source / "tokenizer.json").write_text("{}")
    ckpt_dist.convert(source, tmp_path / "dist", format="torch_dist")
    args = args_in(tmp_path / "dist")
    assert (args["tokenizer_type"], args["tokenizer_model"]) == ("HuggingFaceTokenizer", str(source))


def test_args_of_a_model_that_has_no_config_json_here(tmp_path: Path) -> None:
    transformer("gpt_oss", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron")
    with megatron_here() as m:
        rewritten(tmp_path / "it", lambda tree, number: setattr(tree["args"], "model_type", m.ModelType(1)))
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert not (tmp_path / "back/config.json").exists() and "no config.json" in report["warnings"][0]


YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
)  # fmt: skip


@pytest.mark.parametrize("rope", [None, YARN])
def test_args_of_deepseek_v3_are_its_config(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    from transformers import AutoModelForCausalLM

    transformer("deepseek_v3-mtp", tmp_path / "own")
    source = with_config(tmp_path / "own", tmp_path / "hf", rope_scaling=rope, rope_parameters=None, rope_theta=10000.0)
    ckpt_dist.convert(source, tmp_path / "it", format="megatron")
    args = args_in(tmp_path / "it")
    assert (args["mtp_num_layers"], args["rope_type"]) == (1, "yarn" if rope else "rope")
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert report["warnings"] == []
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert ckpt_dist.fingerprint(tmp_path / "back") == ckpt_dist.fingerprint(source)
    ids = torch.arange(24)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(p).eval()(ids).logits for p in (source, tmp_path / "back"))
    assert torch.equal(one, two)


def test_args_of_deepseek_v3_without_a_query_latent(tmp_path: Path) -> None:
    """transformers would build one where a config.json does not say that there is none, and draw its values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = AutoConfig.for_model(
        "deepseek_v3", **{**SMALL, **KINDS["deepseek_v3"][0], "q_lora_rank": None, "first_k_dense_replace": 2}
    )
    model = AutoModelForCausalLM.from_config(small, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron")
    rewritten(tmp_path / "it", lambda tree, number: delattr(tree["args"], "moe_layer_freq"))
    assert ckpt_dist.convert(tmp_path / "it", tmp_path / "back")["warnings"] == []
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert (back.config.q_lora_rank, back.config.first_k_dense_replace) == (None, 2)
    assert torch.equal(model(torch.arange(24)[None]).logits, back(torch.arange(24)[None]).logits)


def test_args_of_gpt2_are_its_config(tmp_path: Path) -> None:
    transformer("gpt2", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron")
    assert args_in(tmp_path / "it")["norm_epsilon"] == 1e-5 and args_in(tmp_path / "it")["openai_gelu"]
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    was, found = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    same = (
        "activation_function",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "n_positions",
        "layer_norm_epsilon",
        "vocab_size",
    )
    assert {k: found[k] for k in same} == {k: was[k] for k in same}


def test_args_say_nothing_that_is_not_known(llama: Path, tmp_path: Path) -> None:
    ckpt_dist.convert(llama, tmp_path / "single", format="sfpt")
    report = ckpt_dist.convert(
        tmp_path / "single", tmp_path / "it", format="torch_dist", **{"target.dialect": "megatron"}
    )
    assert "num_attention_heads" not in args_in(tmp_path / "it")
    assert any("args do not say them" in w for w in report["warnings"])
    keys = {"target.dialect": "megatron", "model.config": str(llama)}
    ckpt_dist.convert(tmp_path / "single", tmp_path / "known", format="torch_dist", **keys)
    assert ckpt_dist.fingerprint(tmp_path / "known") == ckpt_dist.fingerprint(llama)


def test_args_from_params_json(llama: Path, tmp_path: Path) -> None:
    source = with_config(llama, tmp_path / "hf", rope_parameters=None, rope_theta=500000.0, rms_norm_eps=1e-6)
    ckpt_dist.convert(source, tmp_path / "meta", format="meta")
    ckpt_dist.convert(tmp_path / "meta", tmp_path / "it", format="megatron")
    args = args_in(tmp_path / "it")
    assert (args["rotary_base"], args["norm_epsilon"], args["num_attention_heads"]) == (500000.0, 1e-6, 4)


# ---- layouts that Megatron would refuse


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"target.tp": 8}, r"target.tp=8: Megatron does not divide 4 attention heads in 2 groups"),
        ({"target.ep": 2}, r"target.ep=2: the model has no experts"),
        ({"target.vpp": 2}, r"target.vpp=2 with target.pp=1"),
        ({"target.pp": 2, "target.partition": [5, -1]}, r"target.partition is"),
        (
            {"target.tp": 2, "format": "torch_dist"},
            r"target.tp=2: torch_dist knows nothing of the kind, meta, megatron",
        ),
    ],
)
def test_what_megatron_would_refuse(llama: Path, tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ckpt_dist.convert(llama, tmp_path / "no", **{"format": "megatron", **keys})
    assert not (tmp_path / "no").exists()


# ---- layers with experts and without


MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", dict(mlp_only_layers=[0, 2])),
    "deepseek_v3": ("deepseek_v3", dict(n_shared_experts=2)),
    "deepseek_v3 without query latent": ("deepseek_v3", dict(q_lora_rank=None, first_k_dense_replace=2)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=16)),
    "gemma3_text": ("gemma3_text", {}),
}
TARGETS: list[dict[str, Any]] = [
    dict(format="torch_dist"),
    dict(format="torch_dist", **{"target.dialect": "megatron_local"}),
    dict(format="megatron", **{"target.tp": 2, "target.pp": 2, "target.vpp": 2}),
    dict(format="megatron", **{"target.tp": 2, "target.ep": 2, "target.spec": "local"}),
]


def mixed(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    base, changes = MIXED[kind]
    config = AutoConfig.for_model(base, **{**SMALL, **KINDS.get(base, ({},))[0], **changes})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_layers_there_and_back(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file

    wanted = mixed(kind, tmp_path / "hf")
    dense = kind == "gemma3_text"
    for number, keys in enumerate(TARGETS[::2] if dense else TARGETS):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / f"{number}", **keys)
        config = {"model.config": str(tmp_path / "hf")} if "qwen3" not in kind else {}
        ckpt_dist.convert(tmp_path / f"{number}", tmp_path / f"{number}-back", **config)
        found = load_file(tmp_path / f"{number}-back/model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted), keys
        if not config:
            made = json.loads((tmp_path / f"{number}-back/config.json").read_text())
            assert made["mlp_only_layers"] == [0, 2]


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_norms_are_where_each_spec_of_layers_has_them(tmp_path: Path, kind: str) -> None:
    mixed(kind, tmp_path / "hf")
    named: dict[str, set[str]] = {}
    for spec in ("te", "local"):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / spec, format="megatron", **{"target.spec": spec})
        named[spec] = set(torch.load(rank_files(tmp_path / spec)[0], weights_only=False)["model"])
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "dist", format="torch_dist")
    described = FileSystemReader(tmp_path / "dist/iter_0000001").read_metadata().state_dict_metadata
    fused, own = "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight", "decoder.layers.{}.pre_mlp_layernorm.weight"
    for names in (named["te"], set(described)):  # layer 0 is dense, layer 1 has experts
        assert fused.format(0) in names and own.format(0) not in names
        assert fused.format(1) not in names and own.format(1) in names
    assert own.format(0) in named["local"] and own.format(1) in named["local"]
    if kind == "deepseek_v3":
        assert "decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight" in named["te"] & set(described)
        assert "decoder.layers.1.self_attention.kv_layernorm.weight" in named["local"]


@pytest.mark.parametrize("spec", ["te", "local"])
def test_an_average_in_the_same_files_as_its_sources(llama: Path, tmp_path: Path, spec: str) -> None:
    keys = {"target.tp": 2, "target.pp": 2, "target.partition": [1, 3], "target.spec": spec}
    for step in (1, 2):
        ckpt_dist.convert(llama, tmp_path / f"step-{step}", format="megatron", **keys)

    def moved(tree: dict[str, Any], number: int) -> None:
        tree["model"] = {n: t + 1 for n, t in tree["model"].items()}

    rewritten(tmp_path / "step-2", moved)
    ckpt_dist.average(tmp_path, tmp_path / "mean", format="same")
    one, two, mean = (rank_files(tmp_path / p) for p in ("step-1", "step-2", "mean"))
    assert [f.parent.name for f in mean] == [f.parent.name for f in one]
    for files in zip(one, two, mean, strict=True):
        a, b, c = (torch.load(f, weights_only=False)["model"] for f in files)
        assert list(a) == list(c)
        assert all(torch.allclose(c[n], (a[n] + b[n]) / 2, rtol=2e-7) for n in a)


# ---- what no rule knows, what ranks should have alike


WHOLE: dict[
    str, tuple[tuple[int, ...], int | None]
] = {  # an encoder and a decoder of megatron-core: shape, divided dim
    "embedding.word_embeddings.weight": ((32, 16), 0),
    "encoder.layers.0.input_layernorm.weight": ((16,), None),
    "encoder.layers.0.self_attention.linear_qkv.weight": ((48, 16), 0),
    "encoder.layers.0.self_attention.linear_proj.weight": ((16, 16), 1),
    "encoder.final_layernorm.weight": ((16,), None),
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": ((16,), None),
    "decoder.layers.0.cross_attention.linear_q.weight": ((16, 16), 0),
    "decoder.layers.0.cross_attention.linear_kv.weight": ((32, 16), 0),
    "decoder.layers.0.cross_attention.linear_kv.bias": ((32,), 0),
    "decoder.layers.0.cross_attention.linear_proj.weight": ((16, 16), 1),
    "decoder.final_layernorm.weight": ((16,), None),
    "lm_head.output_layer.bias": ((32,), 0),
}


def laid(folder: Path, tensors: dict[str, tuple[torch.Tensor, int | None]], **sizes: int) -> Path:
    """Rank files of whole tensors, divided along a dim or held by each of two tensor-parallel ranks."""
    args = dict(num_layers=1, hidden_size=16, num_attention_heads=4, tensor_model_parallel_size=2) | sizes
    for t in range(2):
        state = {n: w if dim is None else w.chunk(2, dim)[t].clone() for n, (w, dim) in tensors.items()}
        path = folder / f"iter_0000005/mp_rank_{t:02d}/model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        about = dict(args=argparse.Namespace(**args), checkpoint_version=3.0, iteration=5)
        torch.save({**about, "model": state}, path)
    return folder


def random_of(shapes: dict[str, tuple[tuple[int, ...], int | None]]) -> dict[str, tuple[torch.Tensor, int | None]]:
    torch.manual_seed(3)
    return {n: (torch.randn(shape), dim) for n, (shape, dim) in shapes.items()}


def test_an_encoder_beside_a_decoder(tmp_path: Path) -> None:
    tensors = random_of(WHOLE)
    ckpt_dist.convert(laid(tmp_path / "it", tensors), tmp_path / "whole.pt", format="torch")
    found = torch.load(tmp_path / "whole.pt")
    wanted = {
        n.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"): w for n, (w, _) in tensors.items()
    }
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], w) for n, w in wanted.items())


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    tensors = random_of(WHOLE)
    tensors["decoder.final_norm.weight"] = tensors["decoder.final_layernorm.weight"]
    with pytest.raises(
        CheckpointError, match=r"final_layernorm.weight' and 'decoder.final_norm.weight' of one file both"
    ):
        ckpt_dist.inspect(laid(tmp_path / "it", tensors))


UNKNOWN = {
    "decoder.layers.0.mixer.in_proj.weight": ((40, 16), 0),
    "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": ((8, 16), 0),
    "decoder.layers.0.mixer.A_log": ((4,), 0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_rule_knows_is_read_where_ranks_hold_the_same(tmp_path: Path, name: str) -> None:
    rest = random_of(WHOLE)
    tensors = random_of({name: UNKNOWN[name]})
    source, alike = (
        laid(tmp_path / "it", rest | tensors),
        laid(tmp_path / "alike", rest | {name: (tensors[name][0], None)}),
    )
    says = rf"mp_rank_00/model_optim_rng.pt and .*mp_rank_01/model_optim_rng.pt hold different values of '{name}'"
    verbs: list[Callable[..., Any]] = [
        lambda p: ckpt_dist.convert(p, tmp_path / f"{p.name}.pt", format="torch"),
        lambda p: ckpt_dist.average([p, p], tmp_path / f"{p.name}-mean.pt", format="torch"),
        ckpt_dist.verify,
        ckpt_dist.fingerprint,
    ]
    for verb in verbs:
        with pytest.raises(CheckpointError, match=says):
            verb(source)
        verb(alike)
    assert not list(tmp_path.glob("it*.pt"))
    assert torch.equal(torch.load(tmp_path / "alike.pt")[name], tensors[name][0])
    assert any("no rule says how ranks divide them" in n for n in ckpt_dist.inspect(source)["notes"])
    with pytest.raises(CheckpointError, match="Convert it first"):
        ckpt_dist.dcp.reader(alike)


def test_layers_of_two_stages_that_nobody_counts(tmp_path: Path) -> None:
    source = laid(tmp_path / "it", random_of(WHOLE))
    for t in range(2):
        folder = source / "iter_0000005"
        shutil.copytree(folder / f"mp_rank_{t:02d}", folder / f"mp_rank_{t:02d}_001")
        (folder / f"mp_rank_{t:02d}").rename(folder / f"mp_rank_{t:02d}_000")
    rewritten(source, lambda tree, number: vars(tree["args"]).update(pipeline_model_parallel_size=2, num_layers=2))
    with pytest.raises(CheckpointError, match=r"both hold 'encoder.layers.0.\S+', of two stages"):
        ckpt_dist.inspect(source)


@pytest.mark.parametrize("replicas", ["first", "average"])
def test_norms_of_ranks_that_drifted(llama: Path, tmp_path: Path, replicas: str) -> None:
    ckpt_dist.convert(llama, tmp_path / "it", format="megatron", **{"target.tp": 2, "target.pp": 2})
    assert ckpt_dist.verify(tmp_path / "it", llama)["warnings"] == []

    def drifted(tree: dict[str, Any], number: int) -> None:
        if number in (2, 3):  # both stages of tensor-parallel rank 1
            tree["model"] = {n: t + 1 if "norm" in n else t for n, t in tree["model"].items()}

    rewritten(tmp_path / "it", drifted)
    says = "of 9 tensors that each of 2 ranks has, 9 differ, first 'decoder.final_layernorm.weight'"
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "hf", **{"source.replicas": replicas})
    if replicas == "average":
        assert any(says in w for w in report["warnings"])
    else:  # Megatron adds up their gradients, so they are alike; who wants to be sure asks
        assert any("first rank's are taken, not compared; verify compares them" in n for n in report["notes"])
    assert any(says in w for w in ckpt_dist.verify(tmp_path / "it", llama)["warnings"])
    found, was = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", llama))
    more = 0.5 if replicas == "average" else 0.0
    for name, tensor in was.items():
        torch.testing.assert_close(found[name], tensor + (more if "norm" in name else 0))


def test_routers_of_expert_parallel_ranks_that_drifted(tmp_path: Path) -> None:
    transformer("mixtral", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron", **{"target.tp": 2, "target.ep": 2})
    assert ckpt_dist.verify(tmp_path / "it")["warnings"] == []

    def drifted(tree: dict[str, Any], number: int) -> None:
        if number == 3:
            tree["model"]["decoder.layers.1.mlp.router.weight"] += 1

    rewritten(tmp_path / "it", drifted)
    (said,) = ckpt_dist.verify(tmp_path / "it", tmp_path / "hf")["warnings"]
    assert "each of 4 ranks has, 1 differ, first 'decoder.layers.1.mlp.router.weight'" in said


def test_a_model_that_only_looks_like_a_known_one(llama: Path, tmp_path: Path) -> None:
    """Llama's names, and no gates: twice as many columns after the activation as ranks would say."""
    ckpt_dist.convert(llama, tmp_path / "it", format="megatron", **{"target.tp": 2})

    def ungated(tree: dict[str, Any], number: int) -> None:
        tree["args"].swiglu, model = False, tree["model"]
        for name in [n for n in model if n.endswith("linear_fc2.weight")]:
            model[name] = torch.cat([model[name], model[name]], 1)

    rewritten(tmp_path / "it", ungated)
    found = ckpt_dist.inspect(tmp_path / "it")
    assert found["family"] == "unknown" and any("does not fit llama" in n for n in found["notes"])
    with pytest.raises(CheckpointError, match=r"does not fit llama.* with model=identity"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no")
    ckpt_dist.convert(tmp_path / "it", tmp_path / "as-it-is.pt", format="torch", model="identity")


def test_a_weight_that_is_kept_is_where_megatron_looks_for_it(tmp_path: Path) -> None:
    """A bias that balances experts, of a model whose family has none: Megatron asks for all layers' in one tensor."""
    transformer("qwen3_moe", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron")
    bias = {f"decoder.layers.{k}.mlp.router.expert_bias": torch.rand(4) for k in range(4)}
    rewritten(tmp_path / "it", lambda tree, number: tree["model"].update(bias))
    with pytest.raises(UsageError, match=r"is of one layer, 'decoder.layers.\D\S+' of all: .* model=identity"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", format="torch_dist", unmatched="keep")
    keys: dict[str, Any] = {"unmatched": "keep", "target.dialect": "megatron"}
    ckpt_dist.convert(tmp_path / "it", tmp_path / "each", format="torch_dist", **keys)
    assert torch.equal(state_of(tmp_path / "each/iter_0000001")[min(bias)], bias[min(bias)])
    ckpt_dist.convert(tmp_path / "it", tmp_path / "all", format="torch_dist", model="identity")
    found = state_of(tmp_path / "all/iter_0000001")["decoder.layers.mlp.router.expert_bias"]
    assert torch.equal(found, torch.stack([*bias.values()]))


def test_the_last_stages_copy_of_a_tied_embedding_in_any_model(tmp_path: Path) -> None:
    """Megatron's own modules have it on a last stage that is not the first, and nowhere else."""
    transformer("llama-tied", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron", **{"target.pp": 2})
    assert "output_layer.weight" in torch.load(rank_files(tmp_path / "it")[-1], weights_only=False)["model"]
    for pp in (1, 2):
        keys = {"model": "identity", "target.pp": pp}
        ckpt_dist.convert(tmp_path / "it", tmp_path / f"pp{pp}", format="megatron", **keys)
        for mine, his in zip(rank_files(tmp_path / f"pp{pp}"), rank_files(tmp_path / "it"), strict=pp == 2):
            a, b = (torch.load(f, weights_only=False)["model"] for f in (mine, his))
            assert ("output_layer.weight" in a) == (pp == 2 and "output_layer.weight" in b)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "dist", format="torch_dist", model="identity")
    assert "output_layer.weight" not in state_of(tmp_path / "dist/iter_0000001")


@pytest.mark.parametrize("keys", [{"target.pp": 2}, {"target.ep": 2}])
def test_folders_renamed_where_args_do_not_say_what_their_second_number_is(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    transformer("mixtral", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron", **keys)
    rewritten(tmp_path / "it", lambda tree, number: tree.pop("args"))
    with pytest.raises(CheckpointError, match=r"is not said.* Rename all folders to mp_rank_TT_PPP_EEE"):
        ckpt_dist.inspect(tmp_path / "it")
    for number, file in enumerate(rank_files(tmp_path / "it")):
        stage, expert = (number, 0) if "target.pp" in keys else (0, number)
        file.parent.rename(file.parent.with_name(f"mp_rank_00_{stage:03d}_{expert:03d}"))
    config = {"model.config": str(tmp_path / "hf")}
    assert ckpt_dist.fingerprint(tmp_path / "it", **config) == ckpt_dist.fingerprint(tmp_path / "hf")


@pytest.mark.parametrize(("tp", "etp"), [(2, 1), (1, 2)])
def test_experts_of_other_tensor_parallel_ranks_are_named_before_files_are_missed(
    tmp_path: Path, tp: int, etp: int
) -> None:
    transformer("mixtral", tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron", **{"target.tp": tp, "target.ep": 2})
    rewritten(tmp_path / "it", lambda tree, number: vars(tree["args"]).update(expert_tensor_parallel_size=etp))
    shutil.rmtree(sorted((tmp_path / "it/iter_0000001").iterdir())[-1])
    with pytest.raises(CheckpointError, match=rf"experts are divided by {etp} .* Save with the format torch_dist"):
        ckpt_dist.inspect(tmp_path / "it")


def test_experts_are_one_module_of_transformer_engine(tmp_path: Path) -> None:
    """Megatron takes `moe_grouped_gemm` over from a checkpoint, and by it calls experts this way or that."""
    transformer("mixtral", tmp_path / "hf")
    for spec in ("te", "local"):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / spec, format="megatron", **{"target.spec": spec})
        names = torch.load(rank_files(tmp_path / spec)[0], weights_only=False)["model"]
        assert args_in(tmp_path / spec)["moe_grouped_gemm"] is (spec == "te")
        assert any(n.endswith("experts.linear_fc1.weight3") for n in names) is (spec == "te")


def test_names_and_states_of_a_distributed_checkpoint_are_those_of_its_modules(tmp_path: Path) -> None:
    transformer("mixtral", tmp_path / "hf")
    norm, states = {}, {}
    for spec in ("te", "local"):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / spec, format="torch_dist", **{"target.spec": spec})
        names = set(state_of(tmp_path / spec / "iter_0000001"))
        (norm[spec],) = {n for n in names if re.search("pre_mlp_layernorm.weight|fc1.layer_norm_weight", n)}
        states[spec] = {n.partition("._extra_state")[0] for n in names if "_extra_state" in n}
        assert ckpt_dist.fingerprint(tmp_path / spec) == ckpt_dist.fingerprint(tmp_path / "hf")
    own = "decoder.layers."
    assert norm == dict(te=own + "pre_mlp_layernorm.weight", local=own + "mlp.linear_fc1.layer_norm_weight")
    more = {"decoder.final_layernorm", own + "pre_mlp_layernorm", own + "self_attention.core_attention"}
    assert states["te"] == states["local"] | more and len(states["local"]) == 4


def test_megatron_is_told_that_it_has_to_add_one_to_norms(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind, adds in (("gemma3_text", True), ("llama", None)):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL))
        model.save_pretrained(tmp_path / kind)
        ckpt_dist.convert(tmp_path / kind, tmp_path / f"{kind}-it", format="megatron")
        assert args_in(tmp_path / f"{kind}-it").get("apply_layernorm_1p") is adds


@pytest.mark.parametrize("further", [1, 2])
def test_layers_that_predict_further_tokens_are_counted_by_their_names(tmp_path: Path, further: int) -> None:
    """Hugging Face goes on counting: what only such layers have says where they begin."""
    top = Path(__file__).parent / "data/megatron-core-0.16-mtp/legacy"
    shutil.copytree(top, tmp_path / "it")

    def more(tree: dict[str, Any], number: int) -> None:
        model = tree["model"]
        again = {n.replace("mtp.layers.0.", "mtp.layers.1."): t for n, t in model.items() if n.startswith("mtp.")}
        model.update({n: t * 2 if t is not None else t for n, t in again.items()} if further == 2 else {})
        tree["args"].mtp_num_layers = further

    rewritten(tmp_path / "it", more)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "dcp", format="dcp", **{"target.dialect": "hf"})
    found = ckpt_dist.inspect(tmp_path / "dcp")["sizes"]
    assert found["n"] == further and found["l"] == ckpt_dist.inspect(tmp_path / "it")["sizes"]["l"]
    ckpt_dist.verify(tmp_path / "dcp")
    for source in ("it", "dcp"):
        ckpt_dist.convert(tmp_path / source, tmp_path / f"{source}-hf")
    one, two = (load_file(tmp_path / f"{source}-hf/model.safetensors") for source in ("it", "dcp"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_layers_of_an_unknown_model_between_the_formats(tmp_path: Path) -> None:
    """megatron-core 0.16.1 calls an encoder's and a decoder's layers so (its T5Model, and GPTModel without gates)."""
    one = random_of(WHOLE)
    two = one | {n.replace("layers.0", "layers.1"): (w + 1, dim) for n, (w, dim) in one.items() if "layers.0" in n}
    source = laid(tmp_path / "it", two, num_layers=2)
    assert ckpt_dist.convert(source, tmp_path / "dist", format="torch_dist")["warnings"] == []
    wanted = {n.replace("layers.0.", "layers."): w for n, (w, _) in one.items()}
    fused = "encoder.layers.self_attention.linear_qkv.layer_norm_weight"
    wanted[fused] = wanted.pop("encoder.layers.input_layernorm.weight")
    wanted |= {n: torch.stack([w, w + 1]) for n, w in wanted.items() if "layers." in n}
    state = state_of(tmp_path / "dist/iter_0000005")
    found = {n: t for n, t in state.items() if torch.is_tensor(t)}
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())
    assert "encoder.layers.self_attention.linear_qkv._extra_state/shard_0_2" in state
    with pytest.raises(UsageError, match=r"not taken apart: save it with Megatron's --ckpt-format torch"):
        ckpt_dist.convert(saved(tmp_path / "its", wanted, None), tmp_path / "no", format="megatron", model="identity")


def test_layers_that_are_not_alike_stay_apart(tmp_path: Path) -> None:
    one = random_of(WHOLE)
    two = one | {n.replace("layers.0", "layers.1"): v for n, v in one.items() if "layers.0" in n and "cross" not in n}
    ckpt_dist.convert(laid(tmp_path / "it", two, num_layers=2), tmp_path / "dist", format="torch_dist")
    found = state_of(tmp_path / "dist/iter_0000005")
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in found
    assert found["encoder.layers.self_attention.linear_qkv.weight"].shape == (2, 48, 16)


# ---- verl's folders


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
def test_a_run_of_verl_is_found_by_its_tracker(backend: str, tmp_path: Path) -> None:
    """`RUN/global_step_N/actor/`, with files of ranks or Megatron's `dist_ckpt/`; Megatron's tracker file says N."""
    data = Path(__file__).parent / "data"
    where = {
        "fsdp": (data / "torch-2.6.0/ranks", "."),
        "megatron": (data / "megatron-core-0.16-mtp/torch_dist/iter_0000007", "dist_ckpt"),
    }
    made, inside = where[backend]
    for step in (3, 6):
        shutil.copytree(made, tmp_path / f"run/global_step_{step}/actor" / inside)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("3")
    held = tmp_path / "run/global_step_3/actor" / inside
    wanted = ckpt_dist.inspect(made)
    for given in ("run", "run/global_step_3", "run/global_step_3/actor"):
        facts = ckpt_dist.inspect(tmp_path / given)
        assert Path(facts["path"]) == held and facts["format"] == wanted["format"], given
        assert facts["parameters"] == wanted["parameters"] > 0
