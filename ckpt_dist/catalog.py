"""Catalogs: what a checkpoint holds, as tables of names and addresses; and views: the same, seen as weights.

A *chunk* is one stored array: a slice of an *entry* (a stored name with its whole shape) at an address.
Millions of chunks are rows of integer arrays, never objects. A *view* says where one box of one weight lies
inside one chunk.

Invariant: a catalog and its views are facts; nothing here opens a file or makes a decision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from ckpt_dist.box import Ints, ints, row_major


class Key(int):
    """An integer key of a dict, in a path; a plain int in a path is the index of a list."""


@dataclass(frozen=True)
class Entry:
    """A stored name and its whole shape. `path` is the name as the framework nests it; `role` is weight, optimizer or state."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: tuple[str | int, ...] = ()
    role: str = "weight"


@dataclass(frozen=True)
class Chunks:
    """One row per stored array; `start`, `stop`, `strides` are padded with `0, 1, 0` to the largest rank.

    `entry` and `file` index the catalog's lists; `offset` is in bytes, `strides` in elements.
    """

    entry: Ints
    start: Ints
    stop: Ints
    strides: Ints
    file: Ints
    offset: Ints

    def __len__(self) -> int:
        return len(self.entry)

    def take(self, rows: Ints | Any) -> Chunks:
        return Chunks(*(getattr(self, name)[rows] for name in ("entry", "start", "stop", "strides", "file", "offset")))

    @classmethod
    def dense(cls, entry: Any, start: Any, stop: Any, file: Any, offset: Any) -> Chunks:
        """Chunks that lie row-major, as nearly all do."""
        start, stop = ints(start), ints(stop)
        return cls(ints(entry), start, stop, row_major(stop - start), ints(file), ints(offset))


def padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> Ints:
    """Rows of differing length as one array: `padded([(2,), (3, 4)], 2, 1)` -> `[[2, 1], [3, 4]]`."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    out = np.full((len(rows), width), fill, np.int64)
    flat = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    out[np.arange(width)[None, :] < lengths[:, None]] = flat
    return out


def whole(entries: Sequence[Entry], file: Any, offset: Any) -> Chunks:
    """One chunk for each entry."""
    width = max((len(e.shape) for e in entries), default=0)
    stop = padded([e.shape for e in entries], width, 1)
    return Chunks.dense(np.arange(len(entries)), np.zeros_like(stop), stop, file, offset)


@dataclass(frozen=True)
class Extra:
    """Anything that is no tensor: a value, or the address of bytes that are only passed on, and then these bytes."""

    name: str
    path: tuple[str | int, ...] = ()
    role: str = "state"
    value: Any = None
    address: tuple[int, int, int] | None = None  # file, offset, nbytes


@dataclass(frozen=True)
class Catalog:
    """`files` are relative to `root`; `config` is the model's config.json or params.json if one is at hand."""

    format: str
    root: str
    files: tuple[str, ...]
    entries: tuple[Entry, ...]
    chunks: Chunks
    extras: tuple[Extra, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    assets: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Views:
    """Boxes of weights, one row each: `origin` is the element of the chunk at `start`, `stride` is in elements.

    `keys[weight]` names the weight, `sizes[weight]` its axis lengths (padded with 1).
    """

    keys: tuple[str, ...]
    sizes: Ints
    weight: Ints
    chunk: Ints
    start: Ints
    stop: Ints
    stride: Ints
    origin: Ints

    def __len__(self) -> int:
        return len(self.weight)

    def take(self, rows: Any) -> Views:
        columns = (getattr(self, c)[rows] for c in ("weight", "chunk", "start", "stop", "stride", "origin"))
        return Views(self.keys, self.sizes, *columns)


T = TypeVar("T", "Entry", "Extra")
MODELS = ("model", "module", "state_dict", "model_state_dict")  # dicts in which a training script has a model
WRAPPERS = (*MODELS, "app", "state")  # the same, and those in which it has everything
OPTIMIZERS = ("optim", "optimizer", "optimizers", "optimizer_state_dict", "optim_state_dict", "optimizer_states")
GROUPS = "param_groups"  # what every optimizer of torch has beside its state
CHAINED = re.compile(r"chained_\d+")  # several optimizers of Megatron, each with some of the parameters
STATES = (
    "lr_scheduler",
    "lr_schedulers",
    "scheduler",
    "train_state",
    "trainer",
    "trainer_state",
    "dataloader",
    "rng",
    "rng_state",
    "extra_state",
    "epoch",
    "step",
    "global_step",
    "iteration",
    "args",
    "config",
    "scaler",
    "loops",
    "callbacks",
)


def role(path: Sequence[str | int]) -> str:
    """What a stored value is, from where the framework nests it: `("optim", "state.wq.exp_avg")` -> "optimizer".

    A model may have modules of such names: `("scaler.weight",)` and `("model", "step")` are weights, `("step",)` is not.
    """
    *around, own = map(str, path)
    for head, name in (*zip(around, around, strict=True), (own.partition(".")[0], own)):
        if head in OPTIMIZERS or CHAINED.fullmatch(head):
            return "optimizer"
        if name in STATES:
            return "state"
        if head in MODELS or head not in WRAPPERS:
            break
    return "weight"


def with_optimizers(catalog: Catalog) -> Catalog:
    """The same with all that lies beside `param_groups` as an optimizer's, whatever a training script calls it."""
    stored: list[Entry | Extra] = [*catalog.entries, *catalog.extras]
    paths = [x.path for x in stored if x.role == "weight"]
    around = {path[:k] for path in paths for k, part in enumerate(path) if _first(part) == GROUPS}
    if not around:
        return catalog

    def said(x: T) -> T:
        own = any(x.path[: len(a)] == a and (a or _first(x.path[0]) in ("state", GROUPS)) for a in around if x.path)
        return replace(x, role="optimizer") if x.role == "weight" and own else x

    return replace(catalog, entries=tuple(map(said, catalog.entries)), extras=tuple(map(said, catalog.extras)))


def _first(part: str | int) -> str:
    """Of names that torch flattened: `param_groups.wq.lr` -> `param_groups`."""
    return str(part).partition(".")[0]


def unwrap(path: Sequence[str | int]) -> tuple[tuple[str | int, ...], str]:
    """The dicts around a model and the model's own name: `("model", "norm.weight")` -> `(("model",), "norm.weight")`."""
    cut = 0
    while cut < len(path) - 1 and path[cut] in WRAPPERS:
        cut += 1
    return tuple(path[:cut]), ".".join(str(p) for p in path[cut:])
