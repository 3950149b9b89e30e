"""A ZeRO save as its files say it: which ranks share which line of parameters, and that all files are of one save.

Facts: DeepSpeed 0.19.8. Experts are shared by the ranks that have the same ones: rank r of W has those of expert-parallel
rank `r % ep` (or `r // (W / ep)`, where the config says use_data_before_expert_parallelism).

Invariant: every trained parameter is in a line, under the name that it has in the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.box import Ints, ints
from ckpt_dist.errors import CheckpointError, shown
from ckpt_dist.files import inert
from ckpt_dist.formats._table import File, Folder

FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # stages 1 and 2, stage 3
BASE = ("base_optimizer_state", "optimizer_state_dict")
EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")
Shapes = Mapping[str, tuple[int, ...]]
Shard = tuple[File, Mapping[str, Any]]  # an optimizer's file, and what is in it under optimizer_state_dict


@dataclass(frozen=True)
class Line:
    """Parameters end to end, each beginning at one of `starts`, cut by the ranks that share them: all, or, of experts and
    of the stages of a pipeline, some. In the files of these (`shards`, in the order of the cuts) it is number `group` of
    `groups`, and the parameters are called `stored`."""

    shapes: Shapes
    starts: Ints
    shards: tuple[Shard, ...]
    group: int
    groups: int
    stored: tuple[str, ...]


@dataclass(frozen=True)
class Save:
    """One save of all ranks. `shuffled`: by round_robin_gradients, which the order of parameters in the model's file knows
    and the ranks' own mappings do not (DeepSpeed 0.19.8)."""

    stage: int
    lines: tuple[Line, ...]
    shards: tuple[Shard, ...]
    shuffled: bool = False

    @property
    def where(self) -> Path:
        return self.shards[0][0].path.parent

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """All that is trained; a tensor that several stages have (tied) is listed once."""
        return {name: shape for line in self.lines for name, shape in line.shapes.items()}


def save(stages: Sequence[tuple[File, Sequence[File]]]) -> Save:
    """Of each stage of a pipeline, or of the one that there is, the model's file and those of the optimizer, which have to be
    of one save and of all ranks."""
    each = [(main, [(f, _inner(f)) for f in files]) for main, files in stages]
    shards = [shard for _, of in each for shard in of]
    levels = [_whole(tree.get("zero_stage"), 3 if FLAT[1] in tree else 1) for _, tree in shards]
    for (f, _), level in zip(shards, levels, strict=True):
        if level != levels[0]:
            raise CheckpointError(
                f"{f.path} is of ZeRO stage {level}, {shards[0][0].path.name} of stage {levels[0]}. The files are of two saves."
            )
    for main, of in each:
        _all_ranks(main, of)
    _same_step(shards)
    settings = each[0][0].tree.get("ds_config")
    settings = settings.get("zero_optimization") if isinstance(settings, Mapping) else None
    shuffled = isinstance(settings, Mapping) and settings.get("round_robin_gradients") is True
    lines = [line for main, of in each for line in _lines(main, of)]
    return Save(levels[0], tuple(lines), tuple(shards), shuffled)


def _all_ranks(main: File, shards: Sequence[Shard]) -> None:
    world = max(_numbers(shards[0][1].get("partition_count", len(shards))) or [len(shards)])
    what = f"{main.path.parent}: {len(shards)} optimizer files, and the save was of {world} data-parallel ranks."
    if world > len(shards):
        raise Folder(main.path.parent).lacks(f"{what} Fetch the missing ones.")
    if world < len(shards):
        raise CheckpointError(f"{what} Move those of the other run away.")


def _lines(main: File, shards: Sequence[Shard]) -> Iterator[Line]:
    """Each group of parameters; one of experts is a line for each set of ranks that have the same experts."""
    groups, first = _groups(main), shards[0][1]
    counts = first.get("partition_count")
    local = _local_experts(groups)
    for k, group in enumerate(groups):
        starts = _starts(group, first.get("param_alignment_paddings"), k)
        ranks = counts[k] if isinstance(counts, (list, tuple)) and k < len(counts) else len(shards)
        if type(ranks) is not int or ranks < 1 or len(shards) % ranks:
            raise CheckpointError(
                f"{main.path.parent}: {shown(ranks, 20)} of {len(shards)} ranks share a group of parameters."
            )
        sets = len(shards) // ranks
        settings = main.tree.get("ds_config")
        along = isinstance(settings, Mapping) and settings.get("use_data_before_expert_parallelism") is True
        for e in range(sets):
            team = shards[e * ranks : (e + 1) * ranks] if along else shards[e::sets]
            names = [_global(main, name, e, local) for name in group] if sets > 1 else group
            yield Line(dict(zip(names, group.values(), strict=True)), starts, tuple(team), k, len(groups), tuple(group))


def _local_experts(groups: Sequence[Shapes]) -> dict[str, int]:
    """How many experts of each layer a rank has; groups may share those of one layer."""
    found: dict[str, int] = {}
    for hit in (EXPERT.fullmatch(name) for group in groups for name in group):
        if hit:
            found[hit[1]] = max(found.get(hit[1], 0), int(hit[2]) + 1)
    return found


def _global(main: File, name: str, e: int, local: Mapping[str, int]) -> str:
    """What expert-parallel rank `e` calls expert 0 is the first of its own: `_global(_, "a.deepspeed_experts.0.w", 1, {..: 2})`
    is `a.deepspeed_experts.2.w`, as in the experts' own files."""
    hit = EXPERT.fullmatch(name)
    if hit is None:
        raise CheckpointError(
            f"{main.path.parent}: {shown(name, 80)} is shared by fewer than all ranks, and is no expert of a mixture "
            "(deepspeed_experts.N). Such layouts are not read."
        )
    return f"{hit[1]}{e * local[hit[1]] + int(hit[2])}{hit[3]}"


def _groups(main: File) -> tuple[Shapes, ...]:
    """The trained parameters by group, in their order."""
    groups = main.tree.get("param_shapes")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) for g in groups):
        raise CheckpointError(
            f"{main.path} does not say which parameters are trained (param_shapes). Is it older than DeepSpeed 0.5?"
        )
    for name, shape in (one for group in groups for one in group.items()):
        if not isinstance(name, str) or not inert.is_shape(shape):
            raise CheckpointError(f"{main.path} is damaged: param_shapes has {shown(name)} of shape {shown(shape)}.")
    return tuple(groups)


def _same_step(shards: Sequence[Shard]) -> None:
    """All ranks have counted as many steps: files that were saved at another time look the same in all else."""
    said = [(file, by_group(tree.get(key), 1)[0].get("step")) for file, tree in shards for key in BASE]
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


def by_group(holder: Any, count: int) -> list[Mapping[str, Any]]:
    """The state of each group; a list where each is by itself (elastic checkpoints)."""
    state = holder.get("state") if isinstance(holder, Mapping) else holder
    state = dict(enumerate(state)) if isinstance(state, (list, tuple)) else state
    found = [state.get(g) if isinstance(state, Mapping) else None for g in range(count)]
    return [of if isinstance(of, Mapping) else {} for of in found]
