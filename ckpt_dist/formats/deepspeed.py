"""DeepSpeed's checkpoints: `global_stepN/` of ZeRO stages 0 to 3 (model, fp32 master weights, optimizer); universal ones.

Facts: DeepSpeed 0.19.8, compared with its own zero_to_fp32; older keys from its source. What is trained lies in fp32
in the optimizer's files, flat and cut by data-parallel ranks (`zero.py`). Everything is in the model's file in the
dtype of the computation too at stages 0 to 2; at stage 3 only the buffers are.

Invariant: a parameter is its runs in the flat tensors, never a joined copy; the files of all ranks are there and of one
save, or the first that is not is named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import inert
from ckpt_dist.formats import Layout, Spec, _universal, _zero
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats._table import File, Table, opened

MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
LAYER = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_\d+_model_states\.pt")
PARTS = (  # keys of a model's file that make up its tensors
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params", "optimizer",
)  # fmt: skip


def claims(path: Path) -> bool:
    return path.is_dir() and any(MODEL.fullmatch(p.name) or OPTIM.fullmatch(p.name) for p in path.iterdir())


@dataclass(frozen=True)
class Folder:
    """Names of files, by data-parallel rank. `third`: of stage 3, where each rank has a file of the model."""

    path: Path
    models: list[str]
    optims: list[str]
    experts: list[str]

    @property
    def third(self) -> bool:
        return self.models[0].startswith("zero_pp_rank")


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The model's own weights, or the master weights where they are asked for or nothing else is stored."""
    if _universal.claims(path):
        return _universal.scan(path, _models(path), _state)
    if layers := _layers(path):
        return _pipeline(path, layers, options)
    here, keep, strict = _folder(path), options.get("keep"), options.get("unmatched") != "drop"
    master = here.third or options.get("weights") == "master" or bool(options.get("universal") and here.optims)
    carries = strict and "optimizer" in (keep or ())
    _refuse_experts(here, master or carries)
    main, table = opened(path, here.models[0], 0), Table()
    save, files = None, [here.models[0]]
    if here.optims and not here.experts and (master or keep is None or "optimizer" in keep):
        save = _zero.save(main, [opened(path, name, 1 + k) for k, name in enumerate(here.optims)])
        files += here.optims
    more, lost = _masters(table, here, main, save, strict) if master else _own(table, here, main, len(files))
    extras = [*lost, *_state(table, main)]
    extras += _zero.moments(table, save, carries) if save else _unread(main, here.optims)
    said = _said(_module(main), save, master, bool(here.optims and not here.experts))
    return table.catalog("deepspeed", path, [*files, *more], extras, {"notes": (said,)})


def _own(table: Table, here: Folder, main: File, first: int) -> tuple[list[str], list[Extra]]:
    """What the model's file and the experts' have, in the dtype of the computation."""
    for name, ref in _module(main).items():
        table.whole(Entry(name, ref.dtype, ref.shape, (name,)), ref, main)
    return _experts(table, here.path, main, here.experts, first), []


def _masters(
    table: Table, here: Folder, main: File, save: _zero.Save | None, strict: bool
) -> tuple[list[str], list[Extra]]:
    """Master weights of what is trained; of stage 3 also the parts of what is not, which all files of the model have."""
    if save is None:
        raise CheckpointError(
            f"{here.path} has no fp32 master weights that have names: no optimizer files of ZeRO lie beside {here.models[0]}. "
            "Leave source.weights out."
        )
    held, more = _zero.masters(save), []
    if here.third and main.tree.get("frozen_param_shapes"):
        more, first = here.models[1:], 1 + len(here.optims)
        if len(here.models) != len(save.shards):
            raise CheckpointError(
                f"{save.where}: {len(here.models)} files of the model, and the save was of {len(save.shards)} ranks, each with "
                "parts of frozen weights. Fetch the missing ones."
            )
        held |= _zero.frozen([main, *(opened(here.path, name, first + k) for k, name in enumerate(more))])
    return more, list(_named(table, main, held, strict))


def _named(table: Table, main: File, held: Mapping[str, _zero.Part], strict: bool) -> Iterator[Extra]:
    """Every name of the model: master weights where there are any, what is not trained from the model's file."""
    module = _module(main)
    aliases = _aliases(main, module, held)
    buffers = main.tree.get("buffer_names") or ()
    for name in [*module, *(n for n in held if n not in module)]:
        part = held.get(aliases.get(name, name))
        if part is not None:
            if name in module and module[name].shape != part.shape and 0 not in module[name].shape:
                raise CheckpointError(
                    f"{main.path}: {name!r} is {list(module[name].shape)}, param_shapes say {list(part.shape)}. It is damaged."
                )
            table.runs(Entry(name, part.dtype, part.shape, (name,)), part.lo, part.hi, part.file, part.address)
        elif 0 not in module[name].shape or name in buffers:
            table.whole(Entry(name, module[name].dtype, module[name].shape, (name,)), module[name], main)
        elif strict:
            raise CheckpointError(
                f"{main.path}: {name!r} has no values: it is neither trained, nor frozen, nor a buffer, nor said to be another "
                "name of one (shared_params, which older files lack). Leave it out with unmatched=drop."
            )
        else:
            yield Extra(name, (name,), "weight", None)


def _aliases(main: File, module: Mapping[str, inert.TensorRef], held: Mapping[str, Any]) -> dict[str, str]:
    """Second names of trained parameters, as listed, or as the same elements of one storage (older files list none)."""
    said = main.tree.get("shared_params")
    place = {(r.storage.key, r.offset, r.shape): n for n, r in module.items() if n in held and 0 not in r.shape}
    same = {n: place.get((r.storage.key, r.offset, r.shape), n) for n, r in module.items() if n not in held}
    return {**same, **({str(k): str(v) for k, v in said.items()} if isinstance(said, Mapping) else {})}


def _layers(path: Path) -> dict[int, str]:
    """The files of a pipeline's layers, by their place in its list of layers, if it is one."""
    found = sorted((int(m[1]), int(m[2] or 0), m[0]) for p in path.iterdir() if (m := LAYER.fullmatch(p.name)))
    if more := [name for _, t, name in found if t]:
        raise CheckpointError(
            f"{path} is of several tensor-parallel ranks ({more[0]}), and the files do not say along which dims tensors are "
            "divided. Those of Megatron-DeepSpeed are read with source.format=megatron_deepspeed."
        )
    return {number: name for number, _, name in found}


def _pipeline(path: Path, layers: Mapping[int, str], options: Mapping[str, Any]) -> Catalog:
    """The weights of a pipeline's layers, which its engine calls `3.weight` if item 3 of its list of layers has them."""
    stages = sorted(p.name for p in path.iterdir() if MODEL.fullmatch(p.name))
    if not stages or options.get("weights") == "master" or options.get("universal"):
        raise CheckpointError(
            f"{path} is a pipeline's checkpoint, of which the model's own weights are read, and mp_rank_00_model_states.pt "
            f"({len(stages)} of {max(len(stages), 1)} such files are there). Leave source.weights and target.universal out, or "
            "make it universal with DeepSpeed's ds_to_universal, which is read."
        )
    table = Table()
    for k, (number, name) in enumerate(layers.items()):
        file = opened(path, name, k)
        for place, ref in pt.walk(file.tree):
            label = ".".join(map(str, (number, *place)))
            if isinstance(ref, inert.TensorRef):
                table.whole(Entry(label, ref.dtype, ref.shape, (label,)), ref, file)
    mains = [opened(path, name, len(layers) + k) for k, name in enumerate(stages)]
    _all_layers(path, table, mains)
    optims = [p.name for p in path.iterdir() if OPTIM.fullmatch(p.name)]
    dtypes = ", ".join(sorted({e.dtype for e in table.entries.values()}))
    said = f"weights: the model's own ({dtypes}), of a pipeline of {len(stages)} stages; names begin with the place of a layer"
    extras = [*_state(table, mains[0]), *_unread(mains[0], optims)]
    return table.catalog("deepspeed", path, [*layers.values(), *stages], extras, {"notes": (said,)})


def _all_layers(path: Path, table: Table, mains: Sequence[File]) -> None:
    """What is trained is listed by each stage; tied weights under a name of their own."""
    groups = [group for main in mains for group in main.tree.get("param_shapes") or () if isinstance(group, Mapping)]
    for name in (str(n) for group in groups for n in group):
        number, _, _ = name.partition(".")
        if number.isdecimal() and name not in table.entries:
            raise CheckpointError(
                f"{path}: {name!r} is trained and in no file: layer_{int(number):02d}-model_states.pt is missing or of another run."
            )


def _refuse_experts(here: Folder, needed: bool) -> None:
    if here.experts and needed:
        raise CheckpointError(
            f"{here.path} is of a mixture of experts ({len(here.experts)} files such as {here.experts[0]}), of which the "
            "optimizer's files are not read: only the model's own weights are, without source.weights=master and keep=optimizer."
        )


def _experts(table: Table, path: Path, main: File, names: list[str], first: int) -> list[str]:
    """Experts lie in a file each, under names with their numbers in the whole model; those of all of a layer are there."""
    layers: dict[str | None, set[int]] = {}
    for k, name in enumerate(names):
        layer, expert = EXPERT.fullmatch(name).groups()  # type: ignore[union-attr]
        layers.setdefault(layer, set()).add(int(expert))
        file = opened(path, name, first + k)
        for label, ref in file.tree.items():
            if not isinstance(ref, inert.TensorRef):
                raise CheckpointError(f"{file.path}: {label!r:.60} is no tensor, as all of an expert's file are.")
            table.whole(Entry(str(label), ref.dtype, ref.shape, (str(label),)), ref, file)
    said = main.tree.get("num_experts")
    counts = said if isinstance(said, (list, tuple)) and len(said) == len(layers) else [0] * len(layers)
    for (layer, found), many in zip(sorted(layers.items(), key=lambda row: int(row[0] or 0)), counts, strict=True):
        lost = _first_lost(found)
        if lost < max(found) or (type(many) is int and lost < many):
            raise CheckpointError(f"{path}: expert {lost} of layer {layer or 0} is missing. Fetch its file.")
    return names


def _said(module: Mapping[str, inert.TensorRef], save: _zero.Save | None, master: bool, more: bool) -> str:
    if master and save:
        ranks = f"{len(save.shards)} rank" + "s" * (len(save.shards) > 1)
        only = ", which are all that this stage stores" if save.stage == 3 else ""
        return f"weights: the fp32 master weights of {ranks}, ZeRO stage {save.stage}{only}"
    dtypes = ", ".join(sorted({r.dtype for r in module.values()}))
    return f"weights: the model's own ({dtypes})" + ("; source.weights=master takes the optimizer's" if more else "")


# ---- which files there are


def _models(path: Path) -> list[str]:
    """The files of the model in a universal checkpoint: one that says all, or those of all ranks of stage 3."""
    found = sorted((int(m[1] or -1), m[0]) for p in path.iterdir() if (m := MODEL.fullmatch(p.name)))
    if not found:
        raise CheckpointError(f"{path} holds no file of the model (mp_rank_00_model_states.pt). Fetch it.")
    return [n for rank, n in found if rank >= 0] if found[0][0] >= 0 else [found[0][1]]


def _folder(path: Path) -> Folder:
    """The files of models and optimizers, by data-parallel rank; what is not read is refused by name."""
    names = [p.name for p in path.iterdir()]
    _refuse(path, names)
    models = sorted((int(m[1] or -1), m[0]) for n in names if (m := MODEL.fullmatch(n)))
    optims = sorted((int(m[1]), m[0]) for n in names if (m := OPTIM.fullmatch(n)))
    if not models:
        raise CheckpointError(
            f"{path} holds {optims[0][1]} and no file of the model (mp_rank_00_model_states.pt). Fetch it."
        )
    kinds = {rank < 0 for rank, _ in models}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{path} mixes {models[0][1]} and {models[-1][1]}: files of ZeRO stage 3 and of another stage. Move those of one away."
        )
    for what in (models, optims):
        lost = _first_lost({r for r, _ in what} - {-1})
        if here := next((n for r, n in what if r > lost), None):
            wanted = re.sub(r"pp_rank_\d+", f"pp_rank_{lost}", here)
            raise CheckpointError(f"{path}: the shard of rank {lost} is missing ({wanted}). Fetch it again.")
        if len({r for r, _ in what}) < len(what):
            raise CheckpointError(
                f"{path} holds two files of one rank: {what[0][1]} and {what[1][1]}. Move one run's away."
            )
    experts = sorted(n for n in names if EXPERT.fullmatch(n))
    return Folder(path, [n for _, n in models], [n for _, n in optims], experts)


def _first_lost(found: Collection[int]) -> int:
    """The first number that is not there: `_first_lost({0, 1, 9})` is 2; names of files may have any."""
    return next(n for n in count() if n not in found)


def _refuse(path: Path, names: Sequence[str]) -> None:
    """Checkpoints of which the names of files say already that they are not read."""
    found = sorted({m[2] for n in names if (m := MODEL.fullmatch(n) or OPTIM.fullmatch(n))})
    if len(found) > 1:
        raise CheckpointError(
            f"{path} is of {len(found)} model-parallel ranks (mp_rank_{found[0]} to {found[-1]}); the files do not say along which "
            "dims tensors are divided. Make it universal with DeepSpeed's ds_to_universal, which is read."
        )


# ---- the model's file


def _module(main: File) -> dict[str, inert.TensorRef]:
    module = main.tree.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{main.path} holds no model: a dict under the key module is expected.")
    return {".".join(map(str, p)): leaf for p, leaf in pt.walk(module) if isinstance(leaf, inert.TensorRef)}


def _state(table: Table, main: File) -> Iterator[Extra]:
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


def _unread(main: File, optims: Sequence[str]) -> Iterator[Extra]:
    if optims or main.tree.get("optimizer") is not None:
        yield Extra("optimizer", ("optimizer",), "optimizer", inert.Record())


# ---- writing


def lay_out(spec: Spec) -> Layout:
    """A universal checkpoint, which an engine of any world size and ZeRO stage loads."""
    if not spec.options.get("universal"):
        raise UsageError(
            "target.format=deepspeed: what is written is a universal checkpoint, for engines of any world size and ZeRO stage; "
            'say so with target.universal=true. They load it with "checkpoint": {"load_universal": true} in their config.'
        )
    return _universal.lay_out(spec)
