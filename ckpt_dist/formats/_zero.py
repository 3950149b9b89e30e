"""The optimizer's files of a ZeRO save: where master weights and moments of each parameter lie in them.

Invariant: what the files say themselves of their slices (lengths, mappings) agrees with where parameters are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ckpt_dist import zero
from ckpt_dist.box import Ints, ints
from ckpt_dist.errors import CheckpointError, shown
from ckpt_dist.files import inert
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats._save import FLAT, Line, Save, Shapes
from ckpt_dist.formats._table import File, Slice, flat

Pick = Callable[[Mapping[str, Any]], Sequence[Any]]  # out of a file, by group


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


def parts(s: Save, pick: Pick, what: str) -> dict[str, Part]:
    """Every trained parameter's value, of which `pick` takes each group's flat tensor out of a file."""
    if s.stage == 3:
        return _third(s, pick, what)
    found: dict[str, Part] = {}
    for line in s.lines:
        slices = [flat(f, dict(enumerate(pick(tree))).get(line.group), what) for f, tree in line.shards]
        for name, part in _on_line(s, line, slices, what).items():
            first = found.setdefault(name, part)  # of what several stages have (tied) the first one's
            if first.shape != part.shape:
                raise CheckpointError(
                    f"{s.where}: {name!r} is {list(first.shape)} in one stage, {list(part.shape)} in another. They are of two runs."
                )
    return found


def _on_line(s: Save, line: Line, slices: Sequence[Slice], what: str) -> dict[str, Part]:
    """What lies on one line, of which each rank has a slice."""
    world = len(slices)
    sizes = ints([prod(shape) for shape in line.shapes.values()])
    lengths = [t.length for t in slices]
    end = int((line.starts + sizes).max(initial=0))
    if -(-end // (2 * world)) != -(-sum(lengths) // (2 * world)):
        raise CheckpointError(
            f"{s.where}: {what}: the parameters need {end} elements, the slices of {world} ranks hold {sum(lengths)}, which is "
            "not what padding explains. The files are of two runs."
        )
    found = _placed(line.shapes, zero.cut(line.starts, sizes, lengths), slices, f"{s.where}: {what}")
    for file, tree in () if s.shuffled else line.shards:
        _mapped(file, tree.get("param_slice_mappings"), line, found)
    return found


def _third(s: Save, pick: Pick, what: str) -> dict[str, Part]:
    """Stage 3: each parameter cut by itself; a rank's parts lie end to end in as many tensors as there are."""
    world = len(s.shards)
    ranks = [[flat(f, ref, what) for ref in pick(tree)] for f, tree in s.shards]
    sizes = ints([prod(shape) for shape in s.names.values()])
    need, have = int((-(-sizes // world)).sum()), [sum(t.length for t in of) for of in ranks]
    if have != [need] * world:
        raise CheckpointError(
            f"{s.where}: {what}: the parameters need {need} elements on each of {world} ranks, the files hold {have}."
        )
    runs = zero.parts(sizes, world, [[t.length for t in of] for of in ranks])
    return _placed(s.names, runs, [t for of in ranks for t in of], f"{s.where}: {what}")


def masters(s: Save) -> dict[str, Part]:
    """The fp32 master weights of all that is trained."""
    key = FLAT[s.stage == 3]
    for line in s.lines:
        wide = {len(tree.get(key) or ()) for _, tree in line.shards}
        if len(wide) > 1:
            raise CheckpointError(f"{s.where}: the ranks have {sorted(wide)} flat groups. They are of two runs.")
        if s.stage != 3 and wide != {line.groups}:
            raise CheckpointError(
                f"{s.where}: {key} has {wide.pop()} groups, the model's file lists {line.groups}. They are of two runs."
            )
    return parts(s, lambda tree: tree.get(key) or (), key)


def _mapped(file: File, mappings: Any, line: Line, found: Mapping[str, Part]) -> None:
    """A rank's own table of what it holds, where there is one, says the same."""
    if not isinstance(mappings, (list, tuple)):
        return
    table = mappings[line.group] if line.group < len(mappings) else {}
    table = table if isinstance(table, Mapping) else {}
    said = {n: inert.state_of(record).get("numel") for n, record in table.items()}
    held = ((p.hi - p.lo)[p.file == file.number].sum() for p in found.values())
    have = {n: int(numel) for n, numel in zip(line.stored, held, strict=True)}
    wrong = [n for n in {**have, **said} if said.get(n, 0) != have.get(n, 0)]
    if wrong:
        raise CheckpointError(
            f"{file.path} says that it holds {said.get(wrong[0], 0)} elements of {shown(wrong[0])}; by the order of parameters in the "
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
            raise CheckpointError(f"{files[0].path} is damaged: {shown(name)} is of shape {shown(shape)}.")
        what = f"a part of the frozen {name!r}"
        fragments = [f.tree.get("frozen_param_fragments") for f in files]
        refs = [of.get(name) if isinstance(of, Mapping) else None for of in fragments]
        slices = [flat(f, ref, what) for f, ref in zip(files, refs, strict=True)]
        runs = zero.parts([prod(shape)], len(slices), [[t.length] for t in slices])
        found |= _placed({name: shape}, runs, slices, f"{files[0].path.parent}: frozen weights")
    return found
