"""Training goes on from what was converted: all that torch itself finds in the source is in the result, or it is said.

What is kept is judged by torch's own loaders. Sharded and real runs are in test_real.py, Megatron's, DeepSpeed's and
torchtitan's in their own files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import ckpt_dist
from ckpt_dist.errors import CheckpointError

EVERYTHING: dict[str, Any] = {"keep": ["weights", "optimizer", "state"], "quiet": True}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def trained(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def saved(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def loaded(path: Path) -> Any:
    """All of a checkpoint, as torch nests it."""
    if path.is_dir():
        dcp_to_torch_save(path, path.parent / f"{path.name}.all")
        path = path.parent / f"{path.name}.all"
    return torch.load(path, weights_only=False)


def flat(tree: Any, place: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Leaves by their path, tensors as values that can be compared; a path has the kind of its containers."""
    if isinstance(tree, dict) and tree:
        return {p: v for key, of in tree.items() for p, v in flat(of, (*place, key)).items()}
    if type(tree) in (list, tuple) and tree:
        return {p: v for k, of in enumerate(tree) for p, v in flat(of, (*place, type(tree).__name__, k)).items()}
    kind = type(tree).__name__
    is_tensor = isinstance(tree, torch.Tensor)
    return {place: (str(tree.dtype), tree.tolist()) if is_tensor else (kind, getattr(tree, "tolist", lambda: tree)())}


def test_an_optimizer_in_files_of_its_own_is_not_lost_in_silence(tmp_path: Path) -> None:
    """As accelerate (`optimizer_0`), verl and transformers' Trainer lay out a checkpoint."""
    weights, moments = get_state_dict(*trained(torch.nn.Linear(3, 2)))
    step = tmp_path / "run/checkpoint-3"
    saved(step / "pytorch_model_fsdp_0", {"model": weights})
    saved(step / "optimizer_0", {"optimizer": moments})
    torch.save({"last_epoch": 3}, step / "scheduler.bin")
    for given in (tmp_path / "run", step, step / "pytorch_model_fsdp_0"):
        report = ckpt_dist.convert(given, tmp_path / "out", format="dcp", overwrite=True, **EVERYTHING)
        assert [w.partition(" beside it")[0].rpartition("; ")[2] for w in report["warnings"]] == [
            "optimizer_0",
            "scheduler.bin",
        ]
        said = "beside the weights, and not read with them: optimizer_0, scheduler.bin"
        assert said in ckpt_dist.inspect(given)["notes"]
        assert said in ckpt_dist.convert(given, tmp_path / "out", overwrite=True, quiet=True)["notes"]
    keep: dict[str, Any] = {"keep": ["weights", "optimizer"], "quiet": True}
    report = ckpt_dist.convert(step / "optimizer_0", tmp_path / "moments", format="dcp", **keep)
    assert not report["warnings"] and flat(loaded(tmp_path / "moments")) == flat(loaded(step / "optimizer_0"))
    said = f"keep=state: {step / 'optimizer_0'} has none"
    assert said in ckpt_dist.convert(step / "optimizer_0", tmp_path / "all", format="dcp", **EVERYTHING)["notes"]
    for name in ("model_world_size_1_rank_0.pt", "optim_world_size_1_rank_0.pt"):
        torch.save(weights, tmp_path / name)
    (warning,) = ckpt_dist.convert(tmp_path, tmp_path / "fsdp", format="dcp", **keep)["warnings"]
    assert "keep=optimizer: " in warning and "optim_world_size_1_rank_0.pt beside it is not read with it" in warning
    assert ckpt_dist.convert(step / "pytorch_model_fsdp_0", tmp_path / "w", quiet=True)["warnings"][0].startswith(
        "no config"
    )


def test_an_optimizer_that_a_target_cannot_hold_is_not_lost_in_silence(tmp_path: Path) -> None:
    """A universal checkpoint is all of a run, but only of DeepSpeed's; of weights alone nothing is lost."""
    weights, moments = get_state_dict(*trained(torch.nn.Linear(3, 2)))
    universal: dict[str, Any] = {"format": "deepspeed", "target.universal": True, "quiet": True}
    for name, state, count in (("run", {"optim": moments}, 1), ("weights", {}, 0)):
        report = ckpt_dist.convert(
            saved(tmp_path / name, {"model": weights, **state}), tmp_path / f"{name}-out", **universal
        )
        assert [f"{name} has none that is carried" in w for w in report["warnings"]] == [True] * count


def test_a_target_without_a_tensor_is_not_made(tmp_path: Path) -> None:
    weights, moments = get_state_dict(*trained(torch.nn.Linear(3, 2)))
    for state, kind in (({"optimizer": moments}, "optimizer"), ({"train_state": {"model": weights}}, "state")):
        folder = saved(tmp_path / kind, state)
        says = rf"none of its \d tensors is carried; they are taken for {kind}, first .*keep=\[weights,{kind}\]"
        with pytest.raises(CheckpointError, match=says):
            ckpt_dist.convert(folder, tmp_path / "no", format="dcp")
        assert not (tmp_path / "no").exists()
        ckpt_dist.convert(folder, tmp_path / f"{kind}-kept", format="dcp", keep=["weights", kind], quiet=True)
        assert flat(loaded(tmp_path / f"{kind}-kept")) == flat(loaded(folder))


def test_modules_may_be_called_as_the_state_of_a_training_is(tmp_path: Path) -> None:
    model = torch.nn.Module()
    for name in ("scaler", "scheduler", "args", "trainer", "head"):
        model.add_module(name, torch.nn.Linear(2, 2))
    inner = {**model.state_dict(), "step": torch.tensor(7), "optim.weight": torch.ones(2)}
    for name, state in (("flat", dict(model.state_dict())), ("model", {"model": inner, "step": torch.tensor(5)})):
        torch.save(state, tmp_path / f"{name}.pt")
        saved(tmp_path / name, state)
        for source in (tmp_path / f"{name}.pt", tmp_path / name):
            ckpt_dist.convert(source, tmp_path / "out.pt", format="torch", overwrite=True, quiet=True)
            held = {k: v for k, v in state.items() if k != "step"}
            assert flat(torch.load(tmp_path / "out.pt")) == flat(held)


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flattened"])
@pytest.mark.parametrize("around", ["opt", ""])
def test_an_optimizer_of_any_name_is_one(tmp_path: Path, around: str, options: StateDictOptions | None) -> None:
    """Also where torch has flattened it, and where it lies beside the weights; its moments are no weights."""
    weights, moments = get_state_dict(*trained(torch.nn.Linear(3, 2)), options=options)
    for step in (1, 2):
        state = {**weights, **({around: moments} if around else moments)}
        saved(tmp_path / f"run/step-{step}", state)
    ckpt_dist.convert(tmp_path / "run", tmp_path / "all", format="dcp", **EVERYTHING)
    assert flat(loaded(tmp_path / "all")) == flat(loaded(tmp_path / "run/step-2"))
    ckpt_dist.convert(tmp_path / "run", tmp_path / "weights", format="dcp", quiet=True)
    ckpt_dist.average(tmp_path / "run", tmp_path / "mean", format="dcp", quiet=True)
    assert loaded(tmp_path / "weights").keys() == loaded(tmp_path / "mean").keys() == weights.keys()


def llama(tied: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    return trained(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).float())


@pytest.mark.parametrize("config", [False, True])
def test_a_training_of_a_tied_model_goes_on(tmp_path: Path, config: bool) -> None:
    """It has two names for one tensor, and asks for both; a published model has one."""
    model, optimizer = llama(tied=True)
    weights, moments = get_state_dict(model, optimizer)
    run = saved(tmp_path / "run", {"model": weights, "optim": moments})
    torch.save({"model": model.state_dict(), "optim": moments}, tmp_path / "run.pt")
    if config:
        model.config.save_pretrained(run)  # type: ignore[operator, union-attr]
    for source in (run, tmp_path / "run.pt"):
        for keys in ({}, {"target.dtype": "bfloat16"}, {"target.key": "net"}):
            out = tmp_path / "out"
            report = ckpt_dist.convert(source, out, format="dcp", overwrite=True, **EVERYTHING, **keys)
            assert not any("dropped" in n for n in report["notes"])
            assert "45 of 45 stored tensors are written" in report["notes"]
            asked = {keys.get("target.key", "model"): {n: torch.zeros_like(t) for n, t in weights.items()}}
            dcp.load(asked, checkpoint_id=out, no_dist=True)
            (found,) = asked.values()
            assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
            if not keys:
                assert flat(loaded(out)) == flat(loaded(run))
                assert ckpt_dist.fingerprint(out) == ckpt_dist.fingerprint(run)
    ckpt_dist.average([run, run], tmp_path / "mean.pt", format="torch", quiet=True)
    assert flat(torch.load(tmp_path / "mean.pt")) == flat({"model": weights})
    ckpt_dist.convert(run, tmp_path / "hf", quiet=True)
    from safetensors import safe_open

    assert "lm_head.weight" not in safe_open(tmp_path / "hf/model.safetensors", "pt").keys()  # noqa: SIM118
    assert ckpt_dist.fingerprint(tmp_path / "hf") == ckpt_dist.fingerprint(run)


@pytest.mark.parametrize(
    ("key", "prefix"), [("state_dict", "model."), ("model", "module."), ("model", "module.model.")]
)
def test_what_names_begin_with_is_part_of_them(tmp_path: Path, key: str, prefix: str) -> None:
    """As DDP and Lightning have them; a strict load knows no dict of that name."""
    model, optimizer = llama(tied=False)
    state = {key: {prefix + n: t for n, t in model.state_dict().items()}, "optimizer_states": [optimizer.state_dict()]}
    torch.save(state, tmp_path / "run.ckpt")
    ckpt_dist.convert(tmp_path / "run.ckpt", tmp_path / "out.ckpt", format="torch", **EVERYTHING)
    assert flat(torch.load(tmp_path / "out.ckpt")) == flat(state)
    ckpt_dist.convert(tmp_path / "run.ckpt", tmp_path / "dcp", format="dcp", quiet=True)
    assert flat(loaded(tmp_path / "dcp")) == flat({key: state[key]})
    assert ckpt_dist.inspect(tmp_path / "run.ckpt")["wrapper"] == f"{key}.{prefix.rstrip('.')}"


class Counts(torch.nn.Linear):
    """A module that keeps what is no tensor."""

    def get_extra_state(self) -> Any:
        return {"seen": 7, "scale": [0.5]}

    def set_extra_state(self, state: Any) -> None:
        assert state == self.get_extra_state()


def test_state_that_is_no_tensor_comes_along(tmp_path: Path) -> None:
    """numpy's random state and numbers, what modules keep in the model's dict, and lists in their order."""
    import random

    numpy = pytest.importorskip("numpy")
    model, optimizer = trained(Counts(3, 2))
    rng = [random.getstate(), numpy.random.get_state(), torch.get_rng_state()]
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "rng": rng, "best": numpy.float64(1.5)}
    state |= {"table": numpy.arange(6, dtype=">i2").reshape(2, 3), "names": numpy.array(["a", None], object)}
    run = saved(tmp_path / "run", state)
    ckpt_dist.convert(run, tmp_path / "out.pt", format="torch", **EVERYTHING)
    assert flat(loaded(tmp_path / "out.pt")) == flat(loaded(run))
    torch.save({**state, "rng": tuple(rng)}, tmp_path / "run.pt")
    ckpt_dist.convert(tmp_path / "run.pt", tmp_path / "out", format="dcp", **EVERYTHING)
    assert flat(loaded(tmp_path / "out")) == flat(loaded(run))


def test_state_in_one_dict_with_the_model(tmp_path: Path) -> None:
    """As Composer has it; no name of a dict says what its schedulers are."""
    weights, moments = get_state_dict(*trained(torch.nn.Linear(3, 2)))
    inner = {"model": weights, "optimizers": {"AdamW": moments}, "schedulers": {"cosine": {"last_epoch": 3}}}
    run = saved(
        tmp_path / "run", {"state": inner | {"timestamp": {"batch": 7}}, "rng": [{"cpu": torch.get_rng_state()}]}
    )
    report = ckpt_dist.convert(run, tmp_path / "out.pt", format="torch", **EVERYTHING)
    assert flat(loaded(tmp_path / "out.pt")) == flat(loaded(run)) and not report["warnings"]
    ckpt_dist.convert(run, tmp_path / "weights.pt", format="torch", quiet=True)
    assert flat(loaded(tmp_path / "weights.pt")) == flat({"state": {"model": weights}})


def test_a_list_of_absurd_length_is_refused(tmp_path: Path) -> None:
    import pickle

    run = saved(tmp_path / "run", {"w": torch.ones(2), "rng": [torch.ones(1), torch.zeros(1)]})
    metadata = dcp.FileSystemReader(run).read_metadata()
    assert metadata.planner_data is not None
    metadata.planner_data["rng.1"] = ("rng", 1 << 40)
    (run / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="A list of 1099511627777 values, of which 2 are there"):
        ckpt_dist.convert(run, tmp_path / "out.pt", format="torch", **EVERYTHING)


@pytest.mark.parametrize("format", ["torch", "dcp"])
def test_what_is_not_written_leaves_its_place_in_a_list(tmp_path: Path, format: str) -> None:
    import argparse

    odd = [torch.ones(2), argparse.Namespace(lr=1), torch.zeros(3), "x"]
    torch.save(
        {"model": {"w": torch.ones(2), "parts": [torch.ones(1), None, torch.zeros(1)]}, "rng": odd}, tmp_path / "run.pt"
    )
    out = tmp_path / {"torch": "out.pt", "dcp": "out"}[format]
    report = ckpt_dist.convert(tmp_path / "run.pt", out, format=format, **EVERYTHING)
    assert "dropped, of a class that is not written: rng.1" in report["notes"]
    found = loaded(out)
    assert flat(found["rng"]) == flat([odd[0], None, *odd[2:]])
    assert flat(found["model"]["parts"]) == flat([torch.ones(1), None, torch.zeros(1)])


def test_accelerates_whole_model_is_found_in_its_folder(tmp_path: Path) -> None:
    """Where FULL_STATE_DICT was saved, beside the optimizer and the scheduler."""
    model, optimizer = trained(torch.nn.Linear(3, 2))
    step = tmp_path / "checkpoint-3"
    step.mkdir()
    torch.save(model.state_dict(), step / "pytorch_model_fsdp.bin")
    torch.save(optimizer.state_dict(), step / "optimizer.bin")
    torch.save({"last_epoch": 3}, step / "scheduler.bin")
    report = ckpt_dist.convert(tmp_path, tmp_path / "out", quiet=True)
    assert "beside the weights, and not read with them: optimizer.bin, scheduler.bin" in report["notes"]
    from safetensors.torch import load_file

    assert flat(load_file(tmp_path / "out/model.safetensors")) == flat(dict(model.state_dict()))
    assert ckpt_dist.merge(tmp_path, quiet=True) == step
