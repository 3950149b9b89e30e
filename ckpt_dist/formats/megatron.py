"""Megatron-LM's own checkpoints: `iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one for each model-parallel rank.

Facts: Megatron-LM to core 0.16, files compared with those modules' own state dicts; older names and QKV orders from its
source. A rank's tensors become boxes of whole ones (`ranks.py`), under the names of megatron-core's distributed
checkpoints.

Invariant: the files of all ranks are there and of one save, or the first that is not is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import megatron, megatron_args, ranks, slots
from ckpt_dist import stages as pipeline
from ckpt_dist.box import ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded
from ckpt_dist.errors import CheckpointError, UsageError, shown
from ckpt_dist.files import inert
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.files.zips import Record
from ckpt_dist.formats import Layout, Spec, holders
from ckpt_dist.formats import _megatron_optimizer as kept
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats.torch_dist import args_of
from ckpt_dist.ranks import Rank

FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?")
FILES = ("model_optim_rng.pt", "model_rng.pt")
STATE = "_extra_state"  # of a layer of Transformer Engine: a tensor of bytes, a file, or None
BESIDE = (STATE, "rotary_pos_emb.inv_freq")  # tensors that are no weights; NeMo 1 stored the second, in all stages
OLD = (  # names from before megatron-core, and how it calls the same
    (r"^((model|module)\.)*", ""),  # of wrappers, and of NeMo
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"^word_embeddings(_for_head)?\.", "output_layer."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"\.(self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"^(mtp\.layers\.\d+)\.mtp_model_layer\.", r"\1.transformer_layer."),  # from core 0.17
)

DECODER = re.compile(r"((model|module)\.)*(language_model\.)?decoder\.")
State = Mapping[str, inert.TensorRef]


def claims(path: Path) -> bool:
    return path.is_dir() and any(FOLDER.fullmatch(p.name) and _file(p) for p in path.iterdir())


def _file(folder: Path) -> str | None:
    return next((f for f in FILES if (folder / f).is_file()), None)


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickles of all ranks; each rank's tensors become boxes of the whole ones."""
    folders = sorted(p for p in path.iterdir() if FOLDER.fullmatch(p.name) and _file(p))
    files = [f"{p.name}/{_file(p)}" for p in folders]
    opened = [pt.open_archive(path / f) for f in files]
    same_save(path, files, [tree for tree, _ in opened])
    args = args_of(opened[0][0])
    found, master = _ranks(path, [p.name for p in folders], args), options.get("weights") == "master"
    if not master and "optimizer" not in (options.get("keep") or ()):
        return assembled(path, files, opened, found, args, None, options.get("replica"))
    flats = [f"{p.name}/{kept.FLAT}" if (p / kept.FLAT).is_file() else None for p in folders]
    try:
        catalog = assembled(path, files, opened, found, args, flats, options.get("replica"))
    except kept.Unread:
        if options.get("unmatched") != "drop" and not options.get("universal"):
            raise
        return assembled(path, files, opened, found, args, None, options.get("replica"))
    return slots.masters(catalog) if master else catalog


def assembled(
    path: Path,
    files: Sequence[str],
    opened: Sequence[tuple[Any, Any]],
    found: Sequence[Rank],
    args: Mapping[str, Any],
    flats: Sequence[str | None] | None = None,
    replica: Any = 0,
) -> Catalog:
    """The whole tensors of all ranks' files; `opened` are their dicts and the places of their storages. With `flats`,
    the files of distributed optimizers, also what the ranks' optimizers hold."""
    found = [replace(rank, replica=int(replica or 0)) for rank in found]
    trees = [tree for tree, _ in opened]
    states = _states(trees)
    offsets = _offsets(path, files, states, found, args)
    parts = []
    for number, (rank, chunks, (tree, storages)) in enumerate(zip(found, states, opened, strict=True)):
        version = _version(path / files[number], tree)
        for chunk, state in enumerate(chunks):
            held = ranks.held(state, rank, offsets[chunk, rank.p], args, version)
            parts += [(part, number, storages) for part in held]
    alike = alike_of(parts, found[0].tp * found[0].ep)
    own = list(parts)
    extras = {x.name: x for tree in reversed(trees) for x in _extras(tree)}
    if flats is not None:
        more = [f for f in flats if f]
        parts += _kept(path, [*files, *more], opened, states, found, offsets, args, flats)
        where, (tree, storages) = path / files[0], opened[0]
        if tree.get("optimizer") is not None:
            extras |= {x.name: x for x in kept.beside(where, tree, storages, bool(more))}
        files = [*files, *more]
    entries, table = together(path, files, parts)
    _one_stage(path, files, found, own)
    starts = [*(offsets[k] for k in sorted(offsets)), _count(e.name for e in entries)]
    about: dict[str, Any] = {"tp": found[0].tp, "pp": found[0].pp, "vpp": len(states[0]), "ep": found[0].ep}
    about |= {"partition": [b - a for a, b in pairwise(starts)], "spec": _spec(states)} | alike
    return Catalog("megatron", str(path), tuple(files), entries, table, tuple(extras.values()), args, about=about)


def _kept(
    path: Path,
    files: Sequence[str],
    opened: Sequence[tuple[Any, Any]],
    states: Sequence[Sequence[State]],
    found: Sequence[Rank],
    offsets: Mapping[tuple[int, int], int],
    args: Mapping[str, Any],
    flats: Sequence[str | None],
) -> Iterator[tuple[ranks.Part, int, Mapping[str, Record]]]:
    """What each rank's optimizer keeps of its parameters, as parts of whole tensors like theirs."""
    for number, (rank, chunks, (tree, storages), flat) in enumerate(zip(found, states, opened, flats, strict=True)):
        if tree.get("optimizer") is None:  # not saved
            continue
        where, content, version = path / files[number], None, _version(path / files[number], tree)
        if flat is not None:
            where, number = path / flat, files.index(flat)
            content, storages = pt.open_archive(where)
        for (slot, chunk), mine in kept.slots(where, tree.get("optimizer"), chunks, content).items():
            for part in ranks.held(mine, rank, offsets[chunk, rank.p], args, version):
                yield replace(part, name=slot + part.name), number, storages


def _version(where: Path, tree: Mapping[str, Any]) -> float:
    """Which order the rows of a fused QKV have."""
    said = tree.get("checkpoint_version") or 0
    if type(said) not in (int, float):
        raise CheckpointError(f"{where} is damaged: checkpoint_version is {shown(said)}, not a number.")
    return float(said)


Held = tuple[
    ranks.Part, int, Mapping[str, Record] | int
]  # of a rank: in which file; the storages of that, or the address


def together(path: Path, files: Sequence[str], parts: Sequence[Held]) -> tuple[tuple[Entry, ...], Chunks]:
    """Whole tensors and where their boxes lie, from what the ranks hold."""
    entries: dict[str, Entry] = {}
    number_of: dict[str, int] = {}
    rows: list[tuple[int, ranks.Piece, int, int]] = []
    for part, file, place in parts:
        role = "optimizer" if slots.parted(part.name)[0] else "weight"
        agree(path / files[file], entries, Entry(part.name, part.dtype, part.shape, (part.name,), role))
        entry = number_of.setdefault(part.name, len(number_of))
        where = f"{path / files[file]}: {part.name}"
        at = place if isinstance(place, int) else pt.storage_record(place, part.ref, where)
        rows += [(entry, piece, file, at + piece[2] * itemsize(part.dtype)) for piece in part.pieces]
    return tuple(entries.values()), chunk_table(rows)


def alike_of(parts: Sequence[Held], copies: int) -> dict[str, Any]:
    """What each of several ranks has a copy of, how many there are, and of which of them no rule says that they are alike."""
    names = sorted({part.name for part, *_ in parts if part.alike and not slots.parted(part.name)[0]})
    if copies < 2 or not names:
        return {"replicated": []}
    unknown = [n for n in names if not ranks.known(n)]
    found: dict[str, Any] = {"replicated": names, "unknown": unknown, "copies": copies}
    if not unknown:
        return found
    what = f"of {len(unknown)} tensors, first {unknown[0]!r}, no rule says how ranks divide them"
    return found | {"notes": (f"{what}: they are read where all ranks hold the same",)}


def _one_stage(path: Path, files: Sequence[str], found: Sequence[Rank], parts: Sequence[Held]) -> None:
    """What is of no layer is of one stage, but for what the first and the last share: names of other stages' layers would
    be taken for one."""
    seen: dict[str, list[int]] = {}
    for part, file, _ in parts:
        if re.match(r"(decoder\.layers|embedding|output_layer|mtp)\.", part.name):
            continue
        before = seen.setdefault(part.name, [])
        if before and (found[before[0]].p != found[file].p or file in before):
            raise CheckpointError(
                f"{path / files[before[0]]} and {path / files[file]} both hold {part.name!r}, of two stages. How these count "
                "such layers is not known. Save with the format torch_dist, which is read."
            )
        before.append(file)


def same_save(path: Path, files: Sequence[str], trees: Sequence[Any]) -> None:
    for file, tree in zip(files, trees, strict=True):
        if not isinstance(tree, Mapping) or not _models(tree):
            raise CheckpointError(f"{path / file} holds no model: a dict with the key model (or model0) is expected.")
        if tree.get("iteration") != trees[0].get("iteration"):
            raise CheckpointError(
                f"{path / file} is of iteration {tree.get('iteration')}, {files[0]} of {trees[0].get('iteration')}. "
                "The files are of two saves; fetch the checkpoint again."
            )
        if len(_models(tree)) != len(_models(trees[0])):
            raise CheckpointError(
                f"{path / file} has {len(_models(tree))} virtual chunks, {files[0]} has {len(_models(trees[0]))}. "
                "The files are of two runs."
            )


def _models(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The model, or its chunks in the order of virtual stages."""
    whole = isinstance(tree.get("model"), Mapping)
    keys = ["model"] if whole else [str(k) for k in tree if re.fullmatch(r"model\d+", str(k))]
    return [tree[k] for k in sorted(keys, key=lambda k: (len(k), k))]


def _extras(tree: Mapping[str, Any]) -> Iterator[Extra]:
    """What is beside the model, and what Transformer Engine keeps of a layer. Only plain numbers and texts can be carried."""
    for key, value in tree.items():
        if not re.fullmatch(r"model\d*", str(key)):
            plain = isinstance(value, (int, float, str))
            yield Extra(
                str(key), (key,), "optimizer" if key == "optimizer" else "state", value if plain else inert.Record()
            )
    for model in _models(tree):
        for place, leaf in pt.walk(model):
            name = ".".join(map(str, place))
            if name.endswith(BESIDE) and leaf is not None:
                yield Extra(name, (name,), "state", inert.Record())


def _states(trees: Sequence[Mapping[str, Any]]) -> list[list[State]]:
    """Each file's chunks: their tensors under megatron-core's names; old files nest them in dicts.

    Before megatron-core layers were called an encoder's; beside a decoder's they are just that.
    """
    found = [[_tensors(model) for model in _models(tree)] for tree in trees]
    both = any(DECODER.match(name) for chunks in found for state in chunks for name in state)
    return [[_renamed(state, both) for state in chunks] for chunks in found]


def _tensors(model: Mapping[str, Any]) -> State:
    leaves = ((".".join(map(str, place)), leaf) for place, leaf in pt.walk(model))
    return {n: x for n, x in leaves if isinstance(x, inert.TensorRef) and not n.endswith(BESIDE)}


def _renamed(state: State, encodes: bool) -> State:
    names = {name: renamed(name, encodes) for name in state}
    first: dict[str, str] = {}
    for name, new in names.items():
        if first.setdefault(new, name) != name:
            raise CheckpointError(
                f"{first[new]!r} and {name!r} of one file both are {new!r}. It is of an unknown version."
            )
    return {names[name]: ref for name, ref in state.items()}


def renamed(name: str, encodes: bool = False) -> str:
    """What megatron-core calls a tensor, by whatever name: `encoder.layers.0.input_norm.weight` is its input_layernorm.
    With `encodes` there are an encoder and a decoder."""
    for old, new in OLD:
        if not (encodes and "encoder" in old):
            name = re.sub(old, new, name)
    return name


def _ranks(path: Path, names: Sequence[str], args: Mapping[str, Any]) -> list[Rank]:
    """The ranks of each folder. `mp_rank_00_001` may be a stage or a group of experts; args tell."""
    said = [megatron.count(args, f"{k}_model_parallel_size") for k in ("tensor", "pipeline", "expert")]
    places = []
    for name in names:
        t, p, e = (int(n) if n else None for n in FOLDER.fullmatch(name).groups())  # type: ignore[union-attr]
        if p is not None and e is None and said[1] < 2:
            if said[2] < 2:
                raise CheckpointError(
                    f"{path / name}: whether its second number is a pipeline stage or an expert-parallel rank is not said: args "
                    f"have pipeline_model_parallel_size={said[1] or None} and expert_model_parallel_size={said[2] or None}. "
                    "Rename all folders to mp_rank_TT_PPP_EEE (mp_rank_00_001_000 is stage 1), which says it."
                )
            p, e = None, p
        places.append((t or 0, p or 0, e or 0))
    tp, pp, ep = (max(size, *(p[k] + 1 for p in places)) for k, size in enumerate(said))
    etp = args.get("expert_tensor_parallel_size")
    if (args.get("num_experts") or args.get("num_moe_experts")) and etp not in (None, tp):
        raise CheckpointError(
            f"{path}: experts are divided by {etp} tensor-parallel ranks, the rest by {tp}; such files are not read. "
            "Save with the format torch_dist."
        )
    there = set(places)
    each = ((t, p, e) for t in range(tp) for p in range(pp) for e in range(ep))  # of as many as args say, so not a list
    if lost := next((place for place in each if place not in there), None):
        name = _folder(Rank(*lost, tp, pp, ep))
        raise CheckpointError(
            f"{path / name} is missing: the run had {tp} x {pp} x {ep} tensor, pipeline and expert ranks, the files of "
            f"{tp * pp * ep - len(there)} of them are not there. Fetch them."
        )
    return [Rank(*place, tp, pp, ep) for place in places]


def _offsets(
    path: Path, files: Sequence[str], states: Sequence[Sequence[State]], found: Sequence[Rank], args: Mapping[str, Any]
) -> dict[tuple[int, int], int]:
    """The first layer of each (virtual chunk, stage): a chunk's stages come before those of the next chunk."""
    counts: dict[tuple[int, int], int] = {}
    for file, chunks, rank in zip(files, states, found, strict=True):
        for chunk, state in enumerate(chunks):
            numbers = {int(m[2]) for n in state if (m := ranks.LAYER.fullmatch(n))}
            if numbers != set(range(len(numbers))):
                lost = next(k for k in count() if k not in numbers)
                raise CheckpointError(f"{path / file} lacks layer {lost} of its stage.")
            known = counts.setdefault((chunk, rank.p), len(numbers))
            if known != len(numbers):
                raise CheckpointError(
                    f"{path / file} has {len(numbers)} layers, another rank of stage {rank.p} has {known}."
                )
    layers = [counts[k] for k in sorted(counts)]
    if (said := args.get(pipeline.KEY)) and pipeline.read(said) != layers:
        raise CheckpointError(
            f"{path}: its stages hold {layers} layers, by args {pipeline.read(said)} ({shown(said, 80)}). The files are of two runs."
        )
    offsets, first = {}, 0
    for key in sorted(counts):
        offsets[key], first = first, first + counts[key]
    if args.get("num_layers") not in (None, first):
        raise CheckpointError(f"{path} holds {first} layers, args say num_layers={args['num_layers']}.")
    return offsets


def _spec(states: Sequence[Sequence[State]]) -> str:
    """Whose modules the names are of: Megatron's own have a norm before the layer that Transformer Engine has it in."""
    return "local" if any(".input_layernorm." in n for chunks in states for state in chunks for n in state) else "te"


def agree(where: Path, entries: dict[str, Entry], entry: Entry) -> None:
    known = entries.setdefault(entry.name, entry)
    if known != entry:
        raise CheckpointError(
            f"{where}: {entry.name!r} is part of {entry.dtype}{list(entry.shape)}, that of another rank of "
            f"{known.dtype}{list(known.shape)}. The files are of two models."
        )


def chunk_table(rows: Sequence[tuple[int, ranks.Piece, int, int]]) -> Chunks:
    """Chunks of (entry, piece, file, address)."""
    width = max((len(p[0]) for _, p, *_ in rows), default=0)
    return Chunks(
        ints([e for e, *_ in rows]),
        padded([p[0] for _, p, *_ in rows], width, 0),
        padded([p[1] for _, p, *_ in rows], width, 1),
        padded([p[3] for _, p, *_ in rows], width, 0),
        ints([f for *_, f, _ in rows]),
        ints([a for *_, a in rows]),
    )


def lay_out(spec: Spec) -> Layout:
    """A file for each (tensor, pipeline, expert) rank, as Megatron-LM's loader expects it under the same layout."""
    o = spec.options
    tp, pp, vpp, ep = (int(o.get(k) or 1) for k in ("tp", "pp", "vpp", "ep"))
    _refuse(spec, tp, pp, vpp, ep)
    step = int(o.get("step") or 1)
    stages = partition(_num_layers(spec), pp, vpp, o.get("partition"))
    top = "release" if o.get("release") else megatron.STEPS.format(step)
    further = _count((e.name for e in spec.entries), ranks.FURTHEST)
    args = {**(o.get("args") or {}), **_parallel_args(tp, pp, vpp, ep, stages, o.get("partition"), further)}
    args |= megatron_args.divisor(args, tp)
    if any(ranks.EXPERTS in e.name for e in spec.entries):  # of Transformer Engine they are those of one module
        args["moe_grouped_gemm"] = o.get("spec") != "local"
    all_ranks = [Rank(t, p, e, tp, pp, ep) for p in range(pp) for t in range(tp) for e in range(ep)]
    names = [f"{top}/{_folder(rank)}/{FILES[0]}" for rank in all_ranks]
    each = [list(ranks.holds(spec.entries, rank, stages, str(o.get("spec") or "te"))) for rank in all_ranks]
    about = {"args": inert.Namespace(args), "checkpoint_version": 3.0, "iteration": step}
    common = tuple(Extra(key, (key,), "state", value) for key, value in about.items())
    chunks = ["model"] if vpp == 1 else [f"model{k}" for k in range(vpp)]
    empty = [[Extra(k, (k,), "state", {}) for k in chunks if k not in {one.path[0] for one in held}] for held in each]
    made = rank_files(spec, "megatron", names, each, common, "release" if o.get("release") else str(step), empty)
    return replace(made, holders=_holders(o.get("placement"), all_ranks))


def rank_files(
    spec: Spec,
    format: str,
    names: Sequence[str],
    each: Sequence[Sequence[ranks.Piecewise]],
    common: Sequence[Extra],
    tracker: str,
    own: Sequence[Sequence[Extra]] = (),
) -> Layout:
    """Files that hold what `each` says of them, `common` and their `own` besides; beside their folder the tracker."""
    made = [one for group in each for one in group]
    parts = tuple(Entry(one.path[-1], spec.entries[one.entry].dtype, one.shape, one.path) for one in made)
    ends = np.cumsum([len(group) for group in each]).tolist()
    groups = [list(range(lo, hi)) for lo, hi in zip([0, *ends], ends, strict=False)]
    layout = pt.lay_out_files(replace(spec, entries=parts, extras=()), names, groups, common, own)
    at = layout.catalog.chunks
    rows = [
        (one.entry, piece, int(at.file[k]), int(at.offset[k]) + piece[2] * itemsize(parts[k].dtype))
        for k, one in enumerate(made)
        for piece in one.pieces
    ]
    catalog = Catalog(format, "", tuple(names), spec.entries, chunk_table(rows))
    return replace(layout, catalog=catalog, late={megatron.TRACKER: tracker.encode})


def _holders(placement: Sequence[int] | None, all_ranks: Sequence[Rank]) -> tuple[frozenset[int], ...]:
    """The nodes of each rank's file: Megatron counts its ranks in the order tensor, expert, data, pipeline."""
    if not placement:
        return ()
    one, count = all_ranks[0], len(placement)
    if count % len(all_ranks):
        raise UsageError(
            f"target.placement: {count} ranks cannot load {one.tp} x {one.pp} x {one.ep} tensor, pipeline and expert ranks. "
            "Give target.placement=[...], the node of each rank of the job that will load this."
        )
    number = {(rank.t, rank.p, rank.e): k for k, rank in enumerate(all_ranks)}
    places = [(r % one.tp, r // (count // one.pp), r // one.tp % one.ep) for r in range(count)]
    return holders(placement, [number[place] for place in places])


def _refuse(spec: Spec, tp: int, pp: int, vpp: int, ep: int) -> None:
    """What Megatron's own modules refuse to be built with."""
    args = spec.options.get("args") or {}
    if megatron.is_args(args):
        heads, groups, _ = megatron.heads(args)
        if heads % tp or (groups % tp and tp % groups):
            raise UsageError(
                f"target.tp={tp}: Megatron does not divide {heads} attention heads in {groups} groups by {tp} ranks: heads have to "
                "be a multiple of target.tp, groups a multiple or a divisor."
            )
    if vpp > 1 and pp < 2:
        raise UsageError(
            f"target.vpp={vpp} with target.pp={pp}: only stages of a pipeline have virtual ones. Give target.pp too."
        )
    if ep > 1 and not any(ranks.EXPERTS in e.name for e in spec.entries):
        raise UsageError(f"target.ep={ep}: the model has no experts. Leave it out.")


def _num_layers(spec: Spec) -> int:
    """How many layers there are; names that are not Megatron's are refused."""
    known = re.compile(r"(decoder|embedding|output_layer|mtp)\.")
    for entry in spec.entries:
        if not known.match(entry.name) or re.match(r"decoder\.layers\.\D", entry.name):
            raise UsageError(
                f"target.format=megatron: {entry.name!r} is not what a layer of Megatron is called. Leave target.dialect and "
                "target.key out, and give the model's family if it was not found: model=FAMILY. What unmatched=keep has kept is "
                "left out with unmatched=drop. Of a model of no known family tensors of all layers are not taken apart: save it "
                "with Megatron's --ckpt-format torch."
            )
    return _count(e.name for e in spec.entries)


def _count(names: Iterable[str], layer: re.Pattern[str] = ranks.LAYER) -> int:
    return 1 + max((int(m[2]) for n in names if (m := layer.fullmatch(n))), default=-1)


def partition(layers: int, pp: int, vpp: int, asked: Sequence[int] | None) -> list[int]:
    """How many layers each stage of each virtual chunk has, chunk by chunk: `partition(8, 2, 2, None)` -> `[2, 2, 2, 2]`."""
    count = pp * vpp
    if asked:
        if len(asked) != count or sum(asked) != layers:
            raise UsageError(
                f"target.partition={list(asked)} are {len(asked)} stages of {sum(asked)} layers; the model has {layers} layers, "
                f"target.pp={pp} and target.vpp={vpp} make {count} stages."
            )
        return [int(n) for n in asked]
    if layers % count:
        raise UsageError(
            f"{layers} layers cannot be divided evenly into target.pp={pp} x target.vpp={vpp} stages; give target.partition=[...]."
        )
    return [layers // count] * count


def _parallel_args(
    tp: int, pp: int, vpp: int, ep: int, stages: Sequence[int], asked: Any, further: int
) -> dict[str, Any]:
    args: dict[str, Any] = dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=tp,
        ckpt_format="torch",
    )
    return args | pipeline.args(stages, vpp, bool(asked), further)


def _folder(rank: Rank) -> str:
    stage = f"_{rank.p:03d}" if rank.pp > 1 else ""
    return f"mp_rank_{rank.t:02d}{stage}" + (f"_{rank.e:03d}" if rank.ep > 1 else "")
