"""Formats: how arrays lie in files. Each format is one file with four names:

    claims(folder)             whether a path holds this format, by its content
    scan(path, options)        headers -> Catalog; opens files read-only and never a tensor
    lay_out(spec)              entries -> Layout: each file, its size, its header bytes, the address of each chunk
    locate(catalog, rows)      optional: exact addresses of some chunks, where headers lie beside the data

Invariant: a format is a table of addresses. Nothing here reads or writes the bytes of a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError, UsageError, nearest

# the order in which a folder's content is tried
FORMATS = (
    "catalog",
    "fsdp",
    "megatron_deepspeed",
    "deepspeed",
    "archive",
    "torch_dist",
    "zarr",
    "nemo",
    "megatron",
    "merak",
    "dcp",
    "hf",
    "meta",
    "sfpt",
    "torch",
)
DIALECTS = {  # formats whose files have names of one dialect only, or of the first that can spell the model
    "hf": ("hf",),
    "meta": ("meta",),
    "torch_dist": ("megatron_stacked", "megatron"),
    "zarr": ("megatron_stacked", "megatron"),
    "megatron": ("megatron",),
    "sfpt": ("megatron", "megatron_stacked"),
    "merak": ("hf",),
    "megatron_deepspeed": ("megatron",),
}
ONLY = {"megatron_deepspeed": ("bloom", "gpt2")}  # formats that hold models of some families
_STAGED = ("megatron", "merak", "megatron_deepspeed")
OPTIONS: dict[
    str, tuple[Any, tuple[str, ...]]
] = {  # of a target: what it is if nobody asks, and the formats that know it
    "tp": (1, ("meta", *_STAGED)),
    "pp": (1, _STAGED),
    "vpp": (1, ("megatron",)),
    "ep": (1, ("megatron",)),
    "partition": (None, _STAGED),
    "partition_method": ("uniform", ("merak",)),
    "spec": ("te", ("megatron", "torch_dist", "zarr")),
    "release": (None, _STAGED),  # a checkpoint to begin with, of no step
    "embedding": ("auto", ("meta", "merak")),
    "safetensors": (True, ("hf",)),
    "max_shard_size": (5 * 10**9, ("hf", "dcp", "torch_dist")),
}
EMBEDDINGS = {"meta": ("vocabulary", "hidden"), "merak": ("vocabulary", "whole")}  # what their ranks can divide of it
NESTED = ("dcp", "torch")  # formats of what a program loads into its own dicts
ORDERED = ("merak",)  # formats that keep names in the order of the model's modules, which a family's table has
ARGS = ("megatron", "torch_dist", "zarr", "megatron_deepspeed", "merak")  # formats that keep the args of a run
BESIDE = {  # what resumes an optimizer and is no tensor
    "torch_dist": ("optimizer", "opt_param_scheduler", "content_metadata"),
}
SLOTS = ("dcp", "torch", "torch_dist")  # in which an optimizer's state is written under names of another dialect
MASTERS = (  # of which the optimizer's own copies of the weights are read; the first that claims a folder
    "megatron_deepspeed",
    "deepspeed",
    "merak",
    "torch_dist",
    "megatron",
)
ALONE = ("sfpt",)  # formats whose folders hold nothing else: their readers take every file
FOLDERS = ("hf", "meta", "merak")  # formats whose folders hold a model: weights, config, tokenizer


@dataclass(frozen=True)
class Spec:
    """What is to be laid out: names, dtypes and shapes, what travels along, and the user's options for the format."""

    entries: tuple[Entry, ...]
    extras: tuple[Extra, ...] = ()
    source: Catalog | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def is_adapter(catalog: Catalog) -> bool:
    """Whether this is an adapter as peft stores it, which looks for its own file name."""
    return all(os.path.basename(f).startswith("adapter_model.") for f in catalog.files)


@dataclass(frozen=True)
class Crc:
    """A CRC-32 that is known only when the data is: its bytes go to `positions`."""

    file: int
    offset: int
    nbytes: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A checkpoint that does not exist yet. `late` files are small and made when all else is written.

    Where each node has a disk of its own, `holders` are the nodes that hold each file (none said: all hold all), and
    `own` makes late files that differ from node to node.
    """

    catalog: Catalog
    sizes: tuple[int, ...]
    pieces: tuple[tuple[int, int, bytes], ...] = ()
    crcs: tuple[Crc, ...] = ()
    late: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    holders: tuple[frozenset[int], ...] = ()
    own: Mapping[str, Callable[[int], bytes]] = field(default_factory=dict)


def held(layout: Layout, node: int | None) -> NDArray[np.bool_]:
    """Which files are on the disk of a node; None is a disk that all nodes share."""
    files = len(layout.catalog.files)
    if node is None or not layout.holders:
        return np.ones(files, bool)
    return np.array([node in nodes for nodes in layout.holders], bool)


def holders(placement: Sequence[int], loads: Sequence[int]) -> tuple[frozenset[int], ...]:
    """The nodes of each file, by the node of each rank and the file it loads: `holders([0, 1], [0, 0])` -> `({0, 1},)`."""
    found: list[set[int]] = [set() for _ in range(max(loads) + 1)]
    for node, file in zip(placement, loads, strict=True):
        found[file].add(node)
    return tuple(map(frozenset, found))


def load(name: str) -> ModuleType:
    """The format of that name; an unknown one is refused with the nearest."""
    if name not in FORMATS:
        raise UsageError(f"Unknown format {name!r}.{nearest(name, FORMATS)} Formats: {', '.join(sorted(FORMATS))}.")
    return import_module(f"ckpt_dist.formats.{name}")


def dialects(target: Mapping[str, Any], own: str) -> tuple[str, ...]:
    """Those of a target's format, or the source's own: Merak's layers have other names where ranks divide them."""
    if target.get("format") == "merak" and int(target.get("tp") or 1) > 1:
        return ("merak",)
    local = ("megatron_local_stacked", "megatron_local") if target.get("spec") == "local" else ()
    found = DIALECTS.get(str(target.get("format")), (own,))
    return (*local, *found) if target.get("format") in ("torch_dist", "zarr") else found


def lfs_pointer(path: Path) -> str:
    """What a clone without Git LFS has in the place of a file: a few lines that say which; or nothing."""
    for file in (path, *(sorted(path.iterdir()) if path.is_dir() else ())):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            return f"{file.name} is a pointer of Git LFS and not the file itself, fetch it with `git lfs pull`"
    return ""


def detect(path: Path, among: Sequence[str] = FORMATS) -> str:
    """The format of a checkpoint, recognised from its content."""
    if not path.exists():
        raise CheckpointError(f"No checkpoint at {path}: the path does not exist.{_neighbours(path)}")
    for name in among:
        if load(name).claims(path):
            return name
    inside = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else []
    what = f"it holds {', '.join(inside)}" if inside else "the folder is empty"
    if path.is_file():
        whole = next((name for name in FORMATS if load(name).claims(path.parent)), "")
        what = (
            f"it is one file of a {whole} checkpoint, give {path.parent}" if whole else "it is a file of another kind"
        )
    if pointer := lfs_pointer(path):
        what = pointer
    raise CheckpointError(
        f"No checkpoint recognised at {path}: {what}. Formats: {', '.join(sorted(FORMATS))}; name one with source.format=NAME."
    )


def _neighbours(path: Path) -> str:
    parent = path.parent
    return nearest(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else f" Neither does {parent}."


def inside(root: Path, name: object, where: str) -> str:
    """A file name that a header gives, if it stays below the checkpoint's folder; anything else is refused."""
    if not isinstance(name, str) or not _possible(name):
        raise CheckpointError(f"{where} names a file {name!r:.300}, which is no file name.")
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts:
        raise CheckpointError(f"{where} names the file {name!r}, which lies outside the checkpoint; refused.")
    return name


def _possible(name: str) -> bool:
    try:
        return bool(name) and "\0" not in name and all(len(part) < 256 for part in os.fsencode(name).split(b"/"))
    except UnicodeEncodeError:
        return False


def split(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Items in order, in groups of at most `limit` bytes: `split([3, 3, 3], 6)` -> `[[0, 1], [2]]`."""
    groups: list[list[int]] = [[]]
    used = 0
    for item, size in enumerate(sizes):
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(item)
        used += size
    return groups
