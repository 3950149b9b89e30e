"""The common course of all jobs: open, understand, lay out, prove, fill, publish.

    scanned       rank 0 scans, every rank gets the names; then `part` says what each rank needs
    settle_ties   tied copies are compared once and one of them is left
    Design        what is read (source), how tiles are cut (canon), what is written (target), all as bound entries
    run_tiles     each rank makes its share of the tiles
    digests       per weight, from the digests of its tiles

Invariant: up to `run_tiles` nothing is written and no tensor is read, except for the ties.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import family as families
from ckpt_dist import formats, model, plan, quantised, slots
from ckpt_dist.catalog import Chunks, Entry, Views
from ckpt_dist.configs import is_hf
from ckpt_dist.engine import exchange, traffic
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, Crew, Done, Job, Side, fill, keep, tile_dtypes
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.journal import Journal
from ckpt_dist.engine.moves import Array
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files.dtypes import is_floating, known
from ckpt_dist.formats import Layout
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Bound, Model
from ckpt_dist.part import Part, item_bytes, located, part, readers, share, stored, tile_bytes, wanted, wholly
from ckpt_dist.report import Progress, Report, parse_size, size
from ckpt_dist.sources import Source, open_source

T = TypeVar("T")
TIED = "tied to "  # the rule by which an equal copy is left out
EQUAL = "equal to "  # the same, of copies that belong to a dialect, and not to a model
OWN = "own"  # a transport by which ranks read what they see, and exchange only what somebody does not
KEPT = 1 << 30  # of compressed chunks, by a reader without an engine
WORKER_BYTES = (
    24 << 20
)  # what one thread may hold: a tile of each width, a sum, a result and the scratch of a strided copy


@dataclass(frozen=True)
class Design:
    """Sources, tiles and target as bound entries over the same weights."""

    sources: tuple[Bound, ...]
    canon: Bound
    target: Bound
    dialect: str


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
    )
    if m.lacks and not cfg.get("partial"):
        raise CheckpointError(
            f"{source.folder}: {m.lacks}. Fetch the rest, give the model's own config with model.config=PATH, or keep what is "
            "there, in the same names, with model=identity."
        )
    return _trimmed(m) if m.catalog.about.get("padded") and not m.unresolved else m


def _trimmed(m: Model) -> Model:
    """Without the rows that were added so that ranks could share a vocabulary, as far as a config.json says its length."""
    have, said = m.sizes.get("v", 0), m.source.config.get("vocab_size")
    words = m.catalog.about.get("vocabulary", have)
    if is_hf(m.source.config) and isinstance(said, int) and said < have:
        text = f"{said} rows of the vocabulary, as config.json says; the other {have - said} are padding"
        return replace(model.resized(m, "v", said), guesses=(*m.guesses, text))
    if words < have:
        text = f"all {have} rows of the vocabulary; {words} are said to be words: target.vocab_size={words} takes only these"
        return replace(m, guesses=(*m.guesses, text))
    return m


def design(models: Sequence[Model], cfg_target: Mapping[str, Any]) -> Design:
    """Which spelling the target has, and what is what on each side."""
    first = models[0]
    dialect = _target_dialect(first, cfg_target)
    same = all(m.dialect == first.dialect for m in models)
    names_stay = same and dialect == first.dialect and (model.canonical(dialect) or first.unresolved)
    ordered = cfg_target.get("format") in formats.ORDERED and first.family is not None and not first.unresolved
    ordered |= any(rule.startswith(EQUAL) for m in models for rule in m.dropped)  # they are stored again
    if names_stay and cfg_target.get("vocab_size") is None and not ordered:
        bounds = tuple(model.bind_plain(m) for m in models)
        canon = _plain_entries(first)
        return Design(bounds, canon, _with_paths(canon, first, cfg_target), dialect)
    return _family_design(models, dialect, cfg_target)


def spoken(models: Sequence[Model], cfg_target: Mapping[str, Any]) -> list[Model]:
    """The sources without what the target's dialect has no words for, and says so."""
    dialect = _target_dialect(models[0], cfg_target)
    return [model.spoken(m, dialect) for m in models]


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
        fits = [d for d in choices if d in first.family.dialects and (_uniform(first) or not d.endswith("_stacked"))]
        asked = first.dialect if first.unresolved and first.dialect in choices else (fits or choices)[0]
    if asked not in first.family.dialects:
        raise UsageError(f"target.dialect={asked}: {first.family.name} has {', '.join(first.family.dialects)}.")
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
    for rule in model.rules(m):
        for axis, index in rule.fixed if rule else ():
            if axis == "l":
                layers.setdefault(rule.weights[0], set()).add(index)  # type: ignore[union-attr]
    return len({frozenset(found) for found in layers.values()}) < 2


def _plain_entries(first: Model) -> Bound:
    named = [(first.catalog.entries[e], n) for e, n in enumerate(first.names) if n is not None]
    picked = [(replace(e, name=n if e.role == "weight" else e.name, frame=()), n) for e, n in named]
    entries = tuple(e for e, _ in picked)
    return Bound(entries, tuple(families.plain(e, n) for e, n in picked), {}, {})


def _family_design(models: Sequence[Model], dialect: str, cfg_target: Mapping[str, Any]) -> Design:
    for m in models:
        if m.family is None or m.unresolved:
            what = m.unresolved or "the model's family"
            raise UsageError(
                f"{m.source.folder}: {what} cannot be read from the checkpoint, and names in {m.dialect or 'an unknown dialect'} cannot become "
                f"{dialect or 'others'} without. Give model.config=PATH of its config.json or params.json."
            )
    first = models[0]
    assert first.family is not None
    bounds = tuple(model.bind_family(m) for m in models)
    for m, bound in zip(models, bounds, strict=True):
        _spellable(m, bound, dialect, cfg_target)
    present = model.corners(first.family, bounds[0], wholly(bounds[0]))
    dtype_of = stored_dtypes(bounds[0])
    canon = model.spelled(first.family, families.CANONICAL, present, first.sizes, dtype_of)
    ties = {
        copy: of
        for copy, of in first.family.ties.items()
        if dialect in families.COPIES and copy not in present and tied(first)
    }
    zeros = {w: of for w, of in first.family.zeros.items() if w not in present and of in present}
    more = {c: present[o] for c, o in ties.items()} | model.beside(first.family, zeros, present)
    named = families.weights_in(first.family, dialect)
    copies = {c: found for c, found in model.copied(first.family, present).items() if c in named}
    more |= {c: corners for c, (_, corners) in copies.items()}
    ties |= {c: of for c, (of, _) in copies.items()}
    target = model.spelled(first.family, dialect, present | more, first.sizes, dtype_of_tied(dtype_of, ties | zeros))
    canon, target = (_with_others(side, bounds[0], first.family) for side in (canon, target))
    canon = _with_own(canon, target, {*first.family.zeros} - {*zeros})
    rules = tuple(
        None if r is None or r.weights[0] in zeros else replace(r, weights=tuple(ties.get(w, w) for w in r.weights))
        for r in target.rules
    )  # what has no rule is filled by nobody, and a file begins as zeros
    return Design(bounds, canon, _with_paths(replace(target, rules=rules), first, cfg_target), dialect)


def _with_others(side: Bound, source: Bound, family: families.Family) -> Bound:
    """Also what is no weight and no slot of one, as the source has it."""
    more = [
        (replace(e, frame=()), r)
        for e, r in zip(source.entries, source.rules, strict=True)
        if r and e.role != "weight" and not slots.is_slot(family, r)
    ]
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
    """The stored dtype of a rule's first weight, at its layer where layers are told apart."""
    exact: dict[tuple[str, tuple[tuple[str, int], ...]], str] = {}
    loose: dict[str, str] = {}
    for entry, rule in zip(bound.entries, bound.rules, strict=True):
        for weight in rule.weights if rule else ():
            exact[weight, tuple(sorted(rule.fixed))] = entry.dtype  # type: ignore[union-attr]
            loose.setdefault(weight, entry.dtype)
    return lambda rule: exact.get((rule.weights[0], tuple(sorted(rule.fixed))), loose[rule.weights[0]])


def _with_paths(target: Bound, first: Model, cfg_target: Mapping[str, Any]) -> Bound:
    """Names and nesting as the target stores them: `hf` is flat; others keep the dicts around the model, or get target.key."""
    key = cfg_target.get("key", "auto")
    nested = ("dcp", "torch")
    keeps = cfg_target.get("format") in nested and first.catalog.format in (*nested, "torch_dist", "zarr")
    keeps |= cfg_target.get("format") == first.catalog.format == "deepspeed"  # an engine's names are its wrappers' too
    around: tuple[str | int, ...] = (
        (first.wrapper if keeps else ()) if key == "auto" else tuple(str(key).split(".")) if key else ()
    )
    entries = []
    for entry, rule in zip(target.entries, target.rules, strict=True):
        path = entry.path if entry.role != "weight" else (*around, entry.name)
        if entry.role == "optimizer" and rule and rule.weights[0] in target.axes:  # a slot, named after its weight
            slot, own = slots.parted(entry.name)
            path = (slot + ".".join(map(str, (*around, own))),)
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


def tied(m: Model) -> bool:
    """Whether the config says so, or, where it has no word for it, the values were found equal."""
    config = m.source.config
    said = config.get("tie_word_embeddings") or config.get("untie_embeddings_and_output_weights") is False
    return bool(said) or any(rule.startswith(TIED) for rule in m.dropped)


@dataclass(frozen=True)
class Work:
    """What one rank needs to make its tiles."""

    tiles: Chunks
    first: int
    last: int
    job: Job
    names: Sequence[str]


@dataclass(frozen=True)
class Staged:
    """A target that is being made: where its journal is, and what earlier attempts have done."""

    folder: Path
    finished: Sequence[tuple[int, int]]
    done: Done


def run_tiles(
    group: Group,
    report: Report,
    engine: Mapping[str, Any],
    what: str,
    canon: Bound,
    sources: Sequence[tuple[Model, Bound]],
    target: tuple[Bound, Layout, Files, Views] | None,
    combine: Combine,
    *,
    digests: bool,
    quiet: bool,
    staged: Staged | None = None,
    proof: Proof | None = None,
    here: NDArray[np.bool_] | None = None,
) -> Done:
    """Make all tiles; this rank its share. The result holds this rank's runs and everyone's byte counts and digests.

    Where nodes have targets of their own, `here` are the tiles for that of this node, which its ranks make.
    `proof` saves a second look at the sources. Raises Uncovered, before any tile, if a source does not hold all of them.
    """
    for m, _ in sources:
        needs_data(m.catalog)
    nbytes = tile_bytes(canon)
    finished = np.zeros(len(nbytes), bool)
    for lo, hi in staged.finished if staged else ():
        finished[lo:hi] = True
    if here is not None:
        finished |= ~here
    first, last = share(canon, finished, group, local=here is not None)
    mine = canon.views(plan.tiles(canon.entries, first=first, last=last))
    parts = (
        [part(group, m, b, mine) for m, b in sources]
        if proof is None or here is not None or finished.any()
        else proof.parts
    )  # another share, other parts
    kept = int(engine["memory"]) // 2 if any(m.catalog.about.get("packed") for m, _ in sources) else 0
    engine = {**engine, "memory": int(engine["memory"]) - kept}
    workers = worker_count(engine, group.local_world)
    fsync = bool(engine.get("fsync", True))
    transport = str(engine.get("transport", "auto"))
    plans = [readers(group, m, transport == "collective") for m, _ in sources]
    exchanging, said = group.together(lambda: _collective(transport, group, plans))
    report.notes += [said] if said and target else []

    def work() -> Done:
        files_of = [opened(m, kept // len(sources)) for m, _ in sources]
        sync = target[2].sync if target and fsync else lambda: None

        def flush() -> None:  # a disk may have much to write down
            group.patiently(sync)

        journal = Journal(staged.folder, flush) if staged else None
        with ExitStack() as closing:  # all of them, whatever one of them says
            for files in [*files_of, *([target[2]] if target else [])]:
                closing.callback(files.close)
            if journal:
                closing.callback(journal.close)
            there = [located(group, r, b, p, mine) for r, (_, b), p in zip(plans, sources, parts, strict=True)]
            needs = group.together(
                lambda: [wanted(r, p, mine, finished[first:last]) for r, p in zip(plans, there, strict=True)]
            )
            collective = exchanging
            if transport == "auto" and group.nodes > 1 and not exchanging:
                collective, said = _cheaper(group, needs, [stored(m) for m, _ in sources])
                needs = [replace(w, readers=w.readers.evenly()) for w in needs] if collective else needs
                report.notes += [said] if target else []
            bound_layout = target and (target[0], target[1].catalog.chunks, *target[2:])
            out = group.together(lambda: target_side(*bound_layout, mine, last - first) if bound_layout else None)
            job = Job(
                first,
                first,
                last,
                plan.tile_numel(canon.entries)[first:last],
                finished[first:last],
                [Side(f, w.moves, w.file, w.dtypes) for f, w in zip(files_of, needs, strict=True)],
                out,
                target[2] if target else None,
                _named(combine, canon),
                digests,
                frozenset(c.file for c in target[1].crcs) if target else frozenset(),
                journal.note if journal else lambda lo, hi, done: None,
            )
            total = int((nbytes * ~finished)[first:last].sum()) * len(sources)
            with Progress(what, total * group.world, quiet) as progress, group.busy() as moved, Crew(workers) as crew:

                def advance(nbytes: int) -> None:
                    moved()
                    progress.advance(nbytes * group.world)

                if collective:
                    memory = int(engine["memory"])
                    with group.carrier(str(engine["device"])) as wire:
                        done = exchange.run(group, job, needs, files_of, crew, memory, advance, wire)
                else:
                    done = fill(job, crew, advance)
            flush()
            done.bytes_read = sum(files.bytes_read for files in files_of)
            return done

    done = group.together(work)
    if staged and (group.rank == 0 or (here is not None and group.local_rank == 0)):  # who has read the journal
        done.digests = staged.done.digests | done.digests
        done.runs += staged.done.runs
    all_done = group.gather((done.bytes_read, done.bytes_written, done.digests, done.bytes_sent))
    report.bytes_read += sum(p[0] for p in all_done)
    report.bytes_written += sum(p[1] for p in all_done)
    report.bytes_exchanged += sum(p[3] for p in all_done)
    done.digests = {}
    for key, d in ((key, d) for one in all_done for key, d in one[2].items()):
        if done.digests.setdefault(key, d) != d:  # two nodes have made one tile, and one of them wrongly
            done.digests[key] = b""
    return done


def opened(m: Model, memory: int = KEPT) -> Any:
    """What the bytes of a source come from: its files, or what computes them, within some memory."""
    if m.source.reader:
        return m.source.reader
    files = Files(m.catalog.root, m.catalog.files)
    if not quantised.computed(m.catalog):
        return files
    if packed := m.catalog.about.get("packed"):
        from ckpt_dist.engine.unpack import Unpacked

        return Unpacked(files, packed, memory)
    from ckpt_dist.engine.dequantise import Dequantised

    return Dequantised(files, quantised.of(m.catalog))


def _named(combine: Combine, canon: Bound) -> Combine:
    """The same combination, with the tensor's name in front of its errors."""
    if combine is keep:
        return keep

    ends = np.cumsum(plan.tile_counts(canon.entries))

    def named(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Array | None:
        try:
            return combine(tile, values, dtypes, want)
        except CheckpointError as error:
            raise type(error)(f"{canon.entries[int(np.searchsorted(ends, tile, 'right'))].name}: {error}") from None

    return named


def worker_count(engine: Mapping[str, Any], local_world: int) -> int:
    """Threads of a rank: as asked, else by the CPUs; fewer where `engine.memory` demands it."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = int(engine.get("workers") or max(1, min(8, -(-cpus // local_world))))
    memory = int(engine["memory"])
    if memory < WORKER_BYTES:
        raise plan.TooBig(
            f"engine.memory={size(memory)} is too little: one thread needs {size(WORKER_BYTES)}. Give at least that."
        )
    return min(wanted, memory // WORKER_BYTES)


def _collective(asked: str, group: Group, plans: Sequence[exchange.Readers]) -> tuple[bool, str]:
    """Whether ranks exchange what they read: if asked to, or if some rank does not see some file; what to say of it."""
    blind = not all(readers.everywhere for readers in plans)
    if asked == "direct" and blind:
        raise UsageError(
            "engine.transport=direct, but not every node sees all files of the source. Use engine.transport=auto."
        )
    said = "transport collective: not every node sees all files" if group.world > 1 and blind else ""
    return asked == "collective" or blind, said if asked == "auto" else ""


def _cheaper(group: Group, needs: Sequence[exchange.Wanted], held: Sequence[traffic.Part]) -> tuple[bool, str]:
    """Whether an exchange moves less than reading directly, which all nodes could; and what to say of it."""
    each, once = (traffic.none(group.world) for _ in range(2))
    for w, of in zip(needs, held, strict=True):
        owner = np.full(len(w.file), group.rank)
        each += traffic.direct(w, owner, group.world, of)
        once += traffic.exchanged(replace(w, readers=w.readers.evenly()), owner, group.world, group.nodes, of)
    every = group.gather((each, once))
    each, once = (sum((e[k] for e in every), traffic.none(group.world)) for k in range(2))
    collective, numbers = traffic.cheaper(each, once, group.nodes)
    return collective, f"transport {'collective' if collective else 'direct'}: {numbers}"


def target_side(bound: Bound, chunks: Chunks, files: Files, views: Views, mine: Views, count: int) -> Side:
    """Where each tile goes: into all chunks that hold any of it."""
    entries = bound.entries
    moves = plan.moves(views, chunks, item_bytes(entries, chunks), mine, alternatives=False)
    names = [e.name for e in entries]
    return Side(
        files, moves, chunks.file, tile_dtypes(moves, chunks.entry, [e.dtype for e in entries], 0, count, names)
    )


def weight_digests(canon: Bound, done: Done, which: int, dtypes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A digest of each canonical tensor of one source (or of the result), from the digests of its tiles in order."""
    import xxhash

    cuts = [0, *np.cumsum(plan.tile_counts(canon.entries)).tolist()]
    found = {}
    for e, entry in enumerate(canon.entries):
        if entry.role != "weight":
            continue
        text = b"".join(done.digests.get((which, t), b"") for t in range(cuts[e], cuts[e + 1]))
        dtype = (dtypes or {}).get(entry.name, entry.dtype)
        found[entry.name] = xxhash.xxh3_128_hexdigest(f"{dtype}{list(entry.shape)}".encode() + text)
    return found


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """One digest for a model: of its weights' names and digests, sorted by name."""
    import xxhash

    return xxhash.xxh3_128_hexdigest("\n".join(f"{n} {d}" for n, d in sorted(digests.items())).encode())


def settle_ties(group: Group, report: Report, m: Model, engine: Mapping[str, Any]) -> Model:
    """Where the config ties two weights, or cannot say so, and both are stored: leave the copy out if it is equal.

    Values that are not stored yet cannot be compared: both are kept.
    """
    if m.family is None or m.source.reader:
        return m
    m = _without_copies(group, report, m, engine)
    assert m.family is not None
    if not tied(m) and is_hf(m.source.config):
        return m
    where = {r.weights[0]: e for e, r in enumerate(model.rules(m)) if r is not None and len(r.weights) == 1}
    for copy, of in m.family.ties.items():
        if copy not in where or of not in where:
            continue
        one, two = where[copy], where[of]
        saved = "saved" in m.catalog.about
        if saved:
            differ = "are equal, as the config says" if tied(m) else "differ"
            report.guesses.append(f"{m.names[one]} and {m.names[two]} {differ}")
        if tied(m) if saved else equal_entries(group, report, m, one, two, engine):
            m = _left_out(m, one, TIED + str(m.names[two]))
        elif tied(m):
            report.warnings.append(
                f"{m.names[one]} and {m.names[two]} differ although the config ties them; both are kept, untied"
            )
    return m


def _left_out(m: Model, copy: int, rule: str) -> Model:
    """Without a stored copy of a weight, and what an optimizer keeps of it."""
    names = tuple(None if n and slots.parted(n)[1] == m.names[copy] else n for n in m.names)
    lost = tuple(e.name for e, a, b in zip(m.catalog.entries, m.names, names, strict=True) if a != b)
    return replace(m, names=names, dropped={**m.dropped, rule: (*m.dropped.get(rule, ()), *lost)})


def _without_copies(group: Group, report: Report, m: Model, engine: Mapping[str, Any]) -> Model:
    """Without the copies that only some dialects have; one that is not equal stays, and is said."""
    assert m.family is not None
    found = [(e, r.weights[0]) for e, r in enumerate(model.rules(m)) if r and len(r.weights) == 1]
    where = {weight: e for e, weight in found}
    for e, copy in found if not m.unresolved else ():
        of = m.family.copies.get(copy, "")
        original = where.get(of, where.get(m.family.ties.get(of, "")))
        if original is None:
            continue
        saved = "saved" in m.catalog.about
        report.guesses += [f"{m.names[e]} and {m.names[original]} are equal"] if saved else []
        if saved or equal_entries(group, report, m, e, original, engine, expected=True):
            m = _left_out(m, e, EQUAL + str(m.names[original]))
        else:
            report.warnings.append(f"{m.names[e]} is no copy of {m.names[original]}; it is kept")
    return m


def equal_entries(
    group: Group, report: Report, m: Model, one: int, two: int, engine: Mapping[str, Any], expected: bool = False
) -> bool:
    """Whether two stored tensors have the same shape, dtype and bytes. Where nobody says that they have, one thread
    stops at the first difference: hardly anything is read of a large model whose head is its own."""
    a, b = m.catalog.entries[one], m.catalog.entries[two]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    canon = Bound((replace(a, name="tied"),), (families.plain(a, "tied"),), {}, {})
    sides = []
    for e in (one, two):
        rules = tuple(families.plain(a, "tied") if i == e else None for i in range(len(m.names)))
        sides.append((m, Bound(m.catalog.entries, rules, {}, {})))
    different: list[int] = []
    expected |= tied(m)
    engine = {**engine, "transport": OWN} | ({} if expected else {"workers": 1})

    def compare(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
        if different and not expected:
            return
        kept = next(values).copy()
        if not np.array_equal(kept, next(values)):
            different.append(tile)

    run_tiles(group, report, engine, "compare tied weights", canon, sides, None, compare, digests=False, quiet=True)
    return not any(group.gather(bool(different)))


@dataclass(frozen=True)
class Proof:
    """What was looked up to prove a plan: each source's part of this rank, and the views of the target."""

    parts: Sequence[Part]
    target: Views


def prove_all(group: Group, d: Design, models: Sequence[Model], target_chunks: Chunks) -> Proof:
    """Each source holds all of the tiles, and the tiles all of the target; or the worst holes are named."""
    target = d.target.views(target_chunks)
    group.together(lambda: plan.prove(wholly(d.canon), target))
    first, last = share(d.canon, np.zeros(len(tile_bytes(d.canon)), bool), group)
    mine = d.canon.views(plan.tiles(d.canon.entries, first=first, last=last))
    return Proof([part(group, m, b, mine) for m, b in zip(models, d.sources, strict=True)], target)


def engine_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's settings with sizes in bytes."""
    engine = dict(cfg["engine"])
    engine["memory"] = parse_size(engine["memory"])
    return engine
