"""The optimizer's files of a ZeRO save: where master weights and moments of each parameter lie in them.

Invariant: what the files say themselves of their slices (lengths, mappings) agrees with where parameters are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import zero
from ckpt_dist.box import Ints, ints
from ckpt_dist.catalog import Entry, Extra
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import inert
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats._table import File, Slice, Table, flat

FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # stages 1 and 2, stage 3
BASE = ("base_optimizer_state", "optimizer_state_dict")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Save:
    """One save of all ranks. `groups` are the trained parameters of each group in their order; `starts`, where each
    begins in its group's line (stages 1 and 2). `shuffled`: by round_robin_gradients, which the order of `groups` knows
    and the ranks' own mappings do not (DeepSpeed 0.19.8)."""

    stage: int
    groups: tuple[Shapes, ...]
    starts: tuple[Ints, ...]
    shards: tuple[tuple[File, Mapping[str, Any]], ...]
    shuffled: bool = False

    @property
    def where(self) -> Path:
        return self.shards[0][0].path.parent


def save(main: File, files: Sequence[File]) -> Save:
    """The optimizer's files, which have to be of one stage and of all ranks."""
    shards = [(f, _inner(f)) for f in files]
    stages = [_whole(tree.get("zero_stage"), 3 if FLAT[1] in tree else 1) for _, tree in shards]
    for (f, _), stage in zip(shards, stages, strict=True):
        if stage != stages[0]:
            raise CheckpointError(
                f"{f.path} is of ZeRO stage {stage}, {files[0].path.name} of stage {stages[0]}. The files are of two saves."
            )
    counts = shards[0][1].get("partition_count", len(files))
    world = max(_numbers(counts) or [len(files)])
    if world != len(files):
        raise CheckpointError(
            f"{main.path.parent}: {len(files)} optimizer files, and the save was of {world} data-parallel ranks. "
            + ("Fetch the missing ones." if world > len(files) else "Move those of the other run away.")
        )
    _same_step(shards)
    groups = _groups(main)
    starts = tuple(_starts(g, shards[0][1].get("param_alignment_paddings"), k) for k, g in enumerate(groups))
    settings = main.tree.get("ds_config")
    settings = settings.get("zero_optimization") if isinstance(settings, Mapping) else None
    shuffled = isinstance(settings, Mapping) and settings.get("round_robin_gradients") is True
    return Save(stages[0], tuple(groups), starts, tuple(shards), shuffled)


def _groups(main: File) -> tuple[Shapes, ...]:
    """The trained parameters by group, in their order."""
    groups = main.tree.get("param_shapes")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) for g in groups):
        raise CheckpointError(
            f"{main.path} does not say which parameters are trained (param_shapes). Is it older than DeepSpeed 0.5?"
        )
    for name, shape in (one for group in groups for one in group.items()):
        if not isinstance(name, str) or not inert.is_shape(shape):
            raise CheckpointError(f"{main.path} is damaged: param_shapes has {name!r:.60} of shape {shape!r:.60}.")
    return tuple(groups)


def _same_step(shards: Sequence[tuple[File, Mapping[str, Any]]]) -> None:
    """All ranks have counted as many steps: files that were saved at another time look the same in all else."""
    said = [(file, _by_group(tree.get(key), 1)[0].get("step")) for file, tree in shards for key in BASE]
    steps = [(f, f.number_of(v, "step") if isinstance(v, inert.TensorRef) else v) for f, v in said]
    steps = [(f, v) for f, v in steps if type(v) in (int, float)]
    if other := next(((f, v) for f, v in steps if v != steps[0][1]), None):
        raise CheckpointError(
            f"{other[0].path} is of step {other[1]:g}, {steps[0][0].path.name} of step {steps[0][1]:g}. The files are of two "
            "saves; fetch the checkpoint again."
        )


def _inner(file: File) -> Mapping[str, Any]:
    tree = file.tree.get("optimizer_state_dict")
    if not isinstance(tree, Mapping) or not any(isinstance(tree.get(k), (list, tuple)) for k in FLAT):
        raise CheckpointError(
            f"{file.path} holds no flat master weights ({' or '.join(FLAT)}): it is of an optimizer that is not known."
        )
    return tree


def _whole(value: Any, otherwise: int) -> int:
    """A number, or an enum of one, which a pickle holds as a call."""
    value = value[0] if isinstance(value, inert.Record) and value else value
    return value if type(value) is int else otherwise


def _numbers(value: Any) -> list[int]:
    return [n for n in (value if isinstance(value, (list, tuple)) else [value]) if type(n) is int]


def _starts(group: Shapes, paddings: Any, number: int) -> Ints:
    """Where each parameter begins in its group's line; newer files may align them."""
    sizes = ints([prod(shape) for shape in group.values()])
    more = _numbers(paddings[number]) if isinstance(paddings, (list, tuple)) and len(paddings) > number else []
    more = [n for n in more if 0 <= n < inert.DEEP]
    steps = sizes + ints(more) if len(more) == len(sizes) else sizes
    return ints(np.cumsum(steps) - steps)


@dataclass(frozen=True)
class Part:
    """One parameter: elements `lo` to `hi` lie in a file at an address."""

    dtype: str
    shape: tuple[int, ...]
    lo: Ints
    hi: Ints
    file: Ints
    address: Ints


def _placed(shapes: Shapes, runs: zero.Runs, slices: Sequence[Slice], where: str) -> dict[str, Part]:
    """Runs in slices as parts of parameters at addresses; one that is not whole is refused."""
    sizes = [prod(shape) for shape in shapes.values()]
    dtypes = {s.dtype for s in slices}
    if len(dtypes) > 1:
        raise CheckpointError(f"{where}: slices of {' and '.join(sorted(dtypes))} are mixed.")
    (dtype,) = dtypes
    if (lost := zero.short(sizes, runs)).any():
        worst = int(np.argmax(lost))
        raise CheckpointError(
            f"{where}: {int(lost[worst])} of {sizes[worst]} elements of {list(shapes)[worst]!r} are in no slice; the ranks "
            f"hold {sum(s.length for s in slices)} elements, parameters need {sum(sizes)}. Is a file of another run?"
        )
    file = ints([s.file for s in slices])[runs.slice]
    address = ints([s.address for s in slices])[runs.slice] + runs.at * itemsize(dtype)
    cuts = np.searchsorted(runs.which, np.arange(len(sizes) + 1))
    found = {}
    for k, (name, shape) in enumerate(shapes.items()):
        rows = slice(cuts[k], cuts[k + 1])
        found[name] = Part(dtype, tuple(shape), runs.lo[rows], runs.hi[rows], file[rows], address[rows])
    return found


def _parts(s: Save, flats: Sequence[Sequence[Slice]], what: str) -> dict[str, Part]:
    """Every trained parameter's value in `flats[group][rank]`."""
    world, where = len(s.shards), f"{s.where}: {what}"
    if s.stage == 3:
        shapes = {n: shape for group in s.groups for n, shape in group.items()}
        sizes = ints([prod(shape) for shape in shapes.values()])
        ranks = [[of[r] for of in flats] for r in range(world)]
        need, have = int((-(-sizes // world)).sum()), [sum(t.length for t in of) for of in ranks]
        if have != [need] * world:
            raise CheckpointError(
                f"{where}: the parameters need {need} elements on each of {world} ranks, the files hold {have}."
            )
        return _placed(
            shapes,
            zero.parts(sizes, world, [[t.length for t in of] for of in ranks]),
            [t for of in ranks for t in of],
            where,
        )
    if len(flats) != len(s.groups):
        raise CheckpointError(
            f"{where} has {len(flats)} groups, the model's file lists {len(s.groups)}. They are of two runs."
        )
    found: dict[str, Part] = {}
    for group, starts, slices in zip(s.groups, s.starts, flats, strict=True):
        sizes = ints([prod(shape) for shape in group.values()])
        lengths = [t.length for t in slices]
        end = int((starts + sizes).max(initial=0))
        if -(-end // (2 * world)) != -(-sum(lengths) // (2 * world)):
            raise CheckpointError(
                f"{where}: the parameters need {end} elements, the slices of {world} ranks hold {sum(lengths)}, which is not "
                "what padding explains. The files are of two runs."
            )
        found |= _placed(group, zero.cut(starts, sizes, lengths), slices, where)
    return found


def masters(s: Save) -> dict[str, Part]:
    """The fp32 master weights of all that is trained."""
    key = FLAT[s.stage == 3]
    each = [[flat(f, ref, key) for ref in tree.get(key) or ()] for f, tree in s.shards]
    if len({len(of) for of in each}) > 1:
        raise CheckpointError(
            f"{s.where}: the ranks have {sorted({len(of) for of in each})} flat groups. They are of two runs."
        )
    found = _parts(s, list(zip(*each, strict=True)), key)
    for file, tree in () if s.shuffled else s.shards:
        _mapped(file, tree.get("param_slice_mappings"), found)
    return found


def _mapped(file: File, mappings: Any, found: Mapping[str, Part]) -> None:
    """A rank's own table of what it holds, where there is one, says the same."""
    if not isinstance(mappings, (list, tuple)):
        return
    said = {
        n: inert.state_of(record).get("numel") for m in mappings if isinstance(m, Mapping) for n, record in m.items()
    }
    have = {n: int((p.hi - p.lo)[p.file == file.number].sum()) for n, p in found.items()}
    wrong = [n for n in {**have, **said} if said.get(n, 0) != have.get(n, 0)]
    if wrong:
        raise CheckpointError(
            f"{file.path} says that it holds {said.get(wrong[0], 0)} elements of {wrong[0]!r}; by the order of parameters in the "
            f"model's file it is {have.get(wrong[0], 0)}. The files are of two runs, or of a layout that is not known."
        )


def frozen(files: Sequence[File]) -> dict[str, Part]:
    """Stage 3: what is not trained, of which each rank's model file has one part, in the dtype of the computation."""
    found: dict[str, Part] = {}
    shapes = files[0].tree.get("frozen_param_shapes") or {}
    step = files[0].tree.get("global_steps")
    if other := next((f for f in files if shapes and f.tree.get("global_steps") != step), None):
        raise CheckpointError(
            f"{other.path} is of step {other.tree.get('global_steps')}, {files[0].path.name} of step {step}. The files are of two "
            "saves; fetch the checkpoint again."
        )
    for name, shape in shapes.items() if isinstance(shapes, Mapping) else ():
        if not isinstance(name, str) or not inert.is_shape(shape):
            raise CheckpointError(f"{files[0].path} is damaged: {name!r:.60} is of shape {shape!r:.60}.")
        what = f"a part of the frozen {name!r}"
        slices = [flat(f, (f.tree.get("frozen_param_fragments") or {}).get(name), what) for f in files]
        runs = zero.parts([prod(shape)], len(slices), [[t.length] for t in slices])
        found |= _placed({name: shape}, runs, slices, f"{files[0].path.parent}: frozen weights")
    return found


def moments(table: Table, s: Save, strict: bool) -> Iterator[Extra]:
    """The optimizer's state: flat values as parameters have, counters, settings of groups."""
    holders = [tree.get(BASE[s.stage == 3]) for _, tree in s.shards]
    each = [_by_group(h, len(s.groups)) for h in holders]
    keys = [key for key in dict.fromkeys(key for of in each[0] for key in of) if isinstance(key, str)]
    for key in keys:
        values = [[of[g].get(key) for of in each] for g in range(len(each[0]))]
        flats = [[v for v in of if isinstance(v, inert.TensorRef) and len(v.shape) == 1] for of in values]
        if key == "step" or not any(flats):
            yield from _counters(table, s, key, [of[0] for of in values])
            continue
        try:
            slices = [
                [flat(f, v, f"{key} of group {g}") for (f, _), v in zip(s.shards, of, strict=True)]
                for g, of in enumerate(values)
            ]
            parts = _parts(s, slices, key)
        except CheckpointError as error:
            if strict:
                raise CheckpointError(
                    f"{error} If it is no value of each weight, leave it out with unmatched=drop."
                ) from None
            yield Extra(f"optimizer.{key}", ("optimizer", key), "optimizer", inert.Record())
            continue
        for name, p in parts.items():
            path = ("optimizer", "state", name, key)
            table.runs(Entry(".".join(path), p.dtype, p.shape, path, "optimizer"), p.lo, p.hi, p.file, p.address)
    groups = holders[0].get("param_groups") if isinstance(holders[0], Mapping) else [{} for _ in s.groups]
    yield Extra("optimizer.param_groups", ("optimizer", "param_groups"), "optimizer", groups)
    for key, value in s.shards[0][1].items():
        if isinstance(value, (int, float, str)) or key == "loss_scaler":  # an object, which is not carried
            yield Extra(f"optimizer.{key}", ("optimizer", key), "optimizer", value)


def _by_group(holder: Any, count: int) -> list[Mapping[str, Any]]:
    """The state of each group; a list where each is by itself (elastic checkpoints)."""
    state = holder.get("state") if isinstance(holder, Mapping) else holder
    state = dict(enumerate(state)) if isinstance(state, (list, tuple)) else state
    found = [state.get(g) if isinstance(state, Mapping) else None for g in range(count)]
    return [of if isinstance(of, Mapping) else {} for of in found]


def _counters(table: Table, s: Save, key: str, values: Sequence[Any]) -> Iterator[Extra]:
    """A value of a whole group, for each of its parameters."""
    for group, value in zip(s.groups, values, strict=False):
        for name in group:
            path = ("optimizer", "state", name, key)
            if isinstance(value, inert.TensorRef):
                table.whole(Entry(".".join(path), value.dtype, value.shape, path, "optimizer"), value, s.shards[0][0])
            elif value is not None:
                yield Extra(".".join(path), path, "optimizer", value)
