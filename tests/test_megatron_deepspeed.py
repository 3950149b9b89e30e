"""Megatron-DeepSpeed's layer files, made here of transformers' models as its code makes them: by slicing and by the order
of its fused query, key and value, with torch alone. Not run: its trainer, which needs CUDA and apex.
"""

from __future__ import annotations

import argparse
import enum
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ckpt_dist
from ckpt_dist.cli import main
from ckpt_dist.errors import UsageError
from ckpt_dist.formats import megatron_deepspeed

HEADS, WIDTH, LAYERS, VOCABULARY, POSITIONS = 4, 32, 4, 64, 16
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        activation_function="gelu",
    ),
    "bloom": lambda: transformers.BloomConfig(
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    ),
}
State = dict[str, torch.Tensor]


def fused(q_k_v: torch.Tensor) -> torch.Tensor:
    """Rows of all q, then all k, then all v, in the order of heads: each its q, k and v."""
    return torch.cat([torch.cat([part.chunk(HEADS)[h] for part in q_k_v.chunk(3)]) for h in range(HEADS)])


def gpt2_layers(state: State) -> dict[int, State]:
    layers = {1: {"word_embeddings.weight": state["transformer.wte.weight"],
                  "position_embeddings.weight": state["transformer.wpe.weight"]}}  # fmt: skip
    for k in range(LAYERS):
        own = {
            n.removeprefix(f"transformer.h.{k}."): v for n, v in state.items() if n.startswith(f"transformer.h.{k}.")
        }
        layers[k + 3] = {
            "input_layernorm.weight": own["ln_1.weight"],
            "input_layernorm.bias": own["ln_1.bias"],
            "self_attention.query_key_value.weight": fused(own["attn.c_attn.weight"].T),
            "self_attention.query_key_value.bias": fused(own["attn.c_attn.bias"]),
            "self_attention.dense.weight": own["attn.c_proj.weight"].T,
            "self_attention.dense.bias": own["attn.c_proj.bias"],
            "post_attention_layernorm.weight": own["ln_2.weight"],
            "post_attention_layernorm.bias": own["ln_2.bias"],
            "mlp.dense_h_to_4h.weight": own["mlp.c_fc.weight"].T,
            "mlp.dense_h_to_4h.bias": own["mlp.c_fc.bias"],
            "mlp.dense_4h_to_h.weight": own["mlp.c_proj.weight"].T,
            "mlp.dense_4h_to_h.bias": own["mlp.c_proj.bias"],
        }
    return layers | {LAYERS + 4: {k: state[f"transformer.ln_f.{k}"] for k in ("weight", "bias")}}


def bloom_layers(state: State) -> dict[int, State]:
    norm = {
        f"word_embeddings.norm.{k}": state[f"transformer.word_embeddings_layernorm.{k}"] for k in ("weight", "bias")
    }
    layers = {1: {"word_embeddings.weight": state["transformer.word_embeddings.weight"], **norm}}
    for k in range(LAYERS):
        prefix = f"transformer.h.{k}."
        layers[k + 3] = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return layers | {LAYERS + 4: {k: state[f"transformer.ln_f.{k}"] for k in ("weight", "bias")}}


def slice_of(name: str, whole: torch.Tensor, tp: int, t: int) -> torch.Tensor:
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        return whole.chunk(tp, 1)[t].clone()
    if re.search(r"word_embeddings\.weight|query_key_value|dense_h_to_4h", name):
        return whole.chunk(tp)[t].clone()
    return whole.clone()


def arguments(kind: str, **more: Any) -> argparse.Namespace:
    """Args as such runs have them; one of them of a class that nobody else has."""
    return argparse.Namespace(
        num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, ffn_hidden_size=4 * WIDTH, padded_vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS, layernorm_epsilon=1e-5, init_method_std=0.02, bias_gelu_fusion=False, params_dtype=torch.float32,
        apply_residual_connection_post_layernorm=False, embed_layernorm=kind == "bloom", consumed_train_samples=640, **more,
    )  # fmt: skip


@contextmanager
def its_own_module() -> Iterator[type[enum.Enum]]:
    """A class that only the machine of the run has."""
    position = enum.Enum("PositionEmbeddingType", {"alibi": 3}, module="megatron.enums")
    module = types.ModuleType("megatron.enums")
    module.PositionEmbeddingType = position  # type: ignore[attr-defined]
    before = {n: sys.modules.get(n) for n in ("megatron", "megatron.enums")}
    sys.modules |= {"megatron": types.ModuleType("megatron"), "megatron.enums": module}
    try:
        yield position
    finally:
        for name, was in before.items():
            sys.modules.pop(name)
            sys.modules |= {name: was} if was else {}


def write(folder: Path, kind: str, state: State, tp: int = 2, pp: int = 2, dp: int = 2, enums: bool = True) -> Path:
    step = folder / "global_step5"
    step.mkdir(parents=True)
    layers = gpt2_layers(state) if kind == "gpt2" else bloom_layers(state)
    for number, held in layers.items():
        for t in range(tp):
            part = {n: slice_of(n, v, tp, t) for n, v in held.items()}
            torch.save(part, step / f"layer_{number:02d}-model_{t:02d}-model_states.pt")
    args = arguments(kind, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    info = {"padded_vocab_size": VOCABULARY, "original_vocab_size": VOCABULARY - 3}
    with its_own_module() as position:
        args.position_embedding_type = position(3) if enums else "absolute"
        for k in range(tp * pp):
            about = dict(module=None, args=args, checkpoint_version=3.0, iteration=5, tokens=7, checkpoint_info=info, dp_world_size=dp,
                         mp_world_size=tp, global_steps=5, rng_tracker_states={"a": torch.ones(3)}, optimizer=None)  # fmt: skip
            torch.save(about, step / f"mp_rank_{k:02d}_model_states.pt")
            for d in range(dp):
                zero = step / f"zero_pp_rank_{d}_mp_rank_{k:02d}_optim_states.pt"
                torch.save({"optimizer_state_dict": {"a": torch.ones(3)}}, zero)
    (folder / "latest").write_text("global_step5")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, torch.Tensor]:
    """The kind, a folder with the model in both formats (`hf`, `mds`), its logits."""
    top, kind = tmp_path_factory.mktemp(request.param), str(request.param)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(top / "hf")
    write(top / "mds", kind, dict(model.state_dict()))
    with torch.no_grad():
        return kind, top, model(IDS).logits


def equal(a: Path, b: Path) -> bool:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


Made = tuple[str, Path, torch.Tensor]


def test_transformers_computes_the_same(made: Made, tmp_path: Path) -> None:
    """No config.json: args say all, the activation too."""
    _, top, logits = made
    report = ckpt_dist.convert(top / "mds", tmp_path / "hf")
    assert equal(tmp_path / "hf", top / "hf")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (loaded.eval()(IDS).logits - logits).abs().max() < 1e-5
    found = ckpt_dist.inspect(top / "mds")
    assert found["format"] == "megatron_deepspeed" and found["layout"].startswith("tp=2, pp=2: ")
    assert "all 64 rows of the vocabulary; 61 are said to be words" in "".join(report["guesses"])
    assert any("tensors that each of 2 ranks has are equal" in n for n in report["notes"])


@pytest.mark.parametrize("target", ["megatron", "merak", "megatron_deepspeed", "torch_dist"])
@pytest.mark.parametrize("keys", [dict(tp=1, pp=1), dict(tp=4, pp=2)], ids=str)
def test_to_other_formats_and_back(made: Made, tmp_path: Path, target: str, keys: dict[str, int]) -> None:
    _, top, _ = made
    given = {} if target == "torch_dist" else keys
    ckpt_dist.convert(top / "mds", tmp_path / "it", format=target, **given)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back", **{"model.config": str(top / "hf")})
    assert equal(tmp_path / "back", top / "hf")
    assert ckpt_dist.fingerprint(tmp_path / "it", **{"model.config": str(top / "hf")}) == ckpt_dist.fingerprint(
        top / "hf"
    )


def test_our_layer_files_are_its_own(made: Made, tmp_path: Path) -> None:
    """The same files with the same names in them, and what its tools ask for beside them."""
    _, top, _ = made
    ckpt_dist.convert(top / "hf", tmp_path / "run", format="megatron_deepspeed", tp=2, pp=2)
    ours, theirs = tmp_path / "run/global_step1", top / "mds/global_step5"
    names = {p.name for p in theirs.iterdir() if not p.name.startswith("zero")}
    assert {p.name for p in ours.iterdir()} == names
    for name in sorted(n for n in names if n.startswith("layer")):
        a, b = torch.load(ours / name, weights_only=True), torch.load(theirs / name, weights_only=True)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    about = torch.load(ours / "mp_rank_03_model_states.pt", weights_only=False)
    wanted = dict(num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, ffn_hidden_size=4 * WIDTH, padded_vocab_size=VOCABULARY,
                  tensor_model_parallel_size=2, pipeline_model_parallel_size=2)  # fmt: skip
    assert wanted.items() <= vars(about["args"]).items() and about["iteration"] == 1 and about["module"] is None
    assert (tmp_path / "run/latest").read_text() == "global_step1"
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "1"
    found = ckpt_dist.inspect(tmp_path / "run")
    assert found["layout"].startswith("tp=2, pp=2") and found["path"].endswith("global_step1")


def test_the_old_jobs(made: Made, tmp_path: Path) -> None:
    """Each line of the documentation that scripts had."""
    _, top, _ = made
    step, wanted = top / "mds/global_step5", ckpt_dist.fingerprint(top / "hf")
    report = ckpt_dist.convert(
        step, tmp_path / "merak", format="merak", tp=2, pp=4, release=True, **{"target.partition": [0, 2, 3, 5, 7]}
    )
    assert report["target"] == str(tmp_path / "merak")
    file = tmp_path / "merak/release/mp_rank_01_pp_rank_003/partial_model_optim.pt"
    args = torch.load(file, weights_only=False)["args"]
    assert args.consumed_train_samples == args.consumed_valid_samples == 0 and args.num_layers == LAYERS
    assert ckpt_dist.fingerprint(tmp_path / "merak") == wanted
    ckpt_dist.convert(tmp_path / "merak", tmp_path / "hf")
    assert equal(tmp_path / "hf", top / "hf")
    ckpt_dist.convert(step, tmp_path / "megatron", format="megatron", tp=2, pp=2, release=True)
    assert (tmp_path / "megatron/release/mp_rank_01_001/model_optim_rng.pt").is_file()
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "release"
    assert ckpt_dist.fingerprint(tmp_path / "megatron") == wanted


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The size of the model that Merak's own converter was given as such files (tests/real/merak.py)."""
    for name, value in dict(HEADS=4, WIDTH=8, LAYERS=2, VOCABULARY=20, POSITIONS=8).items():
        monkeypatch.setitem(globals(), name, value)
    return Path(__file__).parent / "data/merak-1.1.0"


def test_what_another_reader_makes_of_these_files(small: Path, tmp_path: Path) -> None:
    """Merak's converter has BigScience's reader of such files: what it wrote of them is what we write of them."""
    state = torch.load(small / "hf-20/pytorch_model.bin", weights_only=True)
    write(tmp_path / "mds", "gpt2", state, enums=False)
    ckpt_dist.convert(tmp_path / "mds", tmp_path / "ours", format="merak", tp=2, pp=2)
    files = sorted((small / "deepspeed").rglob("*.pt"))
    assert len(files) == 4
    for file in files:
        mine = torch.load(tmp_path / "ours" / file.relative_to(small / "deepspeed"), weights_only=False)["model"]
        theirs = torch.load(file, weights_only=False)["model"]
        masks = [n for n in theirs if n.endswith(("attn.bias", "attn.masked_bias"))]
        assert masks and list(mine) == [n for n in theirs if n not in masks]
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    ckpt_dist.convert(small / "deepspeed", tmp_path / "hf")  # its args say how many heads there are
    ckpt_dist.convert(tmp_path / "mds", tmp_path / "was")
    assert equal(tmp_path / "hf", tmp_path / "was")


# ---- copies that drifted apart, vocabularies


def edited(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with its_own_module():
        tree = torch.load(file, weights_only=False)
        change(tree)
        torch.save(tree, file)


def copy_of(made: Made, folder: Path) -> Path:
    shutil.copytree(made[1] / "mds", folder)
    return folder / "global_step5"


@pytest.mark.parametrize("replicas", ["first", "average"])
def test_copies_that_drifted(made: Made, tmp_path: Path, replicas: str) -> None:
    step = copy_of(made, tmp_path / "it")
    edited(step / "layer_04-model_01-model_states.pt", lambda tree: tree["input_layernorm.weight"].add_(0.5))
    edited(step / "layer_08-model_01-model_states.pt", lambda tree: tree["bias"].add_(0.25))
    report = ckpt_dist.convert(step, tmp_path / "hf", **{"source.replicas": replicas})
    (said,) = [w for w in report["warnings"] if "differ" in w]
    assert "2 differ, first 'decoder.final_layernorm.bias'" in said
    found, was = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", made[1] / "hf"))
    more = 0.5 if replicas == "average" else 0.0
    norm = next(n for n in was if ".h.1." in n and n.endswith(("ln_1.weight", "input_layernorm.weight")))
    for name, drift in {norm: 0.5, "transformer.ln_f.bias": 0.25}.items():
        torch.testing.assert_close(found.pop(name), was.pop(name) + drift * more)
    assert all(torch.equal(found[n], was[n]) for n in was)


def test_verify_and_fingerprint_say_that_copies_drifted(made: Made, tmp_path: Path) -> None:
    step = copy_of(made, tmp_path / "it")
    assert ckpt_dist.verify(step)["warnings"] == []
    edited(step / "layer_04-model_01-model_states.pt", lambda tree: tree["input_layernorm.weight"].add_(0.5))
    says = "1 differ, first 'decoder.layers.1.self_attention.linear_qkv.layer_norm_weight'"
    for found in (
        ckpt_dist.verify(step),
        ckpt_dist.verify(step, made[1] / "hf"),
        ckpt_dist.verify(made[1] / "hf", step),
    ):
        assert [says in w for w in found["warnings"]] == [True]
    with pytest.warns(UserWarning, match=says):
        assert ckpt_dist.fingerprint(step) == ckpt_dist.fingerprint(made[1] / "hf")
    for verb in (ckpt_dist.verify, ckpt_dist.fingerprint):
        with pytest.raises(UsageError, match="takes the first rank's"):
            verb(step, **{"a.replicas": "average"})


def test_a_mean_of_copies_is_where_they_are_read_whatever_the_format_is_called(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, scan = copy_of(made, tmp_path / "it"), megatron_deepspeed.scan
    edited(step / "layer_04-model_01-model_states.pt", lambda tree: tree["input_layernorm.weight"].add_(0.5))
    keys = {"source.replicas": "average"}
    ckpt_dist.convert(step, tmp_path / "mean", **keys)
    monkeypatch.setattr(megatron_deepspeed, "scan", lambda *a: replace(scan(*a), format="megatron"))
    ckpt_dist.convert(step, tmp_path / "same", **keys)
    assert equal(tmp_path / "same", tmp_path / "mean")

    def silent(*a: Any) -> Any:
        found = scan(*a)
        return replace(found, about={k: v for k, v in found.about.items() if k != "replicated"})

    monkeypatch.setattr(megatron_deepspeed, "scan", silent)
    with pytest.raises(UsageError, match="megatron_deepspeed takes the first rank's"):
        ckpt_dist.convert(step, tmp_path / "no", **keys)


def test_a_vocabulary_without_its_padding(made: Made, tmp_path: Path) -> None:
    report = ckpt_dist.convert(made[1] / "mds", tmp_path / "hf", **{"target.vocab_size": 61})
    assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == 61
    assert "vocabulary of 61 instead of 64 rows" in "".join(report["notes"])
    config = json.loads((made[1] / "hf/config.json").read_text()) | {"vocab_size": 61}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"model.config": str(tmp_path / "config.json")}
    report = ckpt_dist.convert(made[1] / "mds", tmp_path / "hf2", **given)
    assert "61 rows of the vocabulary, as config.json says" in "".join(report["guesses"])
    assert equal(tmp_path / "hf", tmp_path / "hf2")
    with pytest.raises(UsageError, match=r"61, which 2 ranks cannot share evenly"):
        ckpt_dist.convert(tmp_path / "hf2", tmp_path / "no", format="megatron_deepspeed", tp=2)
    ckpt_dist.convert(tmp_path / "hf2", tmp_path / "it", format="merak", tp=2)  # which has a rule of its own
    ckpt_dist.convert(tmp_path / "it", tmp_path / "hf3")
    assert equal(tmp_path / "hf3", tmp_path / "hf2")


# ---- bad input


def without(name: str) -> Callable[[Path], Any]:
    return lambda step: (step / name).unlink()


SPOILED: list[tuple[Callable[[Path], Any], str]] = [
    (without("layer_04-model_01-model_states.pt"), r"layer_04-model_01-model_states\.pt is missing: other layers have 2"),
    (lambda s: [f.unlink() for f in s.glob("layer_04-*")], r"layer_04-model_00-model_states\.pt is missing"),
    (lambda s: [f.unlink() for f in s.glob("layer_06-*")], r"holds 3 layers, args say num_layers=4"),
    (lambda s: [f.unlink() for f in s.glob("layer_08-*")], r"layer_08-model_00-model_states\.pt is missing: the last norm"),
    (without("mp_rank_03_model_states.pt"), r"2 tensor-parallel ranks, there are 3 files mp_rank_"),
    (lambda s: edited(s / "mp_rank_02_model_states.pt", lambda t: t.update(iteration=6)), r"is of iteration 6, .* of 5"),
    (
        lambda s: edited(s / "layer_04-model_00-model_states.pt", lambda t: t.update(more=torch.ones(2))),
        r"decoder\.layers\.1\.more",
    ),
    (
        lambda s: edited(s / "layer_01-model_01-model_states.pt", lambda t: t.update({"word_embeddings.weight": torch.ones(9, WIDTH)})),
        r"part of float32\[18, 32\], that of another rank of float32\[64, 32\]",
    ),
    (
        lambda s: edited(s / "layer_04-model_00-model_states.pt", lambda t: t.update({5: torch.ones(2)})),
        r"layer_04-model_00-model_states.pt holds .* by name",
    ),
    (
        lambda s: edited(s / "layer_04-model_00-model_states.pt", lambda t: t.update({"self_attention.dense.weight": torch.ones(4)})),
        r"linear_proj.weight has shape \[4\]",
    ),
    (lambda s: (s.parent / "latest").write_text("global_step9"), r"says global_step9, but global_step9 is not there"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), SPOILED, ids=range(len(SPOILED)))
def test_what_is_wrong_is_said(
    made: Made, tmp_path: Path, spoil: Callable[[Path], Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    step = copy_of(made, tmp_path / "it")
    spoil(step)
    assert main("convert", [f"source.path={step.parent}", f"target.path={tmp_path / 'no'}"]) == 3
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "no").exists()
