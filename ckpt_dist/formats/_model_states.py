"""DeepSpeed's `*_model_states.pt`: the model, and beside it counters, settings and what the training program put there.

Invariant: every leaf of the file is a tensor of the model, an extra, or a part of what says where tensors lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckpt_dist.catalog import Entry, Extra
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import inert
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats._table import File, Table

PARTS = (  # keys of a model's file that make up its tensors
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params", "optimizer",
)  # fmt: skip


def module(main: File) -> dict[str, inert.TensorRef]:
    found = main.tree.get("module")
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{main.path} holds no model: a dict under the key module is expected.")
    return {".".join(map(str, p)): leaf for p, leaf in pt.walk(found) if isinstance(leaf, inert.TensorRef)}


def state(table: Table, main: File) -> Iterator[Extra]:
    """What is beside the model: settings, counters and whatever the training program put there; odd values in it."""
    for key, value in main.tree.items():
        for place, leaf in pt.walk(value, (str(key),)) if key not in PARTS and value is not None else ():
            name = ".".join(map(str, place))
            if isinstance(leaf, inert.TensorRef):
                table.whole(Entry(name, leaf.dtype, leaf.shape, place, "state"), leaf, main)
            else:
                yield Extra(name, place, "state", leaf)
    for place, leaf in pt.walk(main.tree.get("module") or {}):
        if place and not isinstance(leaf, inert.TensorRef):
            yield Extra(".".join(map(str, place)), place, "weight", leaf)


def unread(main: File, optims: Sequence[str]) -> Iterator[Extra]:
    if optims or main.tree.get("optimizer") is not None:
        yield Extra("optimizer", ("optimizer",), "optimizer", inert.Record())
