"""A job before its first byte is written: design, layout and proof, checked against the target's place.

Invariant: nothing is written, and every rank finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import (
    altered,
    beside,
    configs,
    design,
    formats,
    megatron_args,
    part,
    quantised,
    slots,
    task,
    ties,
)
from ckpt_dist.catalog import Catalog, Extra, Views
from ckpt_dist.engine import staging as stage
from ckpt_dist.engine.fill import Combine, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.traffic import node_of
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.formats import Layout, Spec
from ckpt_dist.model import Model
from ckpt_dist.report import Report, parse_size
from ckpt_dist.spelling import Bound, bind_plain
from ckpt_dist.whole import contents

Config = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first byte is written: proven, laid out, checked against the target's place."""

    models: Sequence[Model]
    design: design.Design
    combine: Combine
    layout: Layout
    proof: task.Proof
    staging: stage.Staging
    small: Mapping[str, bytes | Path]

    @property
    def local(self) -> bool:
        """Whether each node has a target of its own."""
        return self.staging.node is not None

    def on_disks(self, group: Group, work: Callable[[], T]) -> T:
        """Do the work once for each disk that holds a target; its result to all ranks that write there."""
        return group.on_nodes(work) if self.local else group.on_first(work)

    def on_node(self, node: int | None) -> tuple[Views, NDArray[np.bool_] | None]:
        """The part of the target that a node holds, and the tiles that it is made of; None: all, on a disk of all."""
        views, chunks = self.proof.target, self.layout.catalog.chunks
        if node is None:
            return views, None
        mine = part.on_node(views, chunks, formats.held(self.layout, node))
        needed = part.needed(self.design.canon, mine)
        if node == 0:  # what goes nowhere is digested
            needed |= ~part.needed(self.design.canon, views)
        return mine, needed


def prepare(
    group: Group,
    report: Report,
    models: list[Model],
    cfg: Config,
    path: Path,
    combination: Callable[[design.Design], Combine],
    into: bool,
) -> Prepared:
    """Design, layout and proof: the same on every rank, nothing written."""
    target = cfg["target"]
    group.on_first(lambda: _nameable(path, target["format"], into))  # others may see another disk
    if target["format"] in formats.FOLDERS and set(cfg.get("keep") or ()) - {"weights"}:
        raise UsageError(
            f"keep={','.join(cfg['keep'])}: a folder of format {target['format']} holds weights only. Use keep=weights, or target.format=dcp or torch."
        )
    models = _settled(group, report, models, cfg)
    d = design.of(models, target)
    _same_tensors(models, d.sources)
    stays = d.dialect == models[-1].dialect and target["key"] == "auto"
    extras, lost = beside.extras(group, models[-1], cfg, stays)  # of several what is no weight is the last one's
    beside.lacking(report, models[-1], extras, cfg)
    placement = _placement(group, cfg)
    # a tokenizer may be on one node only, and all must write the same
    told = group.on_first(lambda: beside.args(d, models[-1])) if target["format"] in formats.ARGS else None
    source = beside.with_states(group, models[-1], target["format"])
    layout = _lay_out(d, models[-1], source, extras, told.config if told else {}, cfg, path, placement)
    _say(report, d, models[0], layout, told, target)
    proof = task.prove_all(group, d, models, layout.catalog.chunks)
    _same_dtypes(models, d, target["dtype"])
    task.divided(task.engine_of(cfg), models)  # also a run says here what is too big
    staging = _staging(group, layout, path, cfg, into)
    small = _beside(group, report, models[0], d, layout, staging, cfg)
    beside.account(report, models, d, lost | design.unsaid(models[0], d))
    combine = combination(d)
    if combine is keep and any(quantised.computed(m.catalog) for m in models):
        combine = made
    p = Prepared(models, d, combine, layout, proof, staging, small)
    engine = cfg["engine"]  # plans may be of another machine, and made on another one
    if not (any("saved" in m.catalog.about for m in models) or engine.get("ranks") or engine.get("nodes")):
        used = [Path(m.catalog.root) / f for m in models for f in m.catalog.files]
        p.on_disks(group, lambda: stage.check(staging, layout, list(small), used, bool(cfg.get("overwrite"))))
    return p


def _settled(group: Group, report: Report, models: Sequence[Model], cfg: Config) -> list[Model]:
    """The sources as the target needs them: in tensors, ties and a vocabulary that it has words for."""
    target = cfg["target"]
    if target["format"] == "torch_dist":
        apart = ("megatron", "nemo")
        models = [altered.together(m) if m.family is None and m.catalog.format in apart else m for m in models]
    models = [ties.settle(group, report, m, task.engine_of(cfg)) for m in design.spoken(models, target)]
    report.notes += [note for m in models for note in m.source.notes]
    report.guesses += [*models[0].guesses, *quantised.guesses([m.catalog for m in models], target["dtype"])]
    if "optimizer" in (cfg.get("keep") or ()) and group.rank == 0:
        report.warnings += [text for m in models for text in slots.lacking(m.catalog)]
    if any((m.family is None) != (models[0].family is None) for m in models):
        _same_tensors(models, [bind_plain(m) for m in models])
    return [_with_vocabulary(m, target["vocab_size"], report) for m in models]


def _say(
    report: Report, d: design.Design, m: Model, layout: Layout, told: configs.Translation | None, target: Config
) -> None:
    """What a person should know of the target: what was guessed for it, and where it may not be what they expect."""
    report.warnings += design.unused(target["dtype"], d.target.entries)
    if d.dialect and not d.dialect.startswith("megatron") and not beside.centred(m):
        report.warnings += megatron_args.centred(m.source.config)
    if told and target["format"] != "merak":  # which writes those of a source, not of a config.json
        beside.translated(told, "config.json", report)
    report.guesses += layout.catalog.about.get("guesses", ())
    if d.mixed and target["dtype"] == "keep":
        report.warnings.append(
            f"{len(d.mixed)} tensors, first {d.mixed[0]!r}, join stored ones of unlike dtypes; each is of the one that holds all values"
        )
    if unlike := beside.unlike_titan(d, m):
        report.warnings.append(unlike)
    if d.dialect == "torchtitan" and (built := beside.flavour(m)):
        report.notes.append("torchtitan builds this model as {}, flavour {}".format(*built.split()))


def _staging(group: Group, layout: Layout, path: Path, cfg: Config, into: bool) -> stage.Staging:
    """Where the target will be, and where it is made."""
    node = None if cfg["target"]["shared"] else group.node
    place = path.resolve() if into else path.absolute()  # a link may lead to another disk
    single = is_file_name(path, cfg["target"]["format"]) and len(layout.catalog.files) == 1
    if node is not None and (single or into):
        raise UsageError("target.shared=false: each node gets a folder of its own; give a new folder as target.path.")
    return stage.Staging(place, single, into, node)


def _beside(
    group: Group, report: Report, m: Model, d: design.Design, layout: Layout, staging: stage.Staging, cfg: Config
) -> dict[str, bytes | Path]:
    """The small files that travel along: configs, tokenizers."""
    carries = cfg["target"]["format"] in formats.FOLDERS and not staging.single
    small = beside.small_files(m, d, layout, cfg, report) if carries else {}
    if staging.into:  # what a checkpoint has of its own stays as it is, also where its links lead
        top = staging.target
        own = [n for n in small if staging.there(n) or not (top / n).resolve().is_relative_to(top)]
        small = {n: f for n, f in small.items() if n not in own}
    report.warnings += beside.led(m, small)
    if staging.node is not None:  # the first node may be the only one that has them
        small = group.on_first(lambda: {n: f if isinstance(f, bytes) else contents(f) for n, f in small.items()})
    return small


def _placement(group: Group, cfg: Config) -> tuple[int, ...] | None:
    """The node of each rank of the job that will load the target; None where every node gets everything."""
    asked, engine = cfg["target"]["placement"], cfg["engine"]
    if cfg["target"]["shared"]:
        if asked != "ranks":
            raise UsageError("target.placement says which node gets what; it needs target.shared=false.")
        return None
    imagined = engine.get("ranks") or engine.get("nodes")
    nodes = int(engine.get("nodes") or 1) if imagined else group.nodes
    if asked == "ranks":
        ranks = int(engine.get("ranks") or nodes)
        return tuple(node_of(ranks, nodes).tolist()) if imagined else tuple(group.gather(group.node))
    if asked == "all":
        return None
    if max(asked) >= nodes:
        raise UsageError(f"target.placement names node {max(asked)}, this job has nodes 0 to {nodes - 1}.")
    return tuple(asked)


def _with_vocabulary(m: Model, asked: int | None, report: Report) -> Model:
    have = m.sizes.get("v")
    if asked is None or asked == have:
        return m
    if m.source.reader:
        raise UsageError(
            f"target.vocab_size={asked}: these values are not stored yet, and have the vocabulary of their config; change vocab_size there."
        )
    found = altered.resized(m, "v", asked)
    what = "the rest are zeros" if have and asked > have else "the last ones are left out"
    report.notes.append(f"vocabulary of {asked} instead of {have} rows: {what}; all fingerprints are of {asked}")
    return found


def _same_tensors(models: Sequence[Model], bounds: Sequence[Bound]) -> None:
    """All sources hold the same tensors in the same shapes, or the differences are shown."""
    tables = []
    for bound in bounds:
        tables.append(
            {
                (r.weights, r.fixed): (e.dtype, e.shape)
                for e, r in zip(bound.entries, bound.rules, strict=True)
                if r is not None
            }
        )
    first, differences = tables[0], []
    for m, table_ in zip(models[1:], tables[1:], strict=True):
        if bounds[0].axes and m.dialect != models[0].dialect:
            continue  # other shapes by design; axis lengths and coverage are compared by the plan
        for key in [*first, *(k for k in table_ if k not in first)]:
            if key not in first or key not in table_ or first[key][1] != table_[key][1]:
                name = ", ".join(key[0]) + "".join(f" {a}={i}" for a, i in key[1])
                differences.append(
                    f"  {name}: {_kind(first.get(key))} in {models[0].source.folder.name}, {_kind(table_.get(key))} in {m.source.folder.name}"
                )
    _refuse("These checkpoints are not of one model:", differences)


def _same_dtypes(models: Sequence[Model], d: design.Design, asked: str | Mapping[str, str]) -> None:
    """Each tensor would have the same dtype from whichever source, or the differences are shown."""
    pairs = [(e, r) for e, r in zip(d.target.entries, d.target.rules, strict=True) if r]
    first, differences = design.stored_dtypes(d.sources[0]), list[str]()
    for m, bound in zip(models[1:], d.sources[1:], strict=True):  # one at a time: there may be many, of many tensors
        other = design.stored_dtypes(bound)
        for e, r in pairs:
            one, two = first(r), other(r)
            if one != two and len({design.target_dtype(asked, replace(e, dtype=k)) for k in (one, two)}) > 1:
                kinds = [(one, models[0]), (two, m)]
                said = [f"{_kind((k, e.shape))} in {which.source.folder.name}" for k, which in kinds]
                differences.append(f"  {e.name}: {', '.join(said)}")
    _refuse(
        "These checkpoints have different dtypes:",
        differences,
        "Say which one the mean should have: target.dtype=float32.",
    )


def _refuse(what: str, differences: Sequence[str], todo: str = "") -> None:
    """The first of the differences, if there are any."""
    if differences:
        more = [f"  and {len(differences) - 10} more"] if len(differences) > 10 else []
        raise CheckpointError("\n".join(filter(None, [what, *differences[:10], *more, todo])))


def _kind(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if found is None else f"{found[0]}{list(found[1])}"


def made(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Any:
    """What `keep` does, for computed sources; being another function it has every tile made and digested, none copied."""
    return keep(tile, values, dtypes, want)


def _lay_out(
    d: design.Design,
    m: Model,
    source: Catalog,
    extras: Sequence[Extra],
    args: Config,
    cfg: Config,
    path: Path,
    placement: Sequence[int] | None,
) -> Layout:
    target = cfg["target"]
    options = {
        **target,
        "max_shard_size": parse_size(target["max_shard_size"]),
        "sizes": m.sizes,
        "untied": m.source.config.get("tie_word_embeddings") is False,
        "args": args,
        "step": m.step,
        "file": path.name if is_file_name(path, target["format"]) else None,
        "placement": placement,
    }
    if target["format"] == "fsdp":
        raise UsageError("target.format=fsdp is only read; write dcp instead, which FSDP loads under any sharding.")
    for key, (usual, known) in formats.OPTIONS.items():
        if target[key] != usual and target["format"] not in known:
            raise UsageError(
                f"target.{key}={target[key]}: {target['format']} knows nothing of the kind, {', '.join(known)} do. Leave it out."
            )
    cuts = formats.EMBEDDINGS.get(target["format"])
    if cuts and target["embedding"] not in ("auto", *cuts):
        raise UsageError(
            f"target.embedding={target['embedding']}: {target['format']} has no such ranks. Give {' or '.join(cuts)}."
        )
    layout: Layout = formats.load(target["format"]).lay_out(Spec(d.target.entries, tuple(extras), source, options))
    return layout


def is_file_name(path: Path, format: str) -> bool:
    return format == "torch" and path.suffix in (".pt", ".pth", ".bin", ".ckpt")


def _nameable(path: Path, format: str, into: bool) -> None:
    """Refuse to make a folder with no name of its own, or with that of a file (Lightning's `.ckpt` are folders, too)."""
    if path.name in ("", "..") and not into:
        raise UsageError(f"target.path={path}: give the folder that is to be made by its name.")
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") and not is_file_name(path, format) and not path.exists():
        raise UsageError(
            f"target.path={path}: {format} would make a folder of that name. Give one without {path.suffix}, or, for one file "
            "(.pt, .pth, .bin, .ckpt), target.format=torch."
        )
