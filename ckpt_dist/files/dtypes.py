"""The dtypes that checkpoints hold, by torch's names, and what other formats call them.

Invariant: one table; importing it needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any

from ckpt_dist.errors import CheckpointError

# torch name: (bytes, safetensors name, class of a typed storage in a pickle; None where torch writes an untyped one)
TABLE: dict[str, tuple[int, str | None, str | None]] = {
    "float64": (8, "F64", "DoubleStorage"),
    "float32": (4, "F32", "FloatStorage"),
    "float16": (2, "F16", "HalfStorage"),
    "bfloat16": (2, "BF16", "BFloat16Storage"),
    "int64": (8, "I64", "LongStorage"),
    "int32": (4, "I32", "IntStorage"),
    "int16": (2, "I16", "ShortStorage"),
    "int8": (1, "I8", "CharStorage"),
    "uint8": (1, "U8", "ByteStorage"),
    "bool": (1, "BOOL", "BoolStorage"),
    "complex64": (8, "C64", "ComplexFloatStorage"),
    "complex128": (16, None, "ComplexDoubleStorage"),
    "uint16": (2, "U16", None),
    "uint32": (4, "U32", None),
    "uint64": (8, "U64", None),
    "float8_e4m3fn": (1, "F8_E4M3", None),
    "float8_e5m2": (1, "F8_E5M2", None),
    "float8_e4m3fnuz": (1, "F8_E4M3FNUZ", None),
    "float8_e5m2fnuz": (1, "F8_E5M2FNUZ", None),
    "float8_e8m0fnu": (1, "F8_E8M0", None),
}
LATER = ("float8_e8m0fnu",)  # what torch 2.6 has not
FROM_SAFETENSORS = {short: name for name, (_, short, _) in TABLE.items() if short}
FROM_STORAGE = {cls: name for name, (_, _, cls) in TABLE.items() if cls}


def known(dtype: str) -> bool:
    return dtype in TABLE


def itemsize(dtype: str) -> int:
    """Bytes of one element: `itemsize("bfloat16")` -> 2; an unknown dtype is refused."""
    if dtype not in TABLE:
        raise CheckpointError(f"The dtype {dtype!r} is not supported.")
    return TABLE[dtype][0]


def of_torch(torch: ModuleType, dtype: str) -> Any:
    """torch's own object of this name, from the module; one that it is too old to have is refused."""
    if not hasattr(torch, dtype):
        raise CheckpointError(f"torch {torch.__version__} has no dtype {dtype}. Install a newer torch.")
    return getattr(torch, dtype)


def to_safetensors(dtype: str) -> str:
    short = TABLE[dtype][1] if dtype in TABLE else None
    if short is None:
        raise CheckpointError(f"safetensors cannot hold {dtype}; write target.format=dcp or torch.")
    return short


def holding(kinds: Collection[str]) -> str:
    """The dtype that holds all values of these: `holding({"bfloat16", "float32"})` and `{"bfloat16", "float16"}` -> float32."""
    widest = max(map(itemsize, kinds))
    top = sorted(kind for kind in kinds if itemsize(kind) == widest)
    return top[0] if len(top) == 1 or not all(map(is_floating, top)) else "float32"


def storage_class(dtype: str) -> str | None:
    return TABLE[dtype][2]


def is_floating(dtype: str) -> bool:
    """Whether values may be averaged and cast: real floating types, the 8-bit ones included."""
    return "float" in dtype
