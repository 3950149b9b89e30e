"""The optimizer's state in the files of a ZeRO save: moments lie as master weights do, counters and settings beside them.

Invariant: what is no value of each weight is listed, or refused where it was asked for; nothing is carried by half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ckpt_dist.catalog import Entry, Extra
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import inert
from ckpt_dist.formats._save import BASE, Save, by_group
from ckpt_dist.formats._table import Table
from ckpt_dist.formats._zero import parts

SCALER = "loss_scaler"
SCALERS = tuple(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler"))


def moments(table: Table, s: Save, strict: bool, universal: bool) -> Iterator[Extra]:
    """The optimizer's state: flat values as parameters have, counters, settings of groups."""
    base, many = BASE[s.stage == 3], 1 + max((line.group for line in s.lines), default=-1)

    def pick(key: str, tree: Mapping[str, Any]) -> list[Any]:
        return [of.get(key) for of in by_group(tree.get(base), many)]

    states = [by_group(line.shards[0][1].get(base), many)[line.group] for line in s.lines]
    for key in dict.fromkeys(key for state in states for key in state if isinstance(key, str)):
        each = [value for _, tree in s.shards for value in pick(key, tree)]
        if key == "step" or not any(isinstance(v, inert.TensorRef) and len(v.shape) == 1 for v in each):
            yield from _counters(table, s, key, [state.get(key) for state in states])
            continue
        try:
            found = parts(s, partial(pick, key), key)
        except CheckpointError as error:
            if strict:
                raise CheckpointError(
                    f"{error} If it is no value of each weight, leave it out with unmatched=drop."
                ) from None
            yield Extra(f"optimizer.{key}", ("optimizer", key), "optimizer", inert.Record())
            continue
        for name, p in found.items():
            path = ("optimizer", "state", name, key)
            table.runs(Entry(".".join(path), p.dtype, p.shape, path, "optimizer"), p.lo, p.hi, p.file, p.address)
    holder = s.shards[0][1].get(base)
    groups = holder.get("param_groups") if isinstance(holder, Mapping) else [{} for _ in range(many)]
    yield Extra("optimizer.param_groups", ("optimizer", "param_groups"), "optimizer", groups)
    yield from settings(s.shards[0][1], universal)


def settings(tree: Mapping[str, Any], universal: bool) -> Iterator[Extra]:
    """Numbers beside the state, and what scales the loss of fp16."""
    for key, value in tree.items():
        value = _scaler(value, universal) if key == SCALER else value
        if isinstance(value, (int, float, str)) or key == SCALER:
            yield Extra(f"optimizer.{key}", ("optimizer", str(key)), "optimizer", value)


def _scaler(value: Any, universal: bool) -> Any:
    """A loss scaler that scales: the object that an engine asks for in a universal checkpoint, elsewhere its numbers."""
    state, path = inert.state_of(value), getattr(value, "path", "")
    if path not in SCALERS or not (state.get("dynamic") or state.get("cur_scale") != 1):
        return value
    if not universal:
        return dict(state)
    made = inert.Instance(state)
    made.path = path
    return made


def _counters(table: Table, s: Save, key: str, values: Sequence[Any]) -> Iterator[Extra]:
    """A value of a whole group, for each of its parameters."""
    held = {
        name: (line, value)
        for line, value in zip(reversed(s.lines), reversed(values), strict=True)
        for name in line.shapes
    }
    for name in s.names:
        line, value = held[name]
        path = ("optimizer", "state", name, key)
        if isinstance(value, inert.TensorRef):
            table.whole(Entry(".".join(path), value.dtype, value.shape, path, "optimizer"), value, line.shards[0][0])
        elif value is not None:
            yield Extra(".".join(path), path, "optimizer", value)
