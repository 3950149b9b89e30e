"""Merak's ZeRO stage 1: the fp32 master weights of a (tensor, pipeline) rank in the files of its data-parallel ranks.

    zero_dp_rank_D[_mp_rank_TT][_pp_rank_PPP]_opt_states.pt

Facts: Merak 2.2.2. Parameters of a group lie end to end, in an order that each file lists under the rank's own names. That
line is cut into slices of one length, which ranks take in turn; a tied weight is listed as `tied_modules.SHAPE.weight`,
which shares its storage with the embedding in the model's file.

Invariant: a weight is its runs in these slices, as boxes of the whole one; one that is not whole is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import zero
from ckpt_dist.box import ints
from ckpt_dist.errors import CheckpointError, shown
from ckpt_dist.files import inert
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats._flat import Run
from ckpt_dist.formats._table import File, Slice, flat
from ckpt_dist.ranks import Rank

NAME = re.compile(r"zero_dp_rank_(\d+)(?:_mp_rank_(\d+))?(?:_pp_rank_(\d+))?_opt_states\.pt")
FRONT = re.compile(r"^(module\.)?(\d+\.)?")
MASTERS = "local_sub_partitions_of_fp32_groups"


def files(path: Path, rank: Rank) -> list[str]:
    """Those of one rank, in the order of its data-parallel ranks; a gap is refused."""
    found = {}
    for hit in (NAME.fullmatch(p.name) for p in path.iterdir()):
        if hit and (int(hit[2] or 0), int(hit[3] or 0)) == (rank.t, rank.p):
            found[int(hit[1])] = hit[0]
    lost = next((d for d in range(len(found)) if d not in found), None)
    if lost is not None or not found:
        raise CheckpointError(
            f"{path}: {len(found)} files of the optimizer of tensor rank {rank.t}, stage {rank.p} (zero_dp_rank_*), without that of "
            f"data-parallel rank {lost or 0}. Master weights are in these of ZeRO stage 1. Fetch it, or leave source.weights out."
        )
    return [found[d] for d in range(len(found))]


def masters(opened: Sequence[File], bucket: Any = None) -> dict[str, list[Run]]:
    """What each parameter of a rank consists of, by its bare name; `bucket` is the run's zero_reduce_bucket_size."""
    groups = opened[0].tree.get("param_shapes")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) for g in groups):
        raise CheckpointError(f"{opened[0].path} does not say which parameters are trained (param_shapes).")
    found: dict[str, list[Run]] = {}
    for number, shapes in enumerate(groups):
        if odd := next((n for n, s in shapes.items() if not isinstance(n, str) or not inert.is_shape(s)), None):
            raise CheckpointError(f"{opened[0].path} is damaged: param_shapes has {shown(odd)}.")
        slices = _in_turn(opened, number, bucket)
        sizes = ints([prod(shape) for shape in shapes.values()])
        runs = zero.cut(np.cumsum(sizes) - sizes, sizes, [one.length for one in slices])
        if (lost := zero.short(sizes, runs)).any():
            worst = int(np.argmax(lost))
            raise CheckpointError(
                f"{opened[0].path.parent}: {int(lost[worst])} of {int(sizes[worst])} elements of {list(shapes)[worst]!r} are in no "
                f"file of the optimizer; {len(opened)} are there. Fetch the missing ones."
            )
        names = [bare(name) for name in shapes]
        for which, lo, hi, of, at in zip(
            *(c.tolist() for c in (runs.which, runs.lo, runs.hi, runs.slice, runs.at)), strict=True
        ):
            one = slices[of]
            address = one.address + at * itemsize(one.dtype)
            found.setdefault(names[which], []).append(Run(lo, hi, one.file, address, one.dtype))
    return found


def _in_turn(opened: Sequence[File], group: int, bucket: Any) -> list[Slice]:
    """The line of a group: of each interval the slice of each rank. An interval is as long as a bucket, or longer: where one
    more slice had room in a bucket of several, files of the last ranks are missing, and all that follows would be shifted."""
    each = [_slices(f, group) for f in opened]
    many, where = len(each[0]), opened[0].path.parent
    if odd := next((f for f, of in zip(opened, each, strict=True) if len(of) != many), None):
        raise CheckpointError(
            f"{odd.path} has {len(each[opened.index(odd)])} slices of group {group}, {opened[0].path.name} has {many}. The "
            "files are of two runs."
        )
    room = bucket if type(bucket) is int and many > 1 else 0
    if each[0] and (len(opened) + 1) * each[0][0].length <= room:
        raise CheckpointError(
            f"{where}: {len(opened)} files of the optimizer with slices of {each[0][0].length} elements do not fill a bucket of "
            f"{room} (zero_reduce_bucket_size): those of the last data-parallel ranks are missing. Fetch them."
        )
    return [one for turn in zip(*each, strict=True) for one in turn]


def _slices(file: File, group: int) -> list[Slice]:
    """A rank's slices of one group, of which it has one in each interval."""
    inner = file.tree.get("optimizer_state_dict")
    groups = inner.get(MASTERS) if isinstance(inner, Mapping) else None
    if not isinstance(groups, (list, tuple)) or group >= len(groups) or not isinstance(groups[group], (list, tuple)):
        raise CheckpointError(f"{file.path} holds no master weights of group {group} ({MASTERS}).")
    return [flat(file, ref, MASTERS) for ref in groups[group]]


def aliases(stored: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, str]:
    """What a tensor of the model's file is listed as: itself, or the tied module that has the same elements."""
    refs = {n: r for n, r in stored.items() if isinstance(r, inert.TensorRef)}
    place = {(r.storage.key, r.offset, r.shape): bare(n) for n, r in refs.items() if bare(n) in trained}
    return {n: place.get((r.storage.key, r.offset, r.shape), bare(n)) for n, r in refs.items()}


def bare(name: str) -> str:
    """A name without the engine around the model and the number of its module."""
    return FRONT.sub("", name)


def opened(path: Path, rank: Rank, first: int) -> list[File]:
    """The optimizer's files of one rank, numbered from `first`."""
    found = []
    for k, name in enumerate(files(path, rank)):
        tree, storages = pt.open_archive(path / name)
        if not isinstance(tree, Mapping):
            raise CheckpointError(f"{path / name} holds no dict. Was it written by Merak?")
        found.append(File(path / name, first + k, tree, storages))
    return found
