"""Megatron-core's distributed checkpoints: a DCP folder with `metadata.json` and `common.pt`, in `iter_NNNNNNN/`.

Facts: megatron-core 0.8 to 0.19; what is written was loaded by 0.16.1. Everything but tensors is in common.pt, since
0.19 in the object `common_state/shard_0_1`. A layer's `_extra_state` objects have to be there, if only as [None].

Invariant: tensors are those of `dcp`; this file only adds what Megatron keeps beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_dist import megatron
from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import pickles
from ckpt_dist.formats import Layout, Spec, dcp
from ckpt_dist.formats import torch as pt

METADATA, COMMON, COMMON_OBJECT = "metadata.json", "common.pt", "common_state/shard_0_1"
SETTINGS = "run_config.yaml"  # of Megatron Bridge, which keeps no args
BACKENDS = dict(
    sharded_backend="torch_dist", sharded_backend_version=1, common_backend="torch", common_backend_version=1
)
PLAIN = (str, int, float, bool, type(None))
LINEAR = re.compile(
    r"(decoder\.layers\.(?:\d+\.)?(?:self_attention|mlp)\.(?:linear_\w+|(?:experts\.experts|shared_experts)\.linear_\w+))\.weight"
)


def claims(path: Path) -> bool:
    return path.is_dir() and (path / METADATA).is_file() and (path / ".metadata").is_file()


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """What dcp scans, with the args of the run as its config."""
    catalog: Catalog = dcp.scan(path, options)
    common = _common(path, catalog)
    extras = tuple(x for x in catalog.extras if "_extra_state" not in x.name and x.name != COMMON_OBJECT)
    return replace(catalog, extras=extras, config=args_of(common) or _settings(path / SETTINGS))


def _common(path: Path, catalog: Catalog) -> Mapping[str, Any]:
    if (path / COMMON).is_file():
        tree, _ = pt.open_archive(path / COMMON)
    else:
        held = [dcp.read_extra(catalog, x) for x in catalog.extras if x.name == COMMON_OBJECT]
        tree = held[0][0] if held and isinstance(held[0], list) and held[0] else {}
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path / COMMON} holds {type(tree).__name__}, not a dict. Is it of another tool?")
    return tree


def _settings(path: Path) -> dict[str, Any]:
    """The model's part of a run's settings, by the words that args have for it."""
    if not path.is_file():
        return {}
    import yaml

    try:
        found = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable YAML: {error!s:.200}") from None
    model = found.get("model") if isinstance(found, dict) else None
    return {str(k): v for k, v in model.items() if _plain(v)} if isinstance(model, dict) else {}


def args_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The args of a run as plain values; what is of a class is left out."""
    state = tree.get("args")
    fields = state[-1] if isinstance(state, pickles.Record) and len(state) else state
    return {k: v for k, v in fields.items() if _plain(v)} if isinstance(fields, dict) else {}


def _plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) in (list, tuple) and all(type(v) in PLAIN for v in value))


def lay_out(spec: Spec) -> Layout:
    """A dcp folder with the objects, common.pt and metadata.json that Megatron asks for, and the tracker above it."""
    step = int(spec.options.get("step") or 1)
    objects = tuple(
        Extra(f"{key}/shard_{place}", (f"{key}/shard_{place}",), "state", [None])
        for entry in spec.entries
        for key, place in _objects(entry)
    )
    options = {**spec.options, "placement": None}  # rows are not what its ranks load, so every node has all of them
    layout = dcp.lay_out(replace(spec, extras=(*spec.extras, *objects), options=options))
    args = dict(spec.options.get("args") or {})
    args |= dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, ckpt_format="torch_dist")
    common = {"args": pickles.Namespace(args), "iteration": step, "checkpoint_version": 3.0}
    folder = megatron.STEPS.format(step)
    late = {
        **layout.late,
        METADATA: lambda: json.dumps(BACKENDS).encode(),
        COMMON: lambda: pt.archive(common, "common"),
    }
    catalog = replace(layout.catalog, format="torch_dist", files=tuple(f"{folder}/{f}" for f in layout.catalog.files))
    late = {f"{folder}/{name}": make for name, make in late.items()} | {megatron.TRACKER: lambda: str(step).encode()}
    return replace(layout, catalog=catalog, late=late)


def _objects(entry: Entry) -> list[tuple[str, str]]:
    """The `_extra_state` of a linear layer: one for each layer (and expert) of its tensor, by offset and count."""
    found = LINEAR.fullmatch(entry.name)
    if found is None:
        return []
    stacked = not re.match(r"decoder\.layers\.\d", entry.name)
    counts = [entry.shape[0]] if stacked else []
    if ".experts.experts." in entry.name:
        counts.append(entry.shape[1 if stacked else 0])
    if not counts:
        return [(found[1] + "._extra_state", "0_1")]
    places = [""]
    for count in counts:
        places = [f"{p}.{k}" if p else str(k) for p in places for k in range(count)]
    return [(found[1] + "._extra_state", f"{p}_{'.'.join(map(str, counts))}") for p in places]
