"""Meta's Llama folders: `consolidated.NN.pth`, one for each model-parallel rank, and `params.json`.

Facts: llama and llama-models up to Llama 3.3. A file is a torch.save of a flat dict, the same names in each. Rows of
wq, wk, wv, w1, w3 and output are divided, columns of wo and w2; the embedding by columns in Llama 2 and by rows in
Llama 3, which `dim` and the shapes tell, never a version number. Norms are in every file: of equal boxes one is read.

Invariant: all shards agree with each other and with params.json, or the two numbers that differ are named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist.box import ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded
from ckpt_dist.configs import read_config
from ckpt_dist.errors import CheckpointError, UsageError, shown
from ckpt_dist.files import inert
from ckpt_dist.formats import Layout, Spec, holders
from ckpt_dist.formats import torch as pt
from ckpt_dist.parallel import even
from ckpt_dist.ranks import unshared

FILE = re.compile(r"consolidated\.(\d\d)\.pth")
PARAMS = "params.json"
EMBEDDING, ROWS, COLUMNS = "tok_embeddings.weight", 0, 1
DIVIDED: dict[str, int | None] = {  # which dim the ranks divide; None: each has all of it
    EMBEDDING: ROWS,
    "attention.wq.weight": ROWS,
    "attention.wk.weight": ROWS,
    "attention.wv.weight": ROWS,
    "attention.wo.weight": COLUMNS,
    "feed_forward.w1.weight": ROWS,
    "feed_forward.w3.weight": ROWS,
    "feed_forward.w2.weight": COLUMNS,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
    "norm.weight": None,
    "output.weight": ROWS,
    "rope.freqs": None,
}
SPLITS = {"vocabulary": ROWS, "hidden": COLUMNS}  # of the embedding: Llama 3, Llama 2

Shard = dict[str, tuple[inert.TensorRef, int]]  # each tensor and its address in the file


def claims(path: Path) -> bool:
    """A folder with such files, or one of the files: a shard alone is no model, so it stands for all of them."""
    return any(FILE.fullmatch(p.name) for p in (path.iterdir() if path.is_dir() else [path]))


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickles of all ranks; each rank's part of a tensor becomes a chunk at its place in the whole."""
    path = path if path.is_dir() else path.parent
    params = _params(path)
    names = _files(path)
    shards, extras = zip(*(_shard(path / name) for name in names), strict=True)
    _alike(path, names, shards)
    dims = _dims(path, shards[0], len(shards), params)
    entries = tuple(_entry(name, ref, dims[name], len(shards)) for name, (ref, _) in shards[0].items())
    _fits(path, entries, len(shards), params)
    rows = [
        (e, *_box(entry.shape, dims[entry.name], rank, len(shards)), shard[entry.name][0].stride, rank, at)
        for rank, shard in enumerate(shards)
        for e, entry in enumerate(entries)
        for at in [shard[entry.name][1]]
    ]
    about = {"ranks": len(shards), "embedding": dims.get(EMBEDDING) if len(shards) > 1 else None}
    return Catalog("meta", str(path), tuple(names), entries, _chunks(rows), extras[0], params, about=about)


def _params(path: Path) -> dict[str, Any]:
    """params.json, if there is one; its lengths are whole numbers."""
    params = read_config(path / PARAMS) if (path / PARAMS).is_file() else {}
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size"):
        value = params.get(key)
        if value is not None and (type(value) is not int or (value < 1 and key != "vocab_size")):
            raise CheckpointError(f"{path / PARAMS}: {key} is {shown(value)}, a whole number of 1 or more is expected.")
    for key in ("quantization_args", "lora_args"):
        if params.get(key):
            raise CheckpointError(f"{path / PARAMS} has {key}: quantised files and adapters are not read yet.")
    return params


def _files(path: Path) -> list[str]:
    """The files of all ranks in order; one that is missing in between is named."""
    found = {int(m[1]): p.name for p in path.iterdir() if (m := FILE.fullmatch(p.name))}
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise CheckpointError(
            f"{path / f'consolidated.{missing[0]:02d}.pth'} is missing: {len(found)} shards are there, "
            f"up to {found[max(found)]}. Fetch it again."
        )
    return [found[rank] for rank in sorted(found)]


def _shard(path: Path) -> tuple[Shard, tuple[Extra, ...]]:
    tree, storages = pt.open_archive(path)
    shard: Shard = {}
    extras = []
    for place, leaf in pt.walk(tree):
        name = ".".join(map(str, place))
        if isinstance(leaf, inert.TensorRef):
            shard[name] = (leaf, pt.storage_record(storages, leaf, f"{path}: {name}"))
        else:
            extras.append(Extra(name, place, "state", leaf))
    return shard, tuple(extras)


def _alike(path: Path, names: Sequence[str], shards: Sequence[Shard]) -> None:
    """Every rank has the same names, each with the same shape and dtype."""
    first = {name: (ref.shape, ref.dtype) for name, (ref, _) in shards[0].items()}
    for file, shard in zip(names, shards, strict=True):
        odd = sorted(set(first) ^ set(shard))
        if odd:
            lacking, having = (file, names[0]) if odd[0] in first else (names[0], file)
            raise CheckpointError(
                f"{path / lacking} lacks {odd[0]!r}, which {having} has. The shards are of two models."
            )
        for name, (ref, _) in shard.items():
            if (ref.shape, ref.dtype) != first[name]:
                shape, dtype = first[name]
                raise CheckpointError(
                    f"{path / file}: {name!r} is {ref.dtype}{list(ref.shape)}, in {names[0]} it is {dtype}{list(shape)}. "
                    "The shards are of two models."
                )


def _part(name: str) -> str:
    """A name without its layer: `layers.3.attention.wq.weight` -> `attention.wq.weight`."""
    return re.sub(r"^layers\.\d+\.", "", name)


def _dims(path: Path, shard: Shard, count: int, params: Mapping[str, Any]) -> dict[str, int | None]:
    """Which dim of each tensor the ranks divide. One file holds all, whatever its names are."""
    unknown = [name for name in shard if _part(name) not in DIVIDED]
    if unknown and count > 1:
        raise CheckpointError(
            f"{path}: how {count} ranks divide {unknown[0]!r} is not known ({len(unknown)} such names); only the text models "
            "Llama 1 to 3.3 are. Merge the shards first with the tool that wrote them."
        )
    dims = {name: DIVIDED.get(_part(name)) for name in shard}
    if EMBEDDING in shard and count > 1:
        dims[EMBEDDING] = _embedding(path, shard, count, params)
    return dims


def _embedding(path: Path, shard: Shard, count: int, params: Mapping[str, Any]) -> int:
    """The dim along which the embedding is divided: [V/2, dim] by rows, [V, dim/2] by columns."""
    shape = shard[EMBEDDING][0].shape
    dim = params.get("dim") or (shard["norm.weight"][0].shape[-1] if "norm.weight" in shard else None)
    if len(shape) == 2 and shape[1] == dim:
        return ROWS
    if len(shape) == 2 and shape[1] * count == dim:
        return COLUMNS
    raise CheckpointError(
        f"{path}: {EMBEDDING} is {list(shape)} in each of {count} files, and dim is {dim}: neither all columns ({dim}) nor "
        f"an equal part of them ({(dim or 0) / count:g}). Is a shard missing, or params.json that of another model?"
    )


def _entry(name: str, ref: inert.TensorRef, dim: int | None, count: int) -> Entry:
    if dim is not None and dim >= len(ref.shape):
        raise CheckpointError(f"{name!r} has shape {list(ref.shape)}, a matrix is expected.")
    shape = tuple(n * count if d == dim else n for d, n in enumerate(ref.shape))
    return Entry(name, ref.dtype, shape, (name,))


def _fits(path: Path, entries: Sequence[Entry], count: int, params: Mapping[str, Any]) -> None:
    """What params.json says of lengths and layers is what the files hold together."""
    said = _lengths(params)
    for entry in entries:
        for d, wanted in enumerate(said.get(_part(entry.name), ())):
            if wanted and d < len(entry.shape) and entry.shape[d] != wanted:
                each = DIVIDED[_part(entry.name)] == d and count * wanted / entry.shape[d]
                hint = f"{each:.0f} shards would fit" if each and each % 1 == 0 else "Is it that of another model?"
                raise CheckpointError(
                    f"{path}: {entry.name!r} of {count} shards has the shape {list(entry.shape)}, {entry.shape[d]} along "
                    f"dim {d}; {PARAMS} says {wanted}. {hint}"
                )
    layers = {int(m[1]) for e in entries if (m := re.match(r"layers\.(\d+)\.", e.name))}
    if "n_layers" in params and not len(layers) == params["n_layers"] == 1 + max(layers, default=-1):
        raise CheckpointError(f"{path} holds {len(layers)} layers, {PARAMS} says n_layers={params['n_layers']}.")


def _lengths(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The whole shapes that follow from params.json; 0 where it does not say."""
    dim, heads = params.get("dim"), params.get("n_heads")
    if not dim or not heads:
        return {}
    head = params.get("head_dim") or dim // heads
    groups = (params.get("n_kv_heads") or heads) * head
    words = max(params.get("vocab_size") or 0, 0)  # -1: that of the tokenizer
    return {
        EMBEDDING: (words, dim),
        "attention.wq.weight": (heads * head, dim),
        "attention.wk.weight": (groups, dim),
        "attention.wv.weight": (groups, dim),
        "attention.wo.weight": (dim, heads * head),
        "norm.weight": (dim,),
        "output.weight": (words, dim),
    }


def _box(shape: Sequence[int], dim: int | None, rank: int, count: int) -> tuple[list[int], list[int]]:
    """What a rank holds: `_box((8, 4), 0, 1, 2)` -> `([4, 0], [8, 4])`."""
    parts = [even(n, count)[rank] if d == dim else (0, n) for d, n in enumerate(shape)]
    return [lo for lo, _ in parts], [hi for _, hi in parts]


def _chunks(rows: Sequence[tuple[int, list[int], list[int], Sequence[int], int, int]]) -> Chunks:
    entry, start, stop, strides, file, offset = zip(*rows, strict=True) if rows else ((),) * 6
    width = max(map(len, start), default=0)
    boxes = (padded(start, width, 0), padded(stop, width, 1), padded(strides, width, 0))
    return Chunks(ints(entry), *boxes, ints(file), ints(offset))


def lay_out(spec: Spec) -> Layout:
    """`target.tp` files as torch.save would write each rank's state dict, aligned as pt files are."""
    count = int(spec.options.get("tp") or 1)
    dims = _target_dims(spec, count)
    boxes = [_box(e.shape, dims[e.name], rank, count) for rank in range(count) for e in spec.entries]
    parts = [
        replace(e, shape=tuple(hi - lo for lo, hi in zip(*box, strict=True)))
        for e, box in zip(spec.entries * count, boxes, strict=True)
    ]
    files = [f"consolidated.{rank:02d}.pth" for rank in range(count)]
    groups = np.arange(len(parts)).reshape(count, -1).tolist()
    layout = pt.lay_out_files(replace(spec, entries=tuple(parts), extras=()), files, groups)
    width = layout.catalog.chunks.start.shape[1]
    chunks = Chunks.dense(
        np.tile(np.arange(len(spec.entries)), count),
        padded([lo for lo, _ in boxes], width, 0),
        padded([hi for _, hi in boxes], width, 1),
        layout.catalog.chunks.file,
        layout.catalog.chunks.offset,
    )
    about = {"guesses": _guesses(dims, spec, count)}
    catalog = Catalog("meta", "", tuple(files), spec.entries, chunks, about=about)
    return replace(layout, catalog=catalog, holders=_holders(spec.options.get("placement"), count))


def _holders(placement: Sequence[int] | None, count: int) -> tuple[frozenset[int], ...]:
    """The nodes of each file: ranks that follow each other load those that do."""
    if not placement:
        return ()
    if len(placement) % count:
        raise UsageError(
            f"target.placement: {len(placement)} ranks cannot load {count} files of target.tp={count}. "
            "Give target.placement=[...], the node of each rank of the job that will load this."
        )
    return holders(placement, [r % count for r in range(len(placement))])


def _guesses(dims: Mapping[str, int | None], spec: Spec, count: int) -> tuple[str, ...]:
    told = spec.options.get("embedding", "auto") != "auto" or (
        spec.source and spec.source.about.get("embedding") is not None
    )
    if count == 1 or told or EMBEDDING not in dims:
        return ()
    return ("the embedding is divided along the vocabulary, as in Llama 3; Llama 2 needs target.embedding=hidden",)


def _target_dims(spec: Spec, count: int) -> dict[str, int | None]:
    """Which dim of each tensor to divide; a name that Meta does not know and a length that does not divide are refused."""
    asked, like = (
        str(spec.options.get("embedding", "auto")),
        spec.source.about.get("embedding") if spec.source else None,
    )
    dims: dict[str, int | None] = {}
    for entry in spec.entries:
        if _part(entry.name) not in DIVIDED:
            raise UsageError(
                f"target.format=meta: {entry.name!r} is no tensor of Meta's Llama. Leave target.dialect and target.key out, "
                "or use another target.format."
            )
        dim = dims[entry.name] = DIVIDED[_part(entry.name)]
        if entry.name == EMBEDDING:
            dim = dims[entry.name] = SPLITS.get(asked, ROWS if like is None else like)
        if dim is not None and entry.shape[dim] % count:
            raise UsageError(unshared(count, dim, entry.name, entry.shape))
    groups = (spec.options.get("sizes") or {}).get("g")
    if count > 1 and (groups is None or groups % count):
        have = f"the model has {groups}" if groups else "how many there are is not known: give model.config=PATH"
        raise UsageError(
            f"target.tp={count}: each rank holds whole key-value heads, and {have}. Choose another target.tp."
        )
    return dims
