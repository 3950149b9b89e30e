"""Pickles without running them: an allow-list of names, each of which becomes an inert record.

Nothing that a pickle names is imported or called. A tensor becomes a `TensorRef` (which bytes of which storage), a
sharded tensor a `Sharded`, a class of torch a `Record` that holds its arguments and its state. Everything else is
refused by name. The other direction writes tensors as torch.save does, from names alone.

Invariant: unpickling runs no code but this file's, and its memory is bounded by the pickle's own length.
"""

from __future__ import annotations

import gc
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.dtypes import FROM_STORAGE, TABLE, itemsize, storage_class

BUFFER = 1 << 22  # the C unpickler is three times as fast on a stream that it can peek into
DEEP = 1 << 40
MOST_CLASSES = 1 << 12  # of a framework, in one pickle


class Record(list):  # type: ignore[type-arg]
    """An inert stand-in for an object: its constructor's arguments, then its state. `path` says what it stands for."""

    __slots__ = ()
    path = ""
    __setstate__ = list.append
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(args)

    def __reduce_ex__(self, protocol: Any) -> Any:  # from rank to rank; its class has no name there
        return _again, (self.path, list(self))

    def __setitem__(self, key: Any, value: Any) -> None:  # items of a subclass of dict
        self.append((key, value))


class Namespace(dict):  # type: ignore[type-arg]
    """What is written as an argparse.Namespace."""


class Dtype(str):
    """A dtype by name."""

    __slots__ = ()


@dataclass(frozen=True)
class Storage:
    """A record of the archive: `numel` elements of `dtype` (bytes of an untyped one)."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Small:
    """A tensor of a few elements with their bytes, such as the step of an optimizer: a value like a number is one."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Sharded:
    """What one rank holds of a tensor.

    Of a DTensor: `local`, `placements` (("shard", dim), ("strided", dim, factor), ("replicate",), ("partial",)), the
    mesh's shape, and this rank's coordinate in it; where the file does not say it, `mesh` is the tensor of ranks and
    `rank` may be None. Of a ShardedTensor: `parts`, each (offsets, sizes, tensor).
    """

    shape: tuple[int, ...]
    dtype: str
    local: TensorRef | None = None
    placements: tuple[tuple[object, ...], ...] = ()
    mesh_shape: tuple[int, ...] = ()
    coordinate: tuple[int, ...] | None = None
    mesh: TensorRef | None = None
    rank: int | None = None
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...], TensorRef], ...] = ()


def _record(path: str) -> type[Record]:
    return type(path.rpartition(".")[2], (Record,), {"__slots__": (), "path": path})


def _again(path: str, content: list[Any]) -> Record:
    return _record(path)(*content)


_CHECKPOINT = "torch.distributed.checkpoint."
_SHARD = "torch.distributed._shard."
_OLD, _NEW = "torch.distributed._tensor.", "torch.distributed.tensor."
INERT = {
    path: _record(path)
    for path in (
        *(
            _CHECKPOINT + "metadata." + n
            for n in (
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorStorageMetadata",
                "ChunkStorageMetadata",
                "BytesStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            _CHECKPOINT + "planner." + n
            for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        _CHECKPOINT + "filesystem._StorageInfo",
        _CHECKPOINT + "_hf_utils._HFStorageInfo",
        _SHARD + "sharded_tensor.metadata.TensorProperties",
        _SHARD + "sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        _SHARD + "sharded_tensor.metadata.ShardedTensorMetadata",
        _SHARD + "sharded_tensor.api.ShardedTensor",
        _SHARD + "sharded_tensor.shard.Shard",
        _SHARD + "metadata.ShardMetadata",
        _SHARD + "sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
        _SHARD + "sharding_spec.api.EnumerableShardingSpec",
        "torch.distributed.remote_device._remote_device",
        *(
            m + n
            for m in (_OLD, _NEW)
            for n in (
                "placement_types.Shard",
                "placement_types._StridedShard",
                "placement_types.Replicate",
                "placement_types.Partial",
                "placement_types._Partial",
                "placement_types.DTensorSpec",
                "placement_types.TensorMeta",
                "_dtensor_spec.DTensorSpec",
                "_dtensor_spec.TensorMeta",
                "_dtensor_spec.ShardOrderEntry",
                "api.DTensor",
                "DTensor",
                "_api.DTensor",
            )
        ),
        "torch.distributed.device_mesh.DeviceMesh",
        _OLD + "device_mesh.DeviceMesh",
        "torch.distributed._mesh_layout._MeshLayout",
        "torch.distributed._mesh_layout._FlatLayout",
        "torch.distributed._pycute.layout.Layout",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.UntypedStorage",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.distributed.fsdp._common_utils.FSDPMeta",
        "argparse.Namespace",
        "types.SimpleNamespace",
        "torch.torch_version.TorchVersion",
        "datetime.timedelta",
        "datetime.datetime",
        "uuid.UUID",
        "fractions.Fraction",
        "decimal.Decimal",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "torch.Generator",
        "torch.cuda.amp.grad_scaler._refresh_per_optimizer_state",
        "functools.partial",
        "typing.Any",
        "torch._C._VariableFunctionsClass",
        "signal.Signals",
        "_io.BytesIO",
        "collections.Counter",
        "builtins.range",
        "__builtin__.xrange",
        "builtins.slice",
        "__builtin__.slice",
    )
}
FOREIGN = (  # whose classes and functions are settings: never run
    "deepspeed.",
    "megatron.",
    "nemo.",
    "lightning.",
    "lightning_fabric.",
    "pytorch_lightning.",
    "omegaconf.",
    "transformer_engine.",
    "modelopt.",
    "nvidia_resiliency_ext.",
    "flagscale.",
    "Merak.",
    "transformers.",
    "accelerate.",
    "peft.",
    "deepspeed.",
    "torch.nn.functional.",
    "torch.nn.init.",
    "torch._C._nn.",
)
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"}


def _join(*parts: Any) -> str:
    if not all(type(p) is str for p in parts):
        raise pickle.UnpicklingError("a path of something else than strings")
    return "/".join(parts)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError("_codecs.encode of something else than a text")
    return text.encode(encoding)


def _pairs(*args: Any) -> dict[Any, Any]:
    """`OrderedDict` and `defaultdict` as a plain dict; a default factory is left out."""
    return OrderedDict(args[0]) if len(args) == 1 and isinstance(args[0], (list, dict)) else OrderedDict()


def _member(owner: Any, name: Any = "") -> type[Record]:
    """`getattr(ShardedTensor, "ProcessGroupState")`, as torch spells a class inside a class: an inert one."""
    return Record


def _items(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values) if type(values) in (list, tuple, Record) else ()


def _complex(real: Any = 0, imaginary: Any = 0) -> complex:
    return complex(real, imaginary) if all(type(n) in (int, float) for n in (real, imaginary)) else 0j


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    found = tuple(values) if isinstance(values, (tuple, list)) else None
    if found is None or len(found) > 64 or not all(type(n) is int and 0 <= n < DEEP for n in found):
        raise pickle.UnpicklingError(f"a tensor with {what} {values!r:.60}")
    return found


def is_shape(value: Any) -> bool:
    """Whether a value is the shape of a tensor that could be there."""
    return (
        isinstance(value, (tuple, list))
        and not isinstance(value, Record)
        and all(type(n) is int and n >= 0 for n in value)
        and len(value) <= 64
        and prod(value) < DEEP
    )


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any, dtype: str | None = None) -> TensorRef:
    """`_rebuild_tensor_v2`: the view must lie in its storage."""
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    kind = dtype or storage.dtype
    (at,), sizes, steps = _numbers((offset,), "offset"), _numbers(shape, "shape"), _numbers(stride, "stride")
    if len(sizes) != len(steps):
        raise pickle.UnpicklingError(f"a tensor of shape {sizes} with strides {steps}")
    if prod(sizes) >= DEEP:  # one element may stand for all of them
        raise pickle.UnpicklingError(f"a tensor of shape {sizes}")
    last = at + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True)) + 1 if prod(sizes) else 0
    have = storage.numel * itemsize(storage.dtype)
    if last * itemsize(kind) > have:
        raise pickle.UnpicklingError(f"a tensor that needs {last * itemsize(kind)} bytes of a storage of {have}")
    return TensorRef(storage, kind, at, sizes, steps)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any = None,
    hooks: Any = None,
    dtype: Any = None,
    *more: Any,
) -> TensorRef:
    if not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError("a tensor without a dtype")
    return _tensor(storage, offset, shape, stride, dtype=str(dtype))


def _first(value: Any = None, *more: Any) -> Any:
    return value


class _Wrapper(Record):
    """`_rebuild_wrapper_subclass`, named in a pickle only to be called by the next one."""

    __slots__ = ()
    path = "torch._utils._rebuild_wrapper_subclass"


def _from_type(function: Any = None, kind: Any = None, args: Any = (), state: Any = None, *more: Any) -> Any:
    """`_rebuild_from_type_v2`: a DTensor, or a plain tensor with attributes (which are left out)."""
    name = getattr(kind, "path", "") if isinstance(kind, type) else ""
    if name.endswith("ShardedTensor"):
        return _sharded_tensor(state)
    if name.endswith("DTensor"):
        return _dtensor(args, state)
    if callable(function) and function in (_tensor, _tensor_v3, _first) and isinstance(args, tuple):
        return function(*args)
    raise pickle.UnpicklingError("an unknown kind of tensor")


def _dtensor(args: Any, state: Any) -> Sharded:
    slots = state[1] if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], dict) else state
    slots = {**(state[0] or {} if isinstance(state, tuple) else {}), **slots} if isinstance(slots, dict) else {}
    local, spec = slots.get("_local_tensor"), slots.get("_spec")
    if not isinstance(local, TensorRef) or not isinstance(spec, Record):
        raise pickle.UnpicklingError("a DTensor without a local tensor")
    fields = state_of(spec)
    mesh = state_of(fields.get("mesh"))
    meta = fields.get("tensor_meta")
    shape = (
        meta[0]
        if isinstance(meta, Record) and meta and isinstance(meta[0], (tuple, list))
        else state_of(meta).get("shape", args[2] if len(args) > 2 else ())
    )
    placements = tuple(_placement(p) for p in _items(fields.get("placements")))
    return Sharded(_numbers(shape, "shape"), local.dtype, local, placements, *_mesh(mesh))


def state_of(record: Any) -> dict[str, Any]:
    """The state of a record: the dict that was appended last, or ((None, slots))."""
    if not isinstance(record, Record) or not len(record):
        return {}
    last = record[-1]
    if isinstance(last, tuple) and len(last) == 2 and isinstance(last[1], dict):
        return {**(last[0] or {}), **last[1]}
    return last if isinstance(last, dict) else {}


def _placement(record: Any) -> tuple[object, ...]:
    name = getattr(record, "path", "").rpartition(".")[2]
    fields = state_of(record)
    positional = [a for a in record if type(a) is int] if isinstance(record, Record) else []
    dim = fields.get("dim", positional[0] if positional else None)
    if name in ("Shard", "_StridedShard") and type(dim) is int:
        factor = fields.get("split_factor", positional[1] if len(positional) > 1 else None)
        return ("shard", dim) if name == "Shard" else ("strided", dim, factor)
    return ("replicate",) if name == "Replicate" else ("partial",)


def _mesh(fields: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None, TensorRef | None, int | None]:
    """(shape, coordinate, tensor of ranks, rank), by the fields that the writing torch had."""
    tensor = next((fields[k] for k in ("mesh", "_mesh", "_rank_map") if isinstance(fields.get(k), TensorRef)), None)
    layout = state_of(fields.get("_layout"))
    shape = layout.get("axes", layout.get("shape", layout.get("_shape")))
    if shape is None and tensor is not None and "_rank_map" not in fields:
        shape = tensor.shape
    flat = _flat(shape)
    coordinate = fields.get("_coordinate_on_dim")
    rank = fields.get("_rank", fields.get("_cur_rank"))
    return (
        flat,
        _numbers(coordinate, "coordinate") if coordinate is not None else None,
        tensor,
        rank if type(rank) is int else None,
    )


def _flat(shape: Any) -> tuple[int, ...]:
    """A mesh's shape; a dim may itself be several: `((2, 2), 2)` -> `(4, 2)`."""
    if type(shape) is int:
        return (shape,)
    if isinstance(shape, Record):
        shape = state_of(shape).get("shape", ())
    return tuple(prod(_flat(s)) for s in shape) if isinstance(shape, (tuple, list)) else ()


def _sharded_tensor(state: Any) -> Sharded:
    """A ShardedTensor's state: (local shards, metadata, process group, sharding spec, ...)."""
    if not isinstance(state, tuple) or len(state) < 2:
        raise pickle.UnpicklingError("a ShardedTensor without shards")
    shards, meta = _items(state[0]), state_of(state[1])
    parts, dtype = [], None
    for shard in shards:
        fields = state_of(shard)
        box = state_of(fields.get("metadata"))
        tensor = fields.get("tensor")
        if not isinstance(tensor, TensorRef):
            raise pickle.UnpicklingError("a shard without a tensor")
        parts.append((_numbers(box.get("shard_offsets"), "offsets"), _numbers(box.get("shard_sizes"), "sizes"), tensor))
        dtype = tensor.dtype
    properties = meta.get("tensor_properties")
    listed = [a for a in _items(_last(properties)) if isinstance(a, Dtype)]
    return Sharded(
        _numbers(meta.get("size"), "size"), dtype or (str(listed[0]) if listed else "float32"), parts=tuple(parts)
    )


def _last(record: Any) -> Any:
    return record[-1] if isinstance(record, Record) and len(record) else ()


CALLS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_wrapper_subclass": _Wrapper,
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": _pairs,
    "torch.Size": _items,
    "builtins.tuple": _items,
    "builtins.list": list,
    "builtins.dict": dict,
    "builtins.set": _items,
    "builtins.frozenset": _items,
    "builtins.complex": _complex,
    "builtins.getattr": _member,
    "_codecs.encode": _encode,
    "builtins.int": _record("int"),
    "builtins.float": _record("float"),
    "builtins.str": _record("str"),
    "builtins.bool": _record("bool"),
    "builtins.bytearray": _record("bytearray"),
}
CALLS["torch.Size"] = tuple  # a million of them in a large .metadata; a tuple of a tuple is itself
CALLS["builtins.list"], CALLS["builtins.dict"] = _record("list"), _record("dict")
CALLS |= {name.replace("builtins", "__builtin__"): made for name, made in CALLS.items() if name.startswith("builtins")}
CALLS |= {"__builtin__.long": CALLS["builtins.int"], "__builtin__.unicode": CALLS["builtins.str"]}  # by protocol 2


class _Unpickler(pickle.Unpickler):
    """Names become records; storages become references."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in CALLS:
            return CALLS[path]
        if path in INERT:
            return INERT[path]
        if module in ("torch", "torch.storage") and name in FROM_STORAGE:
            return Dtype(FROM_STORAGE[name])
        if module == "torch" and name in TABLE:
            return Dtype(name)
        if path.startswith(FOREIGN) and all(part.isidentifier() for part in path.split(".")):
            return self._foreign(path)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _join
        raise _Refused(path)

    def _foreign(self, path: str) -> type[Record]:
        """One class for each name; a class takes a hundred times the memory of its name."""
        if path not in self.classes and len(self.classes) >= MOST_CLASSES:
            raise pickle.UnpicklingError(f"more than {MOST_CLASSES} classes")
        return self.classes.get(path) or self.classes.setdefault(path, _record(path))

    persistent: Callable[[Any], Any]
    classes: dict[str, type[Record]]

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)


def storage(pid: Any) -> Storage:
    """What a persistent id of torch.save stands for."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise pickle.UnpicklingError(f"a reference of an unknown kind: {pid!r:.60}")
    kind, key, numel = pid[1], pid[2], pid[4]
    dtype = (
        str(kind)
        if isinstance(kind, Dtype)
        else "uint8"
        if isinstance(kind, type) and kind.__name__ == "UntypedStorage"
        else None
    )
    if dtype is None or type(key) is not str or type(numel) is not int or not 0 <= numel < DEEP:
        raise pickle.UnpicklingError(f"a storage of an unknown kind: {pid!r:.60}")
    return Storage(key, dtype, numel)


class _Refused(Exception):
    """A global that is not on the list."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: looking at millions of records again and again is most of the time they cost.

    It starts again when they are gone, since its first run would look at all that are left.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


# Opcodes by how long they are. A memo number that is put (r, p) may not be larger than the pickle is long: the C unpickler
# makes room for all smaller ones, which would be 64 GB for two opcodes of a stranger.
_TOKENS = (
    rb"[(012NOQR)\]}abdelostu\x81\x85-\x89\x8f-\x91\x93\x94\x97\x98]|[hqK\x80\x82].|[M\x83]..|[Jj\x84]....|[G\x95].{8}"
    rb"|c[^\n]*\n[^\n]*\n|[FILPSVg][^\n]*\n|p[0-9]{1,%d}\n|r..[\x00-\x%02x]%s"
)
_COUNTED = {0x8C: 1, 0x58: 4, 0x8D: 8, 0x43: 1, 0x42: 4, 0x8E: 8, 0x8A: 1, 0x8B: 4, 0x54: 4, 0x55: 1, 0x96: 8}


def _bounded(data: bytes) -> None:
    """Walk over the opcodes; raises UnpicklingError where one could take more memory than the pickle is long."""
    wide = len(data) >> 24
    last = rb"[\x00-\x%02x]" % min(wide, 255) if wide else rb"\x00"
    _walk(data, 0, _TOKENS % (max(len(str(len(data))) - 1, 1), 255 if wide else len(data) >> 16, last))


def end(data: Any, at: int, where: str) -> int:
    """Where the pickle that begins at `at` of some bytes (or a mapped file) ends; nothing of it is loaded."""
    try:
        return _walk(data, at, _TOKENS % (18, 255, rb"."))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{where} is damaged or truncated: its pickle holds {error}.") from None


def _walk(data: Any, at: int, tokens: bytes) -> int:
    """The end of a pickle, over opcodes of these forms."""
    step = re.compile(rb"(?:" + tokens + rb"){1,4000}", re.DOTALL)
    while True:
        if run := step.match(data, at):
            at = run.end()
            continue
        op = data[at : at + 1]
        if op == b".":
            return at + 1
        width = _COUNTED.get(op[0]) if op else None
        if width is None:
            raise pickle.UnpicklingError(f"{op!r} at byte {at}, which is no opcode that fits there")
        length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        at += 1 + width + length
        if at > len(data):
            raise pickle.UnpicklingError(f"a value of {length} bytes, of which {len(data)} are there")


def loads(data: bytes, where: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Unpickle by the allow-list. What is not on it, and what is damaged, is a CheckpointError that names `where`.

    `persistent` says what a persistent id stands for; by default those of torch.save, which are storages.
    """
    unpickler = _Unpickler(io.BufferedReader(io.BytesIO(data), BUFFER))
    unpickler.persistent, unpickler.classes = persistent or storage, {}
    try:
        _bounded(data)
        return unpickler.load()
    except _Refused as refused:
        raise CheckpointError(
            f"{where} asks for {refused}, which no checkpoint needs and which could run code; nothing was run. "
            "If you trust the file, load it with the framework that wrote it and save plain tensors."
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (
        MemoryError,
        RecursionError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        ImportError,
        UnicodeError,
    ) as error:
        raise CheckpointError(f"{where} is damaged: its pickle holds {type(error).__name__}: {error!s:.200}.") from None


class _Name(str):
    """A global to be written by name."""


class _Reduce(tuple):  # type: ignore[type-arg]
    """(callable, arguments) to be written as a call."""


def dumps(tree: Any, small: list[bytes] | None = None, first: int = 0) -> bytes:
    """The data.pkl of torch.save for plain containers, numbers, texts and TensorRefs (whose storages are records `data/KEY`).

    The bytes of small tensors are added to `small`, which become records whose numbers begin with `first`.
    """
    out = io.BytesIO()
    pickler = _Pickler(out, 2)
    pickler.small, pickler.first = [] if small is None else small, first
    pickler.dump(tree)
    if small is None and pickler.small:
        raise CheckpointError("A tensor cannot be written among these values.")
    return out.getvalue()


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[k + 1 :]) for k in range(len(shape)))


_PurePython: Any = pickle._Pickler  # its types do not show what a subclass needs


def writable(value: Any) -> bool:
    """Whether `dumps` can write a value: plain containers, numbers and texts, not the records of foreign classes."""
    try:
        dumps(value, [])
    except CheckpointError:
        return False
    return True


class _Pickler(_PurePython):  # type: ignore[misc]
    """The pure-Python pickler, taught to write names that it does not import."""

    small: list[bytes]
    first: int

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        cls = storage_class(value.dtype)
        kind = _Name(f"torch {cls}") if cls else _Name("torch.storage UntypedStorage")
        numel = value.numel if cls else value.numel * itemsize(value.dtype)
        return ("storage", kind, value.key, "cpu", numel)

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Name):
            module, _, name = value.partition(" ")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        elif isinstance(value, TensorRef):
            self._tensor(value)
        elif isinstance(value, Small):
            key, numel = str(self.first + len(self.small)), len(value.data) // itemsize(value.dtype)
            self.small.append(value.data)
            self._tensor(TensorRef(Storage(key, value.dtype, numel), value.dtype, 0, value.shape, _dense(value.shape)))
        elif isinstance(value, Namespace):
            self.save(_Name("argparse Namespace"))
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.save(dict(value))
            self.write(pickle.BUILD)
        elif isinstance(value, bytes):
            self._call("_codecs encode", value.decode("latin1"), "latin1")
        elif isinstance(value, complex):
            self._call("builtins complex", value.real, value.imag)
        elif isinstance(value, Record) or not isinstance(
            value, (dict, list, tuple, str, bytes, int, float, bool, complex, type(None), Storage)
        ):
            raise CheckpointError(
                f"A value of type {getattr(value, 'path', '') or type(value).__name__} cannot be written."
            )
        else:
            super().save(dict(value) if type(value) is OrderedDict else value, save_persistent_id)

    def _call(self, name: str, *arguments: Any) -> None:
        self.save(_Name(name))
        self.save(arguments)
        self.write(pickle.REDUCE)

    def _tensor(self, ref: TensorRef) -> None:
        typed = storage_class(ref.dtype) is not None
        self.save(_Name("torch._utils _rebuild_tensor_v2" if typed else "torch._utils _rebuild_tensor_v3"))
        self.write(pickle.MARK)
        for part in (ref.storage, ref.offset, ref.shape, ref.stride, False):
            self.save(part)
        self.save(_Name("collections OrderedDict"))
        self.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
        if not typed:
            self.save(_Name(f"torch {ref.dtype}"))
        self.write(pickle.TUPLE + pickle.REDUCE)
