"""Buckets of Megatron's distributed optimizer in a distributed checkpoint (`dp_reshardable`), as slots of weights.

Facts: megatron-core 0.16.1. Each tensor- and pipeline-parallel rank has flat tensors, cut by data-parallel ranks, which
no parameter's name is on: `optimizer.distributed.dp_group_idx_3.gbuf_idx_0.dtype_(...).bucket_idx_0.exp_avg`. In them are
the rank's parameters in reverse order, each at a multiple of 64 elements.

Invariant: what a rank holds follows from the model and the args alone, and every parameter begins and ends where the
ranks that saved had a piece begin and end; else nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import numpy as np

from ckpt_dist import megatron, ranks, zero
from ckpt_dist.box import Ints, ints
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded
from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.formats import BESIDE, dcp
from ckpt_dist.formats._megatron_optimizer import ALIGNED, BUFFER, EXPERT, RESHARDABLE, Unread
from ckpt_dist.ranks import Piecewise, Rank, strides_of

NAME = re.compile(
    r"(?:chained_(\d)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(torch\.(\w+), [^)]*\)\.bucket_idx_(\d+)\.(\w+)"
)
OBJECT = re.compile(r"(?:chained_(\d)\.)?optimizer\.distributed\.dp_group_idx_0\.(optimizer|grad_scaler)/shard_0_1")
ORDER = {  # of the modules of a layer, and of their parameters
    "local": (
        r"input_layernorm\.", r"self_attention\.core_attention\.", r"self_attention\.linear_proj\.",
        r"self_attention\.linear_q(kv|_proj|_down_proj)\.", r"self_attention\.linear_q_up_proj\.",
        r"self_attention\.linear_kv_down_proj\.", r"self_attention\.linear_kv_up_proj\.", r"self_attention\.q_layernorm\.",
        r"self_attention\.kv?_layernorm\.", r"pre_mlp_layernorm\.", r"mlp\.router\.", r"mlp\.(experts\..*)?linear_fc1\.",
        r"mlp\.(experts\..*)?linear_fc2\.", r"mlp\.shared_experts\.linear_fc1\.", r"mlp\.shared_experts\.linear_fc2\.",
        r"mlp\.shared_experts\.gate",
    ),
}  # fmt: skip
ORDER["te"] = ORDER["local"]  # norms are parts of the linear layers after them there
LAST = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
ENDS = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight", "", "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias", "output_layer.weight")  # fmt: skip


@dataclass(frozen=True)
class Flat:
    """One flat tensor: what it is called, its entry, and its pieces in order, with exact addresses."""

    optimizer: int
    group: int
    buffer: int
    dtype: str
    bucket: int
    slot: str
    entry: int
    rows: Ints


def named(catalog: Catalog) -> Catalog:
    """The same checkpoint with slots of weights instead of flat tensors."""
    found = {k: m for k, e in enumerate(catalog.entries) if (m := NAME.fullmatch(e.name))}
    if not found:
        raise Unread("they are objects (dp_zero_gather_scatter)")
    flat_rows = np.flatnonzero(np.isin(catalog.chunks.entry, list(found)))
    exact = dcp.locate(catalog, flat_rows)
    flats = []
    for k, m in found.items():
        rows = np.flatnonzero(exact.entry == k)
        rows = rows[np.argsort(exact.start[rows, 0], kind="stable")]
        flats.append(Flat(int(m[1] or 0), int(m[2]), int(m[3]), m[4], int(m[5]), m[6], k, rows))
    each, origin = _layers(catalog.entries)
    made = _placed(catalog, exact, flats, each)
    return _with(catalog, found, made, each, origin)


# ---- the model, layer by layer


def _layers(entries: Sequence[Entry]) -> tuple[list[Entry], list[tuple[int, int | None]]]:
    """Each layer's tensors as entries of their own, and which entry (and which layer in it) each is."""
    each: list[Entry] = []
    origin: list[tuple[int, int | None]] = []
    for k, entry in enumerate(entries):
        if entry.role != "weight" or BUFFER.search(entry.name):
            continue
        if re.match(r"decoder\.layers\.\D", entry.name):
            for n in range(entry.shape[0]):
                name = entry.name.replace("decoder.layers.", f"decoder.layers.{n}.", 1)
                each.append(replace(entry, name=name, shape=entry.shape[1:]))
                origin.append((k, n))
        else:
            each.append(entry)
            origin.append((k, None))
    return each, origin


def _key(spec: str, name: str) -> tuple[int, int, int, int, int]:
    """The place of a parameter in the order of its model's modules."""
    layer = ranks.LAYER.fullmatch(name)
    if layer is None:
        if name not in ENDS:
            raise Unread(f"{name!r} is of a module whose place in the order of Megatron's modules is not known.")
        return ENDS.index(name), 0, 0, 0, 0
    place = next((k for k, rule in enumerate(ORDER[spec]) if re.match(rule, layer[3])), None)
    end = layer[3].rpartition(".")[2]
    expert = re.search(r"local_experts\.(\d+)\.|\.(?:weight|bias)(\d+)$", layer[3])
    number = int(expert[1] or expert[2]) if expert else 0
    if place is None:
        raise Unread(f"{name!r} is of a module whose place in the order of Megatron's modules is not known.")
    one_by_one = spec == "local" and expert is not None  # both matrices of an expert before those of the next
    kind = LAST.index(re.sub(r"\d+$", "", end)) if re.sub(r"\d+$", "", end) in LAST else 0
    first = next(k for k, rule in enumerate(ORDER[spec]) if rule.startswith(r"mlp\.(experts"))
    return 2, int(layer[2]), first if one_by_one else place, number, place * len(LAST) + kind


def _params(each: Sequence[Entry], rank: Rank, stages: Sequence[int], spec: str) -> list[list[Piecewise]]:
    """Each virtual chunk's parameters in the order of its modules."""
    chunks: dict[str, list[Piecewise]] = {}
    for one in ranks.holds(each, rank, stages, spec):
        chunks.setdefault(one.path[0], []).append(one)
    order = sorted(chunks, key=lambda k: (len(k), k))
    return [sorted(chunks[k], key=lambda one: _key(spec, one.path[1])) for k in order]


def _stages(layers: int, args: Mapping[str, Any]) -> list[int]:
    """Layers of each stage, virtual chunk by chunk."""
    pp, vpp = (max(megatron.count(args, f"{k}pipeline_model_parallel_size"), 1) for k in ("", "virtual_"))
    ends = [args.get(f"decoder_{k}_pipeline_num_layers") for k in ("first", "last")]
    odd = [k for k in ("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
           if args.get(k)]  # fmt: skip
    rest = layers - sum(n or 0 for n in ends)
    middle = pp - sum(n is not None for n in ends)
    if odd or (any(ends) and (vpp > 1 or middle < 1)) or rest % max(middle * vpp, 1):
        raise Unread(
            f"{layers} layers in {pp} stages of {vpp} chunks, {', '.join(odd) or ends}: such stages are not known."
        )
    each = [rest // (middle * vpp)] * middle
    each = [*([ends[0]] if ends[0] is not None else []), *each, *([ends[1]] if ends[1] is not None else [])]
    return each * vpp


# ---- where its parameters lie


Row = tuple[str, int, list[int], list[int], list[int], int, int]  # slot, number in `each`, box, strides, file, address


def _placed(catalog: Catalog, exact: Chunks, flats: Sequence[Flat], each: Sequence[Entry]) -> list[Row]:
    """The boxes of all slots, under the first order of modules that all flat tensors fit."""
    wrong: Unread | None = None
    for spec in ORDER:
        try:
            rows: list[Row] = []
            for rank, optimizer, params in _holders(catalog.config, flats, each, spec):
                group = rank.t + rank.tp * (rank.e + rank.ep * rank.p)
                mine = [f for f in flats if (f.optimizer, f.group) == (optimizer, group)]
                rows += _of_rank(catalog, exact, mine, params, each, rank.t)
            return rows
        except Unread as error:
            wrong = wrong or error
    raise wrong or Unread("nothing is known of its modules")


def _holders(
    args: Mapping[str, Any], flats: Sequence[Flat], each: Sequence[Entry], spec: str
) -> Iterator[tuple[Rank, int, list[list[Piecewise]]]]:
    """Each model-parallel rank of each optimizer with its parameters; the second one is that of experts, whose ranks are
    others."""
    tp, ep, etp = (
        max(megatron.count(args, f"{k}_parallel_size"), 1) for k in ("tensor_model", "expert_model", "expert_tensor")
    )
    layers = 1 + max((int(m[2]) for e in each if (m := ranks.LAYER.fullmatch(e.name))), default=-1)
    stages = _stages(layers, args)
    pp = len(stages) // max(megatron.count(args, "virtual_pipeline_model_parallel_size"), 1)
    count = 1 + max(f.optimizer for f in flats)
    if count > 2 or (count == 1 and ep > 1):
        raise Unread(f"they are of {count} optimizers of {ep} expert-parallel ranks")
    for optimizer, (t, e) in enumerate([(tp, 1), (etp, ep)][:count]):
        for rank in (Rank(a, p, b, t, pp, e) for p in range(pp) for b in range(e) for a in range(t)):
            params = _params(each, rank, stages, spec)
            if count > 1:
                params = [[o for o in c if bool(EXPERT.search(o.path[1])) == (optimizer == 1)] for c in params]
            yield rank, optimizer, [c for c in params if c]


def _of_rank(
    catalog: Catalog,
    exact: Chunks,
    flats: Sequence[Flat],
    params: Sequence[Sequence[Piecewise]],
    each: Sequence[Entry],
    t: int,
) -> Iterator[Row]:
    """Of each buffer (a virtual chunk's parameters of one dtype) its flat tensors, bucket by bucket."""
    lines: list[tuple[str, list[Piecewise]]] = []
    for chunk in params:
        for dtype in dict.fromkeys(each[one.entry].dtype for one in chunk):
            lines.append((dtype, [one for one in chunk if each[one.entry].dtype == dtype]))
    if {f.buffer for f in flats} != set(range(len(lines))):
        raise Unread(f"a rank has {len({f.buffer for f in flats})} flat buffers, by the model it has {len(lines)}")
    for number, (dtype, line) in enumerate(lines):
        for slot in dict.fromkeys(f.slot for f in flats):
            mine = sorted((f for f in flats if (f.buffer, f.slot) == (number, slot)), key=lambda f: f.bucket)
            if any(f.dtype != dtype for f in mine):
                raise Unread(f"buffer {number} of a rank is of {mine[0].dtype}, by the model of {dtype}")
            yield from _of_line(catalog, exact, mine, line, each, t)


def _of_line(
    catalog: Catalog, exact: Chunks, flats: Sequence[Flat], line: Sequence[Piecewise], each: Sequence[Entry], t: int
) -> Iterator[Row]:
    backwards = list(reversed(line))
    places = packed([prod(one.shape) for one in backwards], [catalog.entries[f.entry].shape[0] for f in flats])
    for bucket, flat in enumerate(flats):
        inside = [k for k, (b, _) in enumerate(places) if b == bucket]
        starts, numels = [places[k][1] for k in inside], [prod(backwards[k].shape) for k in inside]
        begin, end = exact.start[flat.rows, 0], exact.stop[flat.rows, 0]
        total = catalog.entries[flat.entry].shape[0]
        if not len(begin) or begin[0] != 0 or end[-1] != total or (begin[1:] != end[:-1]).any():
            raise Unread(f"{catalog.entries[flat.entry].name!r} is not whole")
        edges = {0, *end.tolist()}
        for k, start, numel in zip(inside, starts, numels, strict=True):
            if start not in edges or start + numel not in edges:
                raise Unread(
                    f"{catalog.entries[flat.entry].name!r} has no parameter from element {start} to {start + numel}, where by the "
                    f"order of modules {each[backwards[k].entry].name!r} lies"
                )
        runs = zero.cut(starts, numels, end - begin)
        width = itemsize(catalog.entries[flat.entry].dtype)
        for r in range(len(runs)):
            one = backwards[inside[int(runs.which[r])]]
            if _again(one, each[one.entry], t):
                continue
            row = flat.rows[int(runs.slice[r])]
            at = int(exact.offset[row]) + int(runs.at[r]) * width
            for lo, hi, past in _boxes(one, int(runs.lo[r]), int(runs.hi[r])):
                steps = [0] * (len(lo) - len(one.shape)) + strides_of(one.shape)
                yield flat.slot, one.entry, lo, hi, steps, int(exact.file[row]), at + past * width


def packed(numels: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The bucket of each parameter and where it begins there: `packed([16, 70], [134])` -> `[(0, 0), (0, 64)]`."""
    places, bucket, end = [], 0, 0
    for numel in numels:
        start = -(-end // ALIGNED) * ALIGNED
        if bucket < len(lengths) and lengths[bucket] in (end, start):  # it is full; the next begins anew
            bucket, start = bucket + 1, 0
        if bucket == len(lengths) or start + numel > lengths[bucket]:
            raise Unread(f"buckets of {list(lengths)[:9]} elements do not fit parameters of {list(numels)[:9]}")
        places.append((bucket, start))
        end = start + numel
    if (bucket, end) != (len(lengths) - 1, lengths[-1]):
        raise Unread(f"buckets of {sum(lengths)} elements are longer than parameters of {sum(numels)}")
    return places


def _again(one: Piecewise, entry: Entry, t: int) -> bool:
    """Whether another rank has the same: what ranks do not divide, and the copy of a tied embedding."""
    alike = one.shape == entry.shape[len(entry.shape) - len(one.shape) :]
    return (alike and t > 0) or (one.path[1] == "output_layer.weight" and entry.name != "output_layer.weight")


def _boxes(one: Piecewise, first: int, last: int) -> Iterator[tuple[list[int], list[int], int]]:
    """Elements `first` to `last` of a rank's tensor as boxes of the whole, each with its place after `first`."""
    steps = strides_of(one.shape)
    _, starts, stops, _ = zero.boxes(one.shape, ints([first]), ints([last]))
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        for lo, hi, at, _ in one.pieces:
            more = len(lo) - len(one.shape)
            base = [at // s % n for s, n in zip(steps, one.shape, strict=True)]
            size = [b - a for a, b in zip(lo[more:], hi[more:], strict=True)]
            low = [max(a, b) for a, b in zip(start, base, strict=True)]
            high = [min(a, b + n) for a, b, n in zip(stop, base, size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                shift = [w - b for w, b in zip(lo[more:], base, strict=True)]
                past = sum(a * s for a, s in zip(low, steps, strict=True)) - first
                box = [[x + d for x, d in zip(corner, shift, strict=True)] for corner in (low, high)]
                yield [*lo[:more], *box[0]], [*hi[:more], *box[1]], past


# ---- the catalog


def _with(
    catalog: Catalog,
    flat: Mapping[int, Any],
    made: Sequence[Row],
    each: Sequence[Entry],
    origin: Sequence[tuple[int, int | None]],
) -> Catalog:
    """Slots under the names of their weights, instead of the flat tensors; with the settings of the first rank."""
    kept = [k for k in range(len(catalog.entries)) if k not in flat]
    entries = [catalog.entries[k] for k in kept]
    new_number = {k: n for n, k in enumerate(kept)}
    numbers: dict[tuple[str, int], int] = {}
    dtype = catalog.entries[next(iter(flat))].dtype
    table = []
    for slot, number, lo, hi, steps, file, at in made:
        source, layer = origin[number]
        if (slot, source) not in numbers:
            numbers[slot, source] = len(entries)
            name = f"optimizer.state.{slot}.{catalog.entries[source].name}"
            entries.append(Entry(name, dtype, catalog.entries[source].shape, (name,), "optimizer"))
        if layer is not None:
            lo, hi, steps = [layer, *lo], [layer + 1, *hi], [0, *steps]
        table.append((numbers[slot, source], lo, hi, steps, file, at))
    width = max((len(e.shape) for e in entries), default=0)
    old = np.flatnonzero(~np.isin(catalog.chunks.entry, list(flat)))
    c = catalog.chunks.take(old)
    one = Chunks(
        ints([new_number[k] for k in c.entry.tolist()]),
        c.start[:, :width],
        c.stop[:, :width],
        c.strides[:, :width],
        c.file,
        c.offset,
    )
    two = Chunks(
        ints([r[0] for r in table]), padded([r[1] for r in table], width, 0), padded([r[2] for r in table], width, 1),
        padded([r[3] for r in table], width, 0), ints([r[4] for r in table]), ints([r[5] for r in table]),
    )  # fmt: skip
    chunks = Chunks(*(np.concatenate([getattr(x, f.name) for x in (one, two)]) for f in fields(Chunks)))
    length = np.concatenate([catalog.about["length"][old], np.full(len(table), -1)])  # -1: an exact address
    return replace(
        catalog,
        entries=tuple(entries),
        chunks=chunks,
        extras=tuple(_settings(catalog)),
        about={**catalog.about, "length": length},
    )


def _settings(catalog: Catalog) -> Iterator[Extra]:
    """Settings of groups, which lie beside the flat tensors, as `fully_reshardable` has them in common.pt."""
    found: dict[int, dict[str, Any]] = {}
    for extra in catalog.extras:
        if m := OBJECT.fullmatch(extra.name):
            value = dcp.read_extra(catalog, extra)
            one = found.setdefault(int(m[1] or 0), {"param_state_sharding_type": RESHARDABLE})
            one[m[2]] = value[0] if isinstance(value, list) and len(value) == 1 else value
        elif extra.name == "content_metadata" and isinstance(extra.value, Mapping):
            more = {"distrib_optim_sharding_type": RESHARDABLE, "chained_optim_avoid_prefix": True}
            yield replace(extra, value={**extra.value, **more})
        elif (extra.name != "optimizer" and extra.role != "optimizer") or extra.name in BESIDE["torch_dist"][1:]:
            yield extra
    if found:
        yield Extra(
            "optimizer", ("optimizer",), "optimizer", found[0] if len(found) == 1 else dict(sorted(found.items()))
        )
