"""Megatron-LM's own checkpoints: `iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one for each model-parallel rank.

Facts: Megatron-LM to core 0.16, files compared with those modules' own state dicts; older names and QKV orders from its
source. A rank's tensors become boxes of whole ones, under the names of megatron-core's distributed checkpoints: layers
are counted over all stages, experts are one tensor, and gates lie before what they gate, not rank by rank.

Invariant: how a rank's tensor lies in the whole is said once (`Cut`), and read in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import megatron
from ckpt_dist.box import ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import pickles
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import Layout, Spec
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats.torch_dist import args_of

FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?")
FILES = ("model_optim_rng.pt", "model_rng.pt")
EXPERTS = "mlp.experts.experts."
DIVIDED = (  # the dim that tensor-parallel ranks divide, by the end of a name; what is not here each rank has whole
    (r"word_embeddings\.weight", 0),
    (r"output_layer\.weight", 0),
    (r"linear_qkv\.(weight|bias)", 0),
    (r"linear_(q|q_up|kv_up|q_down|kv_down)_proj\.weight", 0),
    (r"core_attention\.softmax_offset", 0),
    (r"linear_fc1\.(weight|bias)", 0),
    (r"(linear_proj|linear_fc2)\.weight", 1),
)
OLD = (  # names from before megatron-core, and how it calls the same
    (r"^(module\.)*", ""),
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"^word_embeddings_for_head\.", "output_layer."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"\.(self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
)
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)|(linear_fc[12])\.(weight|bias)(\d+))"
)
GROUPED = re.compile(r"mlp\.experts\.weight([12])")

Place = tuple[int, int, int]  # tensor-, pipeline- and expert-parallel rank
Piece = tuple[
    list[int], list[int], int, list[int]
]  # a box of the whole; its first element in the rank's tensor, strides


@dataclass(frozen=True)
class Cut:
    """How a rank's tensor lies in the whole: `dim` is divided by `parts`; gated: each half of it for itself."""

    dim: int | None
    parts: int = 1
    gated: bool = False

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(n * self.parts if d == self.dim else n for d, n in enumerate(shape))

    def part(self, shape: Sequence[int], name: str) -> tuple[int, ...]:
        if self.dim is not None and shape[self.dim] % (self.parts * (2 if self.gated else 1)):
            raise UsageError(
                f"target.tp={self.parts}: dim {self.dim} of {name!r} has length {shape[self.dim]}, which {self.parts} ranks "
                "cannot share evenly. Choose another target.tp, or a longer vocabulary with target.vocab_size."
            )
        return tuple(n // self.parts if d == self.dim else n for d, n in enumerate(shape))

    def pieces(self, shape: Sequence[int], strides: Sequence[int], rank: int) -> Iterator[Piece]:
        """The boxes of the whole that a rank's tensor of this shape holds."""
        if self.dim is None:
            yield [0] * len(shape), list(shape), 0, list(strides)
            return
        halves = 2 if self.gated else 1
        length = shape[self.dim] // halves
        for half in range(halves):
            start, stop = [0] * len(shape), list(shape)
            start[self.dim] = half * length * self.parts + rank * length
            stop[self.dim] = start[self.dim] + length
            yield start, stop, half * length * strides[self.dim], list(strides)


@dataclass(frozen=True)
class Part:
    """A tensor of one rank: which whole one it is part of, and the dtype and shape of that."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def claims(path: Path) -> bool:
    return path.is_dir() and any(FOLDER.fullmatch(p.name) and _file(p) for p in path.iterdir())


def _file(folder: Path) -> str | None:
    return next((f for f in FILES if (folder / f).is_file()), None)


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickles of all ranks; each rank's tensors become boxes of the whole ones."""
    found = {p.name: f"{p.name}/{_file(p)}" for p in sorted(path.iterdir()) if FOLDER.fullmatch(p.name) and _file(p)}
    files = list(found.values())
    trees, storages = zip(*(pt.open_archive(path / f) for f in files), strict=True)
    _same_run(path, files, trees)
    args = args_of(trees[0])
    places = _places(path, list(found), args)
    counts = tuple(max(p[k] for p in places) + 1 for k in range(3))
    offsets = _layer_offsets(path, files, trees, places, args)
    entries: dict[str, Entry] = {}
    rows: list[tuple[str, Piece, int, int]] = []
    extras: dict[str, Extra] = {}
    for number, (tree, held, place) in enumerate(zip(trees, storages, places, strict=True)):
        for key in tree:
            if not key.startswith("model") or not isinstance(tree[key], Mapping):
                extras.setdefault(key, Extra(key, (key,), "optimizer" if key.startswith("opt") else "state"))
        for chunk, state in enumerate(_models(tree)):
            first = offsets[chunk, place[1]]
            version = float(tree.get("checkpoint_version") or 0)
            for part, ref in _parts(path / files[number], state, args, place, counts, first, version):
                entry = Entry(part.name, part.dtype, part.shape, (part.name,))
                if entries.setdefault(part.name, entry) != entry:
                    raise CheckpointError(
                        f"{path / files[number]}: {part.name!r} is {part.dtype}{list(part.shape)}, another rank has "
                        f"{entries[part.name].dtype}{list(entries[part.name].shape)}. The files are of two models."
                    )
                at = pt.storage_record(held, ref, f"{path / files[number]}: {part.name}")
                rows += [(part.name, piece, number, at + piece[2] * itemsize(part.dtype)) for piece in part.pieces]
    about = {"tp": counts[0], "pp": counts[1], "vpp": max(c for c, _ in offsets) + 1, "ep": counts[2]}
    chunks = _chunks(list(entries), rows)
    return Catalog(
        "megatron", str(path), tuple(files), tuple(entries.values()), chunks, tuple(extras.values()), args, about=about
    )


def _same_run(path: Path, files: Sequence[str], trees: Sequence[Any]) -> None:
    for file, tree in zip(files, trees, strict=True):
        if not isinstance(tree, Mapping) or not _models(tree):
            raise CheckpointError(f"{path / file} holds no model: a dict with the key model (or model0) is expected.")
        if tree.get("iteration") != trees[0].get("iteration"):
            raise CheckpointError(
                f"{path / file} is of iteration {tree.get('iteration')}, {files[0]} of {trees[0].get('iteration')}. "
                "The files are of two saves; fetch the checkpoint again."
            )


def _models(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The model, or its chunks in the order of virtual stages."""
    keys = (
        ["model"] if isinstance(tree.get("model"), Mapping) else [k for k in tree if re.fullmatch(r"model\d+", str(k))]
    )
    return [tree[k] for k in sorted(keys, key=lambda k: (len(k), k))]


def _places(path: Path, names: Sequence[str], args: Mapping[str, Any]) -> list[Place]:
    """The ranks of each folder. `mp_rank_00_001` may be a stage or a group of experts; args tell."""
    pipeline = int(args.get("pipeline_model_parallel_size") or 1)
    experts = int(args.get("expert_model_parallel_size") or 1)
    places = []
    for name in names:
        t, p, e = (int(n) if n else None for n in FOLDER.fullmatch(name).groups())  # type: ignore[union-attr]
        if p is not None and e is None and pipeline == 1:
            if experts == 1:
                raise CheckpointError(
                    f"{path / name}: whether its second number is a pipeline stage or an expert-parallel rank is not said, "
                    "args have neither. Was args left out of the file?"
                )
            p, e = None, p
        places.append((t or 0, p or 0, e or 0))
    sizes = (int(args.get("tensor_model_parallel_size") or 0), pipeline, experts)
    need = [max(size, *(p[k] + 1 for p in places)) for k, size in enumerate(sizes)]
    lost = [
        (t, p, e) for t in range(need[0]) for p in range(need[1]) for e in range(need[2]) if (t, p, e) not in places
    ]
    if lost:
        t, p, e = lost[0]
        raise CheckpointError(
            f"{path}: the files of {len(lost)} of {need[0] * need[1] * need[2]} ranks are missing, first of tensor-parallel rank {t}, "
            f"stage {p}, expert-parallel rank {e} (there are {need[0]} x {need[1]} x {need[2]}). Fetch them."
        )
    etp = args.get("expert_tensor_parallel_size")
    if need[0] > 1 and args.get("num_experts", args.get("num_moe_experts")) and etp not in (None, need[0]):
        raise CheckpointError(f"{path}: experts are divided by {etp} ranks, the rest by {need[0]}; that is not read.")
    return places


def _layer_offsets(
    path: Path, files: Sequence[str], trees: Sequence[Any], places: Sequence[Place], args: Mapping[str, Any]
) -> dict[tuple[int, int], int]:
    """The first layer of each (virtual chunk, stage): layers are dealt to the stages of a chunk before those of the next."""
    counts: dict[tuple[int, int], int] = {}
    for file, tree, place in zip(files, trees, places, strict=True):
        for chunk, state in enumerate(_models(tree)):
            numbers = {int(m[1]) for n in _flat(state) if (m := LAYER.fullmatch(n))}
            if numbers != set(range(len(numbers))):
                raise CheckpointError(
                    f"{path / file} lacks layer {min(set(range(max(numbers))) - numbers)} of its stage."
                )
            if counts.setdefault((chunk, place[1]), len(numbers)) != len(numbers):
                raise CheckpointError(
                    f"{path / file} has {len(numbers)} layers, another rank of stage {place[1]} has {counts[chunk, place[1]]}."
                )
    offsets, first = {}, 0
    for key in sorted(counts):
        offsets[key], first = first, first + counts[key]
    if args.get("num_layers") not in (None, first):
        raise CheckpointError(f"{path} holds {first} layers, args say num_layers={args['num_layers']}.")
    return offsets


def _flat(state: Mapping[str, Any]) -> dict[str, pickles.TensorRef]:
    """A model's tensors under megatron-core's names; old ones nest them in dicts."""
    found = {}
    for place, leaf in pt.walk(state):
        if isinstance(leaf, pickles.TensorRef):
            name = ".".join(map(str, place))
            for old, new in OLD:
                name = re.sub(old, new, name)
            found[name] = leaf
    return found


def _parts(
    path: Path,
    state: Mapping[str, Any],
    args: Mapping[str, Any],
    place: Place,
    counts: tuple[int, ...],
    first: int,
    version: float,
) -> Iterator[tuple[Part, pickles.TensorRef]]:
    """What the tensors of one rank are; those that others have as well are taken from one."""
    tensors = _flat(state)
    t, _, e = place
    for name, ref in tensors.items():
        layer = LAYER.fullmatch(name)
        inner = layer[2] if layer else name
        prefix = f"decoder.layers.{first + int(layer[1])}." if layer else ""
        siblings = {
            n: tensors.get(name[: -len(inner)] + n)
            for n in ("mlp.linear_fc2.weight", "self_attention.linear_kv_up_proj.weight")
        }
        if (hit := EXPERT.fullmatch(inner)) is not None:
            number, linear, kind = (hit[1], hit[2], hit[3]) if hit[1] else (hit[6], hit[4], hit[5])
            local = _local_experts(tensors, name[: -len(inner)])
            fc2 = (
                ref
                if linear == "linear_fc2"
                else tensors.get(name.replace("linear_fc1", "linear_fc2").replace("bias", "weight"))
            )
            cut = _cut(f"{EXPERTS}{linear}.{kind}", ref.shape, fc2, counts[0], args)
            x = e * local + int(number)
            pieces = [([x, *lo], [x + 1, *hi], at, [0, *st]) for lo, hi, at, st in cut.pieces(ref.shape, ref.stride, t)]
            shape = (local * counts[2], *cut.whole(ref.shape))
            if cut.dim is not None or t == 0:
                yield Part(f"{prefix}{EXPERTS}{linear}.{kind}", ref.dtype, shape, tuple(pieces)), ref
        elif (hit := GROUPED.fullmatch(inner)) is not None:
            if not args.get("num_experts", args.get("num_moe_experts")):
                raise CheckpointError(
                    f"{path}: {name!r} holds several experts; args do not say how many (num_experts)."
                )
            yield (
                _grouped(
                    f"{prefix}{EXPERTS}linear_fc{hit[1]}.weight", hit[1] == "1", ref, tensors, name, place, counts, args
                ),
                ref,
            )
        else:
            cut = _cut(inner, ref.shape, siblings["mlp.linear_fc2.weight"] if "shared" not in inner else
                       tensors.get(name.replace("linear_fc1", "linear_fc2").replace("bias", "weight")), counts[0], args)  # fmt: skip
            if e or (cut.dim is None and t):
                continue
            pieces = list(cut.pieces(ref.shape, ref.stride, t))
            if "linear_qkv." in inner and version < 2 and "layer_norm" not in inner:
                pieces = list(_old_qkv(path, ref, args, version, t, counts[0]))
            latent = siblings["self_attention.linear_kv_up_proj.weight"] is not None
            yield Part(prefix + _as_stored(inner, "mlp.linear_fc2.weight" in inner or siblings["mlp.linear_fc2.weight"] is not None, latent),
                       ref.dtype, cut.whole(ref.shape), tuple(pieces)), ref  # fmt: skip


def _as_stored(inner: str, dense: bool, latent: bool) -> str:
    """A name inside a layer as distributed checkpoints have it: norms belong to the linear layer after them."""
    if not latent:
        inner = re.sub(r"^input_layernorm\.", "self_attention.linear_qkv.layer_norm_", inner)
        if dense:
            inner = re.sub(r"^pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", inner)
    return inner


def _local_experts(tensors: Mapping[str, Any], layer: str) -> int:
    names = (EXPERT.fullmatch(n[len(layer) :]) for n in tensors if n.startswith(layer))
    return 1 + max(int(m[1] or m[6]) for m in names if m)


def _cut(inner: str, shape: Sequence[int], fc2: pickles.TensorRef | None, parts: int, args: Mapping[str, Any]) -> Cut:
    """How ranks divide a tensor; a feed-forward with a gate has twice as many rows as what follows has columns."""
    dim = next((d for end, d in DIVIDED if re.search(rf"(^|\.){end}$", inner)), None)
    if "_down_proj" in inner and dim is not None:  # Transformer Engine gives each rank all of it
        lora = args.get("q_lora_rank" if "linear_q_" in inner else "kv_lora_rank") or 0
        rope = 0 if "linear_q_" in inner else args.get("qk_pos_emb_head_dim") or 0
        dim = None if shape[0] == lora + rope else 0
    gated = "linear_fc1." in inner and "layer_norm" not in inner and fc2 is not None and shape[0] == 2 * fc2.shape[1]
    if "layer_norm" in inner:
        dim = None
    return Cut(dim, parts, gated) if dim is not None else Cut(None)


def _grouped(
    name: str, gated: bool, ref: pickles.TensorRef, tensors: Mapping[str, pickles.TensorRef], own: str, place: Place,
    counts: tuple[int, ...], args: Mapping[str, Any],
) -> Part:  # fmt: skip
    """Experts of one tensor: expert k's slice of `weight1` and of `weight2` is its matrix, columns first."""
    experts = int(args.get("num_experts") or args["num_moe_experts"])
    local, (t, _, e), parts = experts // counts[2], place, counts[0]
    one, two = tensors[own[:-1] + "1"], tensors[own[:-1] + "2"]
    width, inside = one.shape[0], two.shape[0] // local
    halves = one.shape[1] // (inside * local) if gated else 1
    pieces: list[Piece] = []
    for k in range(local):
        x = e * local + k
        for half in range(halves):
            lo = half * inside * parts + t * inside
            if gated:
                step = halves * inside
                pieces.append(([x, lo, 0], [x + 1, lo + inside, width], k * width * step + half * inside, [0, 1, step]))
            else:
                pieces.append(([x, 0, lo], [x + 1, width, lo + inside], k * inside * width, [0, 1, width]))
    shape = (experts, halves * inside * parts, width) if gated else (experts, width, inside * parts)
    return Part(name, ref.dtype, shape, tuple(pieces))


def _old_qkv(
    path: Path, ref: pickles.TensorRef, args: Mapping[str, Any], version: float, rank: int, parts: int
) -> Iterator[Piece]:
    """Rows of the fused QKV before version 2: q, k, v of all heads (0), or element by element (1)."""
    if not megatron.is_args(args):
        raise CheckpointError(
            f"{path}: how many heads its fused QKV (version {version:g}) has is in args, which it lacks."
        )
    count, groups, width = megatron.heads(args)
    if count != groups or ref.shape[0] * parts != 3 * count * width:
        raise CheckpointError(
            f"{path}: {count} heads of {width} in {groups} groups do not fit {ref.shape[0]} rows of {parts} ranks."
        )
    heads, rest = count // parts, list(ref.shape[1:])
    row, more = ref.stride[0], list(ref.stride[1:])
    for head in range(heads):
        for k in range(3):
            lo = ((rank * heads + head) * 3 + k) * width
            at = (k * heads + head) * width * row if version < 1 else (head * width * 3 + k) * row
            yield [lo] + [0] * len(rest), [lo + width, *rest], at, [row if version < 1 else 3 * row, *more]


def _chunks(names: Sequence[str], rows: Sequence[tuple[str, Piece, int, int]]) -> Chunks:
    number = {n: k for k, n in enumerate(names)}
    width = max((len(p[0]) for _, p, *_ in rows), default=0)
    return Chunks(
        ints([number[n] for n, *_ in rows]),
        padded([p[0] for _, p, *_ in rows], width, 0),
        padded([p[1] for _, p, *_ in rows], width, 1),
        padded([p[3] for _, p, *_ in rows], width, 0),
        ints([f for *_, f, _ in rows]),
        ints([a for *_, a in rows]),
    )


# ---- writing


def lay_out(spec: Spec) -> Layout:
    """A file for each (tensor, pipeline, expert) rank, as Megatron-LM's loader expects it under the same layout."""
    o = spec.options
    tp, pp, vpp, ep = (int(o.get(k) or 1) for k in ("tp", "pp", "vpp", "ep"))
    step = int(o.get("step") or 1)
    numbers = [int(m[1]) for entry in spec.entries if (m := LAYER.fullmatch(entry.name))]
    layers = max(numbers, default=-1) + 1
    if not layers:
        raise UsageError(
            f"target.format=megatron: {spec.entries[0].name!r} is no tensor of Megatron's. Leave target.dialect out (auto), or "
            "name the family: model=FAMILY."
        )
    stages = partition(layers, pp, vpp, o.get("partition"))
    args = dict(o.get("args") or {}) | _parallel_args(tp, pp, vpp, ep, stages, o.get("partition"))
    places = [(t, p, e) for p in range(pp) for t in range(tp) for e in range(ep)]
    names = [f"{megatron.STEPS.format(step)}/{_folder(place, pp, ep)}/{FILES[0]}" for place in places]
    parts: list[Entry] = []
    groups: list[list[int]] = []
    pieces: list[tuple[int, Piece]] = []  # of a part, the box of the whole
    of_part: list[int] = []
    for place in places:
        group = []
        for path, entry, shape, boxes in _rank(
            spec.entries, place, (tp, pp, ep), stages, str(o.get("spec") or "te"), args
        ):
            group.append(len(parts))
            pieces += [(entry, box) for box in boxes]
            of_part += [len(parts)] * len(boxes)
            parts.append(Entry(path[-1], spec.entries[entry].dtype, shape, path))
        groups.append(group)
    common = tuple(
        Extra(k, (k,), "state", v)
        for k, v in {"args": pickles.Namespace(args), "checkpoint_version": 3.0, "iteration": step}.items()
    )
    layout = pt.lay_out_files(replace(spec, entries=tuple(parts), extras=()), names, groups, common)
    held = layout.catalog.chunks
    at = [
        int(held.offset[k]) + box[2] * itemsize(spec.entries[e].dtype)
        for k, (e, box) in zip(of_part, pieces, strict=True)
    ]
    width = max(len(e.shape) for e in spec.entries)
    chunks = Chunks(
        ints([e for e, _ in pieces]),
        padded([b[0] for _, b in pieces], width, 0),
        padded([b[1] for _, b in pieces], width, 1),
        padded([b[3] for _, b in pieces], width, 0),
        held.file[np.array(of_part)],
        ints(at),
    )
    late = {megatron.TRACKER: lambda: str(step).encode()}
    return replace(layout, catalog=Catalog("megatron", "", tuple(names), spec.entries, chunks), late=late)


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


def _parallel_args(tp: int, pp: int, vpp: int, ep: int, stages: Sequence[int], asked: Any) -> dict[str, Any]:
    args: dict[str, Any] = dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=tp,
        ckpt_format="torch",
        no_save_optim=True,
        no_save_rng=True,
    )
    if asked and vpp == 1 and len(set(stages[1:-1])) < 2:
        args |= dict(decoder_first_pipeline_num_layers=stages[0], decoder_last_pipeline_num_layers=stages[-1])
    return args


def _folder(place: Place, pp: int, ep: int) -> str:
    t, p, e = place
    return f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")


def _rank(
    entries: Sequence[Entry],
    place: Place,
    counts: tuple[int, int, int],
    stages: Sequence[int],
    spec: str,
    args: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, ...], int, tuple[int, ...], list[Piece]]]:
    """What one rank holds: the path in its dict, which entry, its shape there, and the boxes of the whole."""
    t, p, e = place
    tp, pp, ep = counts
    chunks = len(stages) // pp
    shapes = {x.name: x.shape for x in entries}
    tied = "output_layer.weight" not in shapes
    first, last = p == 0, p == pp - 1
    for chunk in range(chunks):
        key = "model" if chunks == 1 else f"model{chunk}"
        lo = sum(stages[: chunk * pp + p])
        mine = range(lo, lo + stages[chunk * pp + p])
        for number, entry in enumerate(entries):
            layer = LAYER.fullmatch(entry.name)
            inner = layer[2] if layer else entry.name
            local = [f"decoder.layers.{int(layer[1]) - lo}." if layer else ""]
            if layer:
                if int(layer[1]) not in mine:
                    continue
            elif inner.startswith("embedding."):
                local = [""] if first and chunk == 0 else []
                if tied and pp > 1 and last and chunk == chunks - 1 and "word_embeddings" in inner:
                    yield from _whole((key, "output_layer.weight"), number, entry, Cut(0, tp), t)
                if not local:
                    continue
            elif not (last and chunk == chunks - 1):
                continue
            fc2 = shapes.get(entry.name.replace("linear_fc1", "linear_fc2").replace(".bias", ".weight"))
            gated = (
                "linear_fc1." in inner and fc2 is not None and entry.shape[-1 if "bias" in inner else -2] == 2 * fc2[-1]
            )
            if inner.startswith(EXPERTS):
                yield from _experts(
                    key, local[0], inner, number, entry, Cut(_dim(inner, args, spec), tp, gated), t, e, ep, spec
                )
                continue
            dim = _dim(inner, args, spec)
            yield from _whole(
                (key, local[0] + _in_module(inner, spec)),
                number,
                entry,
                Cut(dim, tp if dim is not None else 1, gated),
                t,
            )


def _dim(inner: str, args: Mapping[str, Any], spec: str) -> int | None:
    if "layer_norm" in inner or ("_down_proj" in inner and spec == "te"):
        return None
    return next((d for end, d in DIVIDED if re.search(rf"(^|\.){end}$", inner)), None)


def _in_module(inner: str, spec: str) -> str:
    """A name inside a layer as the modules call it; Megatron's own layers have norms of their own."""
    if spec == "local":
        inner = inner.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        inner = inner.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    return inner


def _whole(
    path: tuple[str, str], number: int, entry: Entry, cut: Cut, rank: int
) -> Iterator[tuple[tuple[str, ...], int, tuple[int, ...], list[Piece]]]:
    shape = cut.part(entry.shape, entry.name)
    yield path, number, shape, list(cut.pieces(shape, _strides(shape), rank))


def _experts(
    key: str, layer: str, inner: str, number: int, entry: Entry, cut: Cut, t: int, e: int, ep: int, spec: str
) -> Iterator[tuple[tuple[str, ...], int, tuple[int, ...], list[Piece]]]:
    """Each expert of this rank as a tensor of its own."""
    total, rest = entry.shape[0], entry.shape[1:]
    if total % ep:
        raise UsageError(f"target.ep={ep}: {total} experts cannot be divided evenly. Choose another target.ep.")
    linear, kind = inner[len(EXPERTS) :].split(".")
    shape = cut.part(rest, entry.name)
    for k in range(total // ep):
        x = e * (total // ep) + k
        own = f"local_experts.{k}.{linear}.{kind}" if spec == "local" else f"{linear}.{kind}{k}"
        boxes = [([x, *lo], [x + 1, *hi], at, [0, *st]) for lo, hi, at, st in cut.pieces(shape, _strides(shape), t)]
        yield (key, f"{layer}mlp.experts.{own}"), number, shape, boxes


def _strides(shape: Sequence[int]) -> list[int]:
    return [int(np.prod(shape[k + 1 :], dtype=np.int64)) for k in range(len(shape))]
