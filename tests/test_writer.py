"""Contract: `dcp.save` through `ckpt_dist.dcp.writer` makes of a running program's tensors what a conversion of a saved
checkpoint would, in whatever memory they lie; what is not written is said; a target is whole or not there.
Not checked here: four ranks (test_reader, whose program saves too), the formats themselves (test_formats).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_dist
from ckpt_dist.errors import UsageError
from tests.test_reader import SIZES, same, to_meta, to_torchtitan, zeros

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:.*deprecated")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    made = LlamaForCausalLM(LlamaConfig(**SIZES))
    made.folder = tmp_path_factory.mktemp("writer") / "hf"
    made.save_pretrained(made.folder)
    return made


def save(state: dict[str, Any], path: Path, *args: Any, planner: Any = None, **options: Any) -> ckpt_dist.dcp.Writer:
    writer = ckpt_dist.dcp.writer(path, *args, **options)
    dcp.save(state, storage_writer=writer, planner=planner)
    return writer


@pytest.mark.parametrize("dialect", ["hf", "meta", "torchtitan"])
def test_a_hugging_face_folder_from_names_of_any_dialect(model: Any, tmp_path: Path, dialect: str) -> None:
    from transformers import AutoModelForCausalLM

    whole = load_file(model.folder / "model.safetensors")
    spell = {"hf": lambda w, _: w, "meta": to_meta, "torchtitan": to_torchtitan}[dialect]
    save(spell(whole, model.config), tmp_path / "out", config=model.folder)
    same(load_file(tmp_path / "out/model.safetensors"), whole)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["dcp", "torch", "meta", "megatron", "torch_dist"])
def test_the_fingerprint_is_that_of_the_model_in_every_format(model: Any, tmp_path: Path, format: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # params.json has no word for some values of config.json
        ranks = 2 if format in ("meta", "megatron") else 1
        save(model.state_dict(), tmp_path / "out", format, config=model.folder, tp=ranks)
    found = ckpt_dist.fingerprint(tmp_path / "out", **{"model.config": str(model.folder)})
    assert found == ckpt_dist.fingerprint(model.folder)


def test_tensors_of_any_stride_and_dtype(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {
        "t": base.t(),
        "part": base[1:5, 2:7:2],
        "same": torch.tensor(1.5).expand(3, 4),
        "n": torch.arange(5),
        "scalar": torch.tensor(2.0, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
    }
    with pytest.warns(UserWarning, match=r"no config\.json was found"):
        save(state, tmp_path / "out", dtype="float16")
    expected = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    same(load_file(tmp_path / "out/model.safetensors"), expected)


def test_a_tied_model_is_whole_in_other_formats(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "hf")
    once = {k: v for k, v in tied.state_dict().items() if k != "lm_head.weight"}
    for name, state in (("both", dict(tied.state_dict())), ("once", once)):
        save(state, tmp_path / name, config=tmp_path / "hf")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        same(dict(again.state_dict()), dict(tied.state_dict()))
    save(once, tmp_path / "titan.pt", "torch", dialect="torchtitan", config=tmp_path / "hf")
    expected = to_torchtitan(dict(tied.state_dict()), tied.config)
    same(torch.load(tmp_path / "titan.pt", weights_only=True), expected)


def test_the_state_of_a_training_is_left_out_and_that_is_said(model: Any, tmp_path: Path) -> None:
    state = {"model": model.state_dict(), "optim": {"exp_avg": torch.ones(3), "lr": 0.1}, "step": 7}
    with pytest.warns(UserWarning) as said:
        save(state, tmp_path / "out", config=model.folder)
    text = "\n".join(str(w.message) for w in said)
    assert (
        "dropped, optimizer (keep=weights): optim.exp_avg, optim.lr" in text
        and "dropped, state (keep=weights): step" in text
    )
    same(load_file(tmp_path / "out/model.safetensors"), load_file(model.folder / "model.safetensors"))


def test_a_target_that_exists_stays_until_it_may_be_replaced(model: Any, tmp_path: Path) -> None:
    path, other = tmp_path / "out", zeros(dict(model.state_dict()))
    writer = save(model.state_dict(), path, config=model.folder)
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointException, match="nothing was written"):
        dcp.save(other, storage_writer=writer)
    assert (path / "model.safetensors").read_bytes() == before
    save(other, path, config=model.folder, overwrite=True)
    same(load_file(path / "model.safetensors"), other)
    dcp.save(model.state_dict(), storage_writer=writer, checkpoint_id=tmp_path / "second")
    assert (tmp_path / "second/model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "second"]


class Failing(dcp.DefaultSavePlanner):
    """Memory that cannot be read."""

    def resolve_data(self, write_item: Any) -> Any:
        raise OSError("the memory is gone")


def test_a_warning_that_is_an_error_leaves_no_trace(model: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "torch.distributed is")
        with pytest.raises(CheckpointException, match="step"):
            save({**model.state_dict(), "step": 7}, tmp_path / "out", config=model.folder)
    assert list(tmp_path.iterdir()) == []


class Half(dcp.DefaultSavePlanner):
    """A plan that has lost some of the model, as when a rank is left out of the process group."""

    def create_global_plan(self, all_plans: list[Any]) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        (item,) = (i for i in plans[0].items if i.index.fqn == "model.norm.weight")
        chunk = item.tensor_data.chunk
        chunk.sizes = torch.Size([60])
        return plans, metadata


def test_a_failure_leaves_no_trace_and_the_next_save_succeeds(model: Any, tmp_path: Path) -> None:
    writer = ckpt_dist.dcp.writer(tmp_path / "out", config=model.folder)
    for planner, says in (
        (Failing(), r"(?s)rank 0.*the memory is gone"),
        (Half(), r"(?s)the state dict: .*norm.*4 of 64 elements have no source"),
        (dcp.DefaultSavePlanner(enable_plan_caching=True), None),
        (dcp.DefaultSavePlanner(enable_plan_caching=True), "enable_plan_caching=True"),
    ):
        if says is None:  # the first of a cached plan is sent whole
            dcp.save(
                model.state_dict(),
                storage_writer=ckpt_dist.dcp.writer(tmp_path / "cached", config=model.folder),
                planner=planner,
            )
            continue
        with pytest.raises(CheckpointException, match=says):
            dcp.save(model.state_dict(), storage_writer=writer, planner=planner)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.ckpt_dist").exists()
    dcp.save(model.state_dict(), storage_writer=writer)
    same(load_file(tmp_path / "out/model.safetensors"), load_file(model.folder / "model.safetensors"))


def test_what_does_not_fit_is_said(model: Any, tmp_path: Path) -> None:
    titan = to_torchtitan(dict(model.state_dict()), model.config)
    with pytest.raises(CheckpointException, match=r"(?s)the state dict: .*model\.config=PATH"):
        save(titan, tmp_path / "out")
    with pytest.raises(CheckpointException, match=r"(?s)stored names are unknown to llama.*'more'"):
        save({**titan, "more": torch.ones(2)}, tmp_path / "out", config=model.folder)
    with pytest.raises(CheckpointException, match="holds no tensor"):
        save({"step": 3}, tmp_path / "out")
    for options, says in (
        (dict(format="hff"), "hff"),
        (dict(dtpye="bfloat16"), "no key 'dtpye'"),
        ({"keep": "weights,optimizer"}, "a writer writes weights"),
        (dict(dry_run=True), "dry_run"),
        ({"engine.verify": True}, "engine.verify"),
    ):
        with pytest.raises(UsageError, match=says):
            ckpt_dist.dcp.writer(tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="use_collectives"):
        dcp.save(titan, storage_writer=ckpt_dist.dcp.writer(tmp_path / "out"), use_collectives=False)
    assert list(tmp_path.iterdir()) == []
