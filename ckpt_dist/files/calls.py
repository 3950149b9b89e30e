"""What the functions that a pickle may call give back: a tensor is a `TensorRef`, a sharded one a `Sharded`.

Nothing is imported or run: the functions here stand for those of torch and Python, look at plain values and build records.

Invariant: what is given back is checked, copies no more than there is room for (`Take`), and is no tuple of tuples.
"""

from __future__ import annotations

import pickle
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from ckpt_dist.errors import shown
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.hashes import weigh
from ckpt_dist.files.inert import (
    DEEP,
    MOST_ARGUMENTS,
    Call,
    Dtype,
    Pairs,
    Record,
    Sharded,
    Storage,
    TensorRef,
    state_of,
)

MOST_DIMS = 64
LARGE, SPREAD = 1 << 20, 64  # elements; a larger view of a storage repeats each of them no more often than this

Take = Callable[[int], None]  # says how much will be copied, and refuses more than the pickle has room for


def join(take: Take, *parts: Any) -> str:
    if not all(type(p) is str for p in parts):
        raise pickle.UnpicklingError("a path of something else than strings")
    take(sum(len(p) + 1 for p in parts))
    return "/".join(parts)


def encode(take: Take, text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError("_codecs.encode of something else than a text")
    take(len(text))
    return text.encode(encoding)


def pairs(take: Take, *args: Any) -> dict[Any, Any]:
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


def member(owner: Any, name: Any = "") -> type[Record]:
    """`getattr(ShardedTensor, "ProcessGroupState")`, as torch spells a class inside a class: an inert one."""
    return Record


def items(take: Take, values: Any = ()) -> list[Any]:
    """A set or a tuple as a list, which nobody hashes."""
    found = values if type(values) in (list, tuple) else ()
    take(len(found))
    return list(found)


def size(values: Any = ()) -> tuple[Any, ...]:
    """`torch.Size`; there are a million of them in a large `.metadata`."""
    if type(values) is not tuple or len(values) > MOST_DIMS or not {int} >= set(map(type, values)):
        raise pickle.UnpicklingError(f"a size {shown(values)}")
    return values


def complex_of(real: Any = 0, imaginary: Any = 0) -> complex:
    return complex(real, imaginary) if all(type(n) in (int, float) for n in (real, imaginary)) else 0j


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    found = tuple(values) if isinstance(values, (tuple, list)) and len(values) <= MOST_DIMS else (None,)
    for n in found:
        if type(n) is not int or not 0 <= n < DEEP:
            raise pickle.UnpicklingError(f"a tensor with {what} {shown(values)}")
    return found


def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any, dtype: str | None = None) -> TensorRef:
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


def tensor_v3(
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
    return tensor(storage, offset, shape, stride, *more, dtype=str(dtype))


def first(value: Any = None, *more: Any) -> Any:
    if isinstance(value, (tuple, frozenset)):
        raise pickle.UnpicklingError("a parameter of something else than a tensor")
    return value


class Wrapper(Record):
    """`_rebuild_wrapper_subclass`, named in a pickle only to be called by the next one."""

    __slots__ = ()
    path = "torch._utils._rebuild_wrapper_subclass"


def from_type(take: Take, function: Any = None, kind: Any = None, args: Any = (), state: Any = None, *more: Any) -> Any:
    """`_rebuild_from_type_v2`: a DTensor, or a plain tensor with attributes (which are left out)."""
    name = getattr(kind, "path", "") if isinstance(kind, type) else ""
    if name.endswith("ShardedTensor"):
        return _sharded_tensor(take, state)
    if name.endswith("DTensor"):
        return _dtensor(args, state)
    if isinstance(function, Call) and function.function in (tensor, tensor_v3, first) and isinstance(args, tuple):
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
    shards, meta = items(take, state[0]), state_of(state[1])
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
    listed = [a for a in items(take, _last(properties)) if isinstance(a, Dtype)]
    return Sharded(
        _numbers(meta.get("size"), "size"), dtype or (str(listed[0]) if listed else "float32"), parts=tuple(parts)
    )


def _last(record: Any) -> Any:
    return record[-1] if isinstance(record, Record) and len(record) else ()
