"""Patterns: how the named axes of weights lie in the dims of a stored array, said once for both directions.

    q, k, v: (g (q + 1 + 1) c r) e        Megatron's fused QKV: per group, its queries, one key, one value

A dim is an axis or a product of axes in parentheses; `+` concatenates, and its k-th branch belongs to the
k-th weight. Read left to right, the leftmost varies slowest. `1` is a branch without an axis.

Invariant: a pattern is an affine map from axis indices to element offsets. Whatever rank holds which slice,
`boxes` finds disjoint boxes of the weight that together are the slice's part of it, each with one stride per
axis. Pure integers: neither torch nor files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ckpt_dist.box import Ints, ints, row_major, split_interval

Term = "str | tuple[tuple[str, ...], ...]"


class PatternError(ValueError):
    """A pattern's text breaks a rule, or a shape does not fit a pattern."""


@dataclass(frozen=True)
class Pattern:
    """`dims`: for each dim its product of terms; a term is an axis name or a sum (a tuple of branches)."""

    text: str
    weights: tuple[str, ...]
    dims: tuple[tuple[str | tuple[tuple[str, ...], ...], ...], ...]

    def axes(self, branch: int) -> tuple[str, ...]:
        """The axes of the branch-th weight, in stored order: for the fused QKV `g q c r e`, `g c r e`, `g c r e`."""
        found: list[str] = []
        for dim in self.dims:
            for term in dim:
                found.extend((term,) if isinstance(term, str) else term[branch])
        return tuple(found)


@cache
def parse(text: str) -> Pattern:
    """Parse a pattern; an error shows the text with a caret and the rule that was broken.

    `parse("gate, up: ((1 + 1) f) e").dims` -> `(((((), ()), "f"), ("e",)))` in words: a sum of two, times f; e.
    """
    head, colon, body = text.rpartition(":")
    weights = tuple(name.strip() for name in head.split(",")) if colon else ("",)
    offset = len(head) + len(colon)
    tokens = [(m.group(), offset + m.start()) for m in re.finditer(r"[A-Za-z_][A-Za-z_0-9]*|\d+|\S", body)]
    reader = _Reader(text, tokens)
    dims = []
    while reader.peek() is not None:
        dims.append(reader.dim())
    sums = [term for dim in dims for term in dim if not isinstance(term, str)]
    if len(weights) > 1 and [len(s) for s in sums] != [len(weights)]:
        reader.fail(f"{len(weights)} weights need one sum with {len(weights)} branches", offset)
    if len(weights) == 1 and sums:
        reader.fail("a sum needs one weight for each branch", offset)
    pattern = Pattern(text, weights, tuple(dims))
    for branch in range(len(weights)):
        axes = pattern.axes(branch)
        if len(set(axes)) != len(axes):
            reader.fail("an axis may stand only once", offset)
    return pattern


class _Reader:
    """Recursive descent over (token, position)."""

    def __init__(self, text: str, tokens: list[tuple[str, int]]) -> None:
        self.text, self.tokens, self.at = text, tokens, 0

    def fail(self, rule: str, position: int | None = None) -> None:
        if position is None:
            position = self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text)
        raise PatternError(f"{rule}:\n  {self.text}\n  {' ' * position}^")

    def peek(self) -> str | None:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            self.fail("the pattern ends too early")
        self.at += 1
        return str(token)

    def axis(self) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.peek() or ""):
            self.fail("expected an axis name or '('")
        return self.take()

    def dim(self) -> tuple[str | tuple[tuple[str, ...], ...], ...]:
        if self.peek() != "(":
            return (self.axis(),)
        self.take()
        terms: list[str | tuple[tuple[str, ...], ...]] = []
        while self.peek() != ")":
            terms.append(self.sum() if self.peek() == "(" else self.axis())
        self.take()
        return tuple(terms)

    def sum(self) -> tuple[tuple[str, ...], ...]:
        self.take()
        branches = [self.branch()]
        while self.peek() == "+":
            self.take()
            branches.append(self.branch())
        if self.peek() != ")" or len(branches) < 2:
            self.fail("expected '+' between the branches of a sum, then ')'")
        self.take()
        return tuple(branches)

    def branch(self) -> tuple[str, ...]:
        if self.peek() == "1":
            self.take()
            return ()
        axes = [self.axis()]
        while re.fullmatch(r"[A-Za-z_]\w*", self.peek() or ""):
            axes.append(self.axis())
        return tuple(axes)


def identity(ndim: int) -> Pattern:
    """One axis per dim, for weights that nothing is known of: `identity(2)` is `d0 d1`."""
    return parse(" ".join(f"d{k}" for k in range(ndim)))


def _branch_lengths(term: tuple[tuple[str, ...], ...], sizes: Mapping[str, int]) -> list[int]:
    return [int(np.prod([sizes[a] for a in branch], dtype=np.int64)) for branch in term]


def lengths(dim: Sequence[str | tuple[tuple[str, ...], ...]], sizes: Mapping[str, int]) -> list[int]:
    """The length of each term of a dim; a sum has the sum of its branches."""
    return [sizes[t] if isinstance(t, str) else sum(_branch_lengths(t, sizes)) for t in dim]


def shape(pattern: Pattern, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The stored shape: `shape(parse("gate, up: ((1 + 1) f) e"), {"f": 3, "e": 2})` -> `(6, 2)`."""
    return tuple(int(np.prod(lengths(dim, sizes), dtype=np.int64)) for dim in pattern.dims)


def solve(pattern: Pattern, stored: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    """Axis lengths that follow from a stored shape; axes that stay ambiguous are left out.

    `solve(parse("(h d) e"), (8, 3), {"h": 2})` -> `{"h": 2, "d": 4, "e": 3}`. A shape that contradicts
    `known` raises PatternError with both numbers.
    """
    if len(stored) != len(pattern.dims):
        raise PatternError(f"{pattern.text!r} has {len(pattern.dims)} dims, the stored array {len(stored)}")
    sizes = dict(known)
    for dim, length in zip(pattern.dims, stored, strict=True):
        unknown = [t for t in dim if isinstance(t, str) and t not in sizes]
        hidden = {a for t in dim if not isinstance(t, str) for branch in t for a in branch if a not in sizes}
        if hidden or len(unknown) > 1:
            continue
        rest = int(
            np.prod([n for t, n in zip(dim, _partial(dim, sizes), strict=True) if t not in unknown], dtype=np.int64)
        )
        if unknown and (rest == 0 or length % rest):
            raise PatternError(f"a dim of {length} is no multiple of {rest} in {pattern.text!r}")
        if unknown:
            sizes[str(unknown[0])] = length // rest
        elif rest != length:
            raise PatternError(f"{pattern.text!r} needs a dim of {rest}, the stored array has {length}")
    return sizes


def _partial(dim: Sequence[str | tuple[tuple[str, ...], ...]], sizes: Mapping[str, int]) -> list[int]:
    return [sizes.get(t, 1) if isinstance(t, str) else sum(_branch_lengths(t, sizes)) for t in dim]


def boxes(
    pattern: Pattern, branch: int, sizes: Mapping[str, int], start: Ints, stop: Ints, strides: Ints
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Where the branch-th weight lies in slices of the stored array.

    `start`, `stop`: (slices, dims), what each slice holds of the array; `strides`: (slices, dims), elements.
    Returns `(row, start, stop, stride, origin)`: for each box the slice it lies in, its bounds and strides per
    axis in the order of `pattern.axes(branch)`, and the element of the chunk where the box starts.
    """
    rows: Ints = np.arange(len(start))
    los: list[Ints] = []
    his: list[Ints] = []
    steps: list[Ints] = []
    origin = np.zeros(len(start), np.int64)
    for k, dim in enumerate(pattern.dims):
        row, lo, hi, step, at = _dim_boxes(dim, branch, sizes, start[rows, k], stop[rows, k])
        source = rows[row]
        los, his, steps = ([c[row] for c in columns] for columns in (los, his, steps))
        los.append(lo)
        his.append(hi)
        steps.append(strides[source, k][:, None] * step[None, :])
        origin = origin[row] + (at - start[source, k]) * strides[source, k]
        rows = source
    if not pattern.dims:
        none = np.zeros((len(rows), 0), np.int64)
        return rows, none, none, none, origin
    return rows, np.hstack(los), np.hstack(his), np.hstack(steps), origin


def _dim_boxes(
    dim: Sequence[str | tuple[tuple[str, ...], ...]], branch: int, sizes: Mapping[str, int], lo: Ints, hi: Ints
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Intervals of one dim as boxes over its axes: (row, start, stop, stride of each axis, index of the box's start)."""
    radix = lengths(dim, sizes)
    weight = row_major(radix)
    row, start, stop = split_interval(radix, lo, hi)
    los, his, steps = [], [], []
    at: Ints = np.zeros(len(row), np.int64)
    for k, term in enumerate(dim):
        if isinstance(term, str):
            los.append(start[:, k : k + 1])
            his.append(stop[:, k : k + 1])
            steps.append(weight[k : k + 1])
            at = at + start[:, k] * weight[k]
            continue
        parts = _branch_lengths(term, sizes)
        before = sum(parts[:branch])
        inside, sub_lo, sub_hi = split_interval(
            [sizes[a] for a in term[branch]],
            np.maximum(start[:, k] - before, 0),
            np.minimum(stop[:, k] - before, parts[branch]),
        )
        row, start, stop, at = row[inside], start[inside], stop[inside], at[inside]
        los, his = ([c[inside] for c in columns] for columns in (los, his))
        inner = row_major([sizes[a] for a in term[branch]])
        los.append(sub_lo)
        his.append(sub_hi)
        steps.append(inner[: len(term[branch])] * weight[k])
        at = at + (before + sub_lo @ inner[: len(term[branch])]) * weight[k]
    return row, np.hstack(los), np.hstack(his), ints(np.concatenate(steps)), at
