"""NeMo 1's own files: `NAME.ckpt`, alone, in `mp_rank_TT/` or in `tp_rank_TT_pp_rank_PPP/`.

Facts: NeMo 1.x, from source. A file is Lightning's dict, with the model under `state_dict`, or under `model0`, `model1`, ...
with virtual stages; names are Megatron's, old or new, after `model.`. A checkpoint is one NAME in the folders of all ranks;
the first rank's file stands for it. Distributed checkpoints of NeMo are `torch_dist` and `zarr`.

Invariant: the files of all ranks are there and of one step. What is averaged keeps each rank's names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import inert
from ckpt_dist.formats import Layout, Spec, megatron, torch_dist
from ckpt_dist.formats import torch as pt
from ckpt_dist.ranks import Rank

ENDING, WEIGHTS = ".ckpt", "model_weights.ckpt"  # the second is what `.nemo` archives have
NAMED = re.compile(r"-step=0*(\d+)(?!\d)")  # in names such as gpt--val_loss=2.35-step=1000-consumed_samples=256000.0
PASSED = re.compile(r"-(last|unfinished|EMA)$|-averaged")  # copies, marks of saves, results
RANK = re.compile(r"mp_rank_(\d\d)|tp_rank_(\d\d)_pp_rank_(\d\d\d)")
MODEL = re.compile(r"model\d+")
HELD = re.compile(
    rf"(?:(?P<rank>{RANK.pattern})\.)?(?P<model>state_dict|model\d+)\.(?P<key>.+)"
)  # as it is: mp_rank_00.state_dict.model.NAME
KNOWN = re.compile(r"\b(language_model|decoder\.layers)\.")


def passed(path: Path) -> bool:
    """Whether a name is that of a copy or a result, or has the mark of a save that did not end beside it."""
    name = path.name.removesuffix(ENDING)
    folder = path.parent.parent if RANK.fullmatch(path.parent.name) else path.parent
    return PASSED.search(name) is not None or (folder / f"{name}-unfinished").exists()


def files(folder: Path) -> list[Path]:
    """The checkpoints of a folder that are files: its own, or those of any rank, as the first rank calls them.

    One that the first rank lacks is among them, so that it is missed and not left out.
    """
    ranks = [folder / f for f in _folders(folder)] or [folder]
    names = {p.name for rank in ranks for p in rank.glob("*" + ENDING) if p.is_file()}
    return sorted(p for p in (ranks[0] / name for name in names) if not passed(p))


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if RANK.fullmatch(p.name) and any(p.glob("*" + ENDING)))


def claims(path: Path) -> bool:
    if path.is_dir():
        found = files(path)
        return len(found) == 1 and (bool(_folders(path)) or _of_nemo(found[0]))
    return path.suffix == ENDING and path.is_file() and (bool(RANK.fullmatch(path.parent.name)) or _of_nemo(path))


def _of_nemo(path: Path) -> bool:
    try:
        tree, _ = pt.open_archive(path)
    except CheckpointError:
        return False
    return isinstance(tree, Mapping) and any(KNOWN.search(str(k)) for part in _state(tree).values() for k in part)


def _state(tree: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The model's dicts by their key: `state_dict` or, of virtual stages, `model0`, `model1`; a bare one is of `.nemo`."""
    chunks = {k: v for k, v in tree.items() if MODEL.fullmatch(str(k)) and isinstance(v, Mapping)}
    state = tree.get("state_dict", tree)
    return chunks or {"state_dict": state if isinstance(state, Mapping) else {}}


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickles of all ranks: whole tensors; or, to be averaged, each rank's own (`as_is`)."""
    path = files(path)[0] if path.is_dir() else path
    root = path.parent.parent if RANK.fullmatch(path.parent.name) else path.parent
    names = [f"{f}/{path.name}" for f in _folders(root)] if root != path.parent else [path.name]
    lost = next((n for n in names if not (root / n).is_file()), None)
    if lost:
        raise CheckpointError(f"{root / lost} is missing: other ranks have a file of that name. Fetch it.")
    opened = [pt.open_archive(root / n) for n in names]
    if options.get("as_is"):
        return _as_is(root, names, opened)
    return assembled(root, names, opened, torch_dist.settings_beside(root), options.get("replica"))


def assembled(
    root: Path, names: Sequence[str], opened: Sequence[tuple[Any, Any]], args: Mapping[str, Any], replica: Any = 0
) -> Catalog:
    """Whole tensors from the files of all ranks."""
    ranks = _ranks(root, [Path(n).parent.name for n in names])
    trees = [_as_megatron(root / n, tree) for n, (tree, _) in zip(names, opened, strict=True)]
    megatron.same_save(root, names, trees)
    both = [(tree, storages) for tree, (_, storages) in zip(trees, opened, strict=True)]
    return replace(megatron.assembled(root, names, both, ranks, args, None, replica), format="nemo")


def _as_megatron(where: Path, tree: Any) -> dict[str, Any]:
    """Lightning's dict with Megatron's keys. The rows of a fused QKV are in the order of Megatron's version 2 and later."""
    state = _state(tree) if isinstance(tree, Mapping) else {}
    if not any(state.values()):
        raise CheckpointError(f"{where} holds no model: a dict with the key state_dict (or model0) is expected.")
    rest = {k: v for k, v in tree.items() if k in ("optimizer_states", "lr_schedulers")}
    models = {"model" if k == "state_dict" else k: v for k, v in state.items()}
    return {
        **rest,
        **models,
        "iteration": tree.get("global_step"),
        "checkpoint_version": tree.get("checkpoint_version", 3.0),
    }


def _ranks(root: Path, folders: Sequence[str]) -> list[Rank]:
    """The rank of each folder; all of them are there."""
    found = [RANK.fullmatch(f) for f in folders]
    places = [(int(m[1] or m[2]), int(m[3] or 0)) if m else (0, 0) for m in found]
    tp, pp = (1 + max(p[k] for p in places) for k in (0, 1))
    lost = [(t, p) for t in range(tp) for p in range(pp) if (t, p) not in places]
    if lost or len(set(places)) < len(places):
        what = f"tensor rank {lost[0][0]} of stage {lost[0][1]}" if lost else "one rank alone"
        raise CheckpointError(
            f"{root}: folders {', '.join(folders)} lack {what} of {tp} x {pp} ranks. Fetch the checkpoint again."
        )
    return [Rank(t, p, 0, tp, pp, 1) for t, p in places]


def _as_is(root: Path, names: Sequence[str], opened: Sequence[tuple[Any, Any]]) -> Catalog:
    """Each rank's tensors under their own names, after that of the rank's folder."""
    _ranks(root, [Path(n).parent.name for n in names])
    entries, refs, extras = [], [], []
    for number, (name, (tree, storages)) in enumerate(zip(names, opened, strict=True)):
        for place, leaf in _leaves(tree):
            label = ".".join([*Path(name).parts[:-1], *place])
            if not isinstance(leaf, inert.TensorRef) or megatron.STATE in label:
                extras.append(Extra(label, (label,), "state", inert.Record()))
                continue
            entries.append(Entry(label, leaf.dtype, leaf.shape, (label,)))
            refs.append((leaf, number, pt.storage_record(storages, leaf, f"{root / name}: {label}")))
    return Catalog("nemo", str(root), tuple(names), tuple(entries), pt.chunks(entries, refs), tuple(extras))


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, str], Any]]:
    state = _state(tree) if isinstance(tree, Mapping) else {}
    for key, part in state.items():
        for place, leaf in pt.walk(part):
            yield (key, ".".join(map(str, place))), leaf


def lay_out(spec: Spec) -> Layout:
    """`{"state_dict": {...}}` in a file for each rank that the source has."""
    found = [HELD.fullmatch(e.name) for e in spec.entries]
    if None in found:
        raise UsageError(
            "target.format=nemo: NeMo 1's files are written for averages of such files only. For a run of NeMo write "
            "target.format=torch_dist with target.key=module (NeMo 2) or target.key=model (NeMo 1)."
        )
    name = Path(str(spec.options["path"])).name + ENDING
    parts = [(m["rank"] or "", m["model"], m["key"]) for m in found if m]
    folders = list(dict.fromkeys(folder for folder, *_ in parts))
    groups = [[k for k, part in enumerate(parts) if part[0] == folder] for folder in folders]
    entries = tuple(replace(e, path=part[1:]) for e, part in zip(spec.entries, parts, strict=True))
    empty = (
        () if any(key == "state_dict" for _, key, _ in parts) else (Extra("state_dict", ("state_dict",), "state", {}),)
    )
    names = [str(Path(folder) / name) for folder in folders]
    layout = pt.lay_out_files(replace(spec, entries=entries, extras=()), names, groups, empty)
    return replace(layout, catalog=replace(layout.catalog, format="nemo"))
