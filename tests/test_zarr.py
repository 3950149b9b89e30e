"""Contract: zarr checkpoints of megatron-core are read and written byte for byte as zarr lays them out, compressed ones
are read; what is damaged or unknown is refused by name. The judges: megatron-core 0.12, which wrote `tests/data/`, NeMo's own averaging
script, which averaged it, and the zarr package where it is installed.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt_dist
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.codecs import CODECS
from tests.test_megatron import transformer

DATA = Path(__file__).parent / "data/megatron-core-0.12-zarr"
RUN = DATA / "run"
TORCH = {"<f4": torch.float32, "bfloat16": torch.bfloat16, "<i8": torch.int64}


def step_10() -> Path:
    return next(RUN.glob("*-step=10-*"))


def arrays(folder: Path) -> dict[str, torch.Tensor]:
    """Every array of a folder, put together from its raw chunks as the zarr specification says."""
    found = {}
    for head in sorted(folder.glob("*/.zarray")):
        said = json.loads(head.read_text())
        assert said["compressor"] is said["filters"] is said["fill_value"] is None and said["order"] == "C"
        assert said["zarr_format"] == 2
        shape, chunk, dtype = said["shape"], said["chunks"], TORCH[said["dtype"]]
        counts = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
        padded = torch.empty([n * c for n, c in zip(counts, chunk, strict=True)], dtype=dtype)
        for place in np.ndindex(*counts):
            data = (head.parent / (".".join(map(str, place)) or "0")).read_bytes()
            part = torch.frombuffer(bytearray(data), dtype=dtype).reshape(chunk)
            padded[tuple(slice(k * c, k * c + c) for k, c in zip(place, chunk, strict=True))] = part
        found[head.parent.name] = padded[tuple(slice(0, n) for n in shape)]
    return found


def as_torch(path: Path, out: Path) -> dict[str, torch.Tensor]:
    """What we read of a checkpoint, under the names that it has."""
    ckpt_dist.convert(path, out, format="torch", model="identity", quiet=True)
    found: dict[str, torch.Tensor] = torch.load(out)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


def test_what_megatron_wrote_is_read(tmp_path: Path) -> None:
    for step, wanted in torch.load(DATA / "reference.pt").items():
        folder = next(RUN.glob(f"*-step={step}-*.0"))
        same(as_torch(folder, tmp_path / f"{step}.pt"), wanted)
    found = ckpt_dist.inspect(step_10())
    assert (found["format"], found["step"], found["optimizer"]) == ("zarr", 10, True)


def test_an_average_is_what_nemos_script_makes_and_zarr_reads(tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    shutil.copytree(step_10(), tmp_path / "run/gpt--val_loss=2.35-step=30-consumed_samples=240.0-last")
    given = {"recipe": "nemo_average", "name": "gpt", "steps": [10, 20], "engine.verify": True}
    ckpt_dist.average(tmp_path / "run", quiet=True, **given)
    made = tmp_path / "run/gpt-10_20-averaged"
    reference, found = torch.load(DATA / "reference.pt"), arrays(made)
    for name, value in torch.load(DATA / "averaged.pt").items():
        assert torch.equal(found[name], value), name
    assert sorted(found) == sorted(reference[10])  # the optimizer's are left out
    for name, value in found.items():
        mean = (reference[10][name].double() + reference[20][name].double()) / 2
        assert torch.equal(value, mean.to(value.dtype)), name  # rounded once, bf16 too
    last = next(RUN.glob("*-step=20-*.0"))
    for file in ("common.pt", "metadata.json", *(str(p.relative_to(last)) for p in last.glob("*_extra_state/*.pt"))):
        same_json = file == "metadata.json"
        ours, theirs = (made / file).read_bytes(), (last / file).read_bytes()
        assert json.loads(ours) == json.loads(theirs) if same_json else ours == theirs, file
    zarr = pytest.importorskip("zarr", reason="the zarr package is not installed; the rest of this test has passed")
    pytest.importorskip("ml_dtypes")
    for name, value in found.items():
        read = np.ascontiguousarray(zarr.open(str(made / name), mode="r")[:])
        assert torch.equal(
            torch.from_numpy(read.view(np.uint8)),
            value.contiguous().view(torch.uint8).view(-1).view(read.view(np.uint8).shape),
        )


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_a_model_there_and_back(tmp_path: Path, kind: str) -> None:
    transformer(kind, tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "zarr", format="zarr", dtype="bfloat16", quiet=True)
    folder = tmp_path / "zarr/iter_0000001"
    assert (tmp_path / "zarr/latest_checkpointed_iteration.txt").read_text() == "1"
    assert arrays(folder)["decoder.layers.self_attention.linear_qkv.weight"].shape == (4, 64, 32)
    assert torch.load(folder / "decoder.layers.self_attention.linear_qkv._extra_state/shard_3_4.pt") is None
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "plain", dtype="bfloat16", quiet=True)
    assert ckpt_dist.fingerprint(tmp_path / "zarr") == ckpt_dist.fingerprint(tmp_path / "plain")
    ckpt_dist.convert(tmp_path / "zarr", tmp_path / "back", quiet=True)
    from transformers import AutoModelForCausalLM

    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / p).state_dict() for p in ("plain", "back"))
    same(one, two)


# ---- arrays that Megatron does not write, and zarr does


def write(folder: Path, value: np.ndarray[Any, Any], chunk: tuple[int, ...], **more: Any) -> None:
    """An array as zarr 2 writes it, uncompressed."""
    folder.mkdir(parents=True)
    said = dict(zarr_format=2, shape=value.shape, chunks=chunk, dtype=value.dtype.str, compressor=None, filters=None)
    said |= dict(fill_value=0, order="C") | more
    (folder / ".zarray").write_text(json.dumps(said))
    counts = [-(-n // c) for n, c in zip(value.shape, chunk, strict=True)]
    for place in np.ndindex(*counts):
        full = np.full(chunk, 7, value.dtype)
        part = value[tuple(slice(k * c, k * c + c) for k, c in zip(place, chunk, strict=True))]
        full[tuple(slice(0, n) for n in part.shape)] = part
        name = more.get("dimension_separator", ".").join(map(str, place)) or "0"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(full.tobytes(said["order"]))


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    torch.save({"iteration": 3}, folder / "common.pt")
    return folder


def test_edges_orders_and_separators(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), checkpoint(tmp_path / "z")
    values = dict(
        edge=rng.standard_normal((7, 5)).astype(np.float32), columns=rng.standard_normal((4, 6, 3)).astype(np.float16),
        nested=np.arange(60, dtype=np.int64).reshape(10, 6), scalar=np.array(2.5, np.float64), none=np.zeros((0, 4), np.float32),
    )  # fmt: skip
    write(folder / "edge", values["edge"], (3, 2))
    write(folder / "columns", values["columns"], (3, 4, 2), order="F")
    write(folder / "nested", values["nested"], (4, 4), dimension_separator="/")
    write(folder / "scalar", values["scalar"], ())
    write(folder / "none", values["none"], (2, 4))
    same(as_torch(folder, tmp_path / "read.pt"), {k: torch.from_numpy(v) for k, v in values.items()})
    zarr = pytest.importorskip("zarr", reason="the zarr package is not installed; the rest of this test has passed")
    for name, value in values.items():
        assert np.array_equal(zarr.open(str(folder / name), mode="r")[...], value), name


def test_what_the_zarr_package_writes_is_read(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="the zarr package is not installed")
    rng, folder = np.random.default_rng(0), checkpoint(tmp_path / "z")
    values = {}
    for k, (shape, chunks) in enumerate([((7, 5), (3, 2)), ((9,), (9,)), ((2, 3, 4), (1, 3, 2)), ((), ())]):
        values[f"w{k}"] = value = rng.standard_normal(shape).astype(np.float32)
        array = zarr.open(
            str(folder / f"w{k}"), mode="w", shape=shape, chunks=chunks, dtype="f4", compressor=None, fill_value=None
        )
        array[...] = value
    same(as_torch(folder, tmp_path / "read.pt"), {k: torch.from_numpy(np.asarray(v)) for k, v in values.items()})
    zarr.save(str(folder / "packed"), rng.integers(0, 9, (50, 40)).astype(np.float32))  # as zarr compresses by default
    packed = torch.from_numpy(zarr.load(str(folder / "packed")))
    assert json.loads((folder / "packed/.zarray").read_text())["compressor"]["id"] == "blosc"
    assert torch.equal(as_torch(folder, tmp_path / "packed.pt")["packed"], packed)


# ---- compressed chunks


def compress(folder: Path, codec: str) -> None:
    """Every array of a checkpoint with its chunks compressed."""
    for head in folder.rglob(".zarray"):
        head.write_text(json.dumps(json.loads(head.read_text()) | {"compressor": {"id": codec, "level": 1}}))
        for file in head.parent.rglob("*"):
            if file.is_file() and file != head:
                file.write_bytes(encoded(codec, file.read_bytes()))


def encoded(codec: str, data: bytes) -> bytes:
    """By Python's own compressors, or those of numcodecs."""
    if codec in ("gzip", "zlib"):
        return gzip.compress(data) if codec == "gzip" else zlib.compress(data)
    numcodecs = pytest.importorskip("numcodecs", reason="numcodecs is not installed")
    return bytes(numcodecs.get_codec({"id": codec}).encode(data))


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_chunks_are_read(tmp_path: Path, codec: str) -> None:
    shutil.copytree(step_10(), tmp_path / "z")
    write(tmp_path / "z/zeros", np.zeros((300, 100), np.float32), (256, 100))
    wanted = torch.load(DATA / "reference.pt")[10] | {"zeros": torch.zeros(300, 100)}
    compress(tmp_path / "z", codec)
    same(as_torch(tmp_path / "z", tmp_path / "read.pt"), wanted)
    given = {"model": "identity", "quiet": True, "engine.memory": "96MiB", "engine.workers": 3, "engine.verify": True}
    ckpt_dist.convert(tmp_path / "z", tmp_path / "out.pt", format="torch", **given)
    same(torch.load(tmp_path / "out.pt"), wanted)
    file = tmp_path / "z/zeros/0.0"
    good = file.read_bytes()
    other = (tmp_path / "z/metadata.json").read_bytes()
    for bad in (good[: len(good) // 2], other, good[:-8] + bytes(8), b"", encoded(codec, bytes(100))):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=rf"zeros/0.0 (is damaged: {codec}|is truncated)"):
            ckpt_dist.convert(tmp_path / "z", tmp_path / "no.pt", format="torch", **given)
        assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_that_is_cut_off_is_not_read_beyond_its_end(tmp_path: Path, codec: str) -> None:
    """Values that do not compress lie in a chunk as they are, so that no decoder stumbles over those that follow it."""
    folder = checkpoint(tmp_path / "z")
    write(folder / "w", np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32), (256, 64))
    compress(folder, codec)
    file = folder / "w/0.0"
    good = file.read_bytes()
    for bad in (good[:20], good[: len(good) // 2], good[:-1], good + good):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=rf"w/0.0 is damaged: {codec}"):
            ckpt_dist.convert(folder, tmp_path / "no.pt", format="torch", model="identity", quiet=True)
        assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize("codec", ["blosc", "lz4", "zstd"])
def test_a_codec_that_is_not_installed(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "z")
    write(folder / "w", np.ones((4, 4), np.float32), (4, 4))
    header(lambda h: h.update(compressor={"id": codec}))(folder)
    length = (64).to_bytes(4, "little")
    said = {"blosc": bytes(4) + length, "lz4": length, "zstd": bytes.fromhex("28b52ffd80") + bytes(1) + length}[codec]
    (folder / "w/0.0").write_bytes(said + bytes(16))
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    monkeypatch.setitem(sys.modules, f"numcodecs.{codec}", None)
    with pytest.raises(
        CheckpointError, match=rf"compressed by {codec}, which needs the package numcodecs: pip install"
    ):
        ckpt_dist.convert(folder, tmp_path / "no.pt", format="torch", model="identity", quiet=True)


def test_a_frame_of_zstd_that_does_not_say_its_length(tmp_path: Path) -> None:
    """Its 64 bytes are all there, in one block that is stored as it is."""
    folder = checkpoint(tmp_path / "z")
    write(folder / "w", np.ones((4, 4), np.float32), (4, 4))
    header(lambda h: h.update(compressor={"id": "zstd"}))(folder)
    block = (64 << 3 | 1).to_bytes(3, "little") + np.ones(16, np.float32).tobytes()
    (folder / "w/0.0").write_bytes(bytes.fromhex("28b52ffd0000") + block)
    with pytest.raises(CheckpointError, match=r"w/0.0: a frame of zstd that does not say how long its content is"):
        ckpt_dist.convert(folder, tmp_path / "no.pt", format="torch", model="identity", quiet=True)
    for bad in (bytes(100), bytes.fromhex("28b52ffd0000")):
        (folder / "w/0.0").write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"w/0.0 is damaged: zstd"):
            ckpt_dist.convert(folder, tmp_path / "no.pt", format="torch", model="identity", quiet=True)


def test_a_compressed_chunk_that_is_larger_than_the_memory(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "z")
    write(folder / "w", np.zeros((1 << 11, 1 << 12), np.float32), (1 << 11, 1 << 12))
    compress(folder, "zlib")
    ckpt_dist.inspect(folder, save_catalog=tmp_path / "saved")
    given = {"model": "identity", "quiet": True, "format": "torch"}
    for source, dry_run in ((folder, True), (tmp_path / "saved", True), (folder, False)):
        with pytest.raises(
            CheckpointError, match=r"opened whole, which takes 32\.\d+ MiB; of engine.memory 24\.0 MiB are for that"
        ):
            ckpt_dist.convert(source, tmp_path / "no.pt", dry_run=dry_run, **given, **{"engine.memory": "48MiB"})
        with pytest.raises(CheckpointError, match=r"engine.memory=40\.0 MiB is too little: half .* at least 48\.0 MiB"):
            ckpt_dist.convert(source, tmp_path / "no.pt", dry_run=dry_run, **given, **{"engine.memory": "40MiB"})
    given |= {"engine.memory": "96MiB", "engine.workers": 4}
    for source in (folder, tmp_path / "saved"):  # as many threads as a run has
        plan = ckpt_dist.convert(source, tmp_path / "out.pt", dry_run=True, **given)
        assert plan["threads"] == 2 and plan["transports"]["direct"]["memory"] == (48 + 2 * 24) << 20
    ckpt_dist.convert(folder, tmp_path / "out.pt", **given)
    assert torch.equal(torch.load(tmp_path / "out.pt")["w"], torch.zeros(1 << 11, 1 << 12))


# ---- damaged


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        said = json.loads((folder / "w/.zarray").read_text())
        change(said)
        (folder / "w/.zarray").write_text(json.dumps(said))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "missing": (lambda f: (f / "w/1.0").unlink(), r"w/1.0 is missing: by its .zarray there are 2 chunks, 1 are there"),
    "short": (lambda f: (f / "w/0.0").write_bytes(b"abc"), r"w/0.0 has 3 bytes, by its .zarray 32"),
    "long": (lambda f: (f / "w/0.0").write_bytes(bytes(33)), r"w/0.0 has 33 bytes, by its .zarray 32"),
    "no json": (lambda f: (f / "w/.zarray").write_bytes(b"{"), r"w/.zarray is damaged"),
    "no table": (lambda f: (f / "w/.zarray").write_bytes(b"[]"), r"w/.zarray is damaged"),
    "void": (header(lambda h: h.update(dtype="<V2")), r"the dtype '<V2' is not read"),
    "big-endian": (header(lambda h: h.update(dtype=">f4")), r"the dtype '>f4' is not read"),
    "zlib": (header(lambda h: h.update(compressor={"id": "zlib", "level": 1})), r"w/[01].0 is damaged: zlib"),
    "lzma": (header(lambda h: h.update(compressor={"id": "lzma"})), r"coded by lzma; one of blosc, gzip, lz4, zlib, zstd"),
    "pickle": (header(lambda h: h.update(compressor={"id": "pickle"})), r"coded by pickle"),
    "no word": (header(lambda h: h.update(compressor={"id": ["gzip"]})), r"coded by \['gzip'\]; one of"),
    "filter": (header(lambda h: h.update(filters=[{"id": "delta"}])), r"coded by delta"),
    "version": (header(lambda h: h.update(zarr_format=3)), r"damaged.*zarr_format 3"),
    "dims": (header(lambda h: h.update(chunks=[2])), r"is damaged"),
    "negative": (header(lambda h: h.update(shape=[-4, 4])), r"is damaged.*-4"),
    "zero chunk": (header(lambda h: h.update(chunks=[0, 4])), r"is damaged"),
    "text": (header(lambda h: h.update(shape=["4", 4])), r"is damaged"),
    "bomb": (header(lambda h: h.update(shape=[1 << 40, 4], chunks=[1, 1])), r"chunks, more than"),
    "far": (header(lambda h: h.update(shape=[1 << 12] * 9, chunks=[1] * 9)), r"is damaged"),
    "nothing": (header(lambda h: h.update(shape=[0, 1 << 42], chunks=[1, 1])), None),
    "dangling": (lambda f: (f / "x").symlink_to("nowhere"), None),
    "queue": (lambda f: (os.mkfifo(f / "w/x"), (f / "q").mkdir(), os.mkfifo(f / "q/.zarray")), None),
    "link": (lambda f: (f / "w2").symlink_to("w"), r"w2 is a link to an array"),
    "no header": (lambda f: (f / "w/.zarray").unlink(), r"w/[01].0 is a chunk of an array whose .zarray is missing"),
    "common": (lambda f: (f / "common.pt").unlink(), r"common.pt is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(tmp_path: Path, what: str) -> None:
    folder = checkpoint(tmp_path / "z")
    write(folder / "w", np.ones((4, 4), np.float32), (2, 4))
    change, says = DAMAGE[what]
    change(folder)
    if says is None:  # no damage to what is there
        assert ckpt_dist.inspect(folder)["format"] == "zarr"
        return
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.convert(folder, tmp_path / "out", format="dcp", model="identity", quiet=True)
    assert not (tmp_path / "out").exists()
