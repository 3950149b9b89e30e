"""Contract: whatever is wrong with a command or a checkpoint, a person gets one message that says what, where and what to
do, exit code 2 or 3 (4 from verify), no traceback; no target and no trace of the attempt is left; sources are as they
were; and nothing in a file is ever run. Not checked here: the parsers by themselves (test_files).
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file

import ckpt_dist
from ckpt_dist import family
from ckpt_dist.cli import main
from ckpt_dist.engine import staging as stage
from ckpt_dist.errors import CheckpointError, Difference
from tests.conftest import ROOT


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{k}.mlp.up_proj.weight": torch.randn(8, 4, generator=generator) for k in range(2)} | {
        "model.norm.weight": torch.ones(4)
    }


def make(kind: str, folder: Path, seed: int = 0) -> Path:
    """A small checkpoint of some format."""
    folder.mkdir(parents=True)
    if kind == "dcp":
        dcp.save({"model": tensors(seed), "train_state": {"step": 3}}, checkpoint_id=folder, no_dist=True)
    elif kind == "hf":
        save_file(tensors(seed), folder / "model.safetensors")
    elif kind == "torch":
        torch.save(tensors(seed), folder / "model.pt")
    elif kind == "fsdp":
        for rank in range(4):
            shutil.copy(
                ROOT / f"tests/data/torch-2.6.0/ranks/model_world_size_2_rank_{rank % 2}.pt",
                folder / f"model_world_size_2_rank_{rank % 2}.pt",
            )
    elif kind == "sharded":
        named = list(tensors(seed).items())
        for k, (name, value) in enumerate(named):
            save_file({name: value}, folder / f"model-{k + 1:05d}-of-00003.safetensors")
        weight_map = {name: f"model-{k + 1:05d}-of-00003.safetensors" for k, (name, _) in enumerate(named)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail; its message. Nothing but the source may be there afterwards, unchanged."""

    def run(
        source: Path | list[Path], *words: str, code: int = 3, verb: str = "convert", target: Path | None = None
    ) -> str:
        sources = source if isinstance(source, list) else [source]
        before = [contents(s) for s in sources if s.is_dir()]
        out = target or tmp_path / "target"
        key = "a" if verb == "verify" else "source"
        aim = [] if verb == "verify" else [f"target.path={out}"]
        there = out.exists()
        got = main(verb, [f"{key}.path={','.join(map(str, sources))}", *aim, *words])
        message = capsys.readouterr().err
        assert got == code, (got, message)
        assert "Traceback" not in message and message.strip()
        assert there or not out.exists()
        assert not [p for p in tmp_path.rglob(".*ckpt_dist*")]
        assert [contents(s) for s in sources if s.is_dir()] == before
        return message

    return run


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


BROKEN: list[tuple[str, str, Callable[[Path], Any], list[str]]] = [
    ("dcp", "a shard is missing", lambda f: (f / "__0_0.distcp").unlink(), ["__0_0.distcp is missing", "1 files"]),
    (
        "dcp",
        "a shard is cut",
        lambda f: edit(f / "__0_0.distcp", lambda b: b[:-100]),
        ["__0_0.distcp is truncated", "bytes, .metadata needs"],
    ),
    ("dcp", "metadata is cut", lambda f: edit(f / ".metadata", lambda b: b[: len(b) // 2]), [".metadata is damaged"]),
    ("dcp", "metadata is noise", lambda f: edit(f / ".metadata", lambda b: os.urandom(len(b))), [".metadata"]),
    (
        "dcp",
        "metadata is something else",
        lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        ["no metadata of torch"],
    ),
    ("dcp", "the save was interrupted", lambda f: (f / ".metadata").rename(f / ".metadata.tmp"), ["did not finish"]),
    ("dcp", "a blob is noise", lambda f: edit(f / "__0_0.distcp", lambda b: b"x" * len(b)), ["__0_0.distcp"]),
    (
        "hf",
        "the file is cut",
        lambda f: edit(f / "model.safetensors", lambda b: b[:-10]),
        ["model.safetensors is truncated", "bytes, its header needs"],
    ),
    ("hf", "the header is cut", lambda f: edit(f / "model.safetensors", lambda b: b[:20]), ["truncated"]),
    (
        "hf",
        "the header is noise",
        lambda f: edit(f / "model.safetensors", lambda b: b[:8] + b"\xff" * (len(b) - 8)),
        ["no JSON"],
    ),
    (
        "hf",
        "bytes are too many",
        lambda f: edit(f / "model.safetensors", lambda b: b + b"xx"),
        ["longer than its header says"],
    ),
    ("torch", "the file is cut", lambda f: edit(f / "model.pt", lambda b: b[:-50]), ["model.pt is truncated"]),
    ("torch", "the file is no zip", lambda f: (f / "model.pt").write_bytes(b"hello" * 99), ["no file of torch.save"]),
    ("torch", "the file is empty", lambda f: (f / "model.pt").write_bytes(b""), ["model.pt"]),
    (
        "fsdp",
        "a rank is missing",
        lambda f: (f / "model_world_size_2_rank_1.pt").unlink(),
        ["1 of 2 shards are missing", "rank 1"],
    ),
    (
        "fsdp",
        "a rank is cut",
        lambda f: edit(f / "model_world_size_2_rank_1.pt", lambda b: b[:900]),
        ["rank_1.pt is truncated"],
    ),
    (
        "fsdp",
        "another run's shard",
        lambda f: shutil.copy(f / "model_world_size_2_rank_1.pt", f / "model_world_size_4_rank_1.pt"),
        ["different world sizes", "2 of 2", "1 of 4"],
    ),
    (
        "fsdp",
        "the same rank twice",
        lambda f: shutil.copy(f / "model_world_size_2_rank_0.pt", f / "model_world_size_2_rank_1.pt"),
        ["no source"],
    ),
    (
        "sharded",
        "a shard is missing",
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        ["model-00002-of-00003.safetensors is missing"],
    ),
    (
        "sharded",
        "shards are swapped",
        lambda f: shutil.copy(f / "model-00001-of-00003.safetensors", f / "model-00002-of-00003.safetensors"),
        ["stored twice"],
    ),
    (
        "sharded",
        "the index is cut",
        lambda f: edit(f / "model.safetensors.index.json", lambda b: b[:-9]),
        ["index.json is damaged"],
    ),
    (
        "sharded",
        "the index is empty",
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        ["index.json is damaged"],
    ),
]


@pytest.mark.parametrize(("kind", "what", "harm", "says"), BROKEN, ids=[f"{k}: {w}" for k, w, *_ in BROKEN])
def test_a_damaged_checkpoint(
    tmp_path: Path, refused: Refused, kind: str, what: str, harm: Callable[[Path], Any], says: list[str]
) -> None:
    source = make(kind, tmp_path / "source")
    harm(source)
    message = refused(source)
    assert all(s in message for s in says), message


def index(folder: Path, file: str) -> None:
    names = list(tensors())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    (folder / "model.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", ""])
def test_a_file_outside_the_checkpoint_is_never_opened(tmp_path: Path, refused: Refused, escape: str) -> None:
    save_file(tensors(), tmp_path / "secret.safetensors")
    source = make("hf", tmp_path / "source")
    index(source, escape)
    assert "refused" in refused(source) or escape == ""
    metadata = make("dcp", tmp_path / "dcp")
    data = pickle.loads((metadata / ".metadata").read_bytes())
    for info in data.storage_data.values():
        info.relative_path = escape
    (metadata / ".metadata").write_bytes(pickle.dumps(data))
    refused(metadata)


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", [".metadata", "__0.metadata", "model.safetensors.index.json", "latest"])
def test_what_is_no_plain_file_is_not_read(tmp_path: Path, refused: Refused, what: str, name: str) -> None:
    """A pipe would be waited for, a device read until no memory is left."""
    source = make("hf", tmp_path / "source")
    (source / "model.safetensors").unlink()
    place = source / name
    if what == "pipe":
        os.mkfifo(place)
    elif what == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    assert str(place if name != "latest" else source) in refused(source)


@pytest.mark.parametrize("name", [".metadata", "model.safetensors.index.json", "config.json"])
def test_what_is_longer_than_a_file_of_its_kind_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 40)
    save_file(tensors(), tmp_path / "other.safetensors")
    place = tmp_path / ("other.safetensors" if name == "config.json" else "")
    assert main("inspect", [f"source.path={place}", *([f"model.config={tmp_path}"] if "config" in name else [])]) == 3
    assert f"{name} has {1 << 40} bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "offsets",
    ["[-2]", "[1e999]", "[0, 0]", "[NaN]", "[0.5]", "[true]", '"0"', "3", "null", "[]"]
    + [f"[{n}]" for n in (2**40, 2**60, 2**63 - 1, 10**30)],
)
def test_a_shard_begins_inside_its_tensor(tmp_path: Path, refused: Refused, offsets: str) -> None:
    (tmp_path / "source").mkdir()
    info = {"DCP_SHARDING_INFO": f'{{"w": {{"saved_offsets": {offsets}}}}}'}
    save_file({"w": torch.ones(4)}, tmp_path / "source/model.safetensors", info)
    assert "'w'" in refused(tmp_path / "source")


class Evil:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["metadata", "value", "pt", "bin", "rank", "blob"])
def test_a_malicious_pickle_is_named_and_not_run(tmp_path: Path, refused: Refused, place: str) -> None:
    mark, source = tmp_path / "mark", tmp_path / "source"
    words: list[str] = []
    if place == "metadata":
        make("dcp", source)
        (source / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    elif place == "value":
        source.mkdir()
        dcp.save({"model": tensors(), "train_state": {"x": Evil(mark)}}, checkpoint_id=source, no_dist=True)
        words = ["target.format=torch", "keep=weights,state"]
    elif place == "blob":
        make("dcp", source)
        edit(
            source / "__0_0.distcp",
            lambda b: b.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nsystem\n" + b"(" * 18 + b"\n\n"),
        )
    else:
        source.mkdir()
        name = {"pt": "model.pt", "bin": "pytorch_model.bin", "rank": "model_world_size_1_rank_0.pt"}[place]
        torch.save({**tensors(), "x": Evil(mark)}, source / name)
    message = refused(source, *words)
    assert not mark.exists()
    assert place == "blob" or ("system" in message and "nothing was run" in message)


def test_sizes_that_no_machine_has(tmp_path: Path, refused: Refused) -> None:
    source = make("dcp", tmp_path / "source")
    data = pickle.loads((source / ".metadata").read_bytes())
    first = data.state_dict_metadata["model.model.norm.weight"]
    for size in (2**62, 2**80, -4):
        try:
            first.size = torch.Size([size])
        except OverflowError:
            first.size = (size,)
        (source / ".metadata").write_bytes(pickle.dumps(data))
        assert "norm.weight" in refused(source) or size == 2**80
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**61, 8], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert "'w'" in refused(tmp_path / "hf")


def chunks(source: Path, name: str) -> tuple[Any, Any]:
    data = pickle.loads((source / ".metadata").read_bytes())
    return data, data.state_dict_metadata[name]


@pytest.mark.parametrize("size", [(0, 2**63 - 6), (0, 2**62 - 4), (0, 2**61), (2**30, 2**31)])
def test_no_shape_makes_one_tensor_of_another(tmp_path: Path, refused: Refused, size: tuple[int, ...]) -> None:
    """Names and offsets are looked up as one number; those of an empty tensor could wrap round to another's."""
    source = tmp_path / "source"
    dcp.save({"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}, checkpoint_id=source, no_dist=True)
    data, first = chunks(source, "a")
    odd = copy.deepcopy(first)
    odd.chunks, odd.size = [], size
    data.state_dict_metadata = {"a": first, "odd": odd, "b": data.state_dict_metadata["b"]}
    (source / ".metadata").write_bytes(pickle.dumps(data))
    assert "which no" in refused(source)


@pytest.mark.parametrize("offset", [10, -10])
def test_no_offset_makes_one_tensor_of_another(tmp_path: Path, offset: int) -> None:
    source, target = tmp_path / "source", tmp_path / "model.safetensors"
    state = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}
    dcp.save(state, checkpoint_id=source, no_dist=True)
    data, _ = chunks(source, "a")
    named = {i.fqn: (i, info) for i, info in data.storage_data.items()}
    name, other = ("a", "b") if offset > 0 else ("b", "a")
    odd = type(named[name][0])(name, torch.Size([offset]), 0)
    data.storage_data = {odd: named[name][1], **data.storage_data}
    (source / ".metadata").write_bytes(pickle.dumps(data))
    assert main("convert", [f"source.path={source}", f"target.path={target.parent / 'out'}"]) == 0
    assert torch.equal(load_file(target.parent / "out/model.safetensors")[other], state[other])


def test_an_overlap_does_not_hide_a_hole(tmp_path: Path, refused: Refused) -> None:
    source = ROOT / "tests/data/torch-2.6.0/dcp"
    shutil.copytree(source, tmp_path / "source")
    data, described = chunks(tmp_path / "source", "model.layers.0.weight")
    described.chunks[1] = type(described.chunks[1])(
        torch.Size([2, 0]), described.chunks[1].sizes
    )  # rows 3:5 claim to be rows 2:4
    stored = {}
    for index_, info in data.storage_data.items():
        moved = index_.fqn == "model.layers.0.weight" and tuple(index_.offset) == (3, 0)
        stored[type(index_)(index_.fqn, torch.Size([2, 0]), 1) if moved else index_] = info
    data.storage_data = stored
    (tmp_path / "source/.metadata").write_bytes(pickle.dumps(data))
    assert "layers.0.weight" in refused(tmp_path / "source")


def test_what_the_system_refuses_is_said_and_no_mistake_of_ours(tmp_path: Path, refused: Refused) -> None:
    source = make("hf", tmp_path / "source")
    assert "File name too long" in refused(source, f"model.config={'x' * 999}")


def test_averaged_checkpoints_must_be_of_one_model(tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        make("hf", run / f"step-{step}", step)
    changed = run / "step-2/model.safetensors"
    other = load_file(changed)
    for value, says in (
        ({**other, "extra": torch.ones(2)}, "extra: missing in step-1, float32[2] in step-2"),
        (
            {k: v for k, v in other.items() if "norm" not in k},
            "model.norm.weight: float32[4] in step-1, missing in step-2",
        ),
        (
            {k: torch.ones(9, 4) if v.dim() == 2 else v for k, v in other.items()},
            "model.layers.0.mlp.up_proj.weight: float32[8, 4] in step-1, float32[9, 4] in step-2",
        ),
        (
            {**other, "model.norm.weight": torch.ones(4).half()},
            "model.norm.weight: float32[4] in step-1, float16[4] in step-2",
        ),
    ):
        save_file(value, changed)
        assert says in refused(run, verb="average")
    assert "no step 3" in refused(run, "steps=1,3", verb="average")
    assert "no checkpoints" in refused(run / "step-1", verb="average")


@pytest.mark.parametrize(
    "word", ["target.spec=local", "target.partition=[3,5]", "target.safetensors=false", "target.max_shard_size=1KB",
             "target.release=true", "engine.bandwidth.read=1GiB"],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(tmp_path: Path, refused: Refused, word: str) -> None:
    source = make("hf", tmp_path / "source")
    message = refused(source, word, "target.format=torch", code=2)
    assert word.partition("=")[0] in message and ("Leave it out" in message or "only for dry_run" in message)


def test_wrong_commands(tmp_path: Path, refused: Refused) -> None:
    source = make("hf", tmp_path / "source")
    assert "Did you mean 'target.format'" in refused(source, "target.fromat=dcp", code=2)
    assert "dcp" in refused(source, "target.format=dpc", code=2)
    assert "megatron" in refused(source, "target.dialect=megatron", code=2)
    assert "does not exist" in refused(tmp_path / "sorce") and "Did you mean 'source'" in refused(tmp_path / "sorce")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.txt").write_text("x")
    assert "readme.txt" in refused(tmp_path / "other")
    (tmp_path / "there").mkdir()
    assert "exists" in refused(source, code=2, target=tmp_path / "there")
    assert "EMA" in refused(make("fsdp", tmp_path / "checkpoint-1/pytorch_model_fsdp_0").parent, "source.weights=ema")
    assert "24.0 MiB" in refused(source, "engine.memory=1MiB", code=2)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path, refused: Refused, name: str) -> None:
    (tmp_path / "clone").mkdir()
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 1234567890\n"
    (tmp_path / "clone" / name).write_text(text)
    for source in (tmp_path / "clone", tmp_path / "clone" / name):
        message = refused(source)
        assert name in message and "pointer of Git LFS" in message and "git lfs pull" in message


def test_what_was_given_is_said_and_not_what_it_seems_to_hold(tmp_path: Path, refused: Refused) -> None:
    source = make("dcp", tmp_path / "step-1")
    assert f"one file of a dcp checkpoint, give {source}" in refused(source / "__0_0.distcp")
    (tmp_path / "text").write_text("x")
    assert "a file of another kind" in refused(tmp_path / "text")
    assert "it is one itself" in refused(source, verb="average")


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_no_folder_gets_the_name_of_a_file(tmp_path: Path, refused: Refused, name: str) -> None:
    source = make("hf", tmp_path / "source")
    assert "would make a folder" in refused(source, code=2, target=tmp_path / name)
    for odd in (tmp_path / "new/..", Path("."), Path("/")):
        assert "by its name" in refused(source, "overwrite=true", code=2, target=odd)
    ckpt_dist.convert(source, tmp_path / "lightning.ckpt", format="dcp")  # whose folders are called so
    assert (tmp_path / "lightning.ckpt").is_dir()


def test_a_rule_for_dtypes_that_fits_no_name_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make("hf", tmp_path / "source")
    words = [f"source.path={source}", "target.dtype={default: bf16, *norm*: fp32, *nrom*: fp32}"]
    assert main("convert", [*words, f"target.path={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().err
    assert "no weight is called '*nrom*'" in said and "*norm*" not in said


LLAMA = dict(
    model_type="llama", hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
)


def test_an_unknown_tensor_is_refused_with_the_nearest_name_or_dropped_when_asked(
    tmp_path: Path, refused: Refused
) -> None:
    source = make("hf", tmp_path / "source")
    (source / "config.json").write_text(json.dumps(LLAMA))
    shapes = {f"self_attn.{x}_proj": (4, 4) for x in "qkvo"} | {f"mlp.{x}_proj": (8, 4) for x in ("gate", "up")}
    shapes |= {"mlp.down_proj": (4, 8), "input_layernorm": (4,), "post_attention_layernorm": (4,)}
    whole = {f"model.layers.{n}.{name}.weight": torch.randn(s) for n in range(2) for name, s in shapes.items()}
    whole |= {"model.embed_tokens.weight": torch.randn(9, 4), "model.norm.weight": torch.ones(4)}
    save_file({**whole, "model.layers.1.mlp.up_prj.weight": torch.ones(8, 4)}, source / "model.safetensors")
    message = refused(source)
    assert (
        "model.layers.1.mlp.up_prj.weight" in message and "Did you mean 'model.layers.1.mlp.up_proj.weight'" in message
    )
    assert main("convert", [f"source.path={source}", f"target.path={tmp_path / 'out'}", "unmatched=drop"]) == 0
    assert sorted(load_file(tmp_path / "out/model.safetensors")) == sorted(whole)
    other = {name.replace("q_proj", "q_proj.base_layer"): value for name, value in whole.items()}  # an adapter's
    save_file(other, source / "model.safetensors")
    assert "no tensor is the 'q' of llama" in refused(source, "unmatched=drop")


def test_quantised_and_flat_checkpoints_are_refused_by_name(tmp_path: Path, refused: Refused) -> None:
    source = make("hf", tmp_path / "source")
    save_file({**tensors(), "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}, source / "model.safetensors")
    assert "weight_scale_inv" in refused(source)


def test_a_dtype_that_this_torch_is_too_old_for(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.6, the oldest that setup.cfg lets in, has no float8_e8m0fnu; as bytes it is carried all the same."""
    source = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4), "scales": torch.arange(4, dtype=torch.uint8)}, source)
    whole = source.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + size].replace(b'"U8"', b'"F8_E8M0"')
    source.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)
    says = f"scales: .*torch {torch.__version__} has no dtype float8_e8m0fnu".replace("+", r"\+")
    assert re.search(says, refused(source, verb="verify"))
    for early in ("dry_run=true", "dry_run=false"):  # before a byte is written
        assert re.search(says, refused(source, "target.format=dcp", early))
    state = {"w": torch.zeros(4)}
    dcp.load(state, storage_reader=ckpt_dist.dcp.reader(source), no_dist=True)
    assert torch.equal(state["w"], torch.ones(4))  # what nobody asks for is in nobody's way
    assert main("convert", [f"source.path={source}", f"target.path={tmp_path / 'copy'}", "target.format=hf"]) == 0
    data = (tmp_path / "copy/model.safetensors").read_bytes()
    assert b"F8_E8M0" in data and bytes(range(4)) in data


def test_verify_finds_what_is_not_finite_and_what_differs(tmp_path: Path, refused: Refused) -> None:
    source, other = make("hf", tmp_path / "source"), make("dcp", tmp_path / "other")
    assert main("verify", [f"a.path={source}", f"b.path={other}"]) == 0
    changed = load_file(source / "model.safetensors")
    changed["model.norm.weight"][2] = float("nan")
    save_file(changed, source / "model.safetensors")
    assert "model.norm.weight: 1 values" in refused(source, verb="verify", code=4)
    assert "model.norm.weight: 1 elements differ" in refused(source, f"b.path={other}", verb="verify", code=4)


def test_the_newest_step_is_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for step in (9, 10):
        make("dcp", run / f"step-{step}", step)
    (run / "step-10/.metadata").unlink()
    assert main("convert", [f"source.path={run}", f"target.path={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().err
    assert "step 10 passed over" in said and "step 9 is the latest complete one" in said
    assert torch.equal(
        load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.weight"],
        tensors(9)["model.layers.0.mlp.up_proj.weight"],
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(tmp_path: Path, refused: Refused, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    save_file({"w": torch.ones(3 << 20)}, tmp_path / "source/model.safetensors")
    assert "are free on its disk" in refused(tmp_path / "source", target=small_disk / "out")
    monkeypatch.setattr(
        "ckpt_dist.engine.staging.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
    )  # type: ignore[attr-defined]
    assert "No space left" in refused(tmp_path / "source", target=small_disk / "out")  # seen when space is reserved
    monkeypatch.setattr("ckpt_dist.engine.staging.reserve", lambda file, nbytes: None)
    assert "No space left" in refused(tmp_path / "source", target=small_disk / "out")  # seen on the way
    assert not list(small_disk.iterdir())


def test_a_target_that_cannot_be_written(tmp_path: Path, refused: Refused, small_disk: Path) -> None:
    source = make("hf", tmp_path / "source")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in refused(source, target=small_disk / "deep/out")
    (tmp_path / "file").write_text("x")
    refused(source, target=tmp_path / "file/out")


def test_a_target_that_could_not_be_published_is_refused_before_any_work(tmp_path: Path, refused: Refused) -> None:
    source = make("hf", tmp_path / "source")
    (tmp_path / "out.pt").mkdir()
    words = ("target.format=torch", "overwrite=true")
    assert "would be replaced by a file" in refused(source, *words, code=2, target=tmp_path / "out.pt")
    assert (tmp_path / "out.pt").is_dir()
    assert "name is too long" in refused(source, code=2, target=tmp_path / ("x" * 232))
    assert main("convert", [f"source.path={source}", f"target.path={tmp_path / ('x' * 200)}"]) == 0


def test_any_path_is_recorded(tmp_path: Path) -> None:
    """Names that are no UTF-8, and signs that mean something to OmegaConf."""
    odd = [make("hf", tmp_path / name) for name in ("sur\udcff", "we${ird", "$HOME")]
    ckpt_dist.average(odd, tmp_path / "mean", quiet=True)
    recipe = yaml.safe_load((tmp_path / "mean/average.yaml").read_text())
    assert [one["path"] for one in recipe["sources"]][1:] == [str(path) for path in odd[1:]]
    ckpt_dist.convert(odd[0], tmp_path / "out\udcfe", quiet=True)
    record = json.loads((tmp_path / "out\udcfe/ckpt_dist.json").read_text())
    assert record["recipe"]["source"]["path"] == str(odd[0])


def test_a_target_never_replaces_a_source_whatever_is_allowed(tmp_path: Path, refused: Refused) -> None:
    source = make("hf", tmp_path / "run/source")
    (tmp_path / "link").symlink_to(source)
    for target in (source, source.parent, tmp_path / "link", source / "model.safetensors"):
        words = ["overwrite=true", "target.format=torch" if target.suffix else "target.format=hf"]
        assert "would replace the source" in refused(source, *words, code=2, target=target)
    assert main("merge", [f"source.path={source}", "overwrite=true"]) == 2
    assert main("convert", [f"source.path={source}", f"target.path={source / 'inner'}"]) == 0


def test_an_old_target_survives_a_failed_run(tmp_path: Path, refused: Refused) -> None:
    source, target = make("dcp", tmp_path / "source"), make("hf", tmp_path / "target")
    edit(source / "__0_0.distcp", lambda b: b.replace(b"PK\x01\x02", b"PK\x01\x03"))
    before = contents(target)
    refused(source, "overwrite=true")
    assert contents(target) == before


def test_what_was_there_and_cannot_be_cleared_away_fails_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = make("hf", tmp_path / "source"), make("hf", tmp_path / "target")
    busy = target / "busy"
    busy.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", busy], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    words = [f"source.path={source}", f"target.path={target}", "target.format=dcp", "overwrite=true"]
    try:
        for _ in range(2):  # nor is it in the way of the next job
            assert main("convert", words) == 0 and {*contents(target)} >= {".metadata"}
            assert len([*tmp_path.glob(".target.ckpt_dist-old*")]) == 1
        shutil.rmtree(target)
        stage.discard(stage.Staging(target))
        assert not target.exists()  # half of what was there once is not put back
    finally:
        subprocess.run(["umount", *tmp_path.glob(".target*/busy")], check=True)
    assert main("convert", words) == 0 and not list(tmp_path.glob(".*"))


def failing(*args: object) -> None:
    raise CheckpointError("no space")


@pytest.mark.parametrize("more", [[], ["target.format=torch"], ["target.shared=false"], ["overwrite=true"]])
def test_files_that_are_open_stay_on_a_disk_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """As NFS: one that is removed while it is open is there under another name till it is closed."""
    source, target = make("hf", tmp_path / "source"), tmp_path / "target"
    unlink, kept = os.unlink, list[str]()

    def removed(path: Any, *, dir_fd: int | None = None) -> None:
        place = Path(os.path.realpath(path if dir_fd is None else f"/proc/self/fd/{dir_fd}/{path}"))
        if any(os.path.realpath(f"/proc/self/fd/{fd}") == str(place) for fd in os.listdir("/proc/self/fd")):
            kept.append(str(place))
            os.rename(place, place.with_name(f".nfs{len(kept):08}"))
        else:
            unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", removed)
    if "overwrite=true" in more:  # and an attempt at something else that was killed
        (tmp_path / ".target.ckpt_dist/.ckpt_dist").mkdir(parents=True)
        (tmp_path / ".target.ckpt_dist/.ckpt_dist/plan").write_text("another")
    words = [f"source.path={source}", f"target.path={target}", "target.format=dcp", *more]
    assert main("convert", words) == 0, capsys.readouterr().err
    assert target.exists() and (more == ["overwrite=true"] or not kept)
    monkeypatch.setattr("ckpt_dist.engine.staging.finish", failing)
    assert main("convert", [*words, f"target.path={tmp_path / 'other'}", "engine.fsync=false"]) == 3
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".other*"))


@pytest.mark.parametrize("kind", ["conj", "neg"])
def test_values_that_are_not_those_stored_are_refused(tmp_path: Path, refused: Refused, kind: str) -> None:
    """torch notes that a tensor is the conjugate of its storage, or its negative, and stores what it was made of."""
    made = torch.randn(4, dtype=torch.complex64)
    value = {"conj": made.conj(), "neg": made.conj().imag}[kind]
    torch.save({"w": value}, tmp_path / "w.pt")
    dcp.save({"w": value}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save({"w": value}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for source in ("w.pt", "old.pt", *(["dcp"] if kind == "conj" else [])):  # DCP saves what a real one is
        assert f"resolve_{kind}()" in refused(tmp_path / source), source


def test_integers_that_are_one_apart_differ(tmp_path: Path) -> None:
    for name, value in (("a", 1 << 53), ("b", (1 << 53) + 1)):
        save_file({"count": torch.tensor([value, 1])}, tmp_path / f"{name}.safetensors")
    with pytest.raises(Difference, match="1 elements differ"):
        ckpt_dist.verify(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize("limit", ["rtol", "atol"])
def test_infinities_are_equal_to_themselves_alone(tmp_path: Path, limit: str) -> None:
    for one, two in ((1.0, math.inf), (math.inf, -math.inf), (math.inf, math.inf)):
        pair = [torch.tensor([2.0, value]) for value in (one, two)]
        for name, value in zip("ab", pair, strict=True):
            save_file({"w": value}, tmp_path / f"{name}.safetensors")
        paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        if torch.allclose(*pair, **{"rtol": 0, "atol": 0, limit: 1e-3}, equal_nan=True):
            assert ckpt_dist.verify(*paths, **{limit: 1e-3})["equal"]
        else:
            with pytest.raises(Difference, match="1 elements differ"):
                ckpt_dist.verify(*paths, **{limit: 1e-3})


def test_bit_equal_is_of_one_dtype(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        save_file({"w": torch.ones(4, dtype=dtype)}, tmp_path / f"{name}.safetensors")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pytest.raises(Difference, match=r"w: stored as float32 and bfloat16$"):
        ckpt_dist.verify(*paths)
    assert ckpt_dist.verify(*paths, atol=1e-9)["equal"]


@pytest.mark.parametrize("limits", [{}, {"atol": 1e-3}, {"rtol": 5e-3}, {"rtol": 1e-3, "atol": 1e-2}])
def test_the_worst_are_the_worst(tmp_path: Path, limits: dict[str, float]) -> None:
    """Of what differs ten are shown: the most beyond the tolerance first, which numpy finds too."""
    random = np.random.default_rng(0)
    a = {f"t{k:02}": random.standard_normal(50) * 10.0 ** (k % 5) for k in range(20)}
    b = {n: v + random.standard_normal(50) * 10.0 ** random.uniform(-5, 3) for n, v in a.items()}
    b["t07"][3] = np.nan
    for name, tensors in (("a", a), ("b", b)):
        save_file({n: torch.from_numpy(v) for n, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    order: dict[str, tuple[float, float]] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for n in a:
            apart, limit = np.abs(a[n] - b[n]), limits.get("atol", 0) + limits.get("rtol", 0) * np.abs(b[n])
            over = apart > limit
            order[n] = np.nanmax((apart / limit)[over], initial=0), apart[over].max(initial=0)
    order["t07"] = math.inf, math.inf
    with pytest.raises(Difference) as error:
        ckpt_dist.verify(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **limits)
    lines = [line.split(": ") for line in str(error.value).splitlines()[1:]]
    assert [n.strip() for n, _ in lines] == sorted(
        (n for n in order if order[n][1]), key=order.__getitem__, reverse=True
    )[:10]
    for n, said in lines[1:]:
        assert said.endswith(f"by up to {order[n.strip()][1]:.6g}")


@pytest.mark.parametrize("what", ["ranks", "layers"])
def test_a_number_that_a_name_or_a_config_says_is_not_counted_to(tmp_path: Path, refused: Refused, what: str) -> None:
    """Ten digits would be as many gigabytes."""
    source = tmp_path / "source"
    source.mkdir()
    if what == "ranks":
        torch.save(tensors(), source / "model_world_size_3000000_rank_1.pt")
    else:
        torch.save(tensors(), source / "consolidated.00.pth")
        (source / "params.json").write_text('{"dim": 4, "n_heads": 2, "n_layers": 3000000}')
    tracemalloc.start()
    try:
        message = refused(source, "model=identity")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()
    assert "2999999 of 3000000 shards are missing, first that of rank 0" in message or "n_layers=3000000" in message


CONTROLS = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202e"


@pytest.mark.parametrize("place", ["inspect", "verify", "convert", "error"])
def test_nothing_that_a_file_says_controls_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    name = f"{CONTROLS}w\nanother line"
    save_file({name: torch.full((2,), math.nan)}, tmp_path / "model.safetensors")
    if place == "error":
        index(tmp_path, f"{CONTROLS}.safetensors")
    words = {
        "inspect": ["match=*"],
        "convert": [f"target.path={tmp_path / 'out'}", "target.format=torch", "model=identity"],
    }
    torch.save({CONTROLS: 3, "w": torch.ones(2)}, tmp_path / "value.pt")
    path = tmp_path / {"convert": "value.pt", "error": ""}.get(place, "model.safetensors")
    key = "a" if place == "verify" else "source"
    code = main("inspect" if place == "error" else place, [f"{key}.path={path}", *words.get(place, [])])
    assert code == {"verify": 4, "error": 3}.get(place, 0)
    shown = "".join(capsys.readouterr())
    assert r"\x1b[2J" in shown and not {c for c in shown if not c.isprintable()} - {"\n"}
    assert place != "inspect" or r"\nanother line" in shown


def test_one_long_name_does_not_widen_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(
        {"x" * 10**6: torch.ones(1)} | {f"{k}": torch.ones(1) for k in range(100)}, tmp_path / "model.safetensors"
    )
    assert main("inspect", [f"source.path={tmp_path / 'model.safetensors'}", "match=*"]) == 0
    assert 10**6 < len(capsys.readouterr().out) < 11 * 10**5


LISTS = {
    "above": json.dumps(["../outside/new"]),
    "absolute": json.dumps(["/etc/new"]),
    "no list": "3",
    "no names": "[[1]]",
    "cut": '["a',
    "deep": "[" * 10**5,
    "noise": "\0\0",
}


@pytest.mark.parametrize("what", LISTS)
def test_a_list_of_files_that_somebody_has_put_there_moves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """What joins a folder is noted beside it; an archive of a checkpoint may hold such a note."""
    source = make("dcp", tmp_path / "run/step-3")
    kept = tmp_path / "run/.step-3.ckpt_dist/.ckpt_dist"
    (kept / "old").mkdir(parents=True)
    (kept / "order").write_text(LISTS[what])
    (kept / "outside").mkdir()  # where `old/../outside` leads, and from the target one folder up
    (kept / "outside/new").write_text("from a stranger")
    before = contents(tmp_path)
    assert main("merge", [f"source.path={source}", "model=identity"]) == 3
    message = capsys.readouterr().err
    assert str(kept / "order") in message and "Traceback" not in message
    assert contents(tmp_path) == before and not (tmp_path / "run/outside").exists()


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_there_in_place_of_a_plan_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    source, place = make("hf", tmp_path / "source"), tmp_path / ".out.ckpt_dist/.ckpt_dist"
    place.mkdir(parents=True)
    os.mkfifo(place / "plan") if what == "pipe" else (place / "plan").symlink_to("/dev/zero")
    assert main("convert", [f"source.path={source}", f"target.path={tmp_path / 'out'}", "model=identity"]) == 3
    assert f"{place / 'plan'} is no plain file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_merge_does_not_follow_the_links_of_a_checkpoint(tmp_path: Path) -> None:
    source = make("dcp", tmp_path / "step-3/pytorch_model_fsdp_0").parent
    (source / "pytorch_model_fsdp_0/1_Pooling").mkdir()
    (source / "pytorch_model_fsdp_0/1_Pooling/config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    ckpt_dist.merge(source, model="identity", quiet=True)
    assert (source / "model.safetensors").is_file() and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("what", ["through", "deep"])
def test_no_tensor_is_lost_where_a_metadata_puts_two_into_one_place(
    tmp_path: Path, refused: Refused, what: str
) -> None:
    source = make("dcp", tmp_path / "source")
    data = pickle.loads((source / ".metadata").read_bytes())
    one, two = [name for name in data.planner_data if "up_proj" in name]
    data.planner_data[two] = (*data.planner_data[one], "inside") if what == "through" else ("a",) * 5000
    (source / ".metadata").write_bytes(pickle.dumps(data))
    words = ["target.format=torch", "model=identity"]
    if what == "through":
        assert "something else is at this place" in refused(source, *words)
    else:
        assert main("convert", [f"source.path={source}", f"target.path={tmp_path / 'out'}", *words]) == 0
        found = torch.load(tmp_path / "out/model.pt", weights_only=True)
        assert torch.equal(found[two], tensors()[two.removeprefix("model.")])


def test_a_key_that_a_value_has_is_refused(tmp_path: Path, refused: Refused) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"net": tensors(), "step": 3}, source / "model.pt")
    words = ["target.format=torch", "keep=weights,state", "model=identity"]
    assert "step: something else is at this place" in refused(source, *words, "target.key=step")


def test_one_number_is_not_a_million_layers(tmp_path: Path, refused: Refused) -> None:
    layers, one = 1 << 20, torch.ones(1)
    inside = {
        "self_attention.linear_qkv.weight": (12, 4),
        "self_attention.linear_qkv.layer_norm_weight": (4,),
        "self_attention.linear_proj.weight": (4, 4),
        "mlp.linear_fc1.weight": (16, 4),
        "mlp.linear_fc1.layer_norm_weight": (4,),
        "mlp.linear_fc2.weight": (4, 8),
    }
    state = {f"decoder.layers.{name}": one.expand(layers, *shape) for name, shape in inside.items()}
    state |= {f"{name}.weight": one.expand(8, 4) for name in ("embedding.word_embeddings", "output_layer")}
    (tmp_path / "source").mkdir()
    torch.save(state | {"decoder.final_layernorm.weight": one.expand(4)}, tmp_path / "source/model.pt")
    said = dict(
        model_type="llama", num_hidden_layers=layers, hidden_size=4, num_attention_heads=2, num_key_value_heads=2
    )
    (tmp_path / "source/config.json").write_text(json.dumps(said))
    assert "1048576 for the length l" in refused(tmp_path / "source")


def test_names_of_no_family_are_not_compared_with_what_families_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirteen families, some dialects each, two dozen patterns: that was most of a minute for 30 thousand names."""
    save_file({f"t{k}": torch.ones(1) for k in range(100)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(family, "dropped", lambda *given: pytest.fail("compared"))
    assert len(ckpt_dist.inspect(tmp_path / "model.safetensors")["tensors"]) == 100


def test_a_storage_of_another_length_is_of_another_file(tmp_path: Path, refused: Refused) -> None:
    """Torch refuses it too: what begins with as many bytes as are needed may be anything."""
    (tmp_path / "source").mkdir()
    with zipfile.ZipFile(make("torch", tmp_path / "whole") / "model.pt") as good:
        held = {name: good.read(name) for name in good.namelist()}
    short, long = sorted((n for n in held if "/data/" in n), key=lambda n: len(held[n]))[::2]
    held[short] = held[long]
    with zipfile.ZipFile(tmp_path / "source/model.pt", "w") as mixed:
        for name, content in held.items():
            mixed.writestr(name, content)
    with pytest.raises(RuntimeError, match="does not match"):
        torch.load(tmp_path / "source/model.pt")
    assert "is 128 bytes long, the pickle needs 16 bytes" in refused(tmp_path / "source", "model=identity")


def test_a_shape_that_does_not_fit_is_named_with_its_file(tmp_path: Path, refused: Refused) -> None:
    source = tmp_path / "source"
    source.mkdir()
    norms = {"input_layernorm": torch.ones(4), "post_attention_layernorm": torch.ones(8)}
    save_file({f"model.layers.0.{n}.weight": norm for n, norm in norms.items()}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "llama"}')
    assert f"{source}: model.layers.0.post_attention_layernorm.weight has shape (8,)" in refused(source)
