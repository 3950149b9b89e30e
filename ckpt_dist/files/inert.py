"""What pickles become: inert records, references to tensors, and what one rank holds of a tensor.

Invariant: facts only; nothing here reads a pickle or knows which names are allowed.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

DEEP = 1 << 40  # elements of a tensor, and more than any has
MOST_ARGUMENTS = 64  # of a record: they are copied, and a pickle can call with the same ones again and again


class Fact:
    """What no state of a pickle changes: it was checked when it was made."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"a state for a {type(self).__name__}, which has none")

    def __reduce__(self) -> Any:  # from rank to rank
        return type(self), tuple(vars(self).values())


class Call(Fact):
    """A function that a pickle may name. Python's own would let a pickle set its defaults."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Copy(Call):
    """One that copies what it is given, as much as it may still `take`."""

    __slots__ = ("take",)

    def __init__(self, function: Callable[..., Any], take: Callable[[int], None]) -> None:
        self.function, self.take = function, take

    def __call__(self, *args: Any) -> Any:
        return self.function(self.take, *args)


class Record(list):  # type: ignore[type-arg]
    """An inert stand-in for an object: its constructor's arguments, then its state. `path` says what it stands for."""

    __slots__ = ()
    path = ""
    __setstate__ = list.append
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        if len(args) > MOST_ARGUMENTS:
            raise ValueError(f"{len(args)} arguments for {self.path}")
        super().__init__(args)

    def __repr__(self) -> str:  # short: records can hold one another
        return f"<{self.path}>"

    def __reduce_ex__(self, protocol: Any) -> Any:  # from rank to rank; its class has no name there
        return _again, (self.path, list(self))

    def __setitem__(self, key: Any, value: Any) -> None:  # items of a subclass of dict
        self.append((key, value))


class Pairs(dict):  # type: ignore[type-arg]
    """An OrderedDict. Its attributes, as torch gives one to a state dict, are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Instance(dict):  # type: ignore[type-arg]
    """What is written as an object of a class, by the name of that: its state."""

    path = ""


class Namespace(Instance):
    path = "argparse.Namespace"


class Dtype(str):
    """A dtype by name."""

    __slots__ = ()


@dataclass(frozen=True)
class Storage(Fact):
    """A record of the archive: `numel` elements of `dtype` (bytes of an untyped one)."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorRef(Fact):
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Small(Fact):
    """A tensor of a few elements with their bytes, such as the step of an optimizer: a value like a number is one."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, eq=False)
class Sharded(Fact):
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


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense array, in elements: `strides_of((2, 3, 4))` -> `(12, 4, 1)`."""
    return tuple(prod(shape[k + 1 :]) for k in range(len(shape)))


def named(path: str) -> type[Record]:
    """A class that stands for one of that name."""
    return type(path.rpartition(".")[2], (Record,), {"__slots__": (), "path": path})


def _again(path: str, content: list[Any]) -> Record:
    record = named(path)()
    record.extend(content)
    return record


def is_shape(value: Any) -> bool:
    """Whether a value is the shape of a tensor that could be there."""
    return (
        isinstance(value, (tuple, list))
        and not isinstance(value, Record)
        and all(type(n) is int and n >= 0 for n in value)
        and len(value) <= 64
        and prod(value) < DEEP
    )


def state_of(record: Any) -> Mapping[str, Any]:
    """The state of a record: the dict that was appended last, or ((None, slots))."""
    if not isinstance(record, Record) or not len(record):
        return {}
    last = record[-1]
    if isinstance(last, tuple) and len(last) == 2 and isinstance(last[1], dict):
        return ChainMap(last[1], last[0] or {})
    return last if isinstance(last, dict) else {}
