"""Hugging Face folders: safetensors (one file, or shards with an index) and `pytorch_model*.bin`.

Facts: transformers 5.23, safetensors 0.8. The index's weight_map decides which file holds a name, never the
folder listing (repositories hold `consolidated.safetensors` and the like beside the model).

Invariant: what is written has each name once, an index when there are several files, and `format: pt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.catalog import Catalog, Chunks, Entry, padded, whole
from ckpt_dist.errors import CheckpointError, shown
from ckpt_dist.files import safetensors
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.inert import is_shape
from ckpt_dist.formats import Layout, Spec, inside, is_adapter, split
from ckpt_dist.formats import torch as pt
from ckpt_dist.whole import contents

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


def claims(path: Path) -> bool:
    if path.is_file():
        return (
            path.suffix == ".safetensors"
            or path.name in INDEXES
            or (path.name.startswith("pytorch_model") and path.suffix == ".bin")
        )
    return path.is_dir() and (any((path / n).exists() for n in INDEXES + SINGLES) or any(path.glob("*.safetensors")))


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """Headers of all files that the index names (or the one file there is)."""
    root = path if path.is_dir() else path.parent
    names, weight_map = _files(path)
    catalog = pt.scan_files(root, names, options) if names[0].endswith(".bin") else _scan_safetensors(root, names)
    if weight_map is not None:
        _check_index(catalog, weight_map, root)
    return replace(catalog, format="hf")


def _files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files that make up the model, and the index's weight_map if there is one."""
    if path.is_file() and path.name not in INDEXES:
        return [path.name], None
    root = path if path.is_dir() else path.parent
    for single, index in zip(SINGLES, INDEXES, strict=True):
        if (root / single).exists() and path.is_dir():
            return [single], None
        if (root / index).exists() and (path.is_dir() or path.name == index):
            weight_map = _read_index(root / index)
            return sorted({inside(root, f, str(root / index)) for f in weight_map.values()}), weight_map
    found = sorted(p.name for p in root.glob("*.safetensors"))
    if not all(n.startswith("shard-") for n in found) and len(found) > 1:
        raise CheckpointError(
            f"{root} holds {len(found)} safetensors files and no {INDEXES[0]}; which belong together is not known."
        )
    return found, None


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(contents(path))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is no table of names")
        return weight_map
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from None


def _check_index(catalog: Catalog, weight_map: Mapping[str, str], root: Path) -> None:
    held = {e.name for e in catalog.entries}
    missing = sorted(set(weight_map) - held)
    if missing:
        raise CheckpointError(
            f"{root}: the index names {len(weight_map)} tensors, the files lack {len(missing)} of them, first {missing[0]!r} "
            f"(expected in {weight_map[missing[0]]!r}). The index belongs to other files, or a shard was replaced."
        )
    first = catalog.chunks.file
    for row, entry in enumerate(catalog.entries):
        file = catalog.files[first[row]] if len(first) == len(catalog.entries) else None
        if file is not None and entry.name in weight_map and weight_map[entry.name] != file:
            raise CheckpointError(
                f"{root}: {entry.name!r} lies in {file!r}, the index says {weight_map[entry.name]!r}."
            )


def _scan_safetensors(root: Path, names: list[str]) -> Catalog:
    stored, files, starts = [], [], []
    for number, name in enumerate(names):
        if not (root / name).is_file():
            raise CheckpointError(f"{root / name} is missing: the index names it. Fetch the shard again.")
        tensors, metadata = safetensors.read_header(root / name)
        sharding = _sharding(metadata, {t.name: len(t.shape) for t in tensors}, root / name)
        stored += tensors
        files += [number] * len(tensors)
        starts += [sharding.get(t.name) for t in tensors]
    if any(s is not None for s in starts):
        return _distributed(root, names, stored, files, starts)
    seen: dict[str, int] = {}
    for tensor, number in zip(stored, files, strict=True):
        if tensor.name in seen:
            raise CheckpointError(
                f"{root}: {tensor.name!r} is stored twice, in {names[seen[tensor.name]]} and {names[number]}."
            )
        seen[tensor.name] = number
    entries = tuple(Entry(t.name, t.dtype, t.shape, (t.name,)) for t in stored)
    return Catalog("hf", str(root), tuple(names), entries, whole(entries, files, [t.offset for t in stored]))


def _sharding(metadata: Mapping[str, str], dims: Mapping[str, int], path: Path) -> dict[str, list[int]]:
    """Offsets of the shards that torch's distributed HF writer notes in a header."""
    if "DCP_SHARDING_INFO" not in metadata:
        return {}
    try:
        table = json.loads(metadata["DCP_SHARDING_INFO"])
        found = {name: info["saved_offsets"] for name, info in table.items() if name in dims}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: DCP_SHARDING_INFO is damaged: {error!r:.200}.") from None
    for name, at in found.items():
        if not is_shape(at) or len(at) != dims[name]:
            raise CheckpointError(
                f"{path}: DCP_SHARDING_INFO says that {name!r} of {dims[name]} dims begins at {shown(at)}."
            )
    return found


def _distributed(
    root: Path, names: list[str], stored: list[Any], files: list[int], starts: list[list[int] | None]
) -> Catalog:
    """Shards of one tensor in several files; the whole shape is what they reach to."""
    offsets = [s if s is not None else [0] * len(t.shape) for s, t in zip(starts, stored, strict=True)]
    ends = [tuple(o + n for o, n in zip(at, t.shape, strict=True)) for at, t in zip(offsets, stored, strict=True)]
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for tensor, end in zip(stored, ends, strict=True):
        shapes[tensor.name] = tuple(map(max, shapes.get(tensor.name, end), end))
        if dtypes.setdefault(tensor.name, tensor.dtype) != tensor.dtype:
            raise CheckpointError(f"{root}: shards of {tensor.name!r} are {dtypes[tensor.name]} and {tensor.dtype}.")
    for name, shape in shapes.items():
        if not is_shape(shape):
            raise CheckpointError(f"{root}: by its shards {name!r} is of shape {list(shape)}, which no tensor has.")
    entries = tuple(Entry(n, dtypes[n], shape, (n,)) for n, shape in shapes.items())
    row = {e.name: i for i, e in enumerate(entries)}
    width = max((len(e.shape) for e in entries), default=0)
    chunks = Chunks.dense(
        [row[t.name] for t in stored],
        padded(offsets, width, 0),
        padded(ends, width, 1),
        files,
        [t.offset for t in stored],
    )
    return Catalog("hf", str(root), tuple(names), entries, chunks)


def lay_out(spec: Spec) -> Layout:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and the index when `max_shard_size` demands it."""
    sizes = [int(np.prod(e.shape, dtype=np.int64)) * itemsize(e.dtype) for e in spec.entries]
    groups = split(sizes, int(spec.options["max_shard_size"]))
    stem, ending = ("model", ".safetensors") if spec.options.get("safetensors", True) else ("pytorch_model", ".bin")
    stem = "adapter_model" if spec.source and is_adapter(spec.source) else stem
    count = len(groups)
    names = [stem + ending] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}{ending}" for i in range(count)]
    layout = pt.lay_out_files(spec, names, groups) if ending == ".bin" else _safetensors(spec, names, groups)
    if count > 1:
        weight_map = {spec.entries[i].name: names[g] for g, group in enumerate(groups) for i in group}
        elements = sum(int(np.prod(e.shape, dtype=np.int64)) for e in spec.entries)
        index = {
            "metadata": {"total_parameters": elements, "total_size": sum(sizes)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        layout = replace(layout, late={**layout.late, stem + ending + ".index.json": text.encode})
    return layout


def _safetensors(spec: Spec, names: list[str], groups: list[list[int]]) -> Layout:
    file = np.zeros(len(spec.entries), np.int64)
    offset = np.zeros(len(spec.entries), np.int64)
    lengths, pieces = [], []
    for number, group in enumerate(groups):
        tensors = [(spec.entries[i].name, spec.entries[i].dtype, spec.entries[i].shape) for i in group]
        header, offsets = safetensors.lay_out(tensors, {"format": "pt"})
        file[group], offset[group] = number, offsets
        lengths.append(len(header) + sum(int(np.prod(s, dtype=np.int64)) * itemsize(d) for _, d, s in tensors))
        pieces.append((number, 0, header))
    catalog = Catalog("hf", "", tuple(names), spec.entries, whole(spec.entries, file, offset))
    return Layout(catalog, tuple(lengths), tuple(pieces))
