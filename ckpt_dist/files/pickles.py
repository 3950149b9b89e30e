"""Pickles without running them: read by an allow-list of names, each of which becomes an inert record; written from names
alone, as torch.save writes tensors.

What is not on the list (`allowed.py`) is refused by name; what names become is in `inert.py`.

Invariant: unpickling runs no code but ours, and its memory is bounded by the pickle's own length.
"""

from __future__ import annotations

import gc
import io
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ckpt_dist.errors import CheckpointError, shown
from ckpt_dist.files import allowed, hashes
from ckpt_dist.files.dtypes import itemsize, storage_class
from ckpt_dist.files.inert import DEEP, Dtype, Instance, Pairs, Record, Small, Storage, TensorRef, named, strides_of

BUFFER = 1 << 22  # the C unpickler is three times as fast on a stream that it can peek into
MOST_CLASSES = 1 << 12  # of a framework, in one pickle
ARRAYS = {  # calls of numpy that are written again, and how many arguments they have; a state may follow
    "numpy.dtype": 3,
    **{f"numpy.{core}.multiarray._reconstruct": 3 for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": 2 for core in ("core", "_core")},
}
SHARED = 16  # times its length: what a pickle may stand for where it names one thing again and again


class _Names:
    """Names become records; storages become references."""

    persistent: Callable[[Any], Any]
    classes: dict[str, type[Record]]
    take: Callable[[int], None]

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        found = allowed.lookup(module, name, self.take)
        if found is None and allowed.foreign(path):
            return self._foreign(path)
        if found is None:
            raise _Refused(path)
        return found

    def _foreign(self, path: str) -> type[Record]:
        """One class for each name; a class takes a hundred times the memory of its name."""
        if path not in self.classes and len(self.classes) >= MOST_CLASSES:
            raise pickle.UnpicklingError(f"more than {MOST_CLASSES} classes")
        return self.classes.get(path) or self.classes.setdefault(path, named(path))

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)


class _Quick(_Names, pickle.Unpickler):
    """In C."""


class _Weighing(_Names, hashes.Unpickler):
    """In Python, ten times as slow: for pickles that may make what is hashed for ever."""


def storage(pid: Any) -> Storage:
    """What a persistent id of torch.save stands for."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise pickle.UnpicklingError(f"a reference of an unknown kind: {shown(pid)}")
    kind, key, numel = pid[1], pid[2], pid[4]
    dtype = (
        str(kind)
        if isinstance(kind, Dtype)
        else "uint8"
        if isinstance(kind, type) and kind.__name__ == "UntypedStorage"
        else None
    )
    if dtype is None or type(key) is not str or type(numel) is not int or not 0 <= numel < DEEP:
        raise pickle.UnpicklingError(f"a storage of an unknown kind: {shown(pid)}")
    return Storage(key, dtype, numel)


class _Room:
    """How much a pickle may have copied and hashed: a few bytes can name a long list again and again."""

    def __init__(self, nbytes: int) -> None:
        self.left = 4 * nbytes

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise pickle.UnpicklingError("copies, or keys, of more than it holds")


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
_COUNTED = {0x8C: 1, 0x58: 4, 0x8D: 8, 0x43: 1, 0x42: 4, 0x8E: 8, 0x8A: 1, 0x54: 4, 0x55: 1, 0x96: 8}


def _bounded(data: bytes) -> bool:
    """Walk over the opcodes; raises UnpicklingError where one could take more memory than the pickle is long.

    Returns whether keys are bounded so, too.
    """
    wide = len(data) >> 24
    last = rb"[\x00-\x%02x]" % min(wide, 255) if wide else rb"\x00"
    fixed = list[bytes]()
    _walk(data, 0, _TOKENS % (max(len(str(len(data))) - 1, 1), 255 if wide else len(data) >> 16, last), fixed)
    return not hashes.again(b"".join(fixed))


def end(data: Any, at: int, where: str) -> int:
    """Where the pickle that begins at `at` of some bytes (or a mapped file) ends; nothing of it is loaded."""
    try:
        return _walk(data, at, _TOKENS % (18, 255, rb"."))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{where} is damaged or truncated: its pickle holds {error}.") from None


def _walk(data: Any, at: int, tokens: bytes, fixed: list[bytes] | None = None) -> int:
    """The end of a pickle, over opcodes of these forms. They are added to `fixed`, an N in place of what has a length."""
    step = re.compile(rb"(?:" + tokens + rb"){1,4000}", re.DOTALL)
    while True:
        if run := step.match(data, at):
            at = run.end()
            if fixed is not None:
                fixed.append(run[0])
            continue
        op = data[at : at + 1]
        if op == b".":
            return at + 1
        width = _COUNTED.get(op[0]) if op else None
        if width is None:
            raise pickle.UnpicklingError(f"{op!r} at byte {at}, which is no opcode that fits there")
        length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        at += 1 + width + length
        if fixed is not None:
            fixed.append(b"N")
        if at > len(data):
            raise pickle.UnpicklingError(f"a value of {length} bytes, of which {len(data)} are there")


def unfolded(value: Any, most: int, known: dict[int, int]) -> int:
    """How many things a walk over lists and dicts meets, which is more than there are where one of them is held twice."""
    if not isinstance(value, (dict, list, tuple)) or isinstance(value, Record):
        return 1
    if id(value) not in known:
        known[id(value)] = most + 1  # what holds itself has no end
        held = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum([unfolded(v, most, known) for v in held])
        if known[id(value)] > most:
            raise ValueError("lists in lists that are shared without end")
    return known[id(value)]


def loads(data: bytes, where: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Unpickle by the allow-list. What is not on it, and what is damaged, is a CheckpointError that names `where`.

    `persistent` says what a persistent id stands for; by default those of torch.save, which are storages.
    """
    try:
        quick = _bounded(data)
        unpickler = _Quick(io.BufferedReader(io.BytesIO(data), BUFFER)) if quick else _Weighing(io.BytesIO(data))
        unpickler.persistent, unpickler.classes, unpickler.take = persistent or storage, {}, _Room(len(data)).take
        tree = unpickler.load()
        unfolded(tree, (1 << 16) + SHARED * len(data), {})
        return tree
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
            self._tensor(
                TensorRef(Storage(key, value.dtype, numel), value.dtype, 0, value.shape, strides_of(value.shape))
            )
        elif isinstance(value, Dtype):
            self.save(_Name(f"torch {value}"))
        elif isinstance(value, Instance):
            self.save(_Name(" ".join(value.path.rpartition(".")[::2])))
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.save(dict(value))
            self.write(pickle.BUILD)
        elif isinstance(value, bytes):
            self._call("_codecs encode", value.decode("latin1"), "latin1")
        elif isinstance(value, complex):
            self._call("builtins complex", value.real, value.imag)
        elif isinstance(value, Record) and len(value) - ARRAYS.get(value.path, len(value) + 1) in (0, 1):
            count = ARRAYS[value.path]
            self._call(" ".join(value.path.rpartition(".")[::2]), *value[:count])
            for state in value[count:]:
                self.save(state)
                self.write(pickle.BUILD)
        elif value is allowed.INERT["numpy.ndarray"]:
            self.save(_Name("numpy ndarray"))
        elif isinstance(value, Record) or not isinstance(
            value, (dict, list, tuple, str, bytes, int, float, bool, complex, type(None), Storage)
        ):
            raise CheckpointError(
                f"A value of type {getattr(value, 'path', '') or type(value).__name__} cannot be written."
            )
        else:
            super().save(dict(value) if type(value) is Pairs else value, save_persistent_id)

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
