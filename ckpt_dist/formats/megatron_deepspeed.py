"""Megatron-DeepSpeed's checkpoints: `global_stepN/layer_LL-model_TT-model_states.pt`, one for each layer and tensor-parallel rank.

Facts: BigScience's Megatron-DeepSpeed (the one that BLOOM was trained with). Stages of the pipeline do not show in
these files; `mp_rank_KK_model_states.pt` beside them has args. Layers become Megatron's, under the names of
megatron-core's distributed checkpoints. Weights are those that the run computed with, not the optimizer's copies.

Invariant: all files of all layers are there and of one save, or the first that is not is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_dist import ranks
from ckpt_dist.catalog import Catalog, Extra
from ckpt_dist.errors import CheckpointError, UsageError, shown
from ckpt_dist.files import inert, zips
from ckpt_dist.formats import Layout, Spec, _flat, _shards, _zero
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats._save import save
from ckpt_dist.formats._table import Folder
from ckpt_dist.formats.megatron import Held, alike_of, partition, rank_files, renamed, together
from ckpt_dist.formats.torch_dist import args_of
from ckpt_dist.ranks import Piecewise, Rank

LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
STATE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
STEPS, LATEST = "global_step{}", "latest"
EMBEDDING, FIRST = 1, 3  # numbers of the embedding and of the first layer; between them is what has no weights
BLOCK, ENDS = "encoder.layers.0.", "encoder.final_layernorm."  # what is in a layer's file, and in the last one
OWN = (  # how modules of today's Megatron call what they did then
    (".pre_mlp_layernorm.", ".post_attention_layernorm."),
    (".self_attention.linear_qkv.", ".self_attention.query_key_value."),
    (".self_attention.linear_proj.", ".self_attention.dense."),
    (".mlp.linear_fc1.", ".mlp.dense_h_to_4h."),
    (".mlp.linear_fc2.", ".mlp.dense_4h_to_h."),
)


def claims(path: Path) -> bool:
    """Layer files, the first of which is an embedding's: other pipelines have them too."""
    files = sorted(p.name for p in path.iterdir() if LAYER.fullmatch(p.name)) if path.is_dir() else []
    return bool(files) and "word_embeddings.weight" in _tree(path / files[0])


def _tree(path: Path) -> Mapping[str, Any]:
    return _opened(path)[0]


def _opened(path: Path) -> tuple[Mapping[str, Any], Mapping[str, zips.Record]]:
    tree, storages = pt.open_archive(path)
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise CheckpointError(f"{path} holds {type(tree).__name__}, a dict of a layer's tensors by name is expected.")
    return tree, storages


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickles of all layer files; each rank's tensors become boxes of the whole ones."""
    layers, tp = _layers(path)
    about = _state(path, tp)
    args = args_of(about)
    kinds = {number: _kind(path / files[0]) for number, files in layers.items()}
    _all_there(path, kinds, args)
    files = [file for found in layers.values() for file in found]
    masters, zero = _masters(path, tp, len(files)) if options.get("weights") == "master" else ([{}] * tp, [])
    blocks = [number for number, kind in kinds.items() if kind == BLOCK]
    replica = int(options.get("replica") or 0)
    version, parts, used = _said(about, "checkpoint_version", 0), list[Held](), set[tuple[int, str]]()
    for place, file in enumerate(files):
        number, t = (int(n) for n in LAYER.fullmatch(file).groups())  # type: ignore[union-attr]
        rank = Rank(t, 0, 0, tp, 1, 1, replica)
        first = blocks.index(number) if number in blocks else 0
        tree, storages = _opened(path / file)
        own, dense = (
            ranks.held({renamed(kinds[number] + n): r for n, r in state.items()}, rank, first, args, version)
            for state in _tensors(tree)
        )
        for part, by_rows in zip(own, dense, strict=True):
            name = _listed(masters[t], number, by_rows.ref.storage.key)
            used.add((t, name))
            runs = masters[t].get(name)
            parts += list(_flat.boxes(path / file, by_rows, runs)) if runs else [(part, place, storages)]
    files += zero
    if lost := next((name for name in masters[replica] if (replica, name) not in used), None):
        raise CheckpointError(f"{path}: {lost!r} is trained and in no layer's file. The files are of two runs.")
    entries, table = together(path, files, parts)
    pp = max(sum(bool(STATE.fullmatch(p.name)) for p in path.iterdir()) // tp, 1)
    facts: dict[str, Any] = {
        "tp": tp,
        "pp": pp,
        "padded": True,
        "drift": True,
        **alike_of(parts, tp),
        **_vocabulary(about),
    }
    if zero:
        facts["notes"] = (
            *facts.get("notes", ()),
            f"weights: the fp32 master weights of ZeRO, of {len(zero)} files",
        )
    return Catalog(
        "megatron_deepspeed", str(path), tuple(files), entries, table, _extras(path, about), args,
        about=facts,
    )  # fmt: skip


def _tensors(tree: Mapping[str, Any]) -> tuple[dict[str, inert.TensorRef], dict[str, inert.TensorRef]]:
    """A layer's tensors; and the same as if they lay row by row in storages that are called as they are."""
    own = {k: v for k, v in tree.items() if isinstance(v, inert.TensorRef)}
    return own, {name: _flat.dense(ref, name) for name, ref in own.items()}


def _masters(path: Path, tp: int, first: int) -> tuple[list[dict[str, list[_flat.Run]]], list[str]]:
    """Of each tensor-parallel rank the master weights of all its stages, by the engine's names; the optimizer's files."""
    folder, files, found = Folder(path), list[str](), []
    names, shards = _shards.stages(folder)
    if not shards:
        raise CheckpointError(
            f"{path} holds no optimizer files (*_optim_states.pt), so no master weights. Leave source.weights out."
        )
    mains = folder.opened(names)
    for t in range(tp):
        stages = []
        for main, of in zip(mains[t::tp], shards[t::tp], strict=True):
            whole = _shards.all_of(folder, main, of)
            stages.append((main, folder.opened(whole, first + len(files))))
            files += whole
        found.append({name: _runs(part) for name, part in _zero.masters(save(stages)).items()})
    return found, files


def _runs(part: _zero.Part) -> list[_flat.Run]:
    columns = (c.tolist() for c in (part.lo, part.hi, part.file, part.address))
    return [_flat.Run(lo, hi, file, at, part.dtype) for lo, hi, file, at in zip(*columns, strict=True)]


def _listed(masters: Mapping[str, Any], number: int, name: str) -> str:
    """What the engine calls a layer's tensor; one of the embedding may have a name that the last stage uses too."""
    shared = [n for n in masters if n.startswith("tied_modules.") and n.endswith(f".{name}")]
    own = f"{number}.{name}"
    return shared[0] if number == EMBEDDING and len(shared) == 1 and own not in masters else own


def _layers(path: Path) -> tuple[dict[int, list[str]], int]:
    """The files of each layer, rank by rank; how many ranks there were."""
    found: dict[int, dict[int, str]] = {}
    for p in path.iterdir():
        if hit := LAYER.fullmatch(p.name):
            found.setdefault(int(hit[1]), {})[int(hit[2])] = p.name
    tp = 1 + max(t for ranks_ in found.values() for t in ranks_)
    for number, held in sorted(found.items()):
        for t in range(tp):
            if t not in held:
                raise CheckpointError(
                    f"{path}/layer_{number:02d}-model_{t:02d}-model_states.pt is missing: other layers have {tp} "
                    "tensor-parallel ranks. Fetch it."
                )
    return {n: [found[n][t] for t in range(tp)] for n in sorted(found)}, tp


def _kind(path: Path) -> str:
    """What the tensors of a layer file are part of, by their names."""
    tree = _tree(path)
    if "word_embeddings.weight" in tree:
        return "language_model.embedding."
    if any("attention." in key for key in tree):
        return BLOCK
    if set(tree) <= {"weight", "bias"}:
        flat = len(getattr(tree.get("weight"), "shape", ())) == 1
        return ENDS if flat else "language_model.output_layer."
    raise CheckpointError(
        f"{path}: {shown(next(iter(tree), 'nothing'))} is no tensor of an embedding, a layer or a norm."
    )


def _all_there(path: Path, kinds: Mapping[int, str], args: Mapping[str, Any]) -> None:
    """No layer is missing between two others, none that args say, and not the last norm."""
    blocks = [number for number, kind in kinds.items() if kind == BLOCK]
    gap = next((n for n in range(blocks[0], blocks[-1]) if n not in kinds), None) if blocks else FIRST
    if gap is not None:
        raise CheckpointError(f"{path}/layer_{gap:02d}-model_00-model_states.pt is missing. Fetch it.")
    if args.get("num_layers") not in (None, len(blocks)):
        raise CheckpointError(f"{path} holds {len(blocks)} layers, args say num_layers={args['num_layers']}.")
    if ENDS not in kinds.values():
        raise CheckpointError(f"{path}/layer_{blocks[-1] + 2:02d}-model_00-model_states.pt is missing: the last norm.")


def _state(path: Path, tp: int) -> Mapping[str, Any]:
    """What is beside the layers: args, iteration. All ranks have to be of one save."""
    files = sorted(p.name for p in path.iterdir() if STATE.fullmatch(p.name))
    trees = [_tree(path / f) for f in files]
    for file, tree in zip(files, trees, strict=True):
        if tree.get("iteration") != trees[0].get("iteration"):
            raise CheckpointError(
                f"{path / file} is of iteration {tree.get('iteration')}, {files[0]} of {trees[0].get('iteration')}. "
                "The files are of two saves; fetch the checkpoint again."
            )
    said = _said(args_of(trees[0]), "tensor_model_parallel_size", tp) if trees else tp
    if len(files) % tp or said != tp:
        raise CheckpointError(
            f"{path}: layers have files of {tp} tensor-parallel ranks, there are {len(files)} files mp_rank_*, args say "
            f"{said} ranks. Some files are missing or of another save."
        )
    return trees[0] if trees else {"checkpoint_version": 3.0}


def _said(facts: Mapping[str, Any], key: str, otherwise: float) -> float:
    """A number, if one is there."""
    value = facts.get(key)
    return value if isinstance(value, (int, float)) else otherwise


def _vocabulary(about: Mapping[str, Any]) -> dict[str, int]:
    info = about.get("checkpoint_info")
    rows = info.get("original_vocab_size") if isinstance(info, Mapping) else None
    return {"vocabulary": rows} if isinstance(rows, int) else {}


def _extras(path: Path, about: Mapping[str, Any]) -> tuple[Extra, ...]:
    zero = sorted(p.name for p in path.iterdir() if p.name.endswith("_optim_states.pt"))
    found = [Extra(name, (name,), "optimizer", inert.Record()) for name in zero]
    for key, value in about.items():
        plain = isinstance(value, (int, float, str))
        found.append(Extra(str(key), (key,), "state", value if plain else inert.Record()))
    return tuple(found)


# ---- from the whole to layers


def lay_out(spec: Spec) -> Layout:
    """A file for each layer and tensor-parallel rank, and one for each rank of the run that is to load them."""
    o = spec.options
    tp, pp, step = int(o.get("tp") or 1), int(o.get("pp") or 1), int(o.get("step") or 1)
    count = _layers_of(spec)
    partition(count, pp, 1, o.get("partition"))
    top = STEPS.format(step)
    names, each = [], []
    for t in range(tp):
        held = list(ranks.holds(spec.entries, Rank(t, 0, 0, tp, 1, 1), [count], "local"))
        for number in sorted({_number(one, count) for one in held}):
            names.append(f"{top}/layer_{number:02d}-model_{t:02d}-model_states.pt")
            each.append([replace(one, path=(_key(one),)) for one in held if _number(one, count) == number])
    layout = rank_files(spec, "megatron_deepspeed", names, each, (), str(step))
    late = {f"{top}/mp_rank_{k:02d}_model_states.pt": _rank_state(spec, tp, pp, step) for k in range(tp * pp)}
    return replace(layout, late={**late, **layout.late, LATEST: top.encode})


def _layers_of(spec: Spec) -> int:
    for entry in spec.entries:
        if not re.match(r"(decoder\.(layers\.\d|final_layernorm)|embedding)", entry.name):
            raise UsageError(
                f"target.format=megatron_deepspeed: {entry.name!r} is no part of a model whose layers are GPT's, with one "
                "tensor for embedding and head. Give the family if it was not found: model=FAMILY."
            )
    return 1 + max((int(m[2]) for e in spec.entries if (m := ranks.LAYER.fullmatch(e.name))), default=-1)


def _number(one: Piecewise, count: int) -> int:
    """Which layer of the pipeline a tensor is of."""
    layer = ranks.LAYER.fullmatch(one.path[-1])
    return FIRST + int(layer[2]) if layer else EMBEDDING if one.path[-1].startswith("embedding.") else FIRST + count + 1


def _key(one: Piecewise) -> str:
    """A tensor's name in the file of its layer."""
    name = one.path[-1]
    for today, then in OWN:
        name = name.replace(today, then)
    return re.sub(r"^(decoder\.layers\.\d+|embedding|decoder\.final_layernorm)\.", "", name)


def _rank_state(spec: Spec, tp: int, pp: int, step: int) -> Any:
    release = dict(consumed_train_samples=0, consumed_valid_samples=0) if spec.options.get("release") else {}
    args = {**(spec.options.get("args") or {}), **release}
    args |= dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    rows = next((e.shape[0] for e in spec.entries if e.name.endswith("word_embeddings.weight")), 0)
    state = dict(
        module=None, args=inert.Namespace(args), checkpoint_version=3.0, iteration=step, global_steps=step,
        skipped_steps=0, mp_world_size=tp, dp_world_size=1,
        checkpoint_info=dict(padded_vocab_size=rows, original_vocab_size=rows),
    )  # fmt: skip
    return lambda: pt.archive(state, "model_states")
