"""Contract: boxes, patterns and plans are exact. Whatever the pattern, frame and slices, the boxes that are found are
disjoint and complete, a copy there and back is bit-exact, and a plan is complete, within memory and the same for any
number of ranks. Not checked here: files (test_formats) and processes (test_jobs).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_dist import plan, slots
from ckpt_dist.box import expand, intersect, ints, row_major, split_interval, volume
from ckpt_dist.catalog import Chunks, Entry, Views
from ckpt_dist.engine.moves import by_tile
from ckpt_dist.errors import CheckpointError
from ckpt_dist.family import bind, plain
from ckpt_dist.parallel import bounds, chunked, even, placed
from ckpt_dist.pattern import Pattern, PatternError, boxes, identity, parse, shape, solve
from ckpt_dist.task import WORKER_BYTES, worker_count

SLOW = settings(deadline=None, max_examples=150)


@given(st.lists(st.integers(1, 5), min_size=0, max_size=4), st.data())
@SLOW
def test_an_interval_of_a_product_is_few_disjoint_complete_boxes(lengths: list[int], data: st.DataObject) -> None:
    total = int(np.prod(lengths, dtype=int))
    lo = data.draw(st.integers(0, total))
    hi = data.draw(st.integers(lo, total))
    row, start, stop = split_interval(lengths, ints([lo]), ints([hi]))
    hits = np.zeros(lengths, int)
    for s, t in zip(start, stop, strict=True):
        hits[tuple(slice(a, b) for a, b in zip(s, t, strict=True))] += 1
    wanted = np.zeros(total, int)
    wanted[lo:hi] = 1
    assert (hits.ravel() == wanted).all()
    assert len(row) <= max(2 * len(lengths) - 1, 1)


def test_boxes_and_strides() -> None:
    assert intersect(((0, 4), (1, 2)), ((3, 9), (0, 5))) == ((3, 4), (1, 2))
    assert intersect(((0, 4),), ((4, 5),)) is None
    assert row_major([2, 3, 4]).tolist() == [12, 4, 1]
    assert volume(ints([[0, 1]]), ints([[2, 4]])).tolist() == [6]
    rows, values = expand(ints([5, 0]), ints([2, 1]))
    assert rows.tolist() == [0, 0, 1] and values.tolist() == [5, 6, 0]


EQUAL_TO_A_RECIPE = [
    ("w: (h c r) e", dict(h=2, c=2, r=3, e=4), lambda w: w.reshape(12, 4)),
    ("w: (h r c) e", dict(h=2, c=2, r=3, e=4), lambda w: w.transpose(1, 2).reshape(12, 4)),  # Meta's rotary order
    ("w: e (h c r)", dict(h=2, c=2, r=3, e=4), lambda w: w.reshape(12, 4).T),  # GPT-2's Conv1D
]


@pytest.mark.parametrize(("text", "sizes", "recipe"), EQUAL_TO_A_RECIPE)
def test_a_pattern_equals_the_well_known_recipe(text: str, sizes: dict[str, int], recipe: object) -> None:
    w = torch.arange(48).reshape(2, 2, 3, 4)
    stored = recipe(w).contiguous()  # type: ignore[operator]
    assert torch.equal(_read(parse(text), 0, sizes, ("h", "c", "r", "e"), stored), w)


def test_fused_qkv_equals_megatrons_recipe() -> None:
    sizes = dict(g=2, q=3, c=2, r=2, e=5)
    q, k, v = torch.randn(2, 3, 4, 5), torch.randn(2, 1, 4, 5), torch.randn(2, 1, 4, 5)
    stored = torch.cat([q, k, v], dim=1).reshape(-1, 5).contiguous()
    pattern = parse("q, k, v: (g (q + 1 + 1) c r) e")
    assert torch.equal(_read(pattern, 0, sizes, ("g", "q", "c", "r", "e"), stored), q.reshape(2, 3, 2, 2, 5))
    assert torch.equal(_read(pattern, 1, sizes, ("g", "c", "r", "e"), stored), k.reshape(2, 2, 2, 5))
    assert torch.equal(_read(pattern, 2, sizes, ("g", "c", "r", "e"), stored), v.reshape(2, 2, 2, 5))


def _read(
    pattern: Pattern, branch: int, sizes: dict[str, int], order: tuple[str, ...], stored: torch.Tensor
) -> torch.Tensor:
    """A weight out of a whole stored array, by the views alone."""
    full = ints([stored.shape])
    _rows, start, stop, stride, origin = boxes(pattern, branch, sizes, full * 0, full, row_major(full))
    axes = pattern.axes(branch)
    out = torch.full([sizes[a] for a in axes], -1, dtype=stored.dtype)
    for s, t, step, at in zip(start, stop, stride, origin, strict=True):
        part = torch.as_strided(stored.clone(), tuple((t - s).tolist()), tuple(step.tolist()), int(at))
        out[tuple(slice(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True))] = part
    return out.permute([axes.index(a) for a in order])


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Pattern, dict[str, int]]:
    """A random pattern: shuffled axes in random dims, with a sum of branches in one of them or not."""
    axes = draw(st.permutations("abcd"))[: draw(st.integers(1, 4))]
    cuts = sorted(draw(st.lists(st.integers(0, len(axes)), max_size=2)))
    groups = [g for g in (axes[i:j] for i, j in zip([0, *cuts], [*cuts, len(axes)], strict=True)) if g]
    branches = draw(st.sampled_from([(), ("1", "1"), ("m", "1", "1"), ("m n", "1"), ("1", "m")]))
    dims = [list(g) for g in groups]
    if branches:
        target = draw(st.sampled_from(dims))
        target.insert(draw(st.integers(0, len(target))), "(" + " + ".join(branches) + ")")
    text = " ".join("(" + " ".join(d) + ")" for d in dims)
    names = ", ".join(f"w{k}" for k in range(max(len(branches), 1)))
    sizes = {a: draw(st.integers(1, 4)) for a in (*axes, "m", "n")}
    return parse(f"{names}: {text}"), sizes


@st.composite
def sliced(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
    return list(zip([0, *cuts], [*cuts, length], strict=True))


@given(patterns(), st.data())
@SLOW
def test_slices_of_a_pattern_are_disjoint_complete_and_hold_the_right_elements(
    made: tuple[Pattern, dict[str, int]], data: st.DataObject
) -> None:
    pattern, sizes = made
    stored_shape = shape(pattern, sizes)
    stored = torch.arange(int(np.prod(stored_shape))).reshape(stored_shape)
    cuts = [data.draw(sliced(n)) for n in stored_shape]
    slices = [[]]  # type: list[list[tuple[int, int]]]
    for dim in cuts:
        slices = [[*s, c] for s in slices for c in dim]
    start = ints([[lo for lo, _ in s] for s in slices])
    stop = ints([[hi for _, hi in s] for s in slices])
    for branch in range(len(pattern.weights)):
        whole = _read(pattern, branch, sizes, pattern.axes(branch), stored)
        out = torch.full_like(whole, -1)
        count = torch.zeros_like(whole)
        row, lo, hi, stride, origin = boxes(pattern, branch, sizes, start, stop, row_major(stop - start))
        for r, s, t, step, at in zip(row, lo, hi, stride, origin, strict=True):
            chunk = stored[tuple(slice(a, b) for a, b in slices[int(r)])].clone()
            part = torch.as_strided(chunk, tuple((t - s).tolist()), tuple(step.tolist()), int(at))
            place = tuple(slice(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True))
            out[place] = part
            count[place] += 1
        assert torch.equal(out, whole)
        assert (count == 1).all()


def _chunks(slices: list[list[tuple[int, int]]]) -> Chunks:
    start = ints([[lo for lo, _ in s] for s in slices]).reshape(len(slices), -1 if slices else 2)
    stop = ints([[hi for _, hi in s] for s in slices]).reshape(start.shape)
    return Chunks.dense(np.zeros(len(slices), int), start, stop, np.zeros(len(slices), int), np.arange(len(slices)))


def _views(entry: Entry, slices: list[list[tuple[int, int]]]) -> Views:
    return bind([entry], [plain(entry, entry.name)], _chunks(slices), {}, {})


def _grid(data: st.DataObject, sizes: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    slices: list[list[tuple[int, int]]] = [[]]
    for n in sizes:
        slices = [[*s, c] for s in slices for c in data.draw(sliced(n))]
    return slices


@given(st.tuples(st.integers(1, 9), st.integers(1, 7)), st.data())
@SLOW
def test_any_sharding_joins_any_other_exactly_once(sizes: tuple[int, int], data: st.DataObject) -> None:
    entry = Entry("w", "float32", sizes)
    source, target = _views(entry, _grid(data, sizes)), _views(entry, _grid(data, sizes))
    hits = plan.prove(source, target)
    count = np.zeros(sizes, int)
    for s, t in zip(hits.start, hits.stop, strict=True):
        count[tuple(slice(a, b) for a, b in zip(s, t, strict=True))] += 1
    assert (count == 1).all()


@given(st.tuples(st.integers(1, 9), st.integers(1, 7)), st.data())
@SLOW
def test_a_hole_or_a_clash_is_always_refused(sizes: tuple[int, int], data: st.DataObject) -> None:
    entry = Entry("w", "float32", sizes)
    slices = [s for s in _grid(data, sizes) if all(a < b for a, b in s)]
    lost = data.draw(st.integers(0, len(slices) - 1))
    whole = _views(entry, [[(0, n) for n in sizes]])
    with pytest.raises(plan.Uncovered, match="no source"):
        plan.prove(_views(entry, slices[:lost] + slices[lost + 1 :]), whole)
    extra = [(a, b) for a, b in slices[lost]]
    wider = [(0, n) for n in sizes]
    if extra != wider:
        with pytest.raises(plan.Uncovered, match="claim the same"):
            plan.prove(_views(entry, [*slices, wider]), whole)
    assert len(plan.prove(_views(entry, [*slices, extra]), whole)) == len(slices)  # an equal box is a replica


def test_an_overlap_cannot_hide_a_hole() -> None:
    entry = Entry("w", "float32", (4,))
    with pytest.raises(plan.Uncovered):
        plan.prove(_views(entry, [[(0, 2)], [(1, 3)]]), _views(entry, [[(0, 4)]]))


def test_refusals_name_both_numbers() -> None:
    entry = Entry("w", "float32", (6, 4))
    with pytest.raises(plan.Uncovered, match=r"w\[0:6, 0:4\]: 8 of 24 elements"):
        plan.prove(_views(entry, [[(0, 4), (0, 4)]]), _views(entry, [[(0, 6), (0, 4)]]))
    with pytest.raises(CheckpointError, match=r"\[6, 4\].*\[6, 5\]"):
        plan.prove(_views(entry, [[(0, 6), (0, 4)]]), _views(Entry("w", "float32", (6, 5)), [[(0, 6), (0, 5)]]))


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=5), st.integers(1, 40))
@SLOW
def test_tiles_partition_every_tensor_in_row_major_runs(shapes: list[list[int]], limit: int) -> None:
    entries = [Entry(str(k), "float32", tuple(s)) for k, s in enumerate(shapes)]
    tiles = plan.tiles(entries, limit)
    for e, entry in enumerate(entries):
        flat = np.arange(int(np.prod(entry.shape, dtype=int))).reshape(entry.shape)
        mine = np.flatnonzero(tiles.entry == e)
        parts = []
        for row in mine.tolist():
            box = tuple(slice(a, b) for a, b in zip(tiles.start[row], tiles.stop[row], strict=True))[: len(entry.shape)]
            part = flat[box].ravel()
            assert part.size <= limit
            assert part.size == 0 or part[0] == tiles.offset[row]
            parts.append(part)
        joined = np.concatenate(parts) if parts else np.zeros(0, int)
        assert (joined == flat.ravel()).all()


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 7))
@SLOW
def test_shares_of_ranks_are_complete_in_order_and_balanced(sizes: list[int], world: int) -> None:
    nbytes = ints(sizes)
    shares = plan.share(nbytes, world)
    assert [t for lo, hi in shares for t in range(lo, hi)] == list(range(len(sizes)))
    for lo, hi in shares:
        assert int(nbytes[lo:hi].sum()) <= -(-int(nbytes.sum()) // world) + int(nbytes.max(initial=0))


@given(st.integers(1, 1 << 32), st.integers(1, 64), st.none() | st.integers(1, 64))
@SLOW
def test_the_threads_of_a_rank_fit_into_its_memory(memory: int, local_world: int, workers: int | None) -> None:
    engine = {"memory": memory, "workers": workers}
    if memory < WORKER_BYTES:
        with pytest.raises(plan.TooBig, match="one thread needs"):
            worker_count(engine, local_world)
    else:
        assert 1 <= worker_count(engine, local_world) * WORKER_BYTES <= memory


def pairs(extent: list[int], stride: list[int], tile_stride: list[int]) -> list[tuple[int, int]]:
    """Where each element of a box lies: (in the file, in the tile)."""
    index = np.indices(extent).reshape(len(extent), -1)
    return sorted(zip((ints(stride) @ index).tolist(), (ints(tile_stride) @ index).tolist(), strict=True))


@given(st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), max_size=6), st.data())
@SLOW
def test_the_moves_of_a_tile_touch_the_elements_of_its_boxes(extents: list[list[int]], data: st.DataObject) -> None:
    """Of boxes that are one run on both sides, of strided ones, and of several in one tile or none."""
    count, strides = len(extents), st.lists(st.integers(1, 40), min_size=3, max_size=3)
    dense = [row_major(e).tolist() for e in extents]
    file, tile = ([data.draw(st.one_of(st.just(d), strides)) for d in dense] for _ in range(2))
    owner = sorted(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    flat = [np.reshape(ints(x), (count, 3)) for x in (extents, file, tile)]
    rows = ints(range(count))
    moves = plan.Moves(ints(owner), rows, flat[0], rows * 100, flat[1], rows * 10, flat[2])
    first, last = sorted(data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2)))
    found = list(by_tile(moves, rows + 7, first, last))
    assert len(found) == last - first
    for number, own in zip(range(first, last), found, strict=True):
        wanted = [k for k in range(count) if owner[k] == number]
        assert [(m.file, m.at, m.tile_at) for m in own] == [(k + 7, k * 100, k * 10) for k in wanted]
        for k, move in zip(wanted, own, strict=True):
            assert pairs(*map(list, zip(*move.dims, strict=True))) == pairs(extents[k], file[k], tile[k])
            if file[k] == tile[k] == dense[k]:
                assert move.run == np.prod(extents[k])


def test_parsing_says_what_is_wrong_with_a_caret() -> None:
    with pytest.raises(PatternError, match=r"expected an axis(.|\n)*q: \(g \+ e\n\s+\^"):
        parse("q: (g + e")
    with pytest.raises(PatternError, match="one sum with 3 branches"):
        parse("q, k, v: (g (q + 1) c) e")
    with pytest.raises(PatternError, match="only once"):
        parse("w: a a")
    assert parse("gate, up: ((1 + 1) f) e").weights == ("gate", "up")


def test_solving_sizes_refuses_contradictions_and_leaves_ambiguity_open() -> None:
    assert solve(parse("(h d) e"), (8, 3), {"h": 2}) == {"h": 2, "d": 4, "e": 3}
    assert solve(parse("(h d) e"), (8, 3), {}) == {"e": 3}
    with pytest.raises(PatternError, match="8 is no multiple of 3"):
        solve(parse("(h d) e"), (8, 3), {"h": 3})
    with pytest.raises(PatternError, match="needs a dim of 5, the stored array has 3"):
        solve(parse("e"), (3,), {"e": 5})
    assert solve(identity(2), (4, 5), {}) == {"d0": 4, "d1": 5}


def test_cuts() -> None:
    assert chunked(5, 4) == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert even(6, 3) == [(0, 2), (2, 4), (4, 6)]
    assert bounds([3, 4]) == [(0, 3), (3, 7)]
    with pytest.raises(ValueError, match="7 cannot be divided evenly by 2"):
        even(7, 2)


TORCH_PLACEMENTS = [
    ((10, 7), (2, 2), [("strided", 0, 2), ("shard", 0)]),
    ((12, 5), (4,), [("shard", 0)]),
    ((5, 3), (4,), [("shard", 0)]),
    ((8, 6), (2, 3), [("shard", 0), ("shard", 1)]),
    ((9, 4), (2, 2), [("replicate",), ("shard", 0)]),
    ((4, 6, 5), (2, 2), [("shard", 1), ("shard", 0)]),
]


@pytest.mark.parametrize(("sizes", "mesh", "placements"), TORCH_PLACEMENTS)
def test_placements_are_cut_as_torch_cuts_them(
    sizes: tuple[int, ...], mesh: tuple[int, ...], placements: list[tuple[object, ...]]
) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    kinds = {
        "shard": lambda d: Shard(d),
        "replicate": lambda: Replicate(),
        "strided": lambda d, f: _StridedShard(d, split_factor=f),
    }
    theirs = [kinds[str(p[0])](*p[1:]) for p in placements]
    for coordinate in np.ndindex(*mesh):
        local, offset = _compute_local_shape_and_global_offset(sizes, mesh, list(coordinate), theirs)
        ((box, at),) = placed(sizes, mesh, coordinate, placements)
        assert tuple(t - s for s, t in box) == tuple(local)
        assert at == (0,) * len(sizes)
        if all(local):
            assert tuple(s for s, _ in box) == tuple(offset)


# ---- what optimizers keep


def kept_by(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> dict[str, set[str]]:
    """Of a matrix and a vector, what an optimizer keeps after a step."""
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (3,))]
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return {f"layers.{k}.weight": set(optimizer.state[w]) for k, w in enumerate(weights)}


def adafactor(weights: list[torch.nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(weights, lr=1e-3, relative_step=False, scale_parameter=False, **more)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **{
        n: getattr(torch.optim, n)
        for n in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor", "RMSprop", "Adagrad")
    },
    "Adam with amsgrad": lambda w: torch.optim.Adam(w, amsgrad=True),
    "SGD with momentum": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9),
    "Adafactor of transformers": adafactor,
    "Adafactor with a moment": lambda w: adafactor(w, beta1=0.9),
}
NAMES = {"torch": "optim.state.{weight}.{value}", "megatron": "chained_0.optimizer.state.{value}.{weight}"}


@pytest.mark.parametrize("spelled", NAMES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_missing_moment_is_told_from_one_that_an_optimizer_does_not_keep(kind: str, spelled: str) -> None:
    def names(held: dict[str, set[str]]) -> list[str]:
        return [NAMES[spelled].format(weight=w, value=v) for w, values in held.items() for v in sorted(values)]

    (matrix, vector), more = kept_by(OPTIMIZERS[kind]).values(), 4
    held = {f"layers.{k}.weight": vector if k == 2 else matrix for k in range(more)}
    assert not slots.halved(names(held))
    lion = {f"head.{k}.weight": {"exp_avg", "step", "fp32_param"} for k in range(more)}
    assert not slots.halved(names(held | lion | {"frozen.weight": set()}))
    assert not slots.halved([*names(held), *(n.replace("state", "state.second.state") for n in names(lion))])
    packed = [n if "0" in n else f"{n}.{part}" for n in names(held) for part in ("codes", "scale")]
    assert not slots.halved(packed) or spelled == "megatron"  # whose names end in the weight's
    for gone in {"exp_avg", "exp_avg_sq"} if {"exp_avg", "exp_avg_sq"} <= matrix & vector else ():
        lost = held | {"layers.1.weight": held["layers.1.weight"] - {gone}}
        place = NAMES[spelled].partition("{")[0].rstrip(".")
        found = f"of 1 of 4 weights, first 'layers.1.weight', {place!r} has exp_avg or exp_avg_sq only"
        assert slots.halved(names(lost)) == found


def test_names_without_end_take_no_time() -> None:
    long = ["state." * 100_000 + "-", "exp_avg." * 100_000, "state.exp_avg." * 50_000 + "\n"]
    begin = time.process_time()
    assert not slots.halved(long)
    assert time.process_time() - begin < 5  # 0.2 s; a search that begins anew at each part takes minutes
