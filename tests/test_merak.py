"""Merak's checkpoints against what Merak itself wrote: its converter's files (1.1.0) and its trainer's (2.2.2), kept in
tests/data and made by tests/real/merak.py. Where Merak is installed, its trainer loads ours.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ckpt_dist
from ckpt_dist import merak
from ckpt_dist.cli import main
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import legacy
from tests.conftest import torchrun
from tests.test_resume import noted, start, wait

DATA = Path(__file__).parent / "data"
CONVERTED, TRAINED = DATA / "merak-1.1.0", DATA / "merak-2.2.2"
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # folder of the converter's -> vocabulary, our keys for the same
    "t1p1": (20, {}),
    "t2p1": (20, dict(tp=2)),
    "t2p2": (20, dict(tp=2, pp=2)),
    "padded": (11, dict(tp=2, pp=2)),
    "t2p3": (20, dict(tp=2, pp=3, partition=[0, 3, 4, 5])),
    "floor": (20, dict(pp=2, partition_method="uniform_floor")),
}
SMALL: dict[str, Any] = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, vocab_size=64)
KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=12, n_head=4, vocab_size=64, n_positions=16),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=64),
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=4, intermediate_size=48),
}


def rank_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*model_optim.pt"))


def equal(a: Path, b: Path) -> bool:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model of transformers as it saves it, with no value twice."""
    known: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in known:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]())
            for p in model.parameters():
                torch.nn.init.normal_(p)
            known[kind] = tmp_path_factory.mktemp(kind) / "hf"
            model.save_pretrained(known[kind])
        return known[kind]

    return of


# ---- what Merak wrote


def hf_of(vocabulary: int, folder: Path) -> Path:
    """What its converter began with: pytorch_model.bin and config.json."""
    ckpt_dist.convert(CONVERTED / f"hf-{vocabulary}", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_its_converter_wrote_is_read(case: str, tmp_path: Path) -> None:
    vocabulary, _ = CASES[case]
    hf = hf_of(vocabulary, tmp_path / "hf")
    ckpt_dist.convert(CONVERTED / case, tmp_path / "back", **{"model.config": str(hf)})
    assert equal(tmp_path / "back", hf)


@pytest.mark.parametrize("case", CASES)
def test_our_files_are_its_converters(case: str, tmp_path: Path) -> None:
    """Folders, trackers, names in their order, shapes and values, padding of the vocabulary too."""
    vocabulary, keys = CASES[case]
    ckpt_dist.convert(hf_of(vocabulary, tmp_path / "hf"), tmp_path / "ours", format="merak", **keys)
    theirs = CONVERTED / case
    for name in ("latest_checkpointed_iteration.txt", *(p.relative_to(theirs) for p in rank_files(theirs))):
        assert (tmp_path / "ours" / name).is_file(), name
    assert (tmp_path / "ours/latest_checkpointed_iteration.txt").read_text() == "release"
    assert len(rank_files(theirs)) == len(rank_files(tmp_path / "ours"))
    for file in rank_files(theirs):
        a, b = (torch.load(f, weights_only=True) for f in (tmp_path / "ours" / file.relative_to(theirs), file))
        assert list(a["model"]) == list(b["model"]) and a["checkpoint_version"] == b["checkpoint_version"]
        assert all(torch.equal(a["model"][n], t) and a["model"][n].is_contiguous() for n, t in b["model"].items())


@pytest.mark.parametrize("case", ["t1p1", "t2p2", "t2p1", "zero"])
def test_what_its_trainer_saved_is_read(case: str, tmp_path: Path) -> None:
    """Old pickles, tied modules, masks, optimizers; modules that number otherwise; a vocabulary that ranks do not share."""
    hf = hf_of(20, tmp_path / "hf")
    report = ckpt_dist.convert(TRAINED / case, tmp_path / "back", **{"model.config": str(hf)})
    assert equal(tmp_path / "back", hf)
    said = "\n".join(report["notes"])
    assert "dropped, copy of a tied weight" in said and "dropped, derived buffer" in said
    assert "_ckpt is the newest" in said
    assert ("zero_dp_rank_00001_opt_states.pt" in said) == (case == "zero")
    assert all(legacy.is_legacy(f.read_bytes()[:16]) for f in rank_files(TRAINED / case))


def test_master_weights_of_zero(tmp_path: Path) -> None:
    """Its run in fp32, of two data-parallel ranks, after steps: master weights are the model. `zero` was saved after it had
    loaded a release, before its optimizer took over: there they are what the run was made with."""
    keys: dict[str, Any] = {"model.config": str(CONVERTED / "hf-20"), "source.weights": "master"}
    own = ckpt_dist.convert(TRAINED / "zero-trained", tmp_path / "own", **{"model.config": keys["model.config"]})
    report = ckpt_dist.convert(TRAINED / "zero-trained", tmp_path / "back", **keys)
    assert equal(tmp_path / "back", tmp_path / "own")
    assert "master weights of ZeRO stage 1, 2 files" in "\n".join(report["notes"]) and own["notes"] != report["notes"]
    ckpt_dist.convert(TRAINED / "zero", tmp_path / "first", **keys)
    first = load_file(tmp_path / "first/model.safetensors")
    assert all((t == ("weight" in n)).all() for n, t in first.items() if "ln_" in n or "bias" in n)
    with pytest.raises(CheckpointError, match=r"0 files of the optimizer of tensor rank 0, stage 0"):
        ckpt_dist.convert(TRAINED / "t1p1", tmp_path / "no", **keys)
    run = Path(shutil.copytree(TRAINED / "zero-trained", tmp_path / "run"))
    next(run.rglob("zero_dp_rank_00001*")).unlink()
    with pytest.raises(CheckpointError, match="are in no file of the optimizer; 1 are there"):
        ckpt_dist.convert(run, tmp_path / "no", **keys)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("keys", [dict(tp=2, pp=2), dict(tp=1, pp=3)], ids=str)
def test_master_weights_of_other_ranks(keys: dict[str, int], made: Made, tmp_path: Path) -> None:
    """Cut as its optimizer cuts them (core/zero/stage1.py): slices of one length that three ranks take in turn. Files are
    called as by 2.x, or as by 1.x, without zeros in front of numbers."""
    wide = (5, 2, 3) if keys["tp"] > 1 else (1, 1, 1)
    ckpt_dist.convert(made("gpt2"), tmp_path / "it", format="merak", **keys)
    for file in rank_files(tmp_path / "it"):
        tree = torch.load(file, weights_only=True)
        state = {n: t.clone() for n, t in tree["model"].items()}
        groups = [{n: t for n, t in state.items() if ("bias" in n) == late} for late in (False, True)]
        for d, parts in enumerate(zip(*([_turns(g, 3, 2) for g in groups]))):
            numbers = (d, *map(int, re.findall(r"\d+", file.parent.name)))
            words = [f"{k}_rank_{n:0{w}}" for k, n, w in zip(("dp", "mp", "pp"), numbers, wide)]
            name = "_".join(["zero", *words, "opt_states.pt"])
            inner = {"local_sub_partitions_of_fp32_groups": list(parts)}
            shapes = [{n: t.shape for n, t in g.items()} for g in groups]
            torch.save({"optimizer_state_dict": inner, "param_shapes": shapes}, file.parent.parent / name)
        torch.save({**tree, "model": {n: torch.zeros_like(t) for n, t in state.items()}}, file)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back", **{"source.weights": "master"})
    assert equal(tmp_path / "back", made("gpt2"))


def test_a_last_rank_that_is_missing_is_not_taken_for_padding(made: Made, tmp_path: Path) -> None:
    """Half of the last interval may be padding, more than a rank has: what is there would be enough, and in wrong places."""
    ckpt_dist.convert(made("gpt2"), tmp_path / "it", format="merak", tp=1, pp=1)
    (file,) = rank_files(tmp_path / "it")
    tree = torch.load(file, weights_only=True)
    state = {n: t.clone() for n, t in tree["model"].items()}
    count = sum(t.numel() for t in state.values())
    bucket = -(-count * 5 // 8) // 8 * 8  # two intervals, a fifth of which is padding
    line = torch.cat([t.flatten() for t in state.values()])
    slices = torch.nn.functional.pad(line, (0, 2 * bucket - count)).split(bucket // 8)
    torch.save({**tree, "args": argparse.Namespace(zero_reduce_bucket_size=bucket)}, file)
    for d in range(8):
        inner = {"local_sub_partitions_of_fp32_groups": [[s.clone() for s in slices[d::8]]]}
        shapes = [{n: t.shape for n, t in state.items()}]
        name = f"zero_dp_rank_{d:05d}_opt_states.pt"
        torch.save({"optimizer_state_dict": inner, "param_shapes": shapes}, file.parent / name)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back", **{"source.weights": "master"})
    assert equal(tmp_path / "back", made("gpt2"))
    (file.parent / name).unlink()
    with pytest.raises(CheckpointError, match="those of the last data-parallel ranks are missing"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", **{"source.weights": "master"})
    inner = {"local_sub_partitions_of_fp32_groups": [[slices[0].clone()]]}
    torch.save({"optimizer_state_dict": inner, "param_shapes": shapes}, file.parent / name)
    with pytest.raises(CheckpointError, match=r"rank_00007_opt_states\.pt has 1 slices of group 0, .*_00000_.* has 2"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no", **{"source.weights": "master"})


def _turns(tensors: dict[str, torch.Tensor], world: int, intervals: int) -> list[list[torch.Tensor]]:
    """What each rank has of some tensors end to end: of each interval one slice."""
    line = torch.cat([t.flatten() for t in tensors.values()])
    length = -(-len(line) // (world * intervals))
    slices = torch.nn.functional.pad(line, (0, length * world * intervals - len(line))).split(length)
    return [[s.clone() for s in slices[d::world]] for d in range(world)]


@pytest.mark.skipif(
    find_spec("Merak") is None, reason="Merak (HPDL-Group/Merak 2.2.2, transformers 4.46) is not installed"
)
def test_its_trainer_loads_ours(tmp_path: Path) -> None:
    """It loads, saves at once, and what it saved is the model we began with."""
    hf = hf_of(20, tmp_path / "hf")
    keys = dict(tp=2, pp=2, partition=[0, 3, 5])
    ckpt_dist.convert(hf, tmp_path / "ours", format="merak", **keys)
    done = torchrun(4, "-m", "tests.real.merak", "train", tmp_path / "ours", tmp_path / "saved", 2, 2)
    assert done.returncode == 0, done.stderr[-5000:]
    ckpt_dist.convert(tmp_path / "saved", tmp_path / "back", **{"model.config": str(hf)})
    assert equal(tmp_path / "back", hf)


# ---- from every layout to every other


GRID = [dict(tp=t, pp=p) for t in (1, 2, 4) for p in (1, 2, 4)]
CUSTOM = [dict(tp=2, pp=4, partition=[0, 3, 7, 11, 15]), dict(tp=1, pp=3, partition=[0, 1, 2, 15])]


def test_from_every_layout_to_others(made: Made, tmp_path: Path) -> None:
    """Two rounds over all layouts, in different orders: each layout's files are the same whatever they were made of.

    So what holds for these pairs holds for all; a round over all 110 was run once (docs/design/20-merak.md).
    """
    hf, layouts = made("gpt2"), [*GRID, *CUSTOM]
    wanted, source, files = ckpt_dist.fingerprint(hf), hf, {}
    for step in range(2 * len(layouts)):
        at = (step if step < len(layouts) else 4 * step + 2) % len(layouts)
        target = tmp_path / f"{step}"
        keys = {"engine.verify": step % 8 == 0, "engine.fsync": False}
        report = ckpt_dist.convert(source, target, format="merak", **layouts[at], **keys)
        assert report.get("fingerprint", wanted) == wanted and ("fingerprint" in report) == (step % 8 == 0)
        mine = {p.relative_to(target): p.read_bytes() for p in rank_files(target)}
        assert files.setdefault(at, mine) == mine, layouts[at]
        source = target
    assert len(files) == len(layouts)
    ckpt_dist.convert(source, tmp_path / "back")
    assert equal(tmp_path / "back", hf) and ckpt_dist.fingerprint(tmp_path / "back") == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [dict(tp=1, pp=2), dict(tp=2, pp=2), dict(tp=4)], ids=str)
def test_other_families_too(made: Made, tmp_path: Path, kind: str, keys: dict[str, int]) -> None:
    hf = made(kind)
    ckpt_dist.convert(hf, tmp_path / "it", format="merak", **keys)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert equal(tmp_path / "back", hf) and ckpt_dist.fingerprint(tmp_path / "it") == ckpt_dist.fingerprint(hf)
    assert (tmp_path / "back/config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_llamas_ranks_are_slices_of_its_linear_layers(made: Made, tmp_path: Path) -> None:
    ckpt_dist.convert(made("llama"), tmp_path / "it", format="merak", tp=2)
    whole = load_file(made("llama") / "model.safetensors")
    for t, file in enumerate(rank_files(tmp_path / "it")):
        state = torch.load(file, weights_only=True)["model"]
        for name, dim in (("self_attn.q_proj.col", 0), ("mlp.up_proj.col", 0), ("self_attn.o_proj.row", 1)):
            mine = state[f"module.2.model.layers.1.{name}_linear.weight"]
            theirs = whole[f"model.layers.1.{name.rpartition('.')[0]}.weight"]
            assert torch.equal(mine, theirs.chunk(2, dim)[t])


def test_which_stage_has_what(made: Made, tmp_path: Path) -> None:
    ckpt_dist.convert(made("gpt2"), tmp_path / "it", format="merak", pp=4, partition=[0, 3, 7, 11, 15])
    held = [
        {merak.NUMBER.sub("", n, count=1) for n in torch.load(f, weights_only=True)["model"]}
        for f in rank_files(tmp_path / "it")
    ]
    layers = [sorted({int(n.split(".")[2]) for n in names if ".h." in n}) for names in held]
    assert layers == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    ends = [{n for n in names if ".h." not in n} for names in held]
    assert ends[0] == {"transformer.wte.weight", "transformer.wpe.weight"} and not ends[1] and not ends[2]
    assert ends[3] == {"transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"}


@pytest.mark.parametrize(
    ("pp", "method", "wanted"),
    [
        (2, "uniform", [0, 4, 7]),
        (3, "uniform_floor", [0, 2, 4, 7]),
        (3, "uniform", [0, 3, 6, 7]),
        (7, "uniform", list(range(8))),
    ],
)
def test_partitions(pp: int, method: str, wanted: list[int]) -> None:
    names = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"]
    found = merak.modules([*names, *(f"transformer.h.{k}.ln_1.weight" for k in range(4))])
    assert merak.bounds(found, pp, method, None) == wanted


def test_a_killed_job_goes_on(made: Made, tmp_path: Path) -> None:
    words = ["convert", f"source.path={made('gpt2')}", f"target.path={tmp_path / 'out'}", "target.format=merak"]
    words += ["target.tp=2", "target.pp=2", "engine.workers=1"]
    job = start(1, 0.01, *words)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 5)
    job.kill()
    job.communicate(timeout=60)
    assert job.returncode == -9 and not (tmp_path / "out").exists()
    report = ckpt_dist.convert(made("gpt2"), tmp_path / "out", format="merak", tp=2, pp=2)
    assert any("tiles were there already" in note for note in report["notes"])
    ckpt_dist.convert(made("gpt2"), tmp_path / "straight", format="merak", tp=2, pp=2)
    ours, theirs = (sorted(p.relative_to(f) for p in rank_files(f)) for f in (tmp_path / "out", tmp_path / "straight"))
    assert ours == theirs and len(ours) == 4
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "straight" / n).read_bytes() for n in ours)


# ---- folders and trackers


def test_folders_of_every_generation(made: Made, tmp_path: Path) -> None:
    hf, wanted = made("gpt2"), ckpt_dist.fingerprint(made("gpt2"))

    def read(path: Path) -> str:
        assert ckpt_dist.fingerprint(path, **{"model.config": str(hf)}) == wanted
        return str(ckpt_dist.inspect(path)["path"])

    one, two = tmp_path / "run/2026-01-31_ckpt", tmp_path / "run/2026-02-01_ckpt"
    ckpt_dist.convert(hf, one, format="merak", dtype="float16", tp=2)
    ckpt_dist.convert(hf, two, format="merak", release=False)
    assert (two / "iter_0000001_all_dp/model_optim.pt").is_file()
    assert (two / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert read(tmp_path / "run") == read(two) == read(two / "iter_0000001_all_dp")
    assert read(two / "iter_0000001_all_dp/model_optim.pt")
    (two / "latest_checkpointed_iteration.txt").unlink()
    assert read(two).endswith("iter_0000001_all_dp")
    shutil.move(two / "iter_0000001_all_dp", two / "iter_0000001")
    assert read(two).endswith("iter_0000001")
    best = tmp_path / "best_ckpt"
    ckpt_dist.convert(hf, best, format="merak", tp=2, pp=2)
    shutil.move(best / "release", best / "best_model")
    (best / "best_model_loss.txt").write_text("0.5")
    (best / "latest_checkpointed_iteration.txt").write_text("40")
    assert read(best).endswith("best_model")
    (best / "latest_checkpointed_iteration.txt").unlink()
    assert read(best).endswith("best_model")
    (best / "best_model/zero_dp_rank_0_mp_rank_0_pp_rank_0_opt_states.pt").write_bytes(b"optimizer")
    (best / "best_model/lora_config.json").write_text("{}")
    assert read(best / "best_model").endswith("best_model")
    ckpt_dist.convert(hf, tmp_path / "iter", format="merak", tp=2, release=False)
    assert read(tmp_path / "iter").endswith("iter_0000001")


def test_adapters(tmp_path: Path) -> None:
    """A LoRA file is a flat dict; its stages become one file of tensors under the names that they have."""
    names = [f"module.{k + 2}.transformer.h.{k}.attn.c_attn.lora_{ab}.default.weight" for k in range(4) for ab in "AB"]
    state = {n: torch.randn(2, 8) for n in names}
    for p in range(2):
        held = {n: state[n] for n in names[4 * p : 4 * p + 4]}
        old(tmp_path / f"it/iter_0000003/mp_rank_00_pp_rank_00{p}/lora_partial_model_optim.pt", held)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "stages")
    old(tmp_path / "one/iter_0000003_all_dp/lora_model_optim.pt", state)
    ckpt_dist.convert(tmp_path / "one", tmp_path / "alone")
    found = load_file(tmp_path / "stages/model.safetensors")
    assert equal(tmp_path / "alone", tmp_path / "stages") and found.keys() == {n.split(".", 2)[2] for n in names}
    assert all(torch.equal(found[n.split(".", 2)[2]], t) for n, t in state.items())


def test_a_vocabulary_that_ranks_do_not_share(made: Made, tmp_path: Path) -> None:
    ckpt_dist.convert(made("gpt2"), tmp_path / "it", format="merak", tp=2, pp=2, embedding="whole")
    states = [torch.load(f, weights_only=True)["model"] for f in rank_files(tmp_path / "it")]
    assert states[0]["module.0.transformer.wte.weight"].shape == states[3]["module.14.lm_head.weight"].shape == (64, 32)
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back")
    assert equal(tmp_path / "back", made("gpt2"))


def test_there_is_no_need_of_a_config_but_for_heads(made: Made, tmp_path: Path) -> None:
    """One rank's names are transformers': without a config they stay as they are. Several need the number of heads."""
    bare = {"model.config": str(made("gpt2"))}
    for tp in (1, 2):
        ckpt_dist.convert(made("gpt2"), tmp_path / f"t{tp}", format="merak", tp=tp)
        (tmp_path / f"t{tp}/config.json").unlink()
    report = ckpt_dist.convert(tmp_path / "t1", tmp_path / "back")
    assert equal(tmp_path / "back", made("gpt2")) and "no config.json was found" in "".join(report["warnings"])
    with pytest.raises(UsageError, match=r"the lengths of d, h cannot be read.*model\.config"):
        ckpt_dist.convert(tmp_path / "t2", tmp_path / "back2")
    ckpt_dist.convert(tmp_path / "t2", tmp_path / "back2", **bare)
    assert equal(tmp_path / "back2", made("gpt2"))


# ---- bad input: one message, nothing written


def edited(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = torch.load(file, weights_only=True)
    change(tree)
    torch.save(tree, file)


def remove(folder: Path) -> None:
    shutil.rmtree(folder / "release/mp_rank_01_pp_rank_001")


def no_last_stage(folder: Path) -> None:
    for stage in (folder / "release").glob("*_pp_rank_001"):
        shutil.rmtree(stage)


def no_layer(folder: Path) -> None:
    for file in rank_files(folder):
        edited(file, lambda tree: [tree["model"].pop(n) for n in list(tree["model"]) if ".h.3." in n])


def no_end(folder: Path) -> None:
    for file in rank_files(folder):
        edited(file, lambda tree: [tree["model"].pop(n) for n in list(tree["model"]) if n.startswith("module.14.")])


def mixed(folder: Path) -> None:
    shutil.copytree(folder / "release/mp_rank_00_pp_rank_000", folder / "release/mp_rank_00")


def mixed_whole(folder: Path) -> None:
    shutil.copy(rank_files(folder)[0], folder / "release/model_optim.pt")


def other_step(folder: Path) -> None:
    edited(rank_files(folder)[2], lambda tree: tree.update(iteration=7))


def no_model(folder: Path) -> None:
    edited(rank_files(folder)[1], lambda tree: tree.pop("model"))


def other_model(folder: Path) -> None:
    name = "module.0.transformer.wte.weight"
    edited(rank_files(folder)[2], lambda tree: tree["model"].update({name: torch.ones(16, 32)}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (remove, r"mp_rank_01_pp_rank_001/partial_model_optim\.pt is missing: the run had 2 x 2"),
        (no_last_stage, r"mp_rank_00_pp_rank_001/partial_model_optim\.pt is missing: the run had 2 x 2"),
        (no_end, r"lacks what comes after the layers\. Is the folder of a stage missing"),
        (no_layer, r"lacks layer 3\. "),
        (mixed, r"several saves: mp_rank_00 and mp_rank_00_pp_rank_000"),
        (mixed_whole, r"several saves: model_optim\.pt and mp_rank_00_pp_rank_000"),
        (other_step, r"is of iteration 7, .* of 0\. The files are of two saves"),
        (no_model, r"holds no model"),
        (other_model, r"'transformer\.wte\.weight' is part of .*\[32, 32\], that of another rank of .*\[64, 32\]"),
    ],
)
def test_what_is_wrong_is_said(
    made: Made, tmp_path: Path, spoil: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt_dist.convert(made("gpt2"), tmp_path / "it", format="merak", tp=2, pp=2)
    spoil(tmp_path / "it")
    assert main("convert", [f"source.path={tmp_path / 'it'}", f"target.path={tmp_path / 'no'}"]) == 3
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (dict(pp=2, partition=[0, 7, 14]), r"ends with 14; the model has 15 modules .*begin with 0 and end with 15"),
        (dict(pp=2, partition=[1, 7, 15]), r"begins with 1 and ends with 15"),
        (dict(pp=2, partition=[0, 7, 9, 15]), r"bounds of 3 stages, target\.pp=2 makes 2\. Give target\.pp=3"),
        (dict(pp=3, partition=[0, 9, 9, 15]), r"stage 1 would hold none"),
        (dict(pp=3, partition=[0, 9, 4, 15]), r"stage 1 would hold none"),
        (dict(pp=11), r"stage 8 would hold none of the 15 modules"),
        (dict(tp=3), r"4 attention heads cannot be divided by 3"),
        (dict(tp=2, embedding="hidden"), r"target\.embedding=hidden: merak has no such ranks"),
        (dict(format="hf", release=True), r"target\.release=True: hf knows nothing"),
        (dict(vpp=2), r"merak knows nothing of the kind, megatron do"),
        (dict(tp=2, model="identity"), r"its family is not|is of no known family"),
    ],
)
def test_layouts_that_cannot_be(made: Made, tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    model = {"model": keys.pop("model")} if "model" in keys else {}
    with pytest.raises(UsageError, match=says):
        ckpt_dist.convert(made("gpt2"), tmp_path / "no", **{"format": "merak", **keys, **model})
    assert not (tmp_path / "no").exists()


# ---- files of torch.save without its zip


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/never",)


def old(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def test_old_files(tmp_path: Path) -> None:
    """Views of one storage, strides, all dtypes, empty tensors, parameters, what is no tensor."""
    base = torch.arange(24.0).reshape(4, 6)
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    values = {"base": base, "view": base[1:3], "across": base.T, "none": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    values |= {f"k{n}": torch.arange(5).to(k) for n, k in enumerate(kinds)}
    values["parameter"] = torch.nn.Parameter(torch.ones(3))
    file = old(tmp_path / "model.pt", {"model": values, "step": 3, "args": {"lr": 0.1}})
    assert legacy.is_legacy(file.read_bytes()[:16])
    ckpt_dist.convert(file, tmp_path / "new.pt", format="torch", keep=["weights", "state"], model="identity")
    found = torch.load(tmp_path / "new.pt")
    assert found["step"] == 3 and found["args"] == {"lr": 0.1} and found["model"].keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(found["model"][name], value) and found["model"][name].dtype == value.dtype


def cut(file: Path, keep: Iterator[int] | range) -> None:
    data = file.read_bytes()
    for length in keep:
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|no file of torch"):
            ckpt_dist.inspect(file)


def test_old_files_that_are_damaged(tmp_path: Path) -> None:
    file = old(tmp_path / "model.pt", {"w": torch.ones(40), "b": torch.ones(3)})
    size = file.stat().st_size
    cut(file, range(30, size, 23))
    old(file, {"w": Evil()})
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
        ckpt_dist.inspect(file)
    old(file, {"w": torch.ones(40)})
    data = bytearray(file.read_bytes())
    at = len(data) - 160 - 8
    data[at] = 41
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="has 41 elements, the pickle 40"):
        ckpt_dist.inspect(file)
    file.write_bytes(b"".join(pickle.dumps(v, 2) for v in (legacy.MAGIC, 1000, {}, {}, [])))
    with pytest.raises(CheckpointError, match="version 1000"):
        ckpt_dist.inspect(file)
    start = pickle.dumps(legacy.MAGIC, 2)  # then a text of more bytes than any machine counts
    file.write_bytes(start + pickle.dumps(1001, 2) + b"\x80\x04\x8d" + b"\xff" * 8 + b"x.")
    with pytest.raises(CheckpointError, match="is damaged"):
        ckpt_dist.inspect(file)


def test_config_of_a_checkpoint_is_that_of_its_source(made: Made, tmp_path: Path) -> None:
    ckpt_dist.convert(made("gpt2"), tmp_path / "it", format="merak", tp=2)
    assert json.loads((tmp_path / "it/config.json").read_text())["activation_function"] == "gelu_new"


def test_files_that_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers in names are not counted up to; tensors that cannot be a rank's are named."""

    def made(name: str, **more: Any) -> Path:
        folder = Path(shutil.copytree(CONVERTED / "t2p2", tmp_path / name)) / "release"
        path = folder / "mp_rank_00_pp_rank_000/partial_model_optim.pt"
        tree = torch.load(path, weights_only=False)
        tree["model"] |= {f"module.{k}": v for k, v in more.pop("model", {}).items()}
        torch.save(tree | more, path)
        return folder

    far = made("far")
    shutil.copytree(far / "mp_rank_00_pp_rank_000", far / "mp_rank_99999999_pp_rank_000")
    cases = [
        (far, "mp_rank_02_pp_rank_000/partial_model_optim.pt is missing"),
        (made("layer", model={"2.transformer.h.99999999999.ln_1.weight": torch.ones(8)}), "lacks layer 2"),
        (made("flat", model={"2.x.row_linear.weight": torch.ones(8)}), "has the shape [8]"),
        (made("none", model={"0.transformer.wte.weight": torch.tensor(1.0)}), "has the shape []"),
        (made("odd", model={"2.transformer.h.0.attn.c_attn.col_linear.bias": torch.ones(13)}), "has the shape [13]"),
    ]
    for folder, says in cases:
        assert main("convert", [f"source.path={folder}", f"target.path={tmp_path / 'no'}"]) == 3
        assert says in capsys.readouterr().err, folder
    config = {"model.config": str(CONVERTED / "hf-20")}
    ckpt_dist.convert(made("said", ckpt_dist={"orig_vocab_size": -5}), tmp_path / "hf", **config)
    assert load_file(tmp_path / "hf/model.safetensors")["transformer.wte.weight"].shape[0] == 20


def test_files_without_their_last_layer_are_refused(made: Made, tmp_path: Path) -> None:
    """The file itself is whole, and its modules' numbers are not believed: config.json says it."""
    ckpt_dist.convert(made("llama"), tmp_path / "it", format="merak")
    (file,) = rank_files(tmp_path / "it")
    tree = torch.load(file, weights_only=False)
    tree["model"] = {n: t for n, t in tree["model"].items() if ".layers.2." not in n}
    torch.save(tree, file)
    with pytest.raises(CheckpointError, match="has 3 layers, the tensors have 2: layer 2 is the first that is missing"):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no")


def test_copies_are_not_silently_those_of_the_first_rank(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="merak takes the first"):
        ckpt_dist.convert(CONVERTED / "t2p2", tmp_path / "no", **{"source.replicas": "average"})


@pytest.mark.parametrize("tp", [2, 4])
def test_a_padded_vocabulary_is_read_back(tmp_path: Path, tp: int) -> None:
    keys = {"model.config": str(CONVERTED / "hf-11"), "tp": tp, "pp": 2, "engine.verify": True}
    report = ckpt_dist.convert(CONVERTED / "hf-11", tmp_path / "m", format="merak", **keys)
    assert any("read back" in note for note in report["notes"])
    last = torch.load(rank_files(tmp_path / "m/release/mp_rank_01_pp_rank_000")[0], weights_only=False)["model"]
    rows = last["module.0.transformer.wte.weight"]
    assert torch.equal(rows[-1], rows[-2])


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_model_without_a_head_gets_none(tmp_path: Path, head: str) -> None:
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32)
    config = transformers.LlamaConfig(**small, pad_token_id=0, tie_word_embeddings=False)
    getattr(transformers, head).from_config(config).save_pretrained(tmp_path / "hf")
    keys = {"unmatched": "keep", "target.tp": 2, "target.pp": 2}
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "merak", format="merak", **keys)
    ckpt_dist.convert(tmp_path / "merak", tmp_path / "back", unmatched="keep")
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("back", "hf"))
    assert {n.removeprefix("model.") for n in ours} == {n.removeprefix("model.") for n in theirs}
