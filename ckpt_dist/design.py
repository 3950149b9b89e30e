"""What a job reads, how its tiles are cut and what it writes: bound entries over the same weights, in names and dtypes.

Invariant: a design depends on configs, names, shapes and what the user asked for; no tensor is read for it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ckpt_dist import altered, formats, model, slots, spelling
from ckpt_dist import family as families
from ckpt_dist.catalog import Entry
from ckpt_dist.configs import is_hf
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files.dtypes import holding, is_floating, known
from ckpt_dist.model import Model
from ckpt_dist.part import wholly
from ckpt_dist.sources import Source, open_source
from ckpt_dist.spelling import Bound

TIED = "tied to "  # the rule by which an equal copy is left out
EQUAL = "equal to "  # the same, of copies that belong to a dialect, and not to a model


@dataclass(frozen=True)
class Design:
    """Sources, tiles and target as bound entries over the same weights. `mixed`: what joins stored tensors of unlike dtypes."""

    sources: tuple[Bound, ...]
    canon: Bound
    target: Bound
    dialect: str
    mixed: tuple[str, ...] = ()


def open_model(keys: Mapping[str, Any], cfg: Mapping[str, Any]) -> Model:
    """Find, scan and recognise one source."""
    settings = cfg.get("model") or {}
    rules = (cfg.get("target") or {}).get("dtype", "keep")
    carried = {k: cfg.get(k) for k in ("keep", "unmatched")}
    asked = {**keys, **carried, "dtype_of": lambda entry: target_dtype(rules, entry)}
    source = open_source(asked, settings.get("config"))
    if keys.get("universal") and source.catalog.format != "deepspeed":
        cfg = {**cfg, "keep": ["weights"]}  # nobody else's optimizer has DeepSpeed's words
    return understand(source, keys, cfg)


def understand(source: Source, keys: Mapping[str, Any], cfg: Mapping[str, Any]) -> Model:
    settings = cfg.get("model") or {}
    m = model.recognise(
        source,
        family=settings.get("family", "auto"),
        dialect=keys.get("dialect", "auto"),
        keep=cfg.get("keep", ["weights"]),
        unmatched=cfg.get("unmatched", "error"),
        partial=bool(cfg.get("partial")),
    )
    if m.lacks and not cfg.get("partial"):
        raise CheckpointError(
            f"{source.folder}: {m.lacks}. Fetch the rest, give the model's own config with model.config=PATH, or keep what is "
            "there, in the same names, with model=identity."
        )
    if not any(m.names) and not cfg.get("partial"):
        kinds = sorted({e.role for e in m.catalog.entries} - {"weight"})
        more = f", or keep=[{','.join(('weights', *kinds))}]" if "keep" in cfg else ""
        raise CheckpointError(
            f"{source.folder}: none of its {len(m.names)} tensors is carried; they are taken for {' and '.join(kinds) or 'no weights'}, "
            f"first {m.catalog.entries[0].name!r}. Give the model's own checkpoint{more}."
        )
    return _trimmed(m) if m.catalog.about.get("padded") and not m.unresolved else m


def _trimmed(m: Model) -> Model:
    """Without the rows that were added so that ranks could share a vocabulary, as far as a config.json says its length."""
    have, said = m.sizes.get("v", 0), m.source.config.get("vocab_size")
    words = m.catalog.about.get("vocabulary", have)
    if is_hf(m.source.config) and isinstance(said, int) and said < have:
        text = f"{said} rows of the vocabulary, as config.json says; the other {have - said} are padding"
        return replace(altered.resized(m, "v", said), guesses=(*m.guesses, text))
    if words < have:
        text = f"all {have} rows of the vocabulary; {words} are said to be words: target.vocab_size={words} takes only these"
        return replace(m, guesses=(*m.guesses, text))
    return m


def of(models: Sequence[Model], cfg_target: Mapping[str, Any]) -> Design:
    """Which spelling the target has, and what is what on each side."""
    first = models[0]
    dialect = _target_dialect(first, cfg_target)
    same = all(m.dialect == first.dialect for m in models)
    names_stay = same and dialect == first.dialect and (spelling.canonical(dialect) or first.unresolved)
    ordered = cfg_target.get("format") in formats.ORDERED and first.family is not None and not first.unresolved
    ordered |= any(rule.startswith(EQUAL) for m in models for rule in m.dropped)  # they are stored again
    if names_stay and cfg_target.get("vocab_size") is None and not ordered:
        bounds = tuple(spelling.bind_plain(m) for m in models)
        canon = plain_entries(first)
        target = _with_copies(canon, first, cfg_target)
        return Design(bounds, canon, _with_paths(target, first, cfg_target, dialect), dialect)
    return of_family(models, dialect, cfg_target)


def spoken(models: Sequence[Model], cfg_target: Mapping[str, Any]) -> list[Model]:
    """The sources without what the target's dialect has no words for, and says so."""
    dialect = _target_dialect(models[0], cfg_target)
    return [spelling.spoken(m, dialect) for m in models]


def _target_dialect(first: Model, cfg_target: Mapping[str, Any]) -> str:
    asked = str(cfg_target.get("dialect", "auto"))
    if first.family is None:
        if asked != "auto":
            raise UsageError(
                f"target.dialect={asked}: the source is of no known family, so its names cannot be translated. Give model=FAMILY."
            )
        return ""
    only = formats.ONLY.get(str(cfg_target.get("format")))
    if only and first.family.name not in only:
        raise UsageError(
            f"target.format={cfg_target['format']}: it holds models of {' and '.join(only)}, this one is of {first.family.name}."
        )
    if asked == "auto":
        choices = formats.dialects(cfg_target, first.dialect)
        if cfg_target.get("format") == first.catalog.format == "hf" and first.dialect == families.BASE:
            choices = (families.BASE,)  # as it was published
        fits = [d for d in choices if d in first.family.dialects and (_uniform(first) or not d.endswith("_stacked"))]
        asked = first.dialect if first.unresolved and first.dialect in choices else (fits or choices)[0]
    if asked not in first.family.dialects:
        given = cfg_target.get("dialect", "auto") != "auto"
        what = (
            f"target.dialect={asked}" if given else f"target.format={cfg_target.get('format')}, in the dialect {asked}"
        )
        raise UsageError(f"{what}: {first.family.name} has {', '.join(first.family.dialects)}.")
    if asked.startswith("megatron") and asked.endswith("_stacked") and not _uniform(first):
        raise UsageError(
            f"target.dialect={asked}: some layers have weights that others lack, so no tensor can hold those of all. "
            f"Use target.dialect={asked.removesuffix('_stacked')}."
        )
    return asked


def _uniform(m: Model) -> bool:
    """Whether all layers have the same weights, so that one tensor can hold a weight of all of them."""
    assert m.family is not None
    layers: dict[str, set[int]] = {}
    for rule in spelling.rules(m):
        for axis, index in rule.fixed if rule else ():
            if axis == "l":
                layers.setdefault(rule.weights[0], set()).add(index)  # type: ignore[union-attr]
    return len({frozenset(found) for found in layers.values()}) < 2


def plain_entries(first: Model) -> Bound:
    """Every selected name as a tensor of its own, under that name."""
    named = [(first.catalog.entries[e], n) for e, n in enumerate(first.names) if n is not None]
    picked = [(replace(e, name=n if e.role == "weight" else e.name), n) for e, n in named]
    entries = tuple(e for e, _ in picked)
    return Bound(entries, tuple(families.plain(e, n) for e, n in picked), {}, {})


def _with_copies(canon: Bound, first: Model, cfg_target: Mapping[str, Any]) -> Bound:
    """Also the copies of weights that the source stores, where a program loads all names that its model has."""
    if cfg_target.get("format") not in formats.NESTED:
        return canon
    pairs = {e.name: (e, r) for e, r in zip(canon.entries, canon.rules, strict=True)}
    more = [(replace(pairs[of][0], name=copy), pairs[of][1]) for copy, of in first.copies.items()]
    return replace(canon, entries=(*canon.entries, *(e for e, _ in more)), rules=(*canon.rules, *(r for _, r in more)))


def of_family(models: Sequence[Model], dialect: str, cfg_target: Mapping[str, Any]) -> Design:
    """The design where names are translated, by the family's table. Raises UsageError if there is none to do it by."""
    for m in models:
        if m.family is None or m.unresolved:
            what = m.unresolved or "the model's family"
            raise UsageError(
                f"{m.source.folder}: {what} cannot be read from the checkpoint, and names in {m.dialect or 'an unknown dialect'} cannot become "
                f"{dialect or 'others'} without. Give model.config=PATH of its config.json or params.json."
            )
    first = models[0]
    assert first.family is not None
    bounds = tuple(spelling.bind_family(m) for m in models)
    for m, bound in zip(models, bounds, strict=True):
        _spellable(m, bound, dialect, cfg_target)
    present = spelling.corners(first.family, bounds[0], wholly(bounds[0]))
    kinds = stored_kinds(bounds[0])
    dtype_of = _widest(kinds)
    canon = spelling.spelled(first.family, families.CANONICAL, present, first.sizes, dtype_of)
    kept = first.copies and dialect == first.dialect and cfg_target.get("format") in formats.NESTED
    ties = {
        copy: of
        for copy, of in first.family.ties.items()
        if (dialect in families.COPIES or kept) and copy not in present and tied(first)
    }
    zeros = {w: of for w, of in first.family.zeros.items() if w not in present and of in present}
    more = {c: present[o] for c, o in ties.items()} | spelling.beside(first.family, zeros, present)
    named = families.weights_in(first.family, dialect)
    copies = {c: found for c, found in spelling.copied(first.family, present).items() if c in named}
    more |= {c: corners for c, (_, corners) in copies.items()}
    ties |= {c: of for c, (of, _) in copies.items()}
    target = spelling.spelled(first.family, dialect, present | more, first.sizes, dtype_of_tied(dtype_of, ties | zeros))
    canon, target = (_with_others(side, bounds[0], first.family) for side in (canon, target))
    canon = _with_own(canon, target, {*first.family.zeros} - {*zeros})
    rules = tuple(
        None if r is None or r.weights[0] in zeros else replace(r, weights=tuple(ties.get(w, w) for w in r.weights))
        for r in target.rules
    )  # what has no rule is filled by nobody, and a file begins as zeros
    mixed = tuple(
        e.name
        for e, r in zip(target.entries, rules, strict=True)
        if r and r.weights[0] in bounds[0].axes and len(kinds(r)) > 1
    )
    return Design(bounds, canon, _with_paths(replace(target, rules=rules), first, cfg_target, dialect), dialect, mixed)


def _with_others(side: Bound, source: Bound, family: families.Family) -> Bound:
    """Also what is no weight of the family and no slot of one, as the source has it."""
    more, names = [], {e.name for e in side.entries}
    for e, r in zip(source.entries, source.rules, strict=True):
        if r and e.role == "weight" and r.weights[0] not in source.axes:
            if r.weights[0] in names:
                raise UsageError(
                    f"{r.weights[0]!r} cannot be kept: it is another weight's name in the target, or in Hugging Face's words. Leave it "
                    "out with unmatched=drop, or keep all names as they are with model=identity."
                )
            more.append((replace(e, name=r.weights[0], path=(r.weights[0],)), r))
        elif r and e.role != "weight" and not slots.is_slot(family, r):
            more.append((e, r))
    return replace(side, entries=(*side.entries, *(e for e, _ in more)), rules=(*side.rules, *(r for _, r in more)))


def _spellable(m: Model, bound: Bound, dialect: str, cfg_target: Mapping[str, Any]) -> None:
    """Of an optimizer's state only slots of weights have names in other dialects, and a place in some formats."""
    assert m.family is not None
    stays, format = m.dialect == dialect and cfg_target.get("vocab_size") is None, str(cfg_target.get("format"))
    for entry, rule in zip(bound.entries, bound.rules, strict=True):
        if rule is None or entry.role == "weight":
            continue
        if not slots.is_slot(m.family, rule):
            if not stays:
                raise UsageError(
                    f"Optimizer state is carried only under the same names and shapes; {m.dialect} becomes {dialect}"
                    + (", of another vocabulary" if m.dialect == dialect else "")
                    + f", and {entry.name!r} is named after no weight. Use keep=[weights]."
                )
            continue
        if wrong := slots.misshapen(rule, m.sizes, entry.shape):
            raise CheckpointError(
                f"{m.source.folder}: {entry.name!r} {wrong}. It is damaged, or in pieces (fully_sharded_model_space of "
                "megatron-core up to 0.15), which are not read. Use keep=[weights]."
            )
        if format not in formats.SLOTS:
            raise UsageError(
                f"target.format={format}: no optimizer state is written in it, only in {', '.join(formats.SLOTS)}; Megatron loads "
                "torch_dist under any parallel layout. Use keep=[weights], or another target.format."
            )


def _with_own(canon: Bound, target: Bound, own: set[str]) -> Bound:
    """Tiles also for what only the target's dialect has a name for; no part of a fingerprint, which is of all dialects."""
    more = [(e, r) for e, r in zip(target.entries, target.rules, strict=True) if r and r.weights[0] in own]
    entries = (*canon.entries, *(replace(e, role="state") for e, _ in more))
    return replace(canon, entries=entries, rules=(*canon.rules, *(r for _, r in more)))


def unsaid(m: Model, d: Design) -> dict[str, list[str]]:
    """Stored names that the target has no name for, by the rule that lets them be left out."""
    named = {w for rule in d.canon.rules if rule for w in rule.weights}
    names = [n for n, r in zip(m.names, d.sources[0].rules, strict=True) if n and r and r.weights[0] not in named]
    return {f"taken to be zeros in the dialect {d.dialect}": names} if names else {}


def dtype_of_tied(dtype_of: Callable[[Any], str], ties: Mapping[str, str]) -> Callable[[Any], str]:
    return lambda rule: dtype_of(replace(rule, weights=tuple(ties.get(w, w) for w in rule.weights)))


def stored_dtypes(bound: Bound) -> Callable[[Any], str]:
    """The dtype that holds all that is stored of a rule's weights."""
    return _widest(stored_kinds(bound))


def _widest(kinds: Callable[[Any], set[str]]) -> Callable[[Any], str]:
    return lambda rule: holding(kinds(rule))


def stored_kinds(bound: Bound) -> Callable[[Any], set[str]]:
    """The stored dtypes of a rule's weights, at its layer (and expert) as far as both tell them apart."""
    stored: dict[str, list[tuple[str, tuple[tuple[str, int], ...]]]] = {}
    for entry, rule in zip(bound.entries, bound.rules, strict=True):
        for weight in rule.weights if rule else ():
            stored.setdefault(weight, []).append((entry.dtype, rule.fixed))  # type: ignore[union-attr]

    @cache
    def table(weight: str, axes: frozenset[str]) -> dict[frozenset[tuple[str, int]], frozenset[str]]:
        found: dict[frozenset[tuple[str, int]], frozenset[str]] = {}
        for dtype, fixed in stored[weight]:
            place = frozenset(one for one in fixed if one[0] in axes)
            found[place] = found.get(place, frozenset()) | {dtype}
        return found

    def at(weight: str, fixed: tuple[tuple[str, int], ...]) -> frozenset[str]:
        each = table(weight, frozenset(axis for axis, _ in fixed))
        told = {axis for axis, _ in stored[weight][0][1]}
        kinds = each.get(frozenset(one for one in fixed if one[0] in told))
        return frozenset().union(*each.values()) if kinds is None else kinds

    return lambda rule: set().union(*(at(w, rule.fixed) for w in rule.weights))


def _with_paths(target: Bound, first: Model, cfg_target: Mapping[str, Any], dialect: str | None) -> Bound:
    """Names and nesting as the target stores them: `hf` is flat; others keep the dicts around the model, or get target.key.

    Dicts are a framework's, as names are: those of another dialect come without.
    """
    key = cfg_target.get("key", "auto")
    keeps = cfg_target.get("format") in formats.NESTED and first.catalog.format in (
        *formats.NESTED,
        "torch_dist",
        "zarr",
    )
    keeps &= str(dialect).partition("_")[0] == str(first.dialect).partition("_")[0]  # `megatron_stacked` is Megatron's
    keeps |= cfg_target.get("format") == first.catalog.format == "deepspeed"  # an engine's names are its wrappers' too
    around: tuple[str | int, ...] = (
        (first.wrapper if keeps else ()) if key == "auto" else tuple(str(key).split(".")) if key else ()
    )
    nested_at, prefix = (first.paths, first.prefix) if keeps and key == "auto" else ({}, "")
    entries = []
    for entry, rule in zip(target.entries, target.rules, strict=True):
        path = entry.path if entry.role != "weight" else nested_at.get(entry.name, (*around, prefix + entry.name))
        if entry.role == "optimizer" and rule and rule.weights[0] in target.axes:  # a slot, named after its weight
            slot, own = slots.parted(entry.name)
            path = (slot + ".".join(map(str, (*around, prefix + own))),)
            entry = replace(entry, name=path[0])
        name = entry.name if entry.role != "weight" else ".".join(map(str, path))
        entries.append(replace(entry, name=name, path=path, dtype=target_dtype(cfg_target.get("dtype", "keep"), entry)))
    return replace(target, entries=tuple(entries))


def target_dtype(rules: str | Mapping[str, str], entry: Entry) -> str:
    """The dtype that `target.dtype` gives an entry: the first pattern that fits, else `default`; integers stay."""
    if not is_floating(entry.dtype) or entry.role != "weight":
        return entry.dtype
    if isinstance(rules, str):
        rules = {"default": rules}
    fits = [d for pattern, d in rules.items() if pattern != "default" and fnmatch.fnmatch(entry.name, pattern)]
    dtype = fits[0] if fits else rules.get("default", "keep")
    if dtype != "keep" and not (known(dtype) and is_floating(dtype)):
        raise UsageError(f"target.dtype: {dtype!r} is no floating dtype.")
    return entry.dtype if dtype == "keep" else dtype


def unused(rules: str | Mapping[str, str], entries: Sequence[Entry]) -> list[str]:
    """A warning for each pattern of `target.dtype` that is no weight's name; it need not know of dicts around the model."""
    given = [] if isinstance(rules, str) else [pattern for pattern in rules if pattern != "default"]
    names = {e.name for e in entries if e.role == "weight"}
    return [
        f"target.dtype: no weight is called {p!r}, so that rule does nothing"
        for p in given
        if not fnmatch.filter(names, p) + fnmatch.filter(names, f"*.{p}")
    ]


def tied(m: Model) -> bool:
    """Whether the config says so, if only by its type, or, where it has no word for it, the values were found equal."""
    config = m.source.config
    if m.family and config.get("tie_word_embeddings") is None:
        config = {**config, **m.family.defaults.get(str(config.get("model_type")), {})}
    said = config.get("tie_word_embeddings") or config.get("untie_embeddings_and_output_weights") is False
    return bool(said) or any(rule.startswith(TIED) for rule in m.dropped)
