"""The allow-list: which names a pickle may hold, and the inert thing that each of them becomes.

Nothing that a pickle names is imported or called: a function becomes one of `calls.py`, a class of torch a `Record`.

Invariant: whatever is not listed here is refused.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from ckpt_dist.files import calls
from ckpt_dist.files.dtypes import FROM_STORAGE, TABLE
from ckpt_dist.files.inert import Call, Copy, Dtype, named

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
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"}

SIZE = Call(calls.size)
CALLS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": Call(calls.tensor),
    "torch._utils._rebuild_tensor": Call(calls.tensor),
    "torch._utils._rebuild_tensor_v3": Call(calls.tensor_v3),
    "torch._utils._rebuild_parameter": Call(calls.first),
    "torch._utils._rebuild_parameter_with_state": Call(calls.first),
    "torch._utils._rebuild_wrapper_subclass": calls.Wrapper,
    "torch.Size": SIZE,
    "builtins.complex": Call(calls.complex_of),
    "builtins.getattr": Call(calls.member),
    **{f"builtins.{n}": named(n) for n in ("int", "float", "str", "bool", "bytearray", "list", "dict")},
}
COPIES: dict[str, Callable[..., Any]] = {  # of what they are given
    "torch._tensor._rebuild_from_type_v2": calls.from_type,
    "collections.OrderedDict": calls.pairs,
    "collections.defaultdict": calls.pairs,
    "builtins.tuple": calls.items,
    "builtins.set": calls.items,
    "builtins.frozenset": calls.items,
    "_codecs.encode": calls.encode,
}
CALLS |= {name.replace("builtins", "__builtin__"): made for name, made in CALLS.items() if name.startswith("builtins")}
COPIES |= {n.replace("builtins", "__builtin__"): made for n, made in COPIES.items() if n.startswith("builtins")}
CALLS |= {"__builtin__.long": CALLS["builtins.int"], "__builtin__.unicode": CALLS["builtins.str"]}  # by protocol 2


def lookup(module: str, name: str, take: calls.Take) -> Any:
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
        return Copy(calls.join, take)
    return None


def foreign(path: str) -> bool:
    """Whether a name is of a framework whose classes and functions are settings in a checkpoint."""
    return path.startswith(FOREIGN) and all(part.isidentifier() for part in path.split("."))
