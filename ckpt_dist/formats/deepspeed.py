"""DeepSpeed's checkpoints: `global_stepN/` of ZeRO stages 0 to 3 (model, fp32 master weights, optimizer); universal ones.

Facts: DeepSpeed 0.19.8, compared with its own zero_to_fp32; older keys from its source. What is trained lies in fp32
in the optimizer's files, flat and cut by data-parallel ranks (`zero.py`). Everything is in the model's file in the
dtype of the computation too at stages 0 to 2; at stage 3 only the buffers are.

Invariant: a parameter is its runs in the flat tensors, never a joined copy; the files of all ranks are there and of one
save, on the disk of one node or another, or those that are not are listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError, UsageError, shown
from ckpt_dist.files import inert
from ckpt_dist.files.elsewhere import answers
from ckpt_dist.formats import Layout, Spec, _model_states, _moments, _pipeline, _shards, _universal, _zero
from ckpt_dist.formats._model_states import module
from ckpt_dist.formats._save import Save
from ckpt_dist.formats._save import save as saved
from ckpt_dist.formats._shards import MODEL, OPTIM, Files
from ckpt_dist.formats._table import File, Folder, Table


def claims(path: Path) -> bool:
    return path.is_dir() and any(MODEL.fullmatch(p.name) or OPTIM.fullmatch(p.name) for p in path.iterdir())


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The model's own weights, or the master weights where they are asked for or nothing else is stored."""
    folder, universal = Folder(path, answers(options)), bool(options.get("universal"))
    if _universal.claims(path):
        return _universal.scan(path, _shards.models(folder), _model_states.state, universal)
    if layers := _shards.layers(folder):
        return _pipeline.scan(folder, layers, options)
    here, keep, strict = _shards.files(folder), options.get("keep"), options.get("unmatched") != "drop"
    master = here.third or options.get("weights") == "master" or bool(universal and here.optims)
    _refuse(here, folder, universal)
    (main,), table = folder.opened(here.models[:1]), Table()
    if "module" in main.tree and main.tree["module"] is None:
        raise folder.lacks(
            f"{path} is a pipeline's checkpoint, and no file of a layer is there (layer_NN-model_states.pt)."
        )
    save, files = None, [here.models[0]]
    if here.optims and (master or keep is None or "optimizer" in keep):
        optims = _shards.all_of(folder, main, here.optims)
        save = saved([(main, folder.opened(optims, 1))])
        files += optims
    more, lost = (
        _masters(table, folder, here, main, save, strict) if master else _own(table, folder, here, main, len(files))
    )
    extras = [*lost, *_model_states.state(table, main)]
    carries = strict and "optimizer" in (keep or ())
    extras += (
        _moments.moments(table, save, carries, universal)
        if save
        else _model_states.unread(main, [name for _, name in here.optims])
    )
    about = {"notes": (_said(module(main), save, master, bool(here.optims)),), "sizes": folder.sizes([*files, *more])}
    return table.catalog("deepspeed", path, [*files, *more], extras, about)


def _own(table: Table, folder: Folder, here: Files, main: File, first: int) -> tuple[list[str], list[Extra]]:
    """What the model's file and the experts' have, in the dtype of the computation."""
    for name, ref in module(main).items():
        table.whole(Entry(name, ref.dtype, ref.shape, (name,)), ref, main)
    return _experts(table, folder, here, main, first, {}), []


def _masters(
    table: Table, folder: Folder, here: Files, main: File, save: Save | None, strict: bool
) -> tuple[list[str], list[Extra]]:
    """Master weights of what is trained; of stage 3 also the parts of what is not, which all files of the model have."""
    if save is None:
        raise CheckpointError(
            f"{folder.path} has no fp32 master weights that have names: no optimizer files of ZeRO lie beside {here.models[0]}. "
            "Leave source.weights out."
        )
    held, more = _zero.masters(save), list[str]()
    if here.third and main.tree.get("frozen_param_shapes"):
        more, first = here.models[1:], 1 + len(save.shards)
        if len(here.models) != len(save.shards):
            raise folder.lacks(
                f"{save.where}: {len(here.models)} files of the model, and the save was of {len(save.shards)} ranks, each with "
                "parts of frozen weights. Fetch the missing ones."
            )
        held |= _zero.frozen([main, *folder.opened(more, first)])
    lost = list(_named(table, main, held, strict))
    return [*more, *_experts(table, folder, here, main, 1 + len(save.shards) + len(more), held)], lost


def _named(table: Table, main: File, held: Mapping[str, _zero.Part], strict: bool) -> Iterator[Extra]:
    """Every name of the model: master weights where there are any, what is not trained from the model's file."""
    own = module(main)
    aliases = _aliases(main, own, held)
    buffers = main.tree.get("buffer_names") or ()
    for name in [*own, *(n for n in held if n not in own)]:
        part = held.get(aliases.get(name, name))
        if part is not None:
            if name in own and own[name].shape != part.shape and 0 not in own[name].shape:
                raise CheckpointError(
                    f"{main.path}: {name!r} is {list(own[name].shape)}, param_shapes say {list(part.shape)}. It is damaged."
                )
            table.runs(Entry(name, part.dtype, part.shape, (name,)), part.lo, part.hi, part.file, part.address)
        elif 0 not in own[name].shape or name in buffers:
            table.whole(Entry(name, own[name].dtype, own[name].shape, (name,)), own[name], main)
        elif strict:
            raise CheckpointError(
                f"{main.path}: {name!r} has no values: it is neither trained, nor frozen, nor a buffer, nor said to be another "
                "name of one (shared_params, which older files lack). Leave it out with unmatched=drop."
            )
        else:
            yield Extra(name, (name,), "weight", None)


def _aliases(main: File, own: Mapping[str, inert.TensorRef], held: Mapping[str, Any]) -> dict[str, str]:
    """Second names of trained parameters, as listed, or as the same elements of one storage (older files list none)."""
    said = main.tree.get("shared_params")
    place = {(r.storage.key, r.offset, r.shape): n for n, r in own.items() if n in held and 0 not in r.shape}
    same = {n: place.get((r.storage.key, r.offset, r.shape), n) for n, r in own.items() if n not in held}
    return {**same, **({str(k): str(v) for k, v in said.items()} if isinstance(said, Mapping) else {})}


def _refuse(here: Files, folder: Folder, universal: bool) -> None:
    if here.experts and universal:
        raise CheckpointError(
            f"{folder.path} is of a mixture of experts ({len(here.experts)} files such as {here.experts[0]}), which cannot be "
            "universal: each rank of a loading engine would ask for its first expert as expert 0. Its weights are converted "
            "without target.universal."
        )


def _experts(
    table: Table, folder: Folder, here: Files, main: File, first: int, held: Mapping[str, _zero.Part]
) -> list[str]:
    """Experts lie in a file each, under names with their numbers in the whole model; what is not taken from the optimizer."""
    _shards.all_experts(folder, main, here.experts)
    for file in folder.opened(here.experts, first):
        for name, ref in file.tree.items():
            if not isinstance(ref, inert.TensorRef):
                raise CheckpointError(f"{file.path}: {shown(name)} is no tensor, as all of an expert's file are.")
            if name not in held:
                table.whole(Entry(str(name), ref.dtype, ref.shape, (str(name),)), ref, file)
            elif held[name].shape != ref.shape:
                raise CheckpointError(
                    f"{file.path}: {name!r} is {list(ref.shape)}, param_shapes say {list(held[name].shape)}. It is of another run."
                )
    return here.experts


def _said(own: Mapping[str, inert.TensorRef], save: Save | None, master: bool, more: bool) -> str:
    if master and save:
        ranks = f"{len(save.shards)} rank" + "s" * (len(save.shards) > 1)
        only = ", which are all that this stage stores" if save.stage == 3 else ""
        return f"weights: the fp32 master weights of {ranks}, ZeRO stage {save.stage}{only}"
    dtypes = ", ".join(sorted({r.dtype for r in own.values()}))
    return f"weights: the model's own ({dtypes})" + ("; source.weights=master takes the optimizer's" if more else "")


# ---- writing


def lay_out(spec: Spec) -> Layout:
    """A universal checkpoint, which an engine of any world size and ZeRO stage loads."""
    if not spec.options.get("universal"):
        raise UsageError(
            "target.format=deepspeed: what is written is a universal checkpoint, for engines of any world size and ZeRO stage; "
            'say so with target.universal=true. They load it with "checkpoint": {"load_universal": true} in their config.'
        )
    return _universal.lay_out(spec)
