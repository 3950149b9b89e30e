"""Contract: what `dry_run` says will be read, exchanged and written is what a run then counts, to the byte, in both transports
and for any number of ranks, planned by these ranks or by one process from a saved catalog; nothing is read twice; `auto`
says both numbers; a damaged catalog is refused. Not checked here: seconds, which `python -m benchmarks.predict` measures.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import ckpt_dist
from ckpt_dist import config, cost, run
from ckpt_dist.catalog import Catalog, Entry, whole
from ckpt_dist.engine import calibrate
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Crew
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.moves import Array
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.formats.catalog import save
from ckpt_dist.model import Model
from tests.conftest import ROOT, torchrun
from tests.test_scale import model

Real = Callable[[str], Path]
CONFIG = dict(
    model_type="llama",
    hidden_size=1536,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=64,
    tie_word_embeddings=False,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
)  # fmt: skip  heads of 128 rows are cut by tiles of 341
BYTES = ("bytes_read", "bytes_exchanged", "bytes_written")
HOW = ("direct", "collective")


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Meta's layout, whose rotary halves alternate: tiles of it are not contiguous."""
    folder = tmp_path_factory.mktemp("meta")
    e, f, v, kv = 1536, 64, 64, 256
    layer = {"input_layernorm": (e,), "post_attention_layernorm": (e,), "self_attn.q_proj": (e, e)}
    layer |= {"self_attn.k_proj": (kv, e), "self_attn.v_proj": (kv, e), "self_attn.o_proj": (e, e)}
    layer |= {"mlp.gate_proj": (f, e), "mlp.up_proj": (f, e), "mlp.down_proj": (e, f)}
    shapes = {f"model.layers.0.{n}.weight": s for n, s in layer.items()}
    shapes |= {"model.embed_tokens.weight": (v, e), "model.norm.weight": (e,), "lm_head.weight": (v, e)}
    (folder / "hf").mkdir()
    save_file({n: torch.randn(s, dtype=torch.bfloat16) for n, s in shapes.items()}, folder / "hf/model.safetensors")
    (folder / "hf/config.json").write_text(json.dumps(CONFIG))
    ckpt_dist.convert(folder / "hf", folder / "meta", format="meta")
    return folder / "meta"


def jobs(real: Real, meta: Path, here: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """A verb and its keys, without the target, by name."""
    torch.save(load_file(real("fsdp2") / "reference.safetensors"), here / "model.pt")
    config = {"model.config": str(real("fsdp2") / "hf")}
    return {
        "dcp -> hf": ("convert", {"source.path": str(real("fsdp2") / "dcp")}),
        "dim 1 -> torch": ("convert", {"source.path": str(real("dim1") / "dcp"), "target.format": "torch"}),
        "hf -> dcp, checked": (
            "convert",
            {"source.path": str(real("fsdp2") / "hf"), "target.format": "dcp", "engine.verify": True},
        ),
        "torch -> bf16": ("convert", {"source.path": str(here / "model.pt"), "target.dtype": "bf16", **config}),
        "meta -> hf": ("convert", {"source.path": str(meta)}),
        "average": ("average", {"source.path": str(real("steps")), "target.dtype": "bf16", **config}),
    }


@pytest.fixture(scope="module")
def table(real: Real, meta: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Any]]]:
    return jobs(real, meta, tmp_path_factory.mktemp("sources"))


def counted(facts: dict[str, Any]) -> dict[str, int]:
    return {key: facts[key] for key in BYTES}


def runs(here: Path, num_ranks: int, words: list[tuple[str, dict[str, Any], int]]) -> list[dict[str, Any]]:
    """What these jobs return; each is (verb, keys, nodes)."""
    if num_ranks == 1:
        return [getattr(run, verb)(config.fill(verb, {"quiet": True, **keys})) for verb, keys, _ in words]
    (here / "jobs.json").write_text(json.dumps(words))
    done = torchrun(num_ranks, ROOT / "tests/real/reports.py", here / "jobs.json", here / "reports.json")
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((here / "reports.json").read_text())
    return found


@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(1, 1), (2, 2), (4, 2)])
def test_a_run_counts_what_the_plan_has_said(
    tmp_path: Path, table: dict[str, tuple[str, dict[str, Any]]], num_ranks: int, num_nodes: int
) -> None:
    words, which = [], []
    for name, (verb, keys) in table.items():
        for how in ("plan", *HOW):
            more = {"dry_run": True} if how == "plan" else {"engine.transport": how}
            words.append((verb, {**keys, **more, "target.path": str(tmp_path / f"{name} {how}")}, num_nodes))
            which.append((name, how))
    auto: dict[str, Any] = {"source.path": table["meta -> hf"][1]["source.path"], "target.path": str(tmp_path / "auto")}
    words += [("convert", {**auto, "dry_run": True}, num_nodes), ("convert", auto, num_nodes)]
    *found, planned, chosen = runs(tmp_path, num_ranks, words)
    reports, exchanged = dict(zip(which, found, strict=True)), 0
    for name, (verb, keys) in table.items():
        plan = reports[name, "plan"]["transports"]
        more = {**keys, "target.path": str(tmp_path / "none"), "dry_run": True}
        more |= {"engine.ranks": num_ranks, "engine.nodes": num_nodes}
        from_here = runs(tmp_path, 1, [(verb, more, 1)])[0]["transports"]
        for how in HOW:
            assert counted(plan[how]) == counted(reports[name, how]) == counted(from_here[how]), (name, how)
            assert plan[how]["amplification"] <= 1.02, (name, how)
        assert plan["collective"]["bytes_read"] <= 1.02 * plan["direct"]["bytes_read"]
        assert plan["direct"]["bytes_exchanged"] == 0
        exchanged += plan["collective"]["bytes_exchanged"]
    assert (exchanged > 0) == (num_nodes > 1)
    auto_says_its_choice_and_both_numbers(planned, chosen, num_nodes)


def auto_says_its_choice_and_both_numbers(planned: dict[str, Any], run: dict[str, Any], num_nodes: int) -> None:
    said = f"transport {planned['transport']}: {planned['why']}"
    assert said in planned["text"] and "directly" in said and "read once" in said
    assert (said in run["notes"]) == (num_nodes > 1)  # ranks of one node have one disk
    assert planned["transport"] == "direct" and counted(run) == counted(planned["transports"]["direct"])


# ---- plans without the checkpoint


@pytest.fixture
def saved(tmp_path: Path, real: Real) -> Path:
    ckpt_dist.inspect(real("fsdp2") / "dcp", save_catalog=tmp_path / "catalog")
    return tmp_path / "catalog"


@pytest.mark.parametrize("name", ["dcp -> hf", "dim 1 -> torch", "torch -> bf16", "meta -> hf"])
def test_a_saved_catalog_gives_the_same_plan_without_the_checkpoint(
    tmp_path: Path, table: dict[str, tuple[str, dict[str, Any]]], name: str
) -> None:
    _, keys = table[name]
    there = Path(keys["source.path"])
    shutil.copytree(there.parent, tmp_path / "moved")
    more = {k: v for k, v in keys.items() if k not in ("source.path", "model.config")}
    more |= {"dry_run": True, "engine.ranks": 16, "engine.nodes": 2}
    known = {k: v for k, v in keys.items() if k == "model.config"}
    ckpt_dist.inspect(tmp_path / "moved" / there.name, save_catalog=tmp_path / "catalog", **known)
    one = ckpt_dist.convert(tmp_path / "moved" / there.name, tmp_path / "out", **more, **known)
    shutil.rmtree(tmp_path / "moved")
    two = ckpt_dist.convert(tmp_path / "catalog", tmp_path / "out", **more)
    assert (one["ranks"], one["nodes"], one["files"]) == (two["ranks"], two["nodes"], two["files"])
    for how in HOW:
        here, away = ({**plan["transports"][how], "seconds": 0} for plan in (one, two))
        here["bytes_read"] -= one["bytes_read"]  # what planning itself has read: Meta's words do not tell tied weights
        assert here == away
    assert two["transports"]["collective"]["bytes_read_node"] < two["transports"]["collective"]["bytes_read"]
    assert not (tmp_path / "out").exists()


def test_a_saved_catalog_says_how_a_checkpoint_was_cut(tmp_path: Path, real: Real) -> None:
    ckpt_dist.convert(real("fsdp2") / "hf", tmp_path / "ranks", format="megatron", tp=2, vocab_size=256, quiet=True)
    ckpt_dist.inspect(tmp_path / "ranks", save_catalog=tmp_path / "catalog")
    here, there = (
        ckpt_dist.convert(source, tmp_path / "out", format="same", dry_run=True)
        for source in (tmp_path / "ranks", tmp_path / "catalog")
    )
    assert here["files"] == there["files"] and len(here["files"]) == 2


def test_hardly_a_byte_of_a_large_model_is_read_twice(tmp_path: Path) -> None:
    """Llama 70B in Meta's layout, four layers: heads of 128 rows of 16 KiB are cut by tiles of 64 rows."""
    e, f, v = 8192, 28672, 128256
    layer = {"attention.wq": (e, e), "attention.wk": (1024, e), "attention.wv": (1024, e), "attention.wo": (e, e)}
    layer |= {"feed_forward.w1": (f, e), "feed_forward.w3": (f, e), "feed_forward.w2": (e, f)}
    layer |= {"attention_norm": (e,), "ffn_norm": (e,)}
    shapes = {"tok_embeddings.weight": (v, e), "norm.weight": (e,), "output.weight": (v, e)}
    shapes |= {f"layers.{n}.{name}.weight": s for n in range(4) for name, s in layer.items()}
    entries = tuple(Entry(n, "bfloat16", s, (n,)) for n, s in shapes.items())
    nbytes = np.array([2 * int(np.prod(s)) for s in shapes.values()])
    params = dict(dim=e, n_layers=4, n_heads=64, n_kv_heads=8, vocab_size=v, norm_eps=1e-5)
    chunks = whole(entries, nbytes * 0, np.cumsum(nbytes) - nbytes)
    catalog = Catalog("torch", "/none", ("consolidated.00.pth",), entries, chunks, config=params)
    save(tmp_path / "catalog", catalog, Path("/none"), Path("/none"), None)
    keys = {"dry_run": True, "engine.ranks": 16, "engine.nodes": 2}
    plan = ckpt_dist.convert(tmp_path / "catalog", tmp_path / "out", **keys)["transports"]
    for how in HOW:
        assert nbytes.sum() <= plan[how]["bytes_read"] <= 1.02 * nbytes.sum()


def test_files_beside_a_saved_catalog_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sources one is a saved catalog; the file of the other is on the first of two nodes, or on none."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    group, there = Group(), model(0)
    group.world = group.nodes = 2
    group.gather = lambda value: [value, (1, [[False] * len(row) for row in value[1]])]  # type: ignore[assignment,index,method-assign,list-item]

    def at(root: Path, **about: Any) -> Model:
        return replace(there, source=replace(there.source, catalog=replace(there.catalog, root=str(root), about=about)))

    sources = [at(tmp_path, saved="catalog"), at(tmp_path), at(tmp_path, saved="catalog")]
    (tmp_path / "x").touch()
    found = cost._readers(group, sources, cost.World(np.arange(2), False), {})
    assert [one.everywhere for one in found] == [True, False, True]
    assert not any(one.balanced for one in found)  # so each rank of a run reads for itself what it sees, of all sources
    asked = cost._readers(group, sources, cost.World(np.arange(2), False), {"transport": "collective"})
    assert all(
        one.balanced for one in (*asked, *cost._readers(group, sources[::2], cost.World(np.arange(2), False), {}))
    )
    (tmp_path / "x").unlink()
    with pytest.raises(CheckpointError, match="no node sees x"):
        cost._readers(group, sources, cost.World(np.arange(2), False), {})


def test_a_saved_catalog_is_for_plans_only(tmp_path: Path, saved: Path) -> None:
    facts = ckpt_dist.inspect(saved)
    assert facts["format"] == "dcp" and facts["num_chunks"] > facts["num_tensors"]
    with pytest.raises(UsageError, match="holds no data"):
        ckpt_dist.convert(saved, tmp_path / "out")
    with pytest.raises(UsageError, match="holds no data"):
        ckpt_dist.fingerprint(saved)
    with pytest.raises(UsageError, match="holds no data"):
        ckpt_dist.convert(saved, tmp_path / "out", dry_run=True, **{"engine.calibrate": True})
    with pytest.raises(UsageError, match="exists"):
        ckpt_dist.inspect(saved, save_catalog=saved)


def test_given_bandwidths_and_ranks_are_for_plans(tmp_path: Path, saved: Path) -> None:
    keys = {"dry_run": True, "engine.bandwidth.read": "1MB", "engine.bandwidth.write": "1GB"}
    slow = ckpt_dist.convert(saved, tmp_path / "out", **keys)
    assert {k: v["from"] for k, v in slow["bandwidth"].items()} == {
        "read": "given", "exchange": "assumed", "write": "given", "sum": "assumed",
    }  # fmt: skip
    need = slow["transports"]["direct"]["bytes_read"] / 1e6
    two = ckpt_dist.convert(saved, tmp_path / "out", **keys, **{"engine.ranks": 2, "engine.nodes": 2})
    for plan, seconds in ((slow, need), (two, need / 2)):
        assert seconds < plan["transports"]["direct"]["seconds"] < seconds + 1
    with pytest.raises(UsageError, match="evenly"):
        ckpt_dist.convert(saved, tmp_path / "out", **keys, **{"engine.ranks": 3, "engine.nodes": 2})
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="only for dry_run"):
        ckpt_dist.convert(tmp_path / "model.safetensors", tmp_path / "out", **{"engine.ranks": 2})


@pytest.mark.parametrize("disk", [20e6, None])
def test_calibration_counts_what_a_slow_disk_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: float | None
) -> None:
    """Three times as fast in reading, summing and writing as a disk takes it: the disk's rate, or what the disk says."""
    block, unflushed, write = 1 << 18, [0], Files.write
    (tmp_path / "source").write_bytes(bytes(16 << 20))
    for name, value in (("FIRST", 1 << 20), ("LAST", 4 << 20), ("ENOUGH_S", 0.3 if disk else 0)):
        monkeypatch.setattr(calibrate, name, value)

    def counted(self: Files, file: int, offset: int, data: memoryview) -> None:
        write(self, file, offset, data)
        unflushed[0] += len(data)

    def flushed(self: Files) -> None:
        nbytes, unflushed[0] = unflushed[0], 0
        if nbytes and disk is None:  # the only flush, and the last
            raise CheckpointError("Input/output error")
        time.sleep(nbytes / (disk or 1))

    def summed(values: list[Array]) -> Array:
        time.sleep(block / 60e6)
        return values[0]

    monkeypatch.setattr(Files, "write", counted)
    monkeypatch.setattr(Files, "sync", flushed)
    samples = [calibrate.sample(str(tmp_path), ["source"], 2, block)]
    arguments = (samples, tmp_path / "out", 1, block, block, summed, True)
    if disk is None:
        with pytest.raises(CheckpointError, match="Input/output error"):
            calibrate.rates(*arguments)
    else:
        assert 0.1 * disk < 1 / sum(1 / rate for rate in calibrate.rates(*arguments).values()) < 1.1 * disk
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_sums_are_measured_with_one_thread_of_torch_for_each_of_ours(tmp_path: Path) -> None:
    """As a job makes them; what a program has set is set again."""
    (tmp_path / "source").write_bytes(bytes(1 << 22))
    seen, before = set[int](), torch.get_num_threads()

    def summed(values: list[Array]) -> Array:
        seen.add(torch.get_num_threads())
        time.sleep(0.01)
        return values[0]

    samples = [calibrate.sample(str(tmp_path), ["source"], 2, 1 << 16)]
    torch.set_num_threads(3)
    try:
        calibrate.rates(samples, tmp_path / "out", 2, 1 << 16, 1 << 16, summed, False)
        assert seen == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_thread_of_a_program_may_be_importing_torch_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    with Crew(1) as crew:
        assert crew.pool.submit(lambda: 1).result() == 1


def test_a_plan_for_other_nodes_needs_no_room_on_this_one(
    tmp_path: Path, meta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(CheckpointError, match="10 are free on its disk"):
        ckpt_dist.convert(meta, tmp_path / "out", dry_run=True)
    for key in ("engine.ranks", "engine.nodes"):
        assert ckpt_dist.convert(meta, tmp_path / "out", dry_run=True, **{key: 2})["bandwidth"]


def test_calibration_measures_and_leaves_nothing(tmp_path: Path, meta: Path) -> None:
    plan = ckpt_dist.convert(meta, tmp_path / "out", dry_run=True, **{"engine.calibrate": True})
    assert [v["from"] for v in plan["bandwidth"].values()] == ["measured", "assumed", "measured", "assumed"]
    assert not list(tmp_path.iterdir())


# ---- hostile catalogs


def damage(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Write it again with other contents; the header is the safetensors library's own."""
    from safetensors import safe_open

    columns = load_arrays(path)
    with safe_open(path, "np") as file:
        head = json.loads(file.metadata()["ckpt_dist_catalog"])
    change(head, columns)
    save_arrays(columns, path, {"ckpt_dist_catalog": json.dumps(head)})


def column(name: str, value: int) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(head: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        columns[name] = columns[name].astype(np.int64)
        columns[name].reshape(-1)[-1] = value

    return change


def said(**values: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda head, columns: head.update(values)


HUGE = 1 << 62
ENTRY = ["w", "float32", [4, 4], "weight", ["w"], []]
HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, np.ndarray]], Any]] = {
    "another version": said(version=2),
    "no such format": said(format="pickle"),
    "a catalog of a catalog": said(format="catalog"),
    "a file outside": lambda head, columns: head["files"].__setitem__(0, "../../etc/passwd"),
    "an absolute file": lambda head, columns: head["files"].__setitem__(0, "/etc/passwd"),
    "a file twice": lambda head, columns: head["files"].append(head["files"][0]),
    "a tensor twice": lambda head, columns: head["entries"].__setitem__(1, head["entries"][0]),
    "a huge tensor": lambda head, columns: head["entries"][0].__setitem__(2, [1 << 40, 1 << 40]),
    "many dims": lambda head, columns: head["entries"][0].__setitem__(2, [1] * 1000),
    "a negative length": lambda head, columns: head["entries"][0].__setitem__(2, [-4, 4]),
    "a true length": lambda head, columns: head["entries"][0].__setitem__(2, [True, 4]),
    "no such dtype": lambda head, columns: head["entries"][0].__setitem__(1, "float3"),
    "no such role": lambda head, columns: head["entries"][0].__setitem__(3, "admin"),
    "no entries": said(entries=7),
    "no config": said(config=[]),
    "values to come": said(about={"length": [1]}),
    "no number of ranks": said(about={"tp": "two"}),
    "stages in no list": said(about={"partition": 2}),
    "a stage of -1 layers": said(about={"partition": [-1]}),
    "a codec that is none": said(packed=[[0, "rot13", 1, 1]]),
    "a compressed chunk of no file": said(packed=[[10**6, "zlib", 1, 1]]),
    "a compressed chunk twice": said(packed=[[0, "zlib", 1, 1]] * 2),
    "a compressed chunk of -1 bytes": said(packed=[[0, "zlib", 1, -1]]),
    "a compressed chunk of no length": said(packed=[[0, "zlib", 1]]),
    "no head": lambda head, columns: head.clear(),
    "a chunk of no tensor": column("entry", 10**6),
    "a chunk of tensor -1": column("entry", -1),
    "a chunk of no file": column("file", HUGE),
    "a start outside": column("start", 10**6),
    "a negative start": column("start", -1),
    "a size outside": column("size", HUGE),
    "a negative size": column("size", -5),
    "an endless stride": column("strides", HUGE),
    "a negative stride": column("strides", -1),
    "a negative offset": column("offset", -1),
    "an offset beyond files": column("offset", HUGE),
    "a column less": lambda head, columns: columns.pop("file"),
    "a short column": lambda head, columns: columns.update(offset=columns["offset"][:-1]),
    "a column more": lambda head, columns: columns.update(length=columns["offset"]),
    "floats": lambda head, columns: columns.update(offset=columns["offset"].astype(np.float32)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_catalog_is_refused(tmp_path: Path, saved: Path, what: str) -> None:
    damage(saved, lambda head, columns: None)
    ckpt_dist.inspect(saved)
    damage(saved, HOSTILE[what])
    with pytest.raises(CheckpointError, match=r"cannot be used|is damaged"):
        ckpt_dist.inspect(saved)


def test_a_catalog_that_was_cut_off_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in (12, 200, len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            ckpt_dist.inspect(saved)
