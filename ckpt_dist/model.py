"""What model a checkpoint holds: its family, the dialect of its names, its sizes; and which stored name is what.

Invariant: each stored name is selected, carried or dropped by a named rule, or is unmatched and refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_dist import absent, configs, slots
from ckpt_dist import family as families
from ckpt_dist.catalog import Catalog, Entry, unwrap
from ckpt_dist.errors import CheckpointError, Unfit, UsageError, nearest
from ckpt_dist.family import CANONICAL, Family
from ckpt_dist.sources import Source

PREFIX = re.compile(r"((model|module)\.)*")  # a framework adds one for each wrapper of the model
# layers, or experts: each becomes tensors of its own, and one tensor of a few bytes may stand for millions
MOST = 1 << 14
NOISE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_fpw_module.")


@dataclass(frozen=True)
class Model:
    """A source, understood. `names[e]` is the model's own name of an entry, None when it is not selected.

    `wrapper` are the dicts around the weights, `prefix` is what names in them begin with. `copies`: what was left out as
    a copy of another weight. `apart`: the catalog's chunks are on rank 0 only; `part.fetch` gets those that a rank needs.
    `lacks`: which layers or weights are not there, in words, or nothing.
    """

    source: Source
    names: tuple[str | None, ...]
    wrapper: tuple[str | int, ...] = ()
    family: Family | None = None
    dialect: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    unresolved: str = ""
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guesses: tuple[str, ...] = ()
    prefix: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False
    lacks: str = ""

    @property
    def around(self) -> str:
        """What stands before the names of weights: `state_dict.model`."""
        return ".".join(map(str, (*self.wrapper, self.prefix))).rstrip(".")

    @property
    def catalog(self) -> Catalog:
        return self.source.catalog

    @property
    def step(self) -> int | None:
        return self.source.step

    @property
    def paths(self) -> dict[str, tuple[str | int, ...]]:
        """Where the weights of an unknown model are nested, by name: it may be several models, each in a dict."""
        found = {}
        for entry, name in zip(self.catalog.entries, self.names, strict=True):
            if self.family is None and entry.role == "weight" and name is not None and entry.path:
                wrapper, own = _parted(entry)
                rest = ".".join(map(str, entry.path[len(wrapper) :]))
                found[name] = entry.path if rest == own else (*wrapper, own)
        return found


def clean(name: str) -> str:
    """A name without the parts that wrappers of a module add: `_orig_mod.layers.0` -> `layers.0`."""
    for noise in NOISE:
        name = name.replace(noise, "")
    return name


def recognise(
    source: Source,
    *,
    family: str = "auto",
    dialect: str = "auto",
    keep: Sequence[str] = ("weights",),
    unmatched: str = "error",
    partial: bool = False,
) -> Model:
    """Family and dialect from the config's model_type and the names; what does not fit is refused or listed. A model of a
    type that no family has, or one that is only looked at (`partial`), is one of no known family where it does not fit."""
    catalog = source.catalog
    own, wrapper = _own_names(catalog)
    chosen, spoken, prefix = _best([n for n in own if n is not None], source.config, family, dialect)
    if chosen is None and family == "auto" and _preset(source):
        kind = source.config["model_type"]
        raise CheckpointError(f"{source.folder}: the names are not those of {kind}, which model.config names.")
    other = family == dialect == "auto" and spoken.startswith(CANONICAL) and _other_type(source.config)
    names, dropped, lost, own_way = _selected(catalog, own, chosen, spoken, prefix, keep, unmatched)
    if (lost or own_way) and other and (partial or unmatched != "drop"):
        return recognise(source, family="identity", keep=keep)
    if lost and unmatched != "drop" and chosen:
        hint = families.missing_names(chosen, spoken, lost[0])
        raise CheckpointError(
            f"{source.folder}: {len(lost)} of {len(names)} stored names are unknown to {chosen.name} ({spoken}), first {lost[0]!r}.{hint} "
            "Leave them out with unmatched=drop, keep these under their names with unmatched=keep, or all with model=identity."
        )
    if lost:
        dropped["unmatched"] = lost
    _unambiguous(names, source)
    try:
        sizes, unresolved, lacks = _sizes(source, chosen, spoken, names, lost)
    except Unfit as error:
        if not other and (not partial or family != "auto" or configs.is_hf(source.config)):
            raise Unfit(f"{source.folder}: {error}") from None
        plain = recognise(source, family="identity", keep=keep, unmatched=unmatched)
        return plain if other else replace(plain, lacks=str(error))
    only = _originals(names, catalog, chosen, spoken, source.config) if lacks else None
    if only and not _sizes(source, chosen, spoken, only, lost)[2]:
        names, lacks = only, ""
    guesses = [
        f"model family {chosen.name} in the names of {spoken}"
        if chosen
        else "unknown model: names are kept as they are"
    ]
    if only and not lacks:
        guesses.append("of tied weights only the copy is stored; it is taken for both")
    if own_way:
        guesses.append(f"what {chosen.name} has no name for is kept as it is: {len(own_way)}, first {min(own_way)!r}")  # type: ignore[union-attr]
    if _preset(source):
        guesses.append("config.json as such models were published; tokenizer files have to be brought")
    return Model(
        source,
        tuple(names),
        wrapper,
        chosen,
        spoken,
        sizes,
        unresolved,
        {k: tuple(v) for k, v in dropped.items()},
        tuple(guesses),
        prefix=prefix,
        lacks=lacks,
    )


def _selected(
    catalog: Catalog,
    own: Sequence[str | None],
    family: Family | None,
    dialect: str,
    prefix: str,
    keep: Sequence[str],
    unmatched: str,
) -> tuple[list[str | None], dict[str, list[str]], list[str], list[str]]:
    """The name of each entry that is wanted; those that are not, by the rule; weights that the family does not have, and
    those of them that keep their names."""
    names: list[str | None] = []
    dropped, lost, own_way = dict[str, list[str]](), list[str](), list[str]()
    for entry, name in zip(catalog.entries, own, strict=True):
        found = name.removeprefix(prefix) if name is not None else None
        if entry.role != "weight":
            kept = _kept(entry.role, keep)
            found = _own(entry.name, family, dialect, prefix) if kept else None
            if not kept:
                dropped.setdefault(f"{entry.role} (keep={','.join(keep)})", []).append(entry.name)
        elif found is not None and family and families.dropped(family, found):
            dropped.setdefault("derived buffer", []).append(entry.name)
            found = None
        elif found is not None and family and families.match(family, dialect, found) is None:
            if unmatched == "keep" and found not in family.weights:
                own_way.append(found)
            else:
                lost.append(found)
                found = None
        names.append(found)
    return names, dropped, lost, own_way


def _originals(
    names: Sequence[str | None], catalog: Catalog, family: Family | None, dialect: str, config: Mapping[str, Any]
) -> list[str | None] | None:
    """Of tied weights safetensors' `save_model` keeps the first by name, a copy: it has the name of what it is a copy of."""
    said = {**family.defaults.get(str(config.get("model_type")), {}), **config} if family else {}
    weights = {n for e, n in enumerate(names) if n is not None and catalog.entries[e].role == "weight"}
    if family is None or not said.get("tie_word_embeddings") or len(weights) < sum(n is not None for n in names):
        return None
    stored = {text: name for name, text in family.dialects[dialect].items()}
    other = {
        name: stored.get(text.replace(copy, of, 1))
        for copy, of in family.ties.items()
        for text, name in stored.items()
        if text.startswith(f"{copy}:")
    }
    return [of if n and (of := other.get(n)) and of not in weights else n for n in names]


def _other_type(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says a type of model that no family has: such a one may share names with a family, no more."""
    kind = config.get("model_type")
    return kind is not None and not any(kind in families.load(n).model_types for n in families.available())


def _own(name: str, family: Family | None, dialect: str, prefix: str) -> str:
    return slots.unprefixed(family, dialect, prefix, name) if family else name


def _kept(role: str, keep: Sequence[str]) -> bool:
    return {"weight": "weights"}.get(role, role) in keep


def _parted(entry: Entry) -> tuple[tuple[str | int, ...], str]:
    """The dicts around a weight, and its own name."""
    wrapper, name = unwrap(entry.path) if len(entry.path) > 1 else ((), entry.name)
    return wrapper, clean(name)


def _own_names(catalog: Catalog) -> tuple[list[str | None], tuple[str | int, ...]]:
    """Each weight's name without the dicts around the model; those dicts (the most common ones)."""
    found: list[str | None] = []
    wrappers: dict[tuple[str | int, ...], int] = {}
    for entry in catalog.entries:
        if entry.role != "weight":
            found.append(None)
            continue
        wrapper, name = _parted(entry)
        wrappers[wrapper] = wrappers.get(wrapper, 0) + 1
        found.append(name)
    return found, max(wrappers, key=lambda w: wrappers[w]) if wrappers else ()


def _best(names: Sequence[str], config: Mapping[str, Any], family: str, dialect: str) -> tuple[Family | None, str, str]:
    """(family, dialect, prefix) whose rules match most names; identity if too few match."""
    if family == "identity":
        return None, "", ""
    known = [families.load(n) for n in families.available()]
    if family != "auto":
        known = [families.load(family)]
    typed = [f for f in known if config.get("model_type") in f.model_types]
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "0", n) for n in names)  # layers and experts differ by a number only
    prefixes = sorted({"", "model.", "module.", *(PREFIX.match(n)[0] for n in counts)})  # type: ignore[index]
    best: tuple[float, Family | None, str, str] = (0.0, None, "", "")
    for candidate in typed or known:
        if dialect not in ("auto", *candidate.dialects):
            raise UsageError(
                f"dialect={dialect!r} is none of {candidate.name}.{nearest(dialect, candidate.dialects)} Known: {', '.join(candidate.dialects)}."
            )
        for spoken in candidate.dialects if dialect == "auto" else (dialect,):
            for prefix in prefixes:
                score = _score(candidate, spoken, prefix, counts, bool(typed) or family != "auto")
                if score > best[0]:
                    best = (score, candidate, spoken, prefix)
    score, chosen, spoken, prefix = best
    enough = (
        0.5 if typed or family != "auto" or dialect != "auto" else 0.9
    )  # a config that names the family speaks for it
    if (chosen is None or score < enough) and family != "auto" and names:
        raise CheckpointError(
            f"model={family}: {score:.0%} of the {len(names)} stored names are of that family, the first is {names[0]!r}. "
            "Leave model= out to have the family found, or give model=identity to keep names as they are."
        )
    if chosen is None or score < enough:
        return None, "", ""
    return chosen, spoken, prefix


def _score(family: Family, dialect: str, prefix: str, names: Mapping[str, int], known: bool) -> float:
    """The part of the names that a dialect knows; names it only drops do not speak for it.

    Families share many names: one that is not known to be the right one has to have all its weights there.
    """
    rules = {n: families.match(family, dialect, n[len(prefix) :]) for n in names if n.startswith(prefix)}
    hits = sum(names[n] for n, rule in rules.items() if rule is not None)
    found = {w for rule in rules.values() if rule is not None for w in rule.weights}
    if not hits or (not known and not set(family.weights) - {*family.optional, *family.ties, *family.zeros} <= found):
        return 0.0
    drops = sum(count for n, count in names.items() if families.dropped(family, n))
    return hits / max(sum(names.values()) - drops, 1)


def _unambiguous(names: Sequence[str | None], source: Source) -> None:
    seen: dict[str, int] = {}
    for e, name in enumerate(names):
        if name is not None and seen.setdefault(name, e) != e:
            one, two = source.catalog.entries[seen[name]].name, source.catalog.entries[e].name
            raise CheckpointError(
                f"{source.folder}: {one!r} and {two!r} both are the weight {name!r}. Give one with source.path, or model=identity."
            )


def _sizes(
    source: Source, family: Family | None, dialect: str, names: Sequence[str | None], lost: Sequence[str]
) -> tuple[dict[str, int], str, str]:
    """Axis lengths, which axes could not be known, and which layers are not there (an empty text if all are)."""
    if family is None:
        return {}, "", ""
    known: dict[str, int] = {}
    for read in family.sizes.values():
        try:
            known = dict(read(source.config))
            break
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
    known = {a: n for a, n in known.items() if n is not None}
    if wrong := next((f"{n!r:.40} for the length {a}" for a, n in known.items() if not _length(n)), ""):
        raise CheckpointError(f"{source.folder}: its config says {wrong}. Give the right one with model.config=PATH.")
    known = {a: int(n) for a, n in known.items()}  # JSON may say 32.0
    known.pop("v", None)  # stored vocabularies are often padded; the shape decides
    shapes = [(n, source.catalog.entries[e].shape) for e, n in enumerate(names) if n is not None]
    counts = {} if "l" in known else families.counted_on(family, dialect, [n for n, _ in shapes])
    sizes = families.resolve(family, dialect, shapes, {**counts, **known})
    if wrong := next(
        (f"{sizes[a]} for the length {a}" for a in families.counted(family) if sizes.get(a, 0) > MOST), ""
    ):
        raise CheckpointError(
            f"{source.folder}: {wrong}, {MOST} are more than any model has. Keep it as it is with model=identity."
        )
    if _preset(source):
        _fits(
            source, family.sizes[CANONICAL](source.config)["v"], families.resolve(family, dialect, shapes, {}).get("v")
        )
    rules = [rule for n, _ in shapes if (rule := families.match(family, dialect, n, sizes))]
    used = {a for rule in rules for k in range(len(rule.weights)) for a in rule.pattern.axes(k)}
    missing = sorted(used - set(sizes))
    counted = [axis for axis in ("l", *family.further) if axis in sizes and axis not in used]
    told = f"its {source.config_path.name} has" if source.config_path else "its own settings have"
    told = "the model that model.config names has" if _preset(source) else told if "l" in known else "its names count"
    lacks = absent.layers(rules, lost, {a: sizes[a] for a in counted}, told) or absent.weights(family, rules)
    lacks = lacks or absent.implied(family, rules, source.config, sizes)
    return sizes, f"the lengths of {', '.join(missing)}" if missing else "", lacks


def _length(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1 << 43 and value == int(value)


def _preset(source: Source) -> bool:
    return source.config_path is not None and source.config_path.name == configs.PRESETS


def _fits(source: Source, said: int, stored: int | None) -> None:
    """A preset was written for one model: also its vocabulary is that of the tensors."""
    if stored not in (None, said):
        raise CheckpointError(
            f"{source.folder}: the model that model.config names has {said} rows in the vocabulary, the tensors have "
            f"{stored}. Name another one, or give the model's own config.json with model.config=PATH."
        )
