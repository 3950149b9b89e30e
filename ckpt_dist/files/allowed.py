"""The allow-list: which names a pickle may hold, and the inert thing that each of them becomes.

Nothing that a pickle names is imported or called: a tensor becomes a `TensorRef`, a sharded tensor a `Sharded`, a class of
torch a `Record`.

Invariant: what is called here are functions of this file, which look at plain values and build records.
"""

from __future__ import annotations

import pickle
import signal
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from ckpt_dist.errors import shown
from ckpt_dist.files.dtypes import FROM_STORAGE, TABLE, itemsize
from ckpt_dist.files.hashes import weigh
from ckpt_dist.files.inert import (
    DEEP,
    MOST_ARGUMENTS,
    Call,
    Copy,
    Dtype,
    Pairs,
    Record,
    Sharded,
    Storage,
    TensorRef,
    named,
    state_of,
)

_CHECKPOINT = "torch.distributed.checkpoint."
_SHARD = "torch.distributed._shard."
_OLD, _NEW = "torch.distributed._tensor.", "torch.distributed.tensor."
INERT = {
    path: named(path)
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
        *(f"signal.{name}" for name in signal.Signals.__members__),  # so Python pickles them until 3.11.3
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
    "torch.nn.functional.",
    "torch.nn.init.",
    "torch._C._nn.",
)
MOST_DIMS = 64
LARGE, SPREAD = 1 << 20, 64  # elements; a larger view of a storage repeats each of them no more often than this
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"}


Take = Callable[[int], None]  # says how much will be copied, and refuses more than the pickle has room for


def _join(take: Take, *parts: Any) -> str:
    if not all(type(p) is str for p in parts):
        raise pickle.UnpicklingError("a path of something else than strings")
    take(sum(len(p) + 1 for p in parts))
    return "/".join(parts)


def _encode(take: Take, text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError("_codecs.encode of something else than a text")
    take(len(text))
    return text.encode(encoding)


def _pairs(take: Take, *args: Any) -> dict[Any, Any]:
    """`OrderedDict` and `defaultdict` as a plain dict; a default factory is left out."""
    if len(args) != 1 or not isinstance(args[0], (list, dict)):
        return Pairs()
    take(2 * len(args[0]))  # keys and values
    found = Pairs()
    for pair in args[0].items() if isinstance(args[0], dict) else args[0]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise pickle.UnpicklingError("an item of a dict that is no pair")
        weigh(pair[:1], take)
        found[pair[0]] = pair[1]
    return found


def _member(owner: Any, name: Any = "") -> type[Record]:
    """`getattr(ShardedTensor, "ProcessGroupState")`, as torch spells a class inside a class: an inert one."""
    return Record


def _items(take: Take, values: Any = ()) -> list[Any]:
    """A set or a tuple as a list, which nobody hashes."""
    found = values if type(values) in (list, tuple) else ()
    take(len(found))
    return list(found)


def _size(values: Any = ()) -> tuple[Any, ...]:
    """`torch.Size`; there are a million of them in a large `.metadata`."""
    if type(values) is not tuple or len(values) > MOST_DIMS or not {int} >= set(map(type, values)):
        raise pickle.UnpicklingError(f"a size {shown(values)}")
    return values


def _complex(real: Any = 0, imaginary: Any = 0) -> complex:
    return complex(real, imaginary) if all(type(n) in (int, float) for n in (real, imaginary)) else 0j


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    found = tuple(values) if isinstance(values, (tuple, list)) and len(values) <= MOST_DIMS else (None,)
    for n in found:
        if type(n) is not int or not 0 <= n < DEEP:
            raise pickle.UnpicklingError(f"a tensor with {what} {shown(values)}")
    return found


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any, dtype: str | None = None) -> TensorRef:
    """`_rebuild_tensor_v2`: the view must lie in its storage. `more` ends with what torch has noted of the tensor."""
    for note in ("conj", "neg"):
        if any(isinstance(one, Mapping) and one.get(note) for one in more):
            raise pickle.UnpicklingError(
                f"a tensor whose values are not those stored ({note}); save it after .resolve_{note}()"
            )
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    kind = dtype or storage.dtype
    (at,), sizes, steps = _numbers((offset,), "offset"), _numbers(shape, "shape"), _numbers(stride, "stride")
    if len(sizes) != len(steps):
        raise pickle.UnpicklingError(f"a tensor of shape {sizes} with strides {steps}")
    if prod(sizes) >= DEEP:  # one element may stand for all of them
        raise pickle.UnpicklingError(f"a tensor of shape {sizes}")
    if prod(sizes) > SPREAD * max(storage.numel, LARGE):
        raise pickle.UnpicklingError(f"a tensor of shape {sizes} whose storage has {storage.numel} elements")
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
    return _tensor(storage, offset, shape, stride, *more, dtype=str(dtype))


def _first(value: Any = None, *more: Any) -> Any:
    if isinstance(value, (tuple, frozenset)):
        raise pickle.UnpicklingError("a parameter of something else than a tensor")
    return value


class _Wrapper(Record):
    """`_rebuild_wrapper_subclass`, named in a pickle only to be called by the next one."""

    __slots__ = ()
    path = "torch._utils._rebuild_wrapper_subclass"


def _from_type(
    take: Take, function: Any = None, kind: Any = None, args: Any = (), state: Any = None, *more: Any
) -> Any:
    """`_rebuild_from_type_v2`: a DTensor, or a plain tensor with attributes (which are left out)."""
    name = getattr(kind, "path", "") if isinstance(kind, type) else ""
    if name.endswith("ShardedTensor"):
        return _sharded_tensor(take, state)
    if name.endswith("DTensor"):
        return _dtensor(args, state)
    if isinstance(function, Call) and function.function in (_tensor, _tensor_v3, _first) and isinstance(args, tuple):
        return function(*args)
    raise pickle.UnpicklingError("an unknown kind of tensor")


def _dtensor(args: Any, state: Any) -> Sharded:
    slots = state[1] if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], dict) else state
    slots = ChainMap(slots, (state[0] or {}) if isinstance(state, tuple) else {}) if isinstance(slots, dict) else {}
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
    placements = tuple(_placement(p) for p in _few(fields.get("placements")))
    return Sharded(_numbers(shape, "shape"), local.dtype, local, placements, *_mesh(mesh))


def _placement(record: Any) -> tuple[object, ...]:
    name = getattr(record, "path", "").rpartition(".")[2]
    fields = state_of(record)
    positional = [a for a in record[:MOST_ARGUMENTS] if type(a) is int] if isinstance(record, Record) else []
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


def _flat(shape: Any, deep: int = 3) -> tuple[int, ...]:
    """A mesh's shape; a dim may itself be several, and a layout of layouts: `((2, 2), 2)` -> `(4, 2)`."""
    if type(shape) is int:
        return _numbers((shape,), "a mesh of")
    if isinstance(shape, Record):
        shape = state_of(shape).get("shape", ())
    if not deep:
        raise pickle.UnpicklingError("a mesh in a mesh in a mesh")
    return tuple(prod(_flat(s, deep - 1)) for s in _few(shape))


def _few(values: Any) -> Sequence[Any]:
    """A list of what there is one of for each dim."""
    found = values if isinstance(values, (tuple, list)) else ()
    if len(found) > MOST_DIMS:
        raise pickle.UnpicklingError(f"{len(found)} dims")
    return found


def _sharded_tensor(take: Take, state: Any) -> Sharded:
    """A ShardedTensor's state: (local shards, metadata, process group, sharding spec, ...)."""
    if not isinstance(state, tuple) or len(state) < 2:
        raise pickle.UnpicklingError("a ShardedTensor without shards")
    shards, meta = _items(take, state[0]), state_of(state[1])
    take(len(shards))
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
    listed = [a for a in _items(take, _last(properties)) if isinstance(a, Dtype)]
    return Sharded(
        _numbers(meta.get("size"), "size"), dtype or (str(listed[0]) if listed else "float32"), parts=tuple(parts)
    )


def _last(record: Any) -> Any:
    return record[-1] if isinstance(record, Record) and len(record) else ()


SIZE = Call(_size)
CALLS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": Call(_tensor),
    "torch._utils._rebuild_tensor": Call(_tensor),
    "torch._utils._rebuild_tensor_v3": Call(_tensor_v3),
    "torch._utils._rebuild_parameter": Call(_first),
    "torch._utils._rebuild_parameter_with_state": Call(_first),
    "torch._utils._rebuild_wrapper_subclass": _Wrapper,
    "torch.Size": SIZE,
    "builtins.complex": Call(_complex),
    "builtins.getattr": Call(_member),
    **{f"builtins.{n}": named(n) for n in ("int", "float", "str", "bool", "bytearray", "list", "dict")},
}
COPIES: dict[str, Callable[..., Any]] = {  # of what they are given
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": _pairs,
    "builtins.tuple": _items,
    "builtins.set": _items,
    "builtins.frozenset": _items,
    "_codecs.encode": _encode,
}
CALLS |= {name.replace("builtins", "__builtin__"): made for name, made in CALLS.items() if name.startswith("builtins")}
COPIES |= {n.replace("builtins", "__builtin__"): made for n, made in COPIES.items() if n.startswith("builtins")}
CALLS |= {"__builtin__.long": CALLS["builtins.int"], "__builtin__.unicode": CALLS["builtins.str"]}  # by protocol 2


def lookup(module: str, name: str, take: Take) -> Any:
    """What a name becomes; None if it is not on the list."""
    path = f"{module}.{name}"
    if path in CALLS:
        return CALLS[path]
    if path in COPIES:
        return Copy(COPIES[path], take)
    if path in INERT:
        return INERT[path]
    if module in ("torch", "torch.storage") and name in FROM_STORAGE:
        return Dtype(FROM_STORAGE[name])
    if module == "torch" and name in TABLE:
        return Dtype(name)
    if module in ("pathlib", "pathlib._local") and name in _PATHS:
        return Copy(_join, take)
    return None


def foreign(path: str) -> bool:
    """Whether a name is of a framework whose classes and functions are settings in a checkpoint."""
    return path.startswith(FOREIGN) and all(part.isidentifier() for part in path.split("."))
