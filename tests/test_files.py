"""Contract: headers and pickles are read exactly or refused. Whatever bytes a file holds, the only error is CheckpointError,
and it comes soon; what we lay out is byte for byte (safetensors) or by content (zips, pickles) what the real libraries
write and read.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import resource
import shutil
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import pickles, safetensors, yamls, zips
from ckpt_dist.files.dtypes import TABLE, itemsize
from ckpt_dist.formats import torch as pt

FAST = settings(deadline=None, max_examples=300)


def sample(dtype: str, *shape: int) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype == "bool" else 100, (*shape, itemsize(dtype)), dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).reshape(shape)


STORABLE = [d for d, (_, short, _) in TABLE.items() if short]


@pytest.mark.parametrize(
    "dtypes",
    [STORABLE, ["float32"], ["bfloat16", "int64", "bool"], ["uint8", "float8_e5m2", "int8", "float8_e4m3fn", "bool"]],
)
def test_a_header_is_byte_for_byte_that_of_the_library(tmp_path: Path, dtypes: list[str]) -> None:
    shapes = [(3, 2), (), (0, 4), (5,)]
    tensors = {f"{s}.ä {d}": sample(d, *shape) for d in dtypes for s, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    names = [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
    header, offsets = safetensors.lay_out(names, {"format": "pt"})
    theirs = (tmp_path / "theirs").read_bytes()
    assert theirs.startswith(header)
    for (name, _, _), at in zip(names, offsets, strict=True):
        raw = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert theirs[at : at + len(raw)] == raw
    stored, metadata = safetensors.read_header(tmp_path / "theirs")
    assert {(t.name, t.dtype, t.shape, t.offset) for t in stored} == {
        (n, d, s, o) for (n, d, s), o in zip(names, offsets, strict=True)
    }
    assert metadata == {"format": "pt"}


@given(st.binary(max_size=200))
@FAST
def test_no_bytes_after_a_length_crash_the_header_reader(data: bytes) -> None:
    path = Path("/tmp") / f"ckpt_dist-header-{os.getpid()}"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    try:
        safetensors.read_header(path)
    except CheckpointError:
        pass
    finally:
        path.unlink()


HOSTILE_HEADERS = [
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "XX", "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
    f'{{"a": {{"dtype": "F32", "shape": {[1] * 4000}, "data_offsets": [0, 4]}}}}',  # planning grows with dims
    f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "b": {{"dtype": "F32", "shape": {[0, 3] * 33}, "data_offsets": [4, 4]}}}}',
    '{"a": 3}',
    "[1, 2]",
    "[" * 5000,
    '{"__metadata__": {"a": 1}}',
]


@pytest.mark.parametrize("text", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"0000")
    with pytest.raises(CheckpointError):
        safetensors.read_header(tmp_path / "f")


def archive(tmp_path: Path, records: list[tuple[str, bytes | int]], fill: dict[int, bytes]) -> Path:
    layout = zips.lay_out(records, "archive")
    out = bytearray(layout.length)
    for at, piece in layout.pieces:
        out[at : at + len(piece)] = piece
    for k, data in fill.items():
        out[layout.addresses[k] : layout.addresses[k] + len(data)] = data
        for position in layout.crc_at[k]:
            out[position : position + 4] = zips.crc32(data).to_bytes(4, "little")
    assert all(a % 64 == 0 for a in layout.addresses)
    (tmp_path / "a.zip").write_bytes(out)
    return tmp_path / "a.zip"


def test_an_archive_satisfies_strict_tools(tmp_path: Path) -> None:
    data = os.urandom(1000)
    path = archive(tmp_path, [("data.pkl", b"hello"), ("data/0", 1000), ("data/1", 0), ("version", b"3\n")], {1: data})
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None and z.read("archive/data/0") == data
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-t", path], capture_output=True).returncode == 0
    with open(path, "rb") as file:
        found = zips.directory(file.fileno(), 0, path.stat().st_size, "x")
        assert [r.nbytes for r in found.values()] == [5, 1000, 0, 2]
        assert os.pread(file.fileno(), 1000, found["archive/data/0"].offset) == data


def test_very_large_records_and_very_many(tmp_path: Path) -> None:
    layout = zips.lay_out([("data.pkl", b"x"), ("data/0", 5 << 30), ("data/1", 10)])
    with open(tmp_path / "big", "wb") as file:
        file.truncate(layout.length)
        for at, piece in layout.pieces:
            file.seek(at)
            file.write(piece)
    with open(tmp_path / "big", "rb") as file:
        found = zips.directory(file.fileno(), 0, layout.length, "big")
        assert found["archive/data/0"].nbytes == 5 << 30 and found["archive/data/1"].offset == layout.addresses[2]
    with zipfile.ZipFile(tmp_path / "big") as z:
        assert z.getinfo("archive/data/0").file_size == 5 << 30 and z.getinfo("archive/data/1").header_offset > 5 << 30
    path = archive(tmp_path, [(f"data/{k}", b"") for k in range(70_000)], {})
    with open(path, "rb") as file:
        assert len(zips.directory(file.fileno(), 0, path.stat().st_size, "many")) == 70_000
    assert len(zipfile.ZipFile(path).namelist()) == 70_000


def test_a_storage_is_the_record_that_torch_reads(tmp_path: Path) -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.save({"w": value}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a", zipfile.ZIP_STORED) as z:
        for name in ("a/x/data/0", "a/data/x/data/0"):
            z.writestr(name, bytes(16))
    assert torch.equal(torch.load(tmp_path / "a.pt")["w"], value)
    tree, storages = pt.open_archive(tmp_path / "a.pt")
    at = pt.storage_record(storages, tree["w"], "a.pt")
    assert (tmp_path / "a.pt").read_bytes()[at : at + 16] == value.numpy().tobytes()


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
@FAST
def test_crcs_combine(parts: list[bytes]) -> None:
    at, runs = 0, []
    for part in parts:
        runs.append((at, len(part), zips.crc32(part)))
        at += len(part)
    assert zips.combine_runs(reversed(runs)) == (0, at, zlib.crc32(b"".join(parts)))


def real_pickles(tmp_path: Path) -> list[tuple[str, bytes]]:
    """data.pkl of a nested .pt, `.metadata`, and the pickle of real DTensors."""
    state = {
        "model": {"w": torch.randn(3, 4), "b": torch.ones(2).bfloat16()},
        "step": 3,
        "list": [1, "a", None, (2.5, True)],
    }
    torch.save(state, tmp_path / "model.pt")
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    ranks = Path(__file__).parent / "data/torch-2.6.0/ranks/model_world_size_2_rank_1.pt"
    found = [("metadata", (tmp_path / "dcp/.metadata").read_bytes())]
    for path in (tmp_path / "model.pt", ranks):
        with zipfile.ZipFile(path) as z:
            found.append((path.stem, z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))))
    return found


def test_a_pickle_cut_anywhere_is_refused_and_nothing_else_happens(tmp_path: Path) -> None:
    for name, data in real_pickles(tmp_path):
        pickles.loads(data, name)
        for end in range(len(data)):
            with pytest.raises(CheckpointError):
                pickles.loads(data[:end], name)


def test_a_pickle_with_any_byte_changed_gives_a_value_or_a_clear_error(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, data in real_pickles(tmp_path):
        for _ in range(4000):
            at, value = (int(torch.randint(0, n, (1,), generator=generator)) for n in (len(data), 256))
            with contextlib.suppress(CheckpointError):
                pickles.loads(data[:at] + bytes([value]) + data[at + 1 :], name)


EVIL = [
    b"cposix\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"c__builtin__\ngetattr\n(cos\nsystem\nS'x'\ntR.",
    b"cbuiltins\n__import__\n(S'os'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"ctorch.serialization\nload\n(S'x'\ntR.",
    b"cckpt_dist.files.pickles\nloads\n.", b"csubprocess\nPopen\n(S'true'\ntR.", b"cbuiltins\nbytearray.__init__\n.",
    b"\x80\x04\x8c\x08builtins\x94\x8c\x04exec\x94\x93\x94\x8c\x01x\x85R.", b"cnumpy.core.multiarray\nscalar.__globals__\n.",
]  # fmt: skip


@pytest.mark.parametrize("data", EVIL)
def test_what_is_not_on_the_list_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"asks for|damaged"):
        pickles.loads(data, "evil")


def test_signals_by_their_names() -> None:
    """So Python up to 3.11.3 pickles `exit_signal=signal.SIGTERM` of Megatron's args."""
    found = pickles.loads(b"\x80\x02}X\x0b\x00\x00\x00exit_signalcsignal\nSIGTERM\ns.", "args")
    assert found["exit_signal"].path == "signal.SIGTERM" and not pickles.writable(found["exit_signal"])
    for name in ("signal", "raise_signal", "pthread_kill", "default_int_handler", "SIG_DFL", "SIGTERM.numerator"):
        with pytest.raises(CheckpointError, match=f"asks for signal.{name}"):
            pickles.loads(b"\x80\x02csignal\n" + name.encode() + b"\n.", "evil")


def test_names_of_classes_take_no_more_memory_than_settings_need() -> None:
    def named(count: int, distinct: int) -> bytes:
        return b"\x80\x02(" + b"".join(b"cnemo.a\nb%d\n" % (k % distinct) for k in range(count)) + b"t."

    assert len(set(pickles.loads(named(9000, 7), "x"))) == 7
    with pytest.raises(CheckpointError, match="more than 4096 classes"):
        pickles.loads(named(9000, 9000), "x")


def test_small_pickles_cannot_ask_for_much_memory() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bombs = [
        b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".", b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b".",
        b"\x80\x04\x95" + (1 << 50).to_bytes(8, "little") + b".", b"cbuiltins\nbytearray\n(I1000000000000\ntR.", b"(" * 100_000 + b".",
        b"r" + (1 << 30).to_bytes(4, "little") + b".", b"\x80\x02]" + b"2a" * 20 + b".",
    ]  # fmt: skip
    for bomb in bombs:
        with contextlib.suppress(CheckpointError):
            pickles.loads(bomb, "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("dtype", sorted(TABLE))
def test_what_is_written_is_what_torch_reads(tmp_path: Path, dtype: str) -> None:
    value = sample(dtype, 3, 5)
    ref = pt.tensor(dtype, (3, 5), "0")
    tree = {"w": ref, "n": 3, "s": "ä", "none": None, "nested": [{"t": (1.5, True)}, b"x", 1 + 2j], "big": 1 << 80}
    raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    records = pt.records(pickles.dumps(tree), [len(raw)])
    path = archive(tmp_path, records, {next(k for k, (n, _) in enumerate(records) if n == "data/0"): raw})
    for mmap in (False, True):
        got = torch.load(path, weights_only=True, mmap=mmap)
        assert got["w"].dtype == value.dtype and torch.equal(got["w"].view(torch.uint8), value.view(torch.uint8))
        assert {k: v for k, v in got.items() if k != "w"} == {k: v for k, v in tree.items() if k != "w"}
    torch.save({"w": value}, tmp_path / "theirs.pt")
    found, storages = pt.open_archive(tmp_path / "theirs.pt")
    assert (found["w"].dtype, found["w"].shape) == (dtype, (3, 5))
    at = pt.storage_record(storages, found["w"], "theirs")
    assert (tmp_path / "theirs.pt").read_bytes()[at : at + len(raw)] == raw


@pytest.mark.parametrize(
    "bomb", [b"]r\xff\xff\xff\x7f.", b"]r\x00\x00\x00\x10.", b"]p999999999\n.", b"\x80\x02]q\x00r\xff\xff\xff\xff."]
)
def test_a_memo_number_beyond_the_pickle_takes_no_memory(bomb: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="damaged"):
        pickles.loads(bomb, "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_long_pickles_of_every_protocol_pass() -> None:
    tree = {f"k{i}": [i, (i, str(i) * 3), {"x": float(i), "b": b"y" * (1 + i % 300)}] for i in range(20_000)}
    for protocol in range(2, 6):
        assert pickles.loads(pickle.dumps(tree, protocol), "x") == tree


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", storage: bytes = STORAGE) -> bytes:
    return REBUILD + b"(" + storage + b"K\x00" + shape + stride + b"\x89NtR"


def table(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


UNCHANGED = {
    "a function's defaults": REBUILD + b"N" + table(__kwdefaults__=table(dtype=text("int32"))) + b"\x86b",
    "a function's function": REBUILD + b"N" + table(function=b"N") + b"\x86b",
    "a method of a size": b"ctorch\nSize\n" + table(function=b"N") + b"b",
    "a function that copies": b"ccollections\nOrderedDict\nN" + table(take=b"N") + b"\x86b",
    "a record's class": b"ctorch\ndevice\nN" + table(path=text("x")) + b"\x86b",
    "an offset": tensor() + table(offset=b"J\xff\xff\xff\x7f") + b"b",
    "a shape": tensor() + table(shape=text("xyz")) + b"b",
    "a shape by slots": tensor() + b"N" + table(shape=text("xyz")) + b"\x86b",
    "a storage": tensor(storage=STORAGE + table(numel=b"J\xff\xff\xff\x7f") + b"b"),
}


@pytest.mark.parametrize("what", UNCHANGED)
def test_no_state_of_a_pickle_changes_a_fact_or_a_function(what: str) -> None:
    honest = pickles.loads(b"\x80\x02" + tensor() + b".", "x")
    with pytest.raises(CheckpointError, match=r"^x is damaged: its pickle holds"):
        pickles.loads(b"\x80\x02" + UNCHANGED[what] + b".", "x")
    assert pickles.loads(b"\x80\x02" + tensor() + b".", "x") == honest
    assert pickle.loads(pickle.dumps(honest)) == honest


def test_a_few_bytes_are_no_large_tensor() -> None:
    """A mask of 4096 x 4096 may repeat one element; what would be read for hours may not."""
    shape = b"M\x00\x10M\x00\x10\x86"
    assert pickles.loads(b"\x80\x02" + tensor(shape, b"K\x00K\x00\x86") + b".", "x").shape == (4096, 4096)
    for shape in (b"J\x00\x00\x00\x7fK\x00", b"\x8a\x05\x00\x00\x00\x00\x40K\x00"):
        with pytest.raises(CheckpointError, match="whose storage has 4 elements"):
            pickles.loads(b"\x80\x02" + tensor(shape[:-2] + b"\x85", b"K\x00\x85") + b".", "x")


def test_attributes_of_an_ordered_dict_are_left_out() -> None:
    """torch gives a state dict one, `_metadata`."""
    state = table(items=b"K\x03", get=b"K\x03")
    found = pickles.loads(b"\x80\x02ccollections\nOrderedDict\n)R" + text("w") + b"K\x01s" + state + b"b.", "x")
    assert found == {"w": 1} and list(found.items()) == [("w", 1)] and found.get("w") == 1
    assert pickles.loads(pickles.dumps(found), "x") == {"w": 1}


YAMLS = {
    "merge keys": "x0: &x0 {a: 1}\n" + "".join(f"x{k}: &x{k}\n  <<: [*x{k - 1}, *x{k - 1}]\n" for k in range(1, 40)),
    "shared lists": "a: &a [1]\n" + "".join(f"{'b' * k}: &{'b' * k} [*{'b' * (k - 1) or 'a'}, *{'b' * (k - 1) or 'a'}]\n" for k in range(1, 40)),
    "a long text": "a: " + "x" * (1 << 20),
    "an int of nothing": 'a: !!int ""',
    "a float of nothing": 'a: !!float ""',
    "no bool": "a: !!bool foo",
    "an object": "a: !!python/object/apply:os.system [true]",
    "bytes": "a: !!binary zzz",
    "brackets": "[" * 3000,
    "no text": "\0",
}  # fmt: skip


@pytest.mark.parametrize("what", YAMLS)
def test_yaml_is_plain_or_refused_at_once(what: str) -> None:
    with pytest.raises(CheckpointError, match=r"^x "):
        yamls.table(YAMLS[what].encode(), "x")


def test_yaml_of_words_and_numbers() -> None:
    text = (
        "{a: 1, b: [1.5, .inf], c: {d: yes, e: ~}, f: '1', g: &x [1], h: *x, i: 0x10, j: 2001-02-03, k: -1.0e-05, 3: l}"
    )
    assert yamls.table(text.encode(), "x") == {
        **{"a": 1, "b": [1.5, math.inf], "c": {"d": True, "e": None}, "f": "1", "g": [1], "h": [1], "i": 16},
        **{"j": "2001-02-03", "k": -1e-5, 3: "l"},
    }
    for number in ("1" + ":1" * 100_000, "1:1:1.5", "1:" * 400 + "1.5", "9" * 5000):
        assert yamls.table(f"a: {number}".encode(), "x") == {"a": number}


LONG = {
    "a size": (b"ctorch\nSize\n", text("x" * 100_000) + b"\x85"),
    "a record": (b"ctorch\ndevice\n", b"(" + b"N" * 100_000 + b"t"),
    "bytes": (b"c_codecs\nencode\n", text("x" * 100_000) + b"\x85"),
    "a path": (b"cpathlib\nPosixPath\n", text("x" * 100_000) + b"\x85"),
    "a tuple": (b"cbuiltins\ntuple\n", b"](" + b"N" * 100_000 + b"e\x85"),
    "a set": (b"c__builtin__\nset\n", b"](" + b"N" * 100_000 + b"e\x85"),
    "an ordered dict": (b"ccollections\nOrderedDict\n", b"}(" + b"".join(b"J%bN" % struct.pack("<i", k) for k in range(100_000)) + b"u\x85"),
    "a sharded tensor": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n",
        b"(Nctorch.distributed._shard.sharded_tensor.api\nShardedTensor\n)](" + b"N" * 100_000 + b"eN\x86t",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LONG)
def test_calls_copy_no_more_than_the_pickle_is_long(what: str) -> None:
    """A few bytes call with the same long list again and again."""
    called, arguments = LONG[what]
    bomb = b"\x80\x02" + called + b"q\x000" + arguments + b"q\x010(" + b"h\x00h\x01R" * 30_000 + b"t."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"^x is damaged: its pickle holds"):
        pickles.loads(bomb, "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("one", [b"K\x01", b")q\x01", b"N\x85q\x01"])
def test_looking_over_a_pickle_takes_no_more_memory_than_it_is_long(one: bytes) -> None:
    data = b"\x80\x02](" + one * (6_000_000 // len(one)) + b"e."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pickles._bounded(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def doubled(first: bytes, twice: bytes) -> bytes:
    """What holds the one before it twice, sixty times over: a few hundred bytes that a walk takes for ever with."""
    return first + b"q\x00" + b"".join(b"0" + (twice % (k, k)) + b"q%c" % (k + 1) for k in range(60))


TUPLES, LISTS, DICTS = (
    doubled(b")", b"h%ch%c\x86"),
    doubled(b"]", b"](h%ch%ce"),
    doubled(b"}", b"}(K\x01h%cK\x02h%cu"),
)
SHARED = {
    "a key": b"}" + TUPLES + b"Ns",
    "keys": b"}(K\x01N" + TUPLES + b"Nu",
    "a dict of keys": b"(" + TUPLES + b"Nd",
    "a size as a key": b"}ctorch\nSize\n" + TUPLES + b"\x85RNs",
    "a set": b"\x8f(" + TUPLES + b"\x90",
    "a frozen set": b"(" + TUPLES + b"\x91",
    "a key that is doubled": b"})" + b"2\x86" * 60 + b"Ns",
    "a key from the memo": b"}" + TUPLES + b"0h\x20h\x21\x86Ns",
    "a key by other numbers": b"})\x94" + b"".join(b"0g%d\ng%d\n\x86\x94" % (k, k) for k in range(60)) + b"Ns",
    "a key under what was dropped": b"})" + b"".join(b"N0q%c0h%ch%c\x86" % (k, k, k) for k in range(60)) + b"Ns",
    "a key that was got again": b"})q\x00"
    + b"".join(b"0h%ch%c\x86q%c0h%cq%c" % (k, k, k + 1, k + 1, k + 2) for k in range(0, 120, 2))
    + b"Ns",
    "pairs": b"ccollections\nOrderedDict\n]" + TUPLES + b"N\x86a\x85R",
    "lists as pairs": b"ccollections\nOrderedDict\n](](" + TUPLES + b"Nee\x85R",
    "tuples of lists": b"}"
    + doubled(b"]", b"](cbuiltins\ntuple\nh%c\x85Rcbuiltins\ntuple\nh%c\x85Re")
    + b"0cbuiltins\ntuple\nh\x3c\x85RNs",
    "what is called": b"]" + TUPLES + b"NR",
    "frozen sets": b"(" + doubled(b")", b"((h%cK\x00\x86h%cK\x01\x86\x91") + b"\x85\x91",
    "many keys": b"}(" + b"(" + b"K\x01" * 9000 + b"tq\x00N" + b"h\x00N" * 9000 + b"u",
    "lists": LISTS,
    "dicts": DICTS,
    "tuples": TUPLES,
    "a list in itself": b"]q\x00h\x00a",
    "an offset": REBUILD + b"(" + STORAGE + TUPLES + b"))\x89NtR",
    "a shape": tensor(shape=LISTS),
    "a storage": TUPLES + b"Q",
    "a mesh": b"ctorch._tensor\n_rebuild_from_type_v2\n(Nctorch.distributed.tensor\nDTensor\n)"
    + table(
        _local_tensor=tensor(),
        _spec=b"ctorch.distributed.tensor._dtensor_spec\nDTensorSpec\n)R"
        + table(
            tensor_meta=b"ctorch.distributed.tensor._dtensor_spec\nTensorMeta\n((K\x04tt\x81",
            mesh=b"ctorch.distributed.device_mesh\nDeviceMesh\n)R"
            + table(_layout=b"ctorch.distributed._mesh_layout\n_MeshLayout\n)R" + table(shape=TUPLES) + b"b")
            + b"b",
        )
        + b"b",
    )
    + b"tR",
}


@pytest.mark.parametrize("what", SHARED)
def test_things_that_are_shared_without_end_are_refused_at_once(what: str) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"^x is damaged: its pickle holds (UnpicklingError|ValueError|TypeError: unhashable).{0,150}$",
    ):
        pickles.loads(b"\x80\x02" + SHARED[what] + b".", "x")


def test_a_tuple_that_is_held_often_passes() -> None:
    betas = (0.9, [0.95])
    groups = [{"betas": betas, "nested": [betas] * 20} for _ in range(300)]
    assert pickles.loads(pickle.dumps(groups, 2), "x") == groups


def test_a_number_that_nobody_can_print_is_refused() -> None:
    with pytest.raises(CheckpointError, match="x is damaged"):
        pickles.loads(pickle.dumps({1 << 20_000: 1}, 2), "x")
