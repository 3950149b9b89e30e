"""Universal checkpoints of DeepSpeed: one folder for each parameter, one file in it for each of its values.

    latest_universal                                        the name of the folder below
    TAG/mp_rank_00_model_states.pt                          counters and what the training program put beside the model
    TAG/zero_pp_rank_0_mp_rank_00_model_states.pt           the same, where an engine of stage 3 looks for it
    TAG/zero/NAME/fp32.pt exp_avg.pt exp_avg_sq.pt step.pt  whole tensors in fp32
    TAG/zero/optimizer_state.pt                             settings of the parameter groups

Facts: DeepSpeed 0.19.8. Engines of stages 1 and 2 want `{param, cat_dim}` in a file, one of stage 3 takes that too and
wants the step in optimizer_state.pt as well; what is written here serves all of them.

Invariant: a folder without moments is read as a weight like any other; what is written has the names of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.box import ints
from ckpt_dist.catalog import Catalog, Entry, Extra, Key
from ckpt_dist.errors import CheckpointError, UsageError, shown
from ckpt_dist.files import inert
from ckpt_dist.files.dtypes import is_floating
from ckpt_dist.formats import Layout, Spec, _moments, _zero
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats._table import File, Table, opened

FOLDER, STATE, WEIGHT, STEP = "zero", "optimizer_state.pt", "fp32.pt", "step.pt"
MODELS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
TRACKER = "latest_universal"
OPTIMIZER = ("optimizer", "state")
NESTED = ("optimizer_state_dict", "state", Key(0), "step")
INFO = "universal_checkpoint_info"
Values = Mapping[Any, Any]  # by path
PATTERN = re.compile(r"\^?(?:(?:[\w. -]|\\[.dw_-])[+*?]?)+\$?")  # of names of weights, as training programs write them
VERSION = "0.19.8"  # whose engines were seen to load what is written


def claims(path: Path) -> bool:
    return (path / FOLDER / STATE).is_file() or any((path / FOLDER).glob(f"*/{WEIGHT}"))


# ---- reading


def scan(path: Path, models: Sequence[str], more: Any, universal: bool = False) -> Catalog:
    """Each file of each parameter; `models` are the files of the model, and `more(table, main)` is what lies in them.

    `universal`: what is to be made is such a checkpoint again.
    """
    names = sorted(p.parent.name for p in (path / FOLDER).glob(f"*/{WEIGHT}"))
    files = [*models, *([f"{FOLDER}/{STATE}"] if (path / FOLDER / STATE).is_file() else [])]
    heads = [opened(path, name, k) for k, name in enumerate(files)]
    main, table, counters = heads[0], Table(), list[Extra]()
    shapes = {n: tuple(s) for group in main.tree.get("param_shapes") or () for n, s in group.items()}
    for name in names:
        for file in sorted(p.name for p in (path / FOLDER / name).iterdir() if p.suffix == ".pt"):
            files.append(f"{FOLDER}/{name}/{file}")
            counters += _value(table, path, name, file, len(files) - 1, shapes.get(name))
    _rest(table, main, heads[: len(models)])
    extras = [
        *counters,
        *more(table, main),
        *(_settings(table, heads[-1], names, universal) if len(heads) > len(models) else ()),
    ]
    notes = ("weights: the fp32 weights of a universal checkpoint",)
    return table.catalog("deepspeed", path, files, extras, {"notes": notes})


def _value(table: Table, root: Path, name: str, file: str, number: int, shape: Any) -> list[Extra]:
    """One value of a parameter: bare or in a dict, in its shape or flat; a counter may be a plain number."""
    path = f"{FOLDER}/{name}/{file}"
    tree, storages = pt.open_archive(root / path)
    ref = tree.get("param") if isinstance(tree, Mapping) else tree
    key = file.removesuffix(".pt")
    place = (name,) if file == WEIGHT else (*OPTIMIZER, name, key)
    if not isinstance(ref, inert.TensorRef):
        if file == STEP and type(ref) in (int, float):
            return [Extra(".".join(place), place, "optimizer", ref)]
        raise CheckpointError(f"{root / path} holds no tensor. Was it written by DeepSpeed's ds_to_universal?")
    if shape is not None and len(ref.shape) == 1 and file != STEP:
        if prod(shape) != ref.shape[0]:
            raise CheckpointError(f"{root / path} has {ref.shape[0]} elements, the model's file says {list(shape)}.")
        ref = replace(ref, shape=shape, stride=tuple(n * ref.stride[0] for n in inert.strides_of(shape)))
    role = "weight" if file == WEIGHT else "optimizer"
    table.whole(
        Entry(".".join(place), ref.dtype, ref.shape, place, role), ref, File(root / path, number, tree, storages)
    )
    return []


def _rest(table: Table, main: File, models: Sequence[File]) -> None:
    """What has no folder: other names of a weight, buffers, frozen weights."""
    held = set(table.entries)
    module = {n: r for n, r in (main.tree.get("module") or {}).items() if isinstance(r, inert.TensorRef)}
    third = models[0].path.name.startswith("zero_pp_rank")  # of others the module has all
    for name, part in _zero.frozen(models).items() if third else ():
        if name not in held:
            table.runs(Entry(name, part.dtype, part.shape, (name,)), part.lo, part.hi, part.file, part.address)
    for name, of in (main.tree.get("shared_params") or {}).items():
        if name not in table.entries and of in held:
            table.again(replace(table.entries[of], name=name, path=(name,)), of)
    for name, ref in module.items():
        if name not in table.entries and 0 not in ref.shape:
            table.whole(Entry(name, ref.dtype, ref.shape, (name,)), ref, main)


def _settings(table: Table, state: File, names: Sequence[str], universal: bool) -> Iterator[Extra]:
    """Of optimizer_state.pt: settings of groups, numbers, and the step, which stage 3 has only here."""
    inner = state.tree.get("optimizer_state_dict")
    steps = inner.get("state") if isinstance(inner, Mapping) else None
    first = steps.get(0) if isinstance(steps, Mapping) else None
    step = first.get("step") if isinstance(first, Mapping) else None
    for name in names:
        place = (*OPTIMIZER, name, "step")
        label = ".".join(place)
        if step is None or label in table.entries or f"optimizer.state.{name}.exp_avg" not in table.entries:
            continue
        if isinstance(step, inert.TensorRef):
            table.whole(Entry(label, step.dtype, step.shape, place, "optimizer"), step, state)
        else:
            yield Extra(label, place, "optimizer", step)
    if "param_groups" in state.tree:
        groups = state.tree["param_groups"]
        yield Extra("optimizer.param_groups", ("optimizer", "param_groups"), "optimizer", groups)
    yield from _moments.settings(state.tree, universal)


# ---- writing


@dataclass
class _Files:
    """Files to be: each has tensors and plain values at paths in its pickle. `of` is a tensor's entry, -1 for zeros."""

    tag: str
    names: list[str] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    own: list[list[Extra]] = field(default_factory=list)
    tensors: list[Entry] = field(default_factory=list)
    of: list[int] = field(default_factory=list)

    def add(self, name: str, tensors: Sequence[tuple[int, Entry]], values: Values) -> None:
        self.names.append(f"{self.tag}/{name}")
        self.groups.append(list(range(len(self.of), len(self.of) + len(tensors))))
        self.of += [k for k, _ in tensors]
        self.tensors += [e for _, e in tensors]
        self.own.append([Extra("", path, "state", value) for path, value in values.items()])


def lay_out(spec: Spec) -> Layout:
    """One file for each value of each weight, one with the settings of the optimizer, the model's file twice."""
    step = spec.options.get("step")
    files = _Files("universal" if step is None else f"global_step{step}_universal")
    beside: Values = {x.path: x.value for x in spec.extras}
    info = {str(p[1]): v for p, v in beside.items() if p[0] == INFO and len(p) > 1}
    steps = [_value_file(files, k, entry, info) for k, entry in enumerate(spec.entries) if entry.role != "state"]
    counters = {str(p[2]): v for p, v in beside.items() if p[:2] == OPTIMIZER and p[3:] == ("step",)}
    for name, value in counters.items():
        files.add(f"{FOLDER}/{_folder(name)}/{STEP}", [], {(): value})
    if not counters and all(e.role != "optimizer" for e in spec.entries):
        steps += [_fresh(files, e, info) for e in spec.entries if e.role == "weight" and is_floating(e.dtype)]
    found = [(k, replace(e, path=NESTED)) for k, e in filter(None, steps)][:1]
    nested = {NESTED: next(iter(counters.values()))} if counters and not found else {}
    files.add(f"{FOLDER}/{STATE}", found, {**_settings_of(beside), **nested})
    state = [(k, e) for k, e in enumerate(spec.entries) if e.role == "state"]
    for name in MODELS:
        own = {p: v for p, v in beside.items() if p[0] != "optimizer"}
        files.add(name, state, {**_model_of(step), **own, ("mp_world_size",): 1})  # as many such files as there are
    return _laid_out(spec, files)


def _laid_out(spec: Spec, files: _Files) -> Layout:
    made = replace(spec, entries=tuple(files.tensors), extras=())
    layout = pt.lay_out_files(made, files.names, files.groups, own=files.own)
    of = ints(files.of)
    chunks = replace(layout.catalog.chunks, entry=of).take(np.flatnonzero(of >= 0))
    catalog = replace(layout.catalog, format="deepspeed", entries=spec.entries, chunks=chunks)
    return replace(layout, catalog=catalog, late={TRACKER: files.tag.encode})


def _value_file(files: _Files, k: int, entry: Entry, info: Mapping[str, Any]) -> tuple[int, Entry] | None:
    """The file of one value of a weight; what it is, if it is the step."""
    name, key = (entry.name, "fp32") if entry.role == "weight" else (str(entry.path[2]), str(entry.path[3]))
    path = f"{FOLDER}/{_folder(name)}/{_folder(key)}.pt"
    if f"{files.tag}/{path}" in files.names:
        raise UsageError(
            f"target.universal=true: {entry.name!r} would be the second {path}. Leave it out with keep=weights."
        )
    if key == "step":
        files.add(path, [(k, replace(entry, path=()))], {})
        return k, entry
    files.add(path, [(k, replace(entry, path=("param",)))], _flags(name, info))
    return None


def _fresh(files: _Files, entry: Entry, info: Mapping[str, Any]) -> tuple[int, Entry]:
    """Moments that are zeros at step 0: an engine of stage 3 asks for them also where training begins."""
    for key in ("exp_avg", "exp_avg_sq"):
        zeros = [(-1, replace(entry, path=("param",)))]
        files.add(f"{FOLDER}/{_folder(entry.name)}/{key}.pt", zeros, _flags(entry.name, info))
    step = Entry("step", "float32", ())
    files.add(f"{FOLDER}/{_folder(entry.name)}/{STEP}", [(-1, step)], {})
    return -1, step


def _folder(name: str) -> str:
    if "/" in name or name in ("", ".", "..", STATE):
        raise UsageError(
            f"target.universal=true: the weight {name!r} cannot be the name of a folder. Use another target.format."
        )
    return name


def _settings_of(beside: Values) -> dict[Any, Any]:
    """Of optimizer_state.pt: as stages 1 and 2 want it, and as stage 3 does. One group is meant where none is known."""
    groups = beside.get(("optimizer", "param_groups")) or [{}]
    plain = {(p[1],): v for p, v in beside.items() if p[0] == "optimizer" and len(p) == 2 and p[1] != "param_groups"}
    return {
        ("ds_version",): VERSION,
        **plain,
        ("param_groups",): groups,
        ("optimizer_state_dict", "param_groups"): groups,
    }


def _model_of(step: int | None) -> dict[Any, Any]:
    """What an engine wants to find in the file of a model, where the source says nothing."""
    counters: dict[Any, Any] = {
        ("dp_world_size",): 1,
        ("mp_world_size",): 1,
        ("global_steps",): step or 0,
        ("skipped_steps",): 0,
    }
    return {**counters, ("module",): {}, ("ds_version",): VERSION, (INFO, "universal_checkpoint_version"): 0.4}


def _matches(pattern: Any, name: str) -> bool:
    """Whether the name of a weight begins as a pattern says, if that is one that takes no time."""
    text = pattern if isinstance(pattern, str) else ""
    if not PATTERN.fullmatch(text) or len(re.findall("[+*?]", text)) > 3 or len(name) > 255:
        raise CheckpointError(
            f"{INFO} has the pattern {shown(pattern)}; words, \\d and three repetitions of one character are read. "
            "Use another target.format."
        )
    return re.match(text, name) is not None


def _flags(name: str, info: Mapping[str, Any]) -> dict[Any, Any]:
    """How tensor-parallel ranks of a loading engine divide a weight, by the patterns that the training program gave."""

    def listed(key: str) -> bool:
        patterns = info.get(key) or ()
        return any(_matches(p, name) for p in (patterns if isinstance(patterns, (list, tuple)) else [patterns]))

    if info.get("parameter_with_sub_params"):
        raise UsageError(
            "target.universal=true: parameter_with_sub_params of universal_checkpoint_info is not supported."
        )
    if listed("tp_replicated_parameter_patterns") or listed("parameter_to_average_patterns"):
        return {}
    if listed("parameter_with_2_sub_params_cat_dim_0"):
        return {("cat_dim",): 0, ("param_n_sub_params",): 2}
    whole: dict[Any, Any] = {("cat_dim",): int(listed("parameter_with_row_parallelism_patterns"))}
    return whole | ({("vocab_tensor",): True} if listed("vocabulary_parameter_patterns") else {})
