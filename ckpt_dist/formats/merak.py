"""Merak's checkpoints: `release/` or `iter_NNNNNNN/`, with `mp_rank_TT[_pp_rank_PPP]/partial_model_optim.pt` or `model_optim.pt`.

Facts: Merak 1.1 to 2.2.2; files compared with its own converter's, and loaded by its trainer. A rank's tensors become
boxes of whole ones, under transformers' names (one tensor-parallel rank) or those of the dialect `merak` (several).

Invariant: the files of all ranks are there and of one save, or the first that is not is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ckpt_dist import megatron, merak
from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import inert
from ckpt_dist.files.inert import strides_of
from ckpt_dist.files.zips import Record
from ckpt_dist.formats import Layout, Spec, _flat, _merak_zero
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats.megatron import Held, rank_files, together
from ckpt_dist.formats.torch_dist import args_of
from ckpt_dist.ranks import Cut, Part, Piece, Piecewise, Rank

FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_pp_rank_(\d{3,}))?")
WHOLE, PART = "model_optim.pt", "partial_model_optim.pt"
LORA = "lora_"  # in front of the name of a file that holds an adapter alone, as a flat dict
FACTS = "ckpt_dist"  # a plain dict in each file: what no other tool asks for, and every reader needs


def claims(path: Path) -> bool:
    if path.is_file():
        return path.name in (WHOLE, LORA + WHOLE)
    return path.is_dir() and (_there(path, WHOLE) is not None or any(_there(p, PART) for p in _folders(path)))


def _there(folder: Path, name: str) -> str | None:
    """A rank's file in its folder: the model's, else an adapter's."""
    return next((n for n in (name, LORA + name) if (folder / n).is_file()), None)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if FOLDER.fullmatch(p.name) and p.is_dir())


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickles of all ranks; each rank's tensors become boxes of the whole ones."""
    path = path.parent if path.is_file() else path
    found = _ranks(path)
    alone = found[0].tp * found[0].pp == 1
    files = [f"{_folder(rank)}{_there(path / _folder(rank), WHOLE if alone else PART)}" for rank in found]
    opened = [pt.open_archive(path / f) for f in files]
    opened = [
        ({"model": t} if LORA in f and isinstance(t, Mapping) else t, s)
        for f, (t, s) in zip(files, opened, strict=True)
    ]
    _same_save(path, files, [tree for tree, _ in opened])
    facts = _facts(opened[0][0])
    parts, master = list[Held](), options.get("weights") == "master"
    for number, (rank, (tree, storages)) in enumerate(zip(found, opened, strict=True)):
        more = _merak_zero.opened(path, rank, len(files)) if master else []
        files += [file.path.name for file in more]
        runs = _merak_zero.masters(more, facts.get("zero_reduce_bucket_size")) if more else {}
        parts += _parts(path / files[number], tree["model"], rank, facts, runs, number, storages)
    entries, table = together(path, files, parts)
    if LORA not in files[0]:
        _whole(path, [e.name for e in entries], found[0].pp)
    zero = [Extra(p.name, (p.name,), "optimizer", inert.Record()) for p in path.iterdir()
            if _merak_zero.NAME.fullmatch(p.name)]  # fmt: skip
    extras = (*{x.name: x for tree, _ in reversed(opened) for x in _extras(tree)}.values(), *zero)
    about: dict[str, Any] = {"tp": found[0].tp, "pp": found[0].pp, "padded": found[0].tp > 1}
    if master:
        about["notes"] = (f"weights: the fp32 master weights of ZeRO stage 1, {len(files) - len(found)} files",)
    args = args_of(opened[0][0])
    config = args if megatron.is_args(args) else {}
    return Catalog("merak", str(path), tuple(files), entries, table, extras, config, about=about)


def _ranks(path: Path) -> list[Rank]:
    """The ranks that wrote, by the names of their folders."""
    names = [p.name for p in _folders(path)]
    kinds = [[whole]] if (whole := _there(path, WHOLE)) else []
    kinds += [some for staged in (False, True) if (some := [n for n in names if ("_pp_" in n) == staged])]
    if len(kinds) > 1:
        raise CheckpointError(
            f"{path} holds files of several saves: {' and '.join(k[0] for k in kinds)} are of other numbers of ranks. "
            "Move all but one of them to a folder of its own."
        )
    if whole:
        return [Rank(0, 0, 0, 1, 1, 1)]
    places = [tuple(int(n or 0) for n in FOLDER.fullmatch(name).groups()) for name in names]  # type: ignore[union-attr]
    tp, pp = (1 + max(p[k] for p in places) for k in range(2))
    pp = max(pp, 2) if "_pp_" in names[0] else pp  # a run of one stage has no numbers of stages in its names
    all_ranks = (
        Rank(t, p, 0, tp, pp, 1) for p in range(pp) for t in range(tp)
    )  # as many as names say, or till one lacks
    found = []
    for rank in all_ranks:
        if not _there(path / _folder(rank), PART):
            lost = tp * pp - sum(bool(_there(path / name, PART)) for name in names)
            raise CheckpointError(
                f"{path}/{_folder(rank)}{PART} is missing: the run had {tp} x {pp} tensor and pipeline ranks, the files of "
                f"{lost} of them are not there. Fetch them."
            )
        found.append(rank)
    return found


def _same_save(path: Path, files: Sequence[str], trees: Sequence[Any]) -> None:
    for file, tree in zip(files, trees, strict=True):
        if not isinstance(tree, Mapping) or not isinstance(tree.get("model"), Mapping):
            raise CheckpointError(f"{path / file} holds no model: a dict with the key model is expected.")
        if odd := next((repr(name) for name in tree["model"] if not isinstance(name, str)), None):
            raise CheckpointError(f"{path / file} is damaged: {odd:.60} is no name of a tensor.")
        if tree.get("iteration") != trees[0].get("iteration"):
            raise CheckpointError(
                f"{path / file} is of iteration {tree.get('iteration')}, {files[0]} of {trees[0].get('iteration')}. "
                "The files are of two saves; fetch the checkpoint again."
            )


def _facts(tree: Mapping[str, Any]) -> dict[str, Any]:
    own = tree.get(FACTS)
    return {**args_of(tree), **(own if isinstance(own, dict) else {})}


def _state(model: Mapping[str, Any]) -> Iterator[tuple[str, str, inert.TensorRef]]:
    """The tensors of a rank without the numbers of their modules, and as stored; not what is there twice."""
    for stored, ref in model.items():
        name = merak.NUMBER.sub("", stored, count=1) if merak.NUMBER.match(stored) else stored
        if isinstance(ref, inert.TensorRef) and not _ignored(name):
            yield name, stored, ref


def _ignored(name: str) -> str | None:
    return next((what for what, form in merak.IGNORED.items() if form.fullmatch(name)), None)


def _extras(tree: Mapping[str, Any]) -> Iterator[Extra]:
    """What is beside the model, and in it what no conversion needs."""
    for key, value in tree.items():
        if key not in ("model", FACTS):
            plain = isinstance(value, (int, float, str))
            role = "optimizer" if key == "optimizer" else "state"
            yield Extra(str(key), (key,), role, value if plain else inert.Record())
    for stored in tree["model"]:
        what = _ignored(merak.NUMBER.sub("", stored, count=1) if merak.NUMBER.match(stored) else stored)
        if what:
            yield Extra(stored, (stored,), what, inert.Record())


def _whole(path: Path, names: Sequence[str], pp: int) -> None:
    """No file says how many stages there were: the first and the last tensors are there, and all layers."""
    if what := _lost(names, pp):
        raise CheckpointError(f"{path} lacks {what}. Is the folder of a stage missing? Fetch it.")


def _lost(names: Sequence[str], pp: int) -> str:
    """What a model lacks, by the numbers in its names."""
    found = merak.modules(names)
    there = set(found.number.values())
    lost = next(n for n in count() if n not in there)
    ends = found.count - 1 in there or pp == 1  # some models end with a layer
    if found.layers and (lost < found.count - 1 or not ends):
        return f"layer {lost - found.front}" if ends else "what comes after the layers"
    return ""


def _parts(
    where: Path,
    model: Mapping[str, Any],
    rank: Rank,
    facts: Mapping[str, Any],
    runs: Mapping[str, Sequence[_flat.Run]],
    number: int,
    storages: Mapping[str, Record],
) -> Iterator[Held]:
    """What a rank's tensors are of the whole ones; of those that are in `runs` the master weights, with their files."""
    listed = _merak_zero.aliases(model, runs)
    if lost := set(runs) - set(listed.values()):
        raise CheckpointError(f"{where} lacks {min(lost)!r}, which is trained. The files are of two runs.")
    for name, stored, ref in _state(model):
        if of := runs.get(listed[stored]):
            yield from _flat.boxes(where, _held(name, _flat.dense(ref, stored), rank, facts), of)
        elif (part := _held(name, ref, rank, facts)).pieces:
            yield part, number, storages


def _held(name: str, ref: inert.TensorRef, rank: Rank, facts: Mapping[str, Any]) -> Part:
    """The boxes of the whole tensor that a rank's holds; none where the first rank has all."""
    cut = _cut(name, rank.tp, facts.get("parallel_vocab") is not False).checked(name, ref)
    shape, pieces = cut.whole(ref.shape), list(cut.pieces(ref.shape, ref.stride, rank.t))
    if _of_vocabulary(name):
        words = (facts.get(k) for k in ("orig_vocab_size", "padded_vocab_size", "vocab_size"))
        said = next((n for n in words if type(n) is int and n > 0), shape[0])
        shape = (min(shape[0], said), *shape[1:])
        pieces = [([lo[0], *lo[1:]], [min(hi[0], shape[0]), *hi[1:]], at, steps) for lo, hi, at, steps in pieces
                  if lo[0] < shape[0]]  # fmt: skip
    return Part(name, ref.dtype, shape, pieces if cut.dim is not None or rank.t == 0 else [], ref)


def _of_vocabulary(name: str) -> bool:
    return name == merak.HEAD or bool(merak.EMBEDDING.fullmatch(name))


def _cut(name: str, tp: int, shared: bool) -> Cut:
    """How ranks divide a tensor; whether they share the vocabulary is a choice of the run."""
    dim, fused = merak.divided(name)
    return Cut(dim, tp, fused) if dim is not None and (shared or not _of_vocabulary(name)) else Cut()


# ---- from the whole to ranks


def lay_out(spec: Spec) -> Layout:
    """A file for each (tensor, pipeline) rank, as Merak's loader expects it under the same partition."""
    o = spec.options
    tp, pp = int(o.get("tp") or 1), int(o.get("pp") or 1)
    release, shared = o.get("release") is not False, o.get("embedding") != "whole"
    _refuse(spec, tp)
    if what := _lost([e.name for e in spec.entries], 1):
        raise UsageError(
            f"target.format=merak: by the numbers in its names the model lacks {what}, so nobody could tell what is written from "
            "a part of it. Use another target.format."
        )
    found = merak.modules([e.name for e in spec.entries])
    stages = merak.bounds(found, pp, str(o.get("partition_method") or "uniform"), o.get("partition"))
    step = 0 if release else int(o.get("step") or 1)
    top = "release" if release and tp * pp > 1 else merak.STEPS.format(step) + (merak.ALONE if tp * pp == 1 else "")
    all_ranks = [Rank(t, p, 0, tp, pp, 1) for p in range(pp) for t in range(tp)]
    names = [f"{top}/{_folder(rank)}{PART if tp * pp > 1 else WHOLE}" for rank in all_ranks]
    tied = merak.HEAD not in found.number and not o.get("untied")  # a model of classes may have no head at all
    each = [list(_holds(spec.entries, rank, found, stages, shared, tied)) for rank in all_ranks]
    rows = max((e.shape[0] for e in spec.entries if _of_vocabulary(e.name)), default=0)
    facts = {"orig_vocab_size": rows, "parallel_vocab": shared and tp > 1}
    common = {"checkpoint_version": 3.0, "iteration": step, FACTS: facts, **_args(spec, release)}
    extras = tuple(Extra(key, (key,), "state", value) for key, value in common.items())
    return rank_files(spec, "merak", names, each, extras, "release" if release else str(step))


def _args(spec: Spec, release: bool) -> dict[str, Any]:
    """Those of the source, where it has any; a release begins to train with the first sample."""
    if spec.source is None or not megatron.is_args(spec.source.config):
        return {}
    fresh = dict(consumed_train_samples=0, consumed_valid_samples=0) if release else {}
    return {"args": inert.Namespace({**spec.options["args"], **fresh})}


def _refuse(spec: Spec, tp: int) -> None:
    args = spec.options.get("args") or {}
    heads = megatron.heads(args)[0] if megatron.is_args(args) else tp
    if heads % tp:
        raise UsageError(
            f"target.tp={tp}: {heads} attention heads cannot be divided by {tp} ranks. Choose another one."
        )
    if tp > 1 and not any("_linear." in e.name for e in spec.entries):
        raise UsageError(
            f"target.tp={tp}: which layers of this model Merak divides is not known, since its family is not. Give the "
            "family with model=FAMILY, or leave target.tp out."
        )


def _holds(
    entries: Sequence[Entry], rank: Rank, found: merak.Modules, stages: Sequence[int], shared: bool, tied: bool
) -> Iterator[Piecewise]:
    """All tensors of one rank, module by module. A tied head is a copy of the embedding, in the last module."""
    made = [(found.number[e.name], e.name, k) for k, e in enumerate(entries)]
    if tied:
        made += [(found.count - 1, merak.HEAD, k) for k, e in enumerate(entries) if merak.EMBEDDING.fullmatch(e.name)]
    for module, name, k in sorted(made, key=lambda one: one[0]):
        if stages[rank.p] <= module < stages[rank.p + 1]:
            yield _one(("model", f"module.{module}.{name}"), k, entries[k], _cut(name, rank.tp, shared), rank)


def _one(path: tuple[str, str], number: int, entry: Entry, cut: Cut, rank: Rank) -> Piecewise:
    """One tensor of a rank. Rows that a vocabulary lacks to be shared are its last row, again and again."""
    have = entry.shape[0] if entry.shape else 0
    if not (cut.dim is not None and _of_vocabulary(entry.name)):
        shape = cut.part(entry.shape, entry.name)
        return Piecewise(path, number, shape, list(cut.pieces(shape, strides_of(shape), rank.t)))
    rows = merak.padded(have, rank.tp) // rank.tp
    shape, first = (rows, *entry.shape[1:]), rank.t * rows
    zeros, rest, steps = [0] * (len(shape) - 1), list(shape[1:]), strides_of(shape)
    pieces: list[Piece] = []
    apart = have - (rows * rank.tp > have)  # a row that is there again is a box of its own, equal to its copies
    if first < apart:
        pieces.append(([first, *zeros], [min(first + rows, apart), *rest], 0, steps))
    for row in range(max(apart - first, 0), rows):
        pieces.append(([have - 1, *zeros], [have, *rest], row * steps[0], steps))
    return Piecewise(path, number, shape, pieces)


def _folder(rank: Rank) -> str:
    """`mp_rank_00_pp_rank_003/`; without stages `mp_rank_00/`, and nothing for a rank that is alone."""
    stage = f"_pp_rank_{rank.p:03d}" if rank.pp > 1 else ""
    return f"mp_rank_{rank.t:02d}{stage}/" if rank.tp * rank.pp > 1 else ""
