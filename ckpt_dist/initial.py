"""The checkpoint that a config alone implies: names, shapes and first values, of which no file holds a byte.

To the engine it is a source like any other: one fp32 array for each name that transformers would store, whose bytes
are computed when they are read. So a seed is a conversion, and every format, dialect and dtype is a target of it.

Invariant: a value depends on the seed, its tensor's Hugging Face name and its place in it, and on nothing else.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from math import isfinite, prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ckpt_dist import conditions, draw, sources, spelling
from ckpt_dist import family as families
from ckpt_dist.box import Ints
from ckpt_dist.catalog import Catalog, whole
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.family import CANONICAL, Family, Rule
from ckpt_dist.model import Model
from ckpt_dist.sources import Source
from ckpt_dist.spelling import Bound

Config = Mapping[str, Any]
T = TypeVar("T")
DTYPE, ITEM = "float32", 4
MOST_ELEMENTS, MOST_TENSORS = 1 << 43, 1 << 20  # of all weights, and of one
HOW = re.compile(r"(?P<kind>ones|zeros|normal (?P<std>.+?))(, zero row (?P<row>\w+))?")


@dataclass(frozen=True)
class Start:
    """How a weight begins: normal numbers around 0, or `value` everywhere where `std` is 0; one row may be zeros."""

    std: float
    value: float = 0.0
    zero_row: int | None = None

    def __str__(self) -> str:
        values = f"normal, std {self.std:g}" if self.std else f"{self.value:g}"
        return values if self.zero_row is None else f"{values}; row {self.zero_row} 0"


@dataclass(frozen=True)
class Drawn:
    """All tensors end to end as one file that is computed: tensor i begins at byte `begins[i]`."""

    begins: tuple[int, ...]
    keys: tuple[int, ...]
    starts: tuple[Start, ...]
    row_sizes: tuple[int, ...]
    bytes_read: int = 0

    def read(self, file: int, offset: int, into: memoryview) -> None:
        which = bisect_right(self.begins, offset) - 1
        start, first = self.starts[which], (offset - self.begins[which]) // ITEM
        out = np.frombuffer(into, np.float32)
        if start.std:
            draw.normal(self.keys[which], first, start.std, out)
        else:
            out[:] = start.value
        if start.zero_row is not None:
            low = start.zero_row * self.row_sizes[which] - first
            out[max(low, 0) : max(low + self.row_sizes[which], 0)] = 0

    def close(self) -> None:
        """Nothing is open."""


def checkpoint(cfg: Config) -> Model:
    """The model of `model.config`, as if it were stored under Hugging Face's names."""
    settings = cfg["model"]
    place = Path(settings["config"]).expanduser()
    config, path = sources.find_config(place, place, place, settings["config"])
    assert path is not None
    family = _family(settings.get("family", "auto"), config, path)
    complete = {**family.defaults.get(config["model_type"], {}), **config}
    _possible(family, complete, path)
    ties = family.ties if complete.get("tie_word_embeddings") else {}
    weights = [w for w in _told(path, conditions.weights, family, complete) if w not in ties]
    sizes = _sizes(family, weights, complete, path)
    corners = {w: _corners(family, w, sizes, complete, path) for w in weights}
    present = {w: found for w, found in corners.items() if len(found)}
    bound = spelling.spelled(family, CANONICAL, present, sizes, lambda rule: DTYPE)
    begins = list(accumulate((ITEM * prod(e.shape) for e in bound.entries), initial=0))[:-1]
    drawn = _drawn(family, bound, begins, complete, int(cfg["seed"]), path)
    chunks = whole(bound.entries, [0] * len(begins), begins)
    catalog = Catalog("hf", str(path.parent), (path.name,), bound.entries, chunks)  # its file is the config itself
    count = sum(prod(e.shape) for e in bound.entries)
    notes = (f"{config['model_type']} of {count:,} parameters in {len(begins)} tensors, values of seed {cfg['seed']}",)
    source = Source(catalog, place, path.parent, None, config, path, notes, drawn)
    return Model(source, tuple(e.name for e in bound.entries), (), family, CANONICAL, sizes)


def described(m: Model) -> dict[str, str]:
    """How each weight begins, in words: `{"embed": "normal, std 0.02", "norm": "1"}`."""
    assert m.family is not None
    starts = m.source.reader.starts
    return {w: str(s) for rule, s in zip(spelling.rules(m), starts, strict=True) if rule for w in rule.weights}


def _family(asked: str, config: Config, path: Path) -> Family:
    kind = config.get("model_type")
    known = [families.load(n) for n in families.available() if asked in ("auto", n)]
    if asked == "identity":
        raise UsageError("model=identity: a family says which tensors a config implies. Leave model out.")
    found = [f for f in known if kind in f.model_types]
    if not found:
        types = ", ".join(t for f in known if f.init for t in f.model_types)
        raise CheckpointError(f"{path}: model_type is {kind!r}; a seed is made of {types}. Give such a config.json.")
    if not found[0].init:
        raise CheckpointError(
            f"{path}: the family {found[0].name} has no `init` table, so the first values of {kind!r} are not known. "
            f"Add one to ckpt_dist/families/{found[0].name}.py, or convert a model that transformers has made."
        )
    return found[0]


def _sizes(family: Family, weights: Sequence[str], config: Config, path: Path) -> dict[str, int]:
    """The lengths of all axes; the config's own vocabulary, whatever others pad it to."""
    try:
        sizes = dict(family.sizes[CANONICAL](config))
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} is missing, and sizes cannot be guessed. Add it.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: the sizes do not fit together: {error}.") from None
    wrong = {a: n for a, n in sizes.items() if not isinstance(n, int) or isinstance(n, bool) or n < 1}
    if wrong:
        raise CheckpointError(f"{path}: lengths of axes are {wrong}; each is a whole number, 1 or more.")
    lacking = sorted({a for w in weights for a in family.axes(w)} - set(sizes))
    if lacking:
        raise CheckpointError(f"{path}: the lengths of {', '.join(lacking)} of {family.name} do not follow from it.")
    elements = sum(prod(sizes[a] for a in family.axes(w)) for w in weights)
    if elements > MOST_ELEMENTS or sizes.get("l", 1) * sizes.get("x", 1) > MOST_TENSORS:
        raise CheckpointError(f"{path}: {elements} parameters in lengths of {sizes} are more than any model has.")
    return sizes


def _possible(family: Family, config: Config, path: Path) -> None:
    for key, value in family.fixed.items():
        if config.get(key, value) not in (value, None):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}, and {family.name} is known with {value!r} only.")


def _corners(family: Family, weight: str, sizes: Mapping[str, int], config: Config, path: Path) -> Ints:
    """The lower corner of each stored box: one for each layer (and expert) that has a name of its own and the weight."""
    named = {a for name in family.dialects[CANONICAL] for a in families.axes_in(name)}
    counts = [sizes[a] if a in named else 1 for a in family.axes(weight)]
    corners: Ints = np.indices(counts).reshape(len(counts), -1).T
    if weight not in family.layers:
        return corners
    having = _told(path, conditions.layers, family, weight, config, sizes["l"])
    return corners[np.isin(corners[:, family.axes(weight).index("l")], having)]


def _drawn(family: Family, bound: Bound, begins: list[int], config: Config, seed: int, path: Path) -> Drawn:
    keys = tuple(draw.key(seed, e.name) for e in bound.entries)
    by_weight: dict[str, Start] = {}
    rows, row_sizes = [e.shape[0] for e in bound.entries], tuple(prod(e.shape[1:]) for e in bound.entries)
    starts = tuple(
        _start_of(family, rule, n, config, path, by_weight) for rule, n in zip(bound.rules, rows, strict=True) if rule
    )
    return Drawn(tuple(begins), keys, starts, row_sizes)


def _start_of(family: Family, rule: Rule, rows: int, config: Config, path: Path, known: dict[str, Start]) -> Start:
    """The start of one stored tensor; the weights that are fused in it begin alike."""
    for weight in rule.weights:
        known.setdefault(weight, _start(family, weight, rows, config, path))
    first, *others = (known[w] for w in rule.weights)
    if any(other != first for other in others):
        raise CheckpointError(f"{family.name}: {', '.join(rule.weights)} are one tensor and begin differently.")
    return first


def _start(family: Family, weight: str, rows: int, config: Config, path: Path) -> Start:
    """What the family's table says of a weight, with the config's numbers in it."""
    text = next((how for pattern, how in family.init.items() if fnmatchcase(weight, pattern)), "nothing")
    how = HOW.fullmatch(text)
    if how is None:
        raise CheckpointError(f"{family.name}: init says {text!r} of {weight}; write ones, zeros or normal STD.")
    row = _row(how["row"], rows, config, path)
    if how["std"] is None:
        return Start(0.0, float(how["kind"] == "ones"), row)
    return Start(_deviation(how["std"], config, path), 0.0, row)


def _row(key: str | None, rows: int, config: Config, path: Path) -> int | None:
    """The row that a key of the config names, from the end where it is negative; none where it is not there."""
    row = config.get(key) if key else None
    if row is None:
        return None
    if not isinstance(row, int) or not -rows <= row < rows:
        raise CheckpointError(f"{path}: {key} is {row!r}, and there are {rows} rows.")
    return int(row % rows)


def _deviation(text: str, config: Config, path: Path) -> float:
    std = _told(path, conditions.computed, text, config)
    if not isinstance(std, (int, float)) or not isfinite(std) or std < 0:
        raise CheckpointError(f"{path}: the deviation {text!r} is {std!r}; it is a number, 0 or more.")
    return float(std)


def _told(path: Path, what: Callable[..., T], *args: Any) -> T:
    """What a condition says, or whose config it cannot be told of."""
    try:
        return what(*args)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}.") from None
