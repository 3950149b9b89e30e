"""DeepSpeed's pipelines: a file for each item of their list of layers, and of each stage the optimizer's shards.

Facts: DeepSpeed 0.19.8. The engine calls what is in item 3 of the list `3.NAME`, and a module that several stages have
(TiedLayerSpec) `tied_modules.KEY.NAME`; its file is that of the item where it is a plain module. Each stage's
`mp_rank_KK_model_states.pt` lists what is trained in it, under these names.

Invariant: what is trained is in the file of a layer, or the first that is not is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from ckpt_dist.catalog import Catalog, Entry
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import inert
from ckpt_dist.formats import _model_states, _moments, _shards, _zero
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats._save import Save, save
from ckpt_dist.formats._shards import Named
from ckpt_dist.formats._table import File, Folder, Table

TIED = "tied_modules"
Layer = dict[str, inert.TensorRef]  # a layer's tensors by the names inside it
Shapes = Mapping[str, tuple[int, ...]]


def scan(folder: Folder, layers: Mapping[int, str], options: Mapping[str, Any]) -> Catalog:
    """The weights of all layers, or the master weights of what is trained."""
    if more := next(filter(_shards.EXPERT.fullmatch, folder.names), None):
        raise CheckpointError(
            f"{folder.path} is a pipeline with a mixture of experts ({more}): its layers' files have the experts of one rank only. "
            "Such checkpoints are not read."
        )
    names, shards = _shards.stages(folder)
    keep, universal, strict = options.get("keep"), bool(options.get("universal")), options.get("unmatched") != "drop"
    master = options.get("weights") == "master" or bool(universal and shards)
    mains = folder.opened(names, len(layers))
    _all_stages(folder, mains)
    trained = _trained(mains)
    files, table, held, found = [*layers.values(), *names], Table(), dict[str, _zero.Part](), None
    if shards and (master or keep is None or "optimizer" in keep):
        found = _save(folder, mains, shards, len(files))
        files += [file.path.name for file, _ in found.shards]
    if master:
        held = _zero.masters(_known(folder, found))
    _weights(table, folder, layers, trained, held, master)
    extras = [*_model_states.state(table, mains[0])]
    carries = strict and "optimizer" in (keep or ())
    optims = [name for of in shards for _, name in of]
    extras += _moments.moments(table, found, carries, universal) if found else _model_states.unread(mains[0], optims)
    about = {"notes": (_said(table, mains, found, master),), "sizes": folder.sizes(files)}
    return table.catalog("deepspeed", folder.path, files, extras, about)


def _save(folder: Folder, mains: Sequence[File], shards: Sequence[Sequence[Named]], first: int) -> Save:
    """The optimizer's files of all stages, numbered one after another."""
    whole = [_shards.all_of(folder, main, of) for main, of in zip(mains, shards, strict=True)]
    flat = folder.opened([name for of in whole for name in of], first)
    ends = list(accumulate(map(len, whole)))
    return save([(main, flat[end - len(of) : end]) for main, of, end in zip(mains, whole, ends, strict=True)])


def _known(folder: Folder, found: Save | None) -> Save:
    if found is None:
        raise CheckpointError(
            f"{folder.path} has no fp32 master weights that have names: no optimizer files of ZeRO are there. Leave "
            "source.weights out."
        )
    return found


def _all_stages(folder: Folder, mains: Sequence[File]) -> None:
    """As many stages as there were; files of tensor-parallel ranks are among them, which are not read."""
    said = mains[0].tree.get("mp_world_size")
    if type(said) is int and said > len(mains):
        raise folder.lacks(
            f"{folder.path} is of a pipeline of {said} stages; the files of {len(mains)} are there (mp_rank_KK_model_states.pt). "
            "Fetch the missing ones."
        )


def _trained(mains: Sequence[File]) -> dict[str, tuple[int, ...]]:
    """What is trained in any stage, with its shape."""
    said = [main.tree.get("param_shapes") for main in mains]
    groups = [group for of in said if isinstance(of, (list, tuple)) for group in of if isinstance(group, Mapping)]
    return {str(name): tuple(shape) for group in groups for name, shape in group.items() if inert.is_shape(shape)}


def _weights(
    table: Table,
    folder: Folder,
    layers: Mapping[int, str],
    trained: Shapes,
    held: Mapping[str, _zero.Part],
    master: bool,
) -> None:
    """Each layer's tensors under the engine's names: master weights where they were asked for and are there."""
    opened = dict(zip(layers, folder.opened([*layers.values()]), strict=True))
    inside = {number: _inside(file) for number, file in opened.items()}
    modules = _modules(folder, inside, trained, master)
    for number, file in opened.items():
        for name, ref in inside[number].items():
            label = f"{modules[number]}.{name}"
            part = held.get(label)
            if part is None:
                table.whole(Entry(label, ref.dtype, ref.shape, (label,)), ref, file)
                continue
            if part.shape != ref.shape:
                raise CheckpointError(
                    f"{file.path}: {label!r} is {list(ref.shape)}, param_shapes say {list(part.shape)}. It is of another run."
                )
            table.runs(Entry(label, part.dtype, part.shape, (label,)), part.lo, part.hi, part.file, part.address)
    _all_trained(table, folder, trained, master)


def _all_trained(table: Table, folder: Folder, trained: Shapes, master: bool) -> None:
    """What is trained is there; which of the files is a tied module's only matters where its master weights are asked for."""
    for name in trained:
        place, _, _ = name.partition(".")
        if name not in table.entries and (place.isdecimal() or master):
            what = f"layer_{int(place):02d}-model_states.pt" if place.isdecimal() else "the file of its layer"
            raise folder.lacks(
                f"{folder.path}: {name!r} is trained and in no file: {what} is missing or of another run."
            )


def _inside(file: File) -> Layer:
    found = ((".".join(map(str, place)), ref) for place, ref in pt.walk(file.tree))
    return {name: ref for name, ref in found if isinstance(ref, inert.TensorRef)}


def _modules(folder: Folder, inside: Mapping[int, Layer], trained: Shapes, master: bool) -> dict[int, str]:
    """What the engine calls the module of each layer: its place, or, of a tied one, the key that stages share it by.

    Which file is a tied module's is not said: it is the one of which nothing is trained under its place, and that has
    tensors of these names and shapes.
    """
    names = {number: str(number) for number in inside}
    for key, shapes in _tied(trained):
        found = [n for n, layer in inside.items() if _fits(n, layer, shapes, trained)]
        if len(found) == 1 and names[found[0]] == str(found[0]):
            names[found[0]] = f"{TIED}.{key}"
        elif found and master:
            raise CheckpointError(
                f"{folder.path}: which of the layers {', '.join(map(str, found))} is the tied module {key!r} is not said: they have "
                "tensors of the same names and shapes. Leave source.weights out."
            )
    return names


def _tied(trained: Shapes) -> Iterator[tuple[str, Shapes]]:
    """Each tied module's key, and the shapes of its tensors."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in trained.items():
        head, _, rest = name.partition(".")
        key, _, inner = rest.partition(".")
        if head == TIED and inner:
            found.setdefault(key, {})[inner] = shape
    yield from found.items()


def _fits(number: int, layer: Layer, shapes: Shapes, trained: Shapes) -> bool:
    own = any(f"{number}.{name}" in trained for name in layer)
    return not own and all(name in layer and layer[name].shape == shape for name, shape in shapes.items())


def _said(table: Table, mains: Sequence[File], found: Save | None, master: bool) -> str:
    of = f"of a pipeline of {len(mains)} stages; names begin with the place of a layer"
    if master and found:
        ranks = f"{len(found.shards)} rank" + "s" * (len(found.shards) > 1)
        return f"weights: the fp32 master weights of {ranks}, ZeRO stage {found.stage}, {of}"
    dtypes = ", ".join(sorted({e.dtype for e in table.entries.values() if e.role == "weight"}))
    return f"weights: the model's own ({dtypes}), {of}"
