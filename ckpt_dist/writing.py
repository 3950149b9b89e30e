"""From understood sources to a published target: design, layout, proof, fill, publish; or a plan of that.

Invariant: a whole target is published with its report, or an error is raised and no trace of the target is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import (
    __version__,
    beside,
    configs,
    cost,
    design,
    formats,
    part,
    plan,
    quantised,
    slots,
    sources,
    task,
    ties,
)
from ckpt_dist.catalog import Extra, Views
from ckpt_dist.engine import journal
from ckpt_dist.engine import staging as stage
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, Done, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.traffic import node_of
from ckpt_dist.errors import CheckpointError, Stopped, UsageError
from ckpt_dist.formats import Layout, Spec
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Bound, Model, bind_plain, canonical, resized
from ckpt_dist.report import Report, parse_size, peak_memory, size

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


def write(
    group: Group,
    report: Report,
    models: list[Model],
    cfg: Config,
    path: Path,
    combination: Callable[[design.Design], Combine],
    about: Mapping[str, Any],
    *,
    into: bool = False,
    given: Sequence[float] = (),
) -> dict[str, Any]:
    """From understood sources to a published target."""
    engine = task.engine_of(cfg)
    if not cfg.get("dry_run"):
        _only_for_plans(models, engine)
    with report.phase("plan"):
        p = prepare(group, report, models, cfg, path, combination, into)
    if cfg.get("dry_run"):
        return _dry(group, report, p, engine, path)
    if p.combine is not keep or _casts(p.design):
        from ckpt_dist.averages.tensors import use

        report.notes.append(f"computed on {use(str(engine['device']), group.local_rank)}")
    staged = _begun(group, p, lambda: begin(p, cfg, about, given))
    if staged.finished:
        report.notes.append(f"resumed: {sum(hi - lo for lo, hi in staged.finished)} tiles were there already")
    try:
        prints = _fill(group, report, p, cfg, engine, about, given, staged)
    except CheckpointError as error:  # nobody will go on with what is wrong; anything else may be resumed
        if not isinstance(error, Stopped) and (group.rank == 0 or (p.local and group.local_rank == 0)):
            stage.discard(p.staging)
        raise
    finally:
        stage.release()
    report.target = str(path)
    return {**report.to_dict(), **prints}


def _only_for_plans(models: Sequence[Model], engine: Config) -> None:
    """A job that writes needs data and real ranks."""
    for m in models:
        needs_data(m.catalog)
    for key in ("ranks", "nodes", "calibrate"):
        if engine.get(key):
            raise UsageError(
                f"engine.{key}={engine[key]} is only for dry_run=true. Ranks are started by torchrun, or by nproc=."
            )


def _begun(group: Group, p: Prepared, work: Callable[[], task.Staged]) -> task.Staged:
    """Begin on all disks; where one cannot, what the others have just made goes away again."""
    mine: list[task.Staged] = []

    def noted() -> task.Staged:
        mine.append(work())
        return mine[0]

    try:
        return p.on_disks(group, noted)
    except Exception:
        if mine and not mine[0].finished:
            stage.discard(p.staging)
        stage.release()
        raise


def begin(p: Prepared, cfg: Config, about: Config, given: Sequence[float]) -> task.Staged:
    """The staging folder: new, or as an earlier attempt at the very same job left it."""
    used = [(m.catalog.root, f) for m in p.models for f in m.catalog.files]
    times = [
        (root, f, (s := (Path(root) / f).stat()).st_size, s.st_mtime_ns)
        for root, f in used
        if (Path(root) / f).exists()
    ]
    settings = {k: cfg.get(k) for k in ("source", "target", "model", "keep", "unmatched")}
    entries = [(e.name, e.dtype, e.shape) for e in p.layout.catalog.entries]
    headers = b"".join(b"%d %d " % (n, at) + data for n, at, data in p.layout.pieces)
    laid_out = (entries, p.layout.catalog.files, p.layout.sizes, journal.plan_key(headers.hex()))
    facts = (__version__, about, given, settings, cfg["engine"]["verify"], times, laid_out, p.staging.node)
    resumed = stage.create(p.staging, p.layout, journal.plan_key(*facts), bool(cfg.get("resume", True)))
    finished, done = journal.read(p.staging.folder) if resumed else ([], Done())
    return task.Staged(p.staging.folder, finished, done)


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
    if target["format"] in formats.FOLDERS and set(cfg.get("keep") or ()) - {"weights"}:
        raise UsageError(
            f"keep={','.join(cfg['keep'])}: a folder of format {target['format']} holds weights only. Use keep=weights, or target.format=dcp or torch."
        )
    models = [ties.settle(group, report, m, task.engine_of(cfg)) for m in design.spoken(models, target)]
    report.notes += [note for m in models for note in m.source.notes]
    report.guesses += [*models[0].guesses, *quantised.guesses([m.catalog for m in models], target["dtype"])]
    if "optimizer" in (cfg.get("keep") or ()) and group.rank == 0:
        report.warnings += [text for m in models for text in slots.lacking(m.catalog)]
    if any((m.family is None) != (models[0].family is None) for m in models):
        _same_tensors(models, [bind_plain(m) for m in models])
    models = [_with_vocabulary(m, target["vocab_size"], report) for m in models]
    d = design.of(models, target)
    _same_tensors(models, d.sources)
    extras, lost = beside.extras(models[-1], cfg)  # of several what is no weight is the last one's
    placement = _placement(group, cfg)
    told = beside.args(d, models[-1]) if target["format"] in formats.ARGS else None
    if told and target["format"] != "merak":  # which writes those of a source, not of a config.json
        beside.translated(told, "config.json", report)
    layout = _lay_out(d, models[-1], extras, told.config if told else {}, cfg, path, placement)
    report.guesses += layout.catalog.about.get("guesses", ())
    if d.dialect == "torchtitan" and (built := configs.flavour(models[0].source.config)):
        report.notes.append("torchtitan builds this model as {}, flavour {}".format(*built.split()))
    proof = task.prove_all(group, d, models, layout.catalog.chunks)
    task.divided(task.engine_of(cfg), models)  # also a run says here what is too big
    node = None if target["shared"] else group.node
    place = path.resolve() if into else path.absolute()  # a link may lead to another disk
    staging = stage.Staging(place, _single(layout, path, cfg), into, node)
    if node is not None and (staging.single or into):
        raise UsageError("target.shared=false: each node gets a folder of its own; give a new folder as target.path.")
    carries = target["format"] in formats.FOLDERS and not staging.single
    small = beside.small_files(models[0], d, layout, cfg, report) if carries else {}
    if into:  # what a checkpoint has of its own stays as it is
        small = {n: f for n, f in small.items() if not staging.there(n)}
    if node is not None:  # the first node may be the only one that has them
        small = group.on_first(lambda: {n: f if isinstance(f, bytes) else f.read_bytes() for n, f in small.items()})
    used = [Path(m.catalog.root) / f for m in models for f in m.catalog.files]
    beside.account(report, models, lost | design.unsaid(models[0], d))
    combine = combination(d)
    if combine is keep and any(quantised.computed(m.catalog) for m in models):
        combine = made
    p = Prepared(models, d, combine, layout, proof, staging, small)
    if not any("saved" in m.catalog.about for m in models):  # plans may be made on another machine
        p.on_disks(group, lambda: stage.check(staging, layout, list(small), used, bool(cfg.get("overwrite"))))
    return p


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
    found = resized(m, "v", asked)
    what = "the rest are zeros" if have and asked > have else "the last ones are left out"
    report.notes.append(f"vocabulary of {asked} instead of {have} rows: {what}; all fingerprints are of {asked}")
    return found


def _same_tensors(models: Sequence[Model], bounds: Sequence[Bound]) -> None:
    """All sources hold the same tensors, shapes and dtypes, or the differences are shown."""
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
            if first.get(key) != table_.get(key):
                name = ", ".join(key[0]) + "".join(f" {a}={i}" for a, i in key[1])
                differences.append(
                    f"  {name}: {_kind(first.get(key))} in {models[0].source.folder.name}, {_kind(table_.get(key))} in {m.source.folder.name}"
                )
    if differences:
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError("These checkpoints are not of one model:\n" + "\n".join(differences[:10]) + more)


def _kind(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if found is None else f"{found[0]}{list(found[1])}"


def made(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Any:
    """What `keep` does, for computed sources; being another function it has every tile made and digested, none copied."""
    return keep(tile, values, dtypes, want)


def _fill(
    group: Group,
    report: Report,
    p: Prepared,
    cfg: Config,
    engine: Config,
    about: Config,
    given: Sequence[float],
    staged: task.Staged,
) -> dict[str, Any]:
    """Make the tiles, read them again if asked, publish; the fingerprints that were taken on the way."""
    digests, quiet = p.combine is not keep or bool(engine.get("verify")), bool(cfg.get("quiet"))
    files = Files(p.staging.folder, p.layout.catalog.files, writable=True)
    sides = list(zip(p.models, p.design.sources, strict=True))
    views, here = p.on_node(p.staging.node)
    target = (p.design.target, p.layout, files, views)
    with report.phase("copy" if p.combine is keep else about["verb"]):
        done = task.run_tiles(
            group,
            report,
            engine,
            about["verb"],
            p.design.canon,
            sides,
            target,
            p.combine,
            digests=digests,
            quiet=quiet,
            staged=staged,
            proof=p.proof,
            here=here,
        )
    if engine.get("verify"):
        with report.phase("verify"):
            _reread(group, report, p, done, engine, quiet, here)
    with report.phase("publish"):
        each = group.gather((p.staging.node, done.runs))
        runs = [run for node, some in each if node == p.staging.node for run in some]
        told = group.gather((peak_memory(), _summed(p)))
        report.peak_memory = [memory for memory, _ in told]
        report.notes += sorted({how for _, ways in told for how in ways})
        prints = _fingerprints(p.design, done, p.models, report) if digests else {}
        kept = {} if p.staging.single else beside.record(cfg, about, p.models, given, prints, report)
        if p.local:  # the ranks have phases of their own, and all nodes get the first one's record
            kept = group.broadcast(kept)
        finish(p, lambda work: p.on_disks(group, work), runs, {**p.small, **kept}, cfg)
    return prints


def _summed(p: Prepared) -> list[str]:
    """How this rank has summed; another one may lack a package."""
    if len(p.models) < 2:
        return []
    from ckpt_dist.averages.tensors import SUMMED

    return list(SUMMED)


def finish(
    p: Prepared,
    once: Callable[[Callable[[], None]], None],
    runs: stage.Runs,
    small: Mapping[str, bytes | Path],
    cfg: Config,
) -> None:
    """Steps of which none begins before the one before has come to its end on all disks; `once` does one on each."""
    fsync, overwrite = bool(cfg["engine"].get("fsync", True)), bool(cfg.get("overwrite"))
    once(lambda: stage.finish(p.staging, p.layout, runs, small))
    once(lambda: stage.publish(p.staging, fsync, overwrite))
    if p.local:
        once(lambda: stage.settle(p.staging))


def _casts(d: design.Design) -> bool:
    """Whether any weight changes its dtype on the way."""
    stored = {
        key: e.dtype for e, r in zip(d.sources[0].entries, d.sources[0].rules, strict=True) if r for key in r.weights
    }
    return any(
        stored.get(key) != e.dtype
        for e, r in zip(d.target.entries, d.target.rules, strict=True)
        if r
        for key in r.weights
    )


def _lay_out(
    d: design.Design,
    m: Model,
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
        "args": args,
        "step": m.step,
        "file": path.name if is_file_name(path, target["format"]) else None,
        "placement": placement,
    }
    if target["format"] == "fsdp":
        raise UsageError("target.format=fsdp is only read; write dcp instead, which FSDP loads under any sharding.")
    for key in ("tp", "pp", "vpp", "ep"):
        if target[key] != 1 and key not in formats.RANKS.get(target["format"], ()):
            raise UsageError(
                f"target.{key}={target[key]}: {target['format']} has no files of such ranks. Leave it out."
            )
    known = formats.EMBEDDINGS.get(target["format"])
    if known and target["embedding"] not in ("auto", *known):
        raise UsageError(
            f"target.embedding={target['embedding']}: {target['format']} has no such ranks. Give {' or '.join(known)}."
        )
    if target["release"] and target["format"] not in formats.RELEASES:
        raise UsageError(f"target.release=true: {target['format']} has no such checkpoints. Leave it out.")
    layout: Layout = formats.load(target["format"]).lay_out(Spec(d.target.entries, tuple(extras), m.catalog, options))
    return layout


def is_file_name(path: Path, format: str) -> bool:
    return format == "torch" and path.suffix in (".pt", ".pth", ".bin", ".ckpt")


def _single(layout: Layout, path: Path, cfg: Config) -> bool:
    return is_file_name(path, cfg["target"]["format"]) and len(layout.catalog.files) == 1


def _fingerprints(d: design.Design, done: Any, models: Sequence[Model], report: Report) -> dict[str, Any]:
    """The result's fingerprint, and each source's, taken in passing."""
    if not canonical(d.dialect) and not d.canon.axes:
        report.warnings.append(
            f"no fingerprint: it is taken of the Hugging Face spelling, which needs {models[0].unresolved}; give model.config=PATH"
        )
        return {"fingerprint": None, "source_fingerprints": [None] * len(models)}
    written = {
        (w, r.fixed): e.dtype for e, r in zip(d.target.entries, d.target.rules, strict=True) if r for w in r.weights
    }
    canon_dtypes = {
        e.name: written.get((r.weights[0], r.fixed), e.dtype)
        for e, r in zip(d.canon.entries, d.canon.rules, strict=True)
        if r
    }
    result = task.weight_digests(d.canon, done, len(models), canon_dtypes)
    return {
        "fingerprint": task.fingerprint_of(result),
        "source_fingerprints": [task.fingerprint_of(task.weight_digests(d.canon, done, k)) for k in range(len(models))],
    }


def _reread(
    group: Group,
    report: Report,
    p: Prepared,
    done: Done,
    engine: Config,
    quiet: bool,
    here: NDArray[np.bool_] | None,
) -> None:
    """Read the staged target again, through its own addresses, and compare with what was meant to be written.

    A node reads its own files; what these lack of a tile is sent to it."""
    result, sides = len(p.models), [_as_source(p, p.staging.node)]
    if here is not None:
        engine = {**engine, "transport": task.OWN}
    again = task.run_tiles(
        group, report, engine, "verify", p.design.canon, sides, None, drain, digests=True, quiet=quiet, here=here
    )
    wrong = [key for key, value in done.digests.items() if key[0] == result and again.digests.get((0, key[1])) != value]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tiles of {p.staging.target} read back differ from what was written; nothing was published. Check the disk."
        )
    report.notes.append("every tile was read back and is equal to what was written")


def _as_source(p: Prepared, node: int | None) -> tuple[Model, Bound]:
    """The staged target, to be read; of equal boxes the first is, so those that a node holds come first."""
    folder, catalog = p.staging.folder, p.layout.catalog
    order = np.argsort(~formats.held(p.layout, node)[catalog.chunks.file], kind="stable")
    catalog = replace(catalog, root=str(folder), format="hf", chunks=catalog.chunks.take(order))  # nothing to locate
    m = Model(sources.Source(catalog, folder, folder), tuple(e.name for e in catalog.entries))
    return m, p.design.target


def drain(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
    for _ in values:
        pass


def _dry(group: Group, report: Report, p: Prepared, engine: Config, path: Path) -> dict[str, Any]:
    """The plan as text: files, bytes, memory, seconds, guesses; nothing was written."""
    verify, layout = bool(engine.get("verify")), p.layout
    job = cost.Job(
        list(zip(p.models, p.design.sources, strict=True)),
        p.design.canon,
        (p.design.target, layout, Files(path, ())),
        p.on_node,
        (lambda node: _as_source(p, node)) if verify else None,
        p.local,
        p.combine,
        p.combine is not keep or verify,
    )
    facts, said = cost.estimate(group, report, job, engine, path)
    total = sum(layout.sizes)
    tiles = int(plan.tile_counts(p.design.canon.entries).sum())
    lines = [
        f"{path} ({layout.catalog.format}), {len(layout.catalog.entries)} tensors, {size(total)} in {len(layout.sizes)} files, nothing written"
    ]
    places = [f"  node {', '.join(map(str, sorted(nodes)))}" for nodes in layout.holders] or [""] * len(layout.sizes)
    lines += [f"  {n}  {size(b)}{at}" for n, b, at in zip(layout.catalog.files, layout.sizes, places, strict=True)]
    lines += [f"  {n}  small" for n in (*layout.late, *layout.own)]
    lines.append(f"{tiles} tiles for {facts['ranks']} ranks of {facts['threads']} threads on {facts['nodes']} nodes")
    lines += said
    lines += report.remarks()
    report.notes.clear()
    report.guesses.clear()
    files = dict(zip(layout.catalog.files, layout.sizes, strict=True))
    return {
        **report.to_dict(),
        **facts,
        "dry_run": True,
        "target": str(path),
        "files": files,
        "bytes": total,
        "tiles": tiles,
        "text": lines,
    }
