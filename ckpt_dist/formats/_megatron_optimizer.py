"""The optimizer of one of Megatron's ranks: which tensor is the moment, or the copy in fp32, of which parameter.

Facts: megatron-core 0.16.1. Its files name no parameters. Without shards there are lists of tensors: in each group of
settings those of its parameters, in the model's order. A distributed optimizer has one flat tensor for all parameters of
a dtype, end to end in reverse order, each at a multiple of 64 elements.

Invariant: the shapes and lengths in the files fit the model's parameters in one way only, or they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ckpt_dist.catalog import Extra
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.inert import TensorRef, strides_of
from ckpt_dist.files.zips import Record as Place
from ckpt_dist.formats import torch as pt

FLAT = "distrib_optim.pt"
ALIGNED = 64  # elements
BUFFER = re.compile(r"(expert_bias|local_tokens_per_expert|inv_freq)$")  # stored with a model and not trained
EXPERT = re.compile(r"\.mlp\.experts\.")
COPIES = ("fp32_from_fp16_params", "fp32_from_fp16")
RESHARDABLE = "fully_reshardable"
State = Mapping[str, TensorRef]


@dataclass(frozen=True)
class Param:
    chunk: int
    name: str
    ref: TensorRef

    @property
    def half(self) -> bool:
        return self.ref.dtype != "float32"


@dataclass(frozen=True)
class Group:
    """Parameters with the same settings: what is kept of each, in their order; copies are of those in half precision."""

    each: Sequence[Mapping[str, TensorRef]]
    copies: Sequence[TensorRef]
    expert: bool

    def shape(self, k: int) -> tuple[int, ...] | None:
        return next((r.shape for r in self.each[k].values()), None) if k < len(self.each) else None


class Unread(CheckpointError):
    """An optimizer that is not read."""


Slots = dict[tuple[str, int], dict[str, TensorRef]]  # by slot and virtual chunk


def params_of(chunks: Sequence[State]) -> list[Param]:
    """The model's parameters in their order, which is that of its dict."""
    return [Param(c, n, ref) for c, state in enumerate(chunks) for n, ref in state.items() if not BUFFER.search(n)]


def slots(where: Path, optimizer: Any, chunks: Sequence[State], flat: Any) -> Slots:
    """What a rank's optimizer keeps of each parameter: moments, copies in fp32. `flat` is the content of its FLAT."""
    members, params = _members(where, optimizer), params_of(chunks)
    found: Slots = {}
    if flat is not None:
        for name, slot, ref in _of_flats(where, flat, params):
            found.setdefault((f"optimizer.state.{slot}.", name.chunk), {})[name.name] = ref
        return found
    groups = [g for member in members for g in _groups(where, member)]
    for param, kept in _walked(where, params, groups):
        for slot, ref in kept.items():
            found.setdefault((f"optimizer.state.{slot}.", param.chunk), {})[param.name] = ref
    return found


def _members(where: Path, optimizer: Any) -> list[Mapping[str, Any]]:
    """The optimizers of a rank: of experts there may be one of their own."""
    members = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not members or not all(isinstance(m, Mapping) for m in members):
        raise Unread(f"{where}: its optimizer is {type(optimizer).__name__}, a dict (or several) is expected.")
    return members


def _inner(member: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dict of torch's own optimizer, which one for half precision has inside."""
    inner = member.get("optimizer", member.get("optimizer_state_dict", member))
    return inner if isinstance(inner, Mapping) else {}


def _groups(where: Path, member: Mapping[str, Any]) -> Iterator[Group]:
    inner = _inner(member)
    state, settings = inner.get("state"), inner.get("param_groups")
    copies: Sequence[Any] = next((member[k] for k in COPIES if k in member), [[] for _ in settings or ()])
    if state is None and settings:
        raise Unread(f"{where}: its optimizer is a distributed one, whose {FLAT} is not beside it. Fetch it.")
    if not isinstance(state, Mapping) or not isinstance(settings, (list, tuple)) or len(copies) != len(settings):
        raise Unread(f"{where}: its optimizer has no state of each parameter. It is of a kind that is not read.")
    for group, mine in zip(settings, copies, strict=True):
        each = [state.get(k) for k in group.get("params", ())]
        if not all(isinstance(kept, Mapping) for kept in each):
            raise Unread(f"{where}: its optimizer has no moments of some parameters. Was it saved before a step?")
        tensors = [{n: r for n, r in (kept or {}).items() if isinstance(r, TensorRef) and n != "step"} for kept in each]
        yield Group(tensors, list(mine), bool(group.get("is_expert_parallel")))


def _walked(
    where: Path, params: Sequence[Param], groups: Sequence[Group]
) -> Iterator[tuple[Param, dict[str, TensorRef]]]:
    """Each parameter with what is kept of it: the next of the one group whose next has its shape."""
    at, copied = [0] * len(groups), [0] * len(groups)
    apart = any(g.expert for g in groups)
    for param in params:
        mine = [
            k
            for k, g in enumerate(groups)
            if g.shape(at[k]) == param.ref.shape and (not apart or g.expert == bool(EXPERT.search(param.name)))
        ]
        if len(mine) != 1:
            raise Unread(
                f"{where}: {param.name!r} of shape {list(param.ref.shape)} could be the next of {len(mine)} groups of its "
                f"optimizer, whose next ones are {[g.shape(n) for g, n in zip(groups, at, strict=True)]}. Some parameters are "
                "not trained, or the groups are of a kind that is not known. Use keep=[weights]."
            )
        (k,) = mine
        kept = dict(groups[k].each[at[k]])
        at[k] += 1
        if param.half and groups[k].copies:
            kept["fp32_param"] = _fitting(where, param, groups[k].copies, copied[k])
            copied[k] += 1
        for slot, ref in kept.items():
            _fitting(where, param, [ref], 0, slot)
        yield param, kept
    left = sum(len(g.each) - n for g, n in zip(groups, at, strict=True))
    if left:
        raise Unread(f"{where}: {left} parameters of its optimizer are none of the model's. It is of another run.")


def _fitting(where: Path, param: Param, refs: Sequence[Any], k: int, slot: str = "fp32_param") -> TensorRef:
    ref = refs[k] if k < len(refs) else None
    if not isinstance(ref, TensorRef) or ref.shape != param.ref.shape:
        have = list(ref.shape) if isinstance(ref, TensorRef) else "missing"
        raise Unread(
            f"{where}: {slot} of {param.name!r} is {have}, the weight {list(param.ref.shape)}. It is of another run."
        )
    return ref


# ---- a distributed optimizer


def _of_flats(where: Path, flat: Any, params: Sequence[Param]) -> Iterator[tuple[Param, str, TensorRef]]:
    """Parameters in flat tensors; where experts have an optimizer of their own there are two sets of these."""
    experts = [p for p in params if EXPERT.search(p.name)]
    sets = [(flat, params)]
    if isinstance(flat, (list, tuple)):
        if len(flat) != 2 or not experts:
            raise Unread(f"{where} is of {len(flat)} optimizers; one, and one of experts, are read.")
        sets = [(flat[0], [p for p in params if not EXPERT.search(p.name)]), (flat[1], experts)]
    for tree, mine in sets:
        if tree is None:  # of weights that all expert-parallel ranks share, the first has it
            continue
        if not isinstance(tree, Mapping) or tree.get("buckets_coalesced") is not True:
            raise Unread(f"{where} has a tensor for each bucket (Megatron before 2024), which is not read.")
        lines = _lines(mine)
        if len(tree) - 1 != len(lines):
            raise Unread(f"{where} has {len(tree) - 1} flat buffers, the model {len(lines)}. It is of another run.")
        for number, (dtype, line) in enumerate(lines):
            yield from _of_line(where, tree.get(number), dtype, line)


def _lines(params: Sequence[Param]) -> list[tuple[str, list[Param]]]:
    """Parameters that share a buffer: those of one virtual chunk and dtype."""
    lines: dict[tuple[int, str], list[Param]] = {}
    for param in params:
        lines.setdefault((param.chunk, param.ref.dtype), []).append(param)
    order = sorted(lines, key=lambda k: k[0])  # of a chunk, as dtypes come first
    return [(key[1], lines[key]) for key in order]


def _of_line(where: Path, buffer: Any, dtype: str, line: Sequence[Param]) -> Iterator[tuple[Param, str, TensorRef]]:
    held = next(iter(buffer.items()), None) if isinstance(buffer, Mapping) and len(buffer) == 1 else None
    if held is None or not isinstance(held[1], Mapping) or str(held[0][0]) != dtype:
        raise Unread(f"{where}: a buffer of {dtype} parameters is expected, it has {str(buffer)[:80]}.")
    starts, total = _starts(where, line, held[1].get("numel_unpadded"))
    for slot, ref in held[1].items():
        if slot == "numel_unpadded":
            continue
        if not isinstance(ref, TensorRef) or ref.shape != (total,) or ref.stride != (1,):
            raise Unread(f"{where}: {slot!r} should be a flat tensor of {total} elements.")
        for param, start in zip(reversed(line), starts, strict=True):
            shape = param.ref.shape
            yield (
                param,
                str(slot),
                replace(ref, offset=ref.offset + start, shape=shape, stride=strides_of(shape)),
            )


def _starts(where: Path, line: Sequence[Param], length: Any) -> tuple[list[int], int]:
    """Where each parameter begins. Buckets leave gaps out, so if a length has all gaps, or none, so have all places."""
    numels, totals = [prod(p.ref.shape) for p in reversed(line)], []
    for step in (ALIGNED, 1):
        starts, end = [], 0
        for numel in numels:
            starts.append(-(-end // step) * step)
            end = starts[-1] + numel
        if end == length:
            return starts, end
        totals.append(end)
    raise Unread(
        f"{where}: a flat buffer has {length} elements; its parameters need {totals[1]}, or {totals[0]} with gaps between "
        "them. It is of another run, or of several buckets with gaps in some, whose borders are not stored."
    )


# ---- its settings


def beside(where: Path, tree: Mapping[str, Any], storages: Mapping[str, Place], flat: bool) -> list[Extra]:
    """What is no tensor of an optimizer, as distributed checkpoints have it."""
    read = [
        _settings(pt.with_small(_stripped(m), where, storages), flat) for m in _members(where, tree.get("optimizer"))
    ]
    metadata = {"chained_optim_avoid_prefix": True} | ({"distrib_optim_sharding_type": RESHARDABLE} if flat else {})
    values = {"optimizer": read[0] if len(read) == 1 else dict(enumerate(read)), "content_metadata": metadata}
    if "opt_param_scheduler" in tree:
        values["opt_param_scheduler"] = pt.with_small(tree["opt_param_scheduler"], where, storages)
    return [Extra(key, (key,), "optimizer", value) for key, value in values.items()]


def _stripped(member: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is kept of each parameter, of which one has to say the step."""
    inner = dict(_inner(member))
    state = inner.pop("state", None)
    first = next((s for s in state.values() if isinstance(s, Mapping)), {}) if isinstance(state, Mapping) else {}
    if isinstance(state, Mapping):
        inner["state"] = {"common_step": first["step"]} if "step" in first else {}
    inner["param_groups"] = [{k: v for k, v in g.items() if k != "params"} for g in inner.get("param_groups") or ()]
    if "optimizer" not in member and "optimizer_state_dict" not in member:
        return inner
    rest = {k: v for k, v in member.items() if k not in (*COPIES, "optimizer", "optimizer_state_dict")}
    return {"optimizer": inner, **rest}


def _settings(member: Any, flat: bool) -> Any:
    return {**member, "param_state_sharding_type": RESHARDABLE} if flat else member
