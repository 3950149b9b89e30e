"""Merak's words: what its tensor-parallel linear layers are called, its modules, and how stages share these.

Facts: Merak 1.1 to 2.2.2. A model is a row of modules, cut out of the one of transformers; a stored name begins with its
module's number. With tensor-parallel ranks each linear layer holds another, `col_linear` or `row_linear`, that divides
its outputs or its inputs; with one rank all is as in transformers.

Invariant: pure; a module's number is said, never believed: layers are told apart by the name after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckpt_dist.errors import UsageError

STEPS = "iter_{:07d}"
ALONE = "_all_dp"  # how the folder of a run without model-parallel ranks ends
NUMBER = re.compile(r"(module\.)?\d+\.")  # of a module, in front of a name; `module` is the engine around it
LAYER = re.compile(r"[^\d]*?(?:^|\.)(\d+)\..*")
FRONT = ("wte", "wpe", "word_embeddings", "word_embeddings_layernorm", "embed_tokens")  # modules before the layers
EMBEDDING = re.compile(r"(.*\.)?(wte|word_embeddings|embed_tokens)\.weight")
HEAD = "lm_head.weight"
DIVIDED = (  # the dim that ranks divide, and how many tensors in one they divide each for itself; others each rank has whole
    (r".*\.c_attn\.col_linear\.(weight|bias)", 0, 3),
    (r".*\.col_linear\.(weight|bias)", 0, 1),
    (r".*\.row_linear\.weight", 1, 1),
    (rf"{EMBEDDING.pattern}|{HEAD}", 0, 1),
)
IGNORED = {  # what else a file holds of a model, by the name after the module's number
    "copy of a tied weight": re.compile(r"(module\.)?tied_modules\..*"),
    "constant of a trace": re.compile(r"(.*\.)?_tensor_constant\d+"),
}
MULTIPLE = 128  # of rows that each rank has of a vocabulary that cannot be shared evenly


def dialect(rules: Mapping[str, str], columns: Collection[str], rows: Collection[str]) -> dict[str, str]:
    """The names of tensor-parallel ranks: `h.0.mlp.c_fc.weight` becomes `h.0.mlp.c_fc.col_linear.weight`."""
    return {_inner(name, columns, rows): text for name, text in rules.items()}


def _inner(name: str, columns: Collection[str], rows: Collection[str]) -> str:
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    return f"{module}.col_linear.{kind}" if last in columns else f"{module}.row_linear.{kind}" if last in rows else name


def divided(name: str) -> tuple[int | None, int]:
    """The dim that ranks divide, and how many tensors in one: `(0, 3)` of a fused query, key and value."""
    return next(((dim, n) for form, dim, n in DIVIDED if re.fullmatch(form, name)), (None, 1))


@dataclass(frozen=True)
class Modules:
    """The number of each name's module, by name, and of which there are `layers` and in all `count`."""

    number: Mapping[str, int]
    front: int
    layers: int

    @property
    def count(self) -> int:
        return self.front + self.layers + 1


def modules(names: Sequence[str]) -> Modules:
    """Each embedding is a module, each layer, and all that comes after: GPT-2 of N layers has N + 3."""
    layer = {n: int(m[1]) for n in names if (m := LAYER.fullmatch(n))}
    there = [m for m in FRONT if any(_module(n) == m for n in names)]
    count = 1 + max(layer.values(), default=-1)
    number = {
        n: len(there) + layer[n]
        if n in layer
        else there.index(_module(n))
        if _module(n) in there
        else len(there) + count
        for n in names
    }
    return Modules(number, len(there), count)


def _module(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]


def bounds(m: Modules, pp: int, method: str, asked: Sequence[int] | None) -> list[int]:
    """The first module of each stage, and the end: 15 modules in 4 stages are `[0, 4, 8, 12, 15]` (uniform)."""
    what = f"{m.count} modules ({m.front} before the layers, {m.layers} layers, 1 after them)"
    if asked:
        if len(asked) != pp + 1:
            raise UsageError(
                f"target.partition={list(asked)} are the bounds of {len(asked) - 1} stages, target.pp={pp} makes {pp}. "
                f"Give target.pp={len(asked) - 1}, or {pp + 1} bounds."
            )
        if asked[0] != 0 or asked[-1] != m.count:
            raise UsageError(
                f"target.partition={list(asked)} begins with {asked[0]} and ends with {asked[-1]}; the model has {what}: "
                f"it has to begin with 0 and end with {m.count}."
            )
        found = list(asked)
    else:
        step = -(-m.count // pp) if method == "uniform" else m.count // pp
        found = [min(p * step, m.count) for p in range(pp)] + [m.count]
    empty = next((p for p, (lo, hi) in enumerate(pairwise(found)) if lo >= hi), None)
    if empty is not None:
        raise UsageError(
            f"target.partition={found}: stage {empty} would hold none of the {what}. Give other bounds, each larger than the "
            "one before, or a smaller target.pp."
        )
    return found


def padded(rows: int, tp: int) -> int:
    """Rows of a vocabulary that ranks share: as many as there are if they can, else a multiple of 128 for each."""
    return rows if rows % tp == 0 else -(-rows // (MULTIPLE * tp)) * MULTIPLE * tp
