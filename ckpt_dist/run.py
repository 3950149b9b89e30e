"""The verbs that write: convert, average, merge, seed. Each is one straight line over the steps of `task`.

Invariant: a verb either publishes a whole target and a report, or raises and leaves no trace of the target.
"""

from __future__ import annotations

import fnmatch
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import (
    __version__,
    configs,
    cost,
    formats,
    initial,
    megatron,
    part,
    plan,
    quantised,
    replicas,
    sources,
    task,
)
from ckpt_dist.catalog import Extra, Views
from ckpt_dist.engine import journal
from ckpt_dist.engine import staging as stage
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, Done, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.traffic import node_of
from ckpt_dist.errors import CheckpointError, Stopped, UsageError
from ckpt_dist.files import pickles
from ckpt_dist.formats import Layout, Spec
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import FURTHER, Bound, Model, bind_plain, canonical, resized
from ckpt_dist.report import Report, parse_size, peak_memory, size

Config = Mapping[str, Any]
T = TypeVar("T")
COMMAND = Event()  # set where this process is one of the command's


@contextmanager
def job(verb: str, cfg: Config) -> Iterator[tuple[Group, Report]]:
    """The ranks and the report of one job."""
    with Group(cfg["engine"]["timeout"]) as group, _frozen():
        report = Report(verb)
        yield group, report
        report.show(bool(cfg.get("quiet")))


@contextmanager
def _frozen() -> Iterator[None]:
    """The garbage collector leaves alone what was there before: with torch imported, a full look at it takes 0.15 s.

    Only in a process of the command, which ends with its job: in a program that converts in a loop, what was thrown away
    between two jobs would come among the oldest objects each time, and the full look at these would never be due.
    """
    ours = COMMAND.is_set() and not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def engine_of(cfg: Config) -> dict[str, Any]:
    """The engine's settings with sizes in bytes."""
    engine = dict(cfg["engine"])
    engine["memory"] = parse_size(engine["memory"])
    return engine


def convert(cfg: Config) -> dict[str, Any]:
    """One checkpoint into another format, dialect or dtype."""
    cfg = _universal(cfg)
    with job("convert", cfg) as (group, report):
        with report.phase("scan"):
            m = part.scanned(group, lambda more: task.open_model({**cfg["source"], **more}, cfg))
            group.together(lambda: _replicas(cfg, m.catalog.format))
            copies = replicas.others(group, m, cfg)
        cfg = _as_stored(cfg, m)
        target, average = Path(cfg["target"]["path"]), cfg["source"]["replicas"] == "average"
        if copies:
            replicas.settle(group, report, [m, *copies], engine_of(cfg), average)
        if average and copies:
            even = [1 / (1 + len(copies))] * (1 + len(copies))
            return _write(group, report, [m, *copies], cfg, target, lambda d: _mean(d, even), {"verb": "convert"})
        return _write(group, report, [m], cfg, target, lambda d: keep, {"verb": "convert"})


def _replicas(cfg: Config, format: str) -> None:
    """Copies of several ranks are averaged where they are read, and nowhere silently not."""
    if cfg["source"]["replicas"] == "average" and format != "megatron_deepspeed":
        raise UsageError(
            f"source.replicas=average: of what ranks have alike, {format} takes the first rank's. Leave it out; "
            "the mean is taken by convert from megatron_deepspeed."
        )


def _universal(cfg: Config) -> Config:
    """A universal checkpoint is all of a run: fp32 weights, optimizer and state, as far as the source has them."""
    target = cfg["target"]
    if not target["universal"]:
        return cfg
    if target["format"] != "deepspeed":
        raise UsageError(f"target.universal=true is of target.format=deepspeed, not {target['format']}.")
    dtype = "float32" if target["dtype"] == "keep" else target["dtype"]
    source = {**cfg["source"], "universal": True}
    return {**cfg, "source": source, "target": {**target, "dtype": dtype}, "keep": ["weights", "optimizer", "state"]}


def _as_stored(cfg: Config, m: Model) -> Config:
    """With the source's own format where `target.format=same` asks for it."""
    if cfg["target"]["format"] != "same":
        return cfg
    if m.catalog.format == "fsdp" or m.source.reader:
        raise UsageError(f"target.format=same: {m.catalog.format} is only read. Give target.format=dcp.")
    about, target = m.catalog.about, {**cfg["target"], "format": m.catalog.format}
    if m.catalog.format == "megatron":
        asked = {k: target[k] for k in ("tp", "pp", "vpp", "ep") if target[k] != 1}
        uneven = len(set(about["partition"])) > 1 and not asked and target["partition"] is None
        target |= {k: about[k] for k in ("tp", "pp", "vpp", "ep", "spec", *(["partition"] if uneven else []))} | asked
    return {**cfg, "target": target}


def merge(cfg: Config) -> dict[str, Any]:
    """The shards of a training checkpoint into one Hugging Face model, by default inside the checkpoint itself."""
    _replicas(cfg, "merge")
    with job("merge", cfg) as (group, report):
        with report.phase("scan"):
            m = part.scanned(group, lambda more: task.open_model({**cfg["source"], **more}, cfg))
        given = cfg["target"].get("path")
        into = None if given else _checkpoint_of(m)
        return _write(
            group,
            report,
            [m],
            cfg,
            Path(given) if given else _checkpoint_of(m),
            lambda d: keep,
            {"verb": "merge"},
            into=into is not None,
        )


def _checkpoint_of(m: Model) -> Path:
    """The checkpoint's own folder: the one above `pytorch_model_fsdp_0` and the like, unless that was given itself."""
    inner = {n for names in (*sources.INSIDE.values(), sources.BELOW) for n in names}
    folder = m.source.folder if m.source.folder.is_dir() else m.source.folder.parent
    return folder.parent if folder.name in inner and folder != m.source.asked else folder


def average(cfg: Config) -> dict[str, Any]:
    """The weighted mean of several checkpoints of one model, summed in fp32 and rounded once."""
    _replicas(cfg, "average")
    with job("average", cfg) as (group, report):
        with report.phase("scan"):
            models = part.scanned(group, lambda more: _open_all(cfg, more))
        given, from_user = _coefficients(cfg.get("weights"), models, report)
        cfg = _as_stored(cfg, models[-1])
        label = cfg.get("name") or Path(str(_paths(cfg)[0])).name
        target = _average_target(cfg, label, models[-1])
        beside = cfg["target"]["format"] == "nemo"  # a file more in the folder of each rank
        cfg = {**cfg, "target": {**cfg["target"], "path": str(target)}} if beside else cfg
        table = [(m.step, str(m.source.folder), w) for m, w in zip(models, given, strict=True)]
        for step, folder, w in table:
            report.notes.append(f"{'step ' + str(step) if step is not None else folder}: weight {w:.6g}")
        report.notes += [f"{target.name}.ckpt, one in the folder of each rank"] if beside else []
        about = {"verb": "average", "name": label, "weights": "as given" if from_user else "uniform"}
        place = target.parent if beside else target
        return _write(group, report, models, cfg, place, lambda d: _mean(d, given), about, into=beside, given=given)


def seed(cfg: Config) -> dict[str, Any]:
    """A checkpoint of first values, from a config alone: a conversion whose source is computed."""
    with job("seed", cfg) as (group, report):
        with report.phase("scan"):
            m = group.on_first(lambda: initial.checkpoint(cfg))
        about = {"verb": "seed", "seed": cfg["seed"], "init": initial.described(m)}
        return _write(group, report, [m], cfg, Path(cfg["target"]["path"]), lambda d: _made, about)


def _made(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Any:
    """What `keep` does, for computed sources; being another function it has every tile made and digested, none copied."""
    return keep(tile, values, dtypes, want)


def _paths(cfg: Config) -> list[str]:
    path = cfg["source"]["path"]
    return [str(p) for p in path] if isinstance(path, (list, tuple)) else [str(path)]


def _open_all(cfg: Config, more: Mapping[str, Any]) -> list[Model]:
    """The checkpoints to average: those of a list, or the chosen steps of a folder, in order."""
    paths, wanted, last = _paths(cfg), cfg.get("steps"), cfg.get("last")
    if wanted is not None and last is not None:
        raise UsageError("steps= and last= exclude each other; give one.")
    if len(paths) > 1:
        if wanted is not None or last is not None:
            raise UsageError(
                "steps= and last= choose among the steps of one folder; source.path names several checkpoints."
            )
        found = [Path(p) for p in paths]
    else:
        root = Path(paths[0]).expanduser()
        if not root.is_dir():
            formats.detect(root)
            raise UsageError(f"{root} is one checkpoint; an average needs a folder of steps or a list of paths.")
        chosen = sources.choose(root, wanted, last)
        found = [
            chosen[s] for s in (wanted if wanted and cfg.get("weights") else chosen)
        ]  # weights= goes by the order of steps=
    if len(found) < 2:
        raise UsageError(f"An average needs at least two checkpoints; {paths[0]} gives {len(found)}.")
    as_is = cfg["target"]["format"] in ("same", "nemo")  # each rank's tensors for themselves, under their own names
    return [task.open_model({**cfg["source"], **more, "path": str(p), "as_is": as_is}, cfg) for p in found]


def _coefficients(given: Sequence[float] | None, models: Sequence[Model], report: Report) -> tuple[list[float], bool]:
    if given is None:
        return [1 / len(models)] * len(models), False
    if len(given) != len(models):
        raise UsageError(f"weights= has {len(given)} numbers, there are {len(models)} checkpoints.")
    total = sum(given)
    if not abs(total) > 1e-12:
        raise UsageError(f"weights={list(given)} sum to {total}; they cannot be normalised.")
    if abs(total - 1) > 1e-9:
        report.warnings.append(f"weights sum to {total:.6g}; they were divided by it")
        return [w / total for w in given], True
    return [float(w) for w in given], True


def _average_target(cfg: Config, label: str, m: Model) -> Path:
    """`target.path`, or `<name>-averaged` below it when a name is given, or beside the steps when nothing is."""
    path, name = cfg["target"].get("path"), cfg.get("name")
    if cfg["naming"] == "nemo":
        steps = ["_".join(map(str, cfg["steps"]))] if cfg.get("steps") else []
        return Path(path or _among(cfg, m)).absolute() / "-".join([label, *steps, "averaged"])
    if path and not name:
        return Path(path)
    parent = Path(path) if path else Path(_paths(cfg)[0]).absolute().parent
    return parent / f"{label}-averaged"


def _among(cfg: Config, m: Model) -> Path:
    """The folder of the steps; where several checkpoints are named, that of the last."""
    if isinstance(cfg["source"]["path"], str):
        return Path(cfg["source"]["path"])
    return Path(m.catalog.root) if m.catalog.format == "nemo" else m.source.asked.parent


def _mean(d: task.Design, coefficients: Sequence[float]) -> Combine:
    """The combination of an average: the mean, except where training sets a value without gradients."""
    from ckpt_dist.averages.tensors import COPIED, last, mean

    each = [any(fnmatch.fnmatch(e.name, pattern) for pattern in COPIED) for e in d.canon.entries]
    copied = np.repeat(np.array(each, bool), plan.tile_counts(d.canon.entries))

    def combine(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Any:
        if copied[tile]:
            return keep(tile, iter([last(values)]), dtypes[-1:], want)
        return mean(values, dtypes, coefficients, want)

    return combine


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


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first byte is written: proven, laid out, checked against the target's place."""

    models: Sequence[Model]
    design: task.Design
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


def _write(
    group: Group,
    report: Report,
    models: list[Model],
    cfg: Config,
    path: Path,
    combination: Callable[[task.Design], Combine],
    about: Mapping[str, Any],
    *,
    into: bool = False,
    given: Sequence[float] = (),
) -> dict[str, Any]:
    """From understood sources to a published target."""
    engine = engine_of(cfg)
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
    combination: Callable[[task.Design], Combine],
    into: bool,
) -> Prepared:
    """Design, layout and proof: the same on every rank, nothing written."""
    target = cfg["target"]
    if target["format"] in formats.FOLDERS and set(cfg.get("keep") or ()) - {"weights"}:
        raise UsageError(
            f"keep={','.join(cfg['keep'])}: a folder of format {target['format']} holds weights only. Use keep=weights, or target.format=dcp or torch."
        )
    models = [task.settle_ties(group, report, m, engine_of(cfg)) for m in models]
    report.notes += [note for m in models for note in m.source.notes]
    report.guesses += [*models[0].guesses, *quantised.guesses([m.catalog for m in models], target["dtype"])]
    if any((m.family is None) != (models[0].family is None) for m in models):
        _same_tensors(models, [bind_plain(m) for m in models])
    models = [_with_vocabulary(m, target["vocab_size"], report) for m in models]
    d = task.design(models, target)
    _same_tensors(models, d.sources)
    extras, lost = _extras(models[-1], cfg)  # of several what is no weight is the last one's
    placement = _placement(group, cfg)
    layout = _lay_out(d, models[-1], extras, cfg, path, placement)
    report.guesses += layout.catalog.about.get("guesses", ())
    if target["format"] in ("megatron", "torch_dist", "zarr", "megatron_deepspeed"):
        _translated(_args(d, models[0]), "config.json", report)
    if d.dialect == "torchtitan" and (built := configs.flavour(models[0].source.config)):
        report.notes.append("torchtitan builds this model as {}, flavour {}".format(*built.split()))
    proof = task.prove_all(group, d, models, layout.catalog.chunks)
    node = None if target["shared"] else group.node
    staging = stage.Staging(path.absolute(), _single(layout, path, cfg), into, node)
    if node is not None and (staging.single or into):
        raise UsageError("target.shared=false: each node gets a folder of its own; give a new folder as target.path.")
    carries = target["format"] in formats.FOLDERS and not staging.single
    small = _small_files(models[0], d, layout, cfg, report) if carries else {}
    if into:  # what a checkpoint has of its own stays as it is
        small = {n: f for n, f in small.items() if not (staging.target / n).exists()}
    if node is not None:  # the first node may be the only one that has them
        small = group.on_first(lambda: {n: f if isinstance(f, bytes) else f.read_bytes() for n, f in small.items()})
    used = [Path(m.catalog.root) / f for m in models for f in m.catalog.files]
    _account(report, models, lost | task.unsaid(models[0], d))
    combine = combination(d)
    if combine is keep and any(quantised.of(m.catalog) for m in models):
        combine = _made
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
        report.peak_memory = group.gather(peak_memory())
        prints = _fingerprints(p.design, done, p.models, report) if digests else {}
        kept = {} if p.staging.single else record(cfg, about, p.models, given, prints, report)
        if p.local:  # the ranks have phases of their own, and all nodes get the first one's record
            kept = group.broadcast(kept)
        finish(p, lambda work: p.on_disks(group, work), runs, {**p.small, **kept}, cfg)
    return prints


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


def _casts(d: task.Design) -> bool:
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
    d: task.Design, m: Model, extras: Sequence[Extra], cfg: Config, path: Path, placement: Sequence[int] | None
) -> Layout:
    target = cfg["target"]
    options = {
        **target,
        "max_shard_size": parse_size(target["max_shard_size"]),
        "sizes": m.sizes,
        "args": _args(d, m).config,
        "step": m.step,
        "file": path.name if _is_file_name(path, target["format"]) else None,
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


def _args(d: task.Design, m: Model) -> configs.Translation:
    """What Megatron calls args, for a model of a known family."""
    weights = {w for rule in d.target.rules if rule for w in rule.weights}
    if m.unresolved:
        return configs.Translation(
            dict(megatron.SPLIT),
            (),
            (f"{m.unresolved} are not known, so args do not say them: give model.config=PATH",),
        )
    config, tied = m.source.config, "head" not in weights
    if configs.is_params(config) and {"v", "f"} <= set(m.sizes):
        config = configs.to_hf(config, m.sizes, tied).config
    return megatron.to_args(config, m.sizes, weights, tied)


def _is_file_name(path: Path, format: str) -> bool:
    return format == "torch" and path.suffix in (".pt", ".pth", ".bin", ".ckpt")


def _single(layout: Layout, path: Path, cfg: Config) -> bool:
    return _is_file_name(path, cfg["target"]["format"]) and len(layout.catalog.files) == 1


def _extras(m: Model, cfg: Config) -> tuple[list[Extra], dict[str, list[str]]]:
    """What is no tensor: carried where it was asked for and the target can hold it, else listed as dropped."""
    carried: list[Extra] = []
    lost: dict[str, list[str]] = {}
    wanted = set(cfg.get("keep") or ["weights"])
    format = cfg["target"]["format"]
    holds = format in ("dcp", "torch") or format == m.catalog.format == "deepspeed"
    for extra in m.catalog.extras:
        if "saved" in m.catalog.about and extra.role in wanted:
            lost.setdefault("its value is not in the saved catalog", []).append(extra.name)
        elif extra.role == "weight":
            lost.setdefault("not a tensor", []).append(extra.name)
        elif extra.role not in wanted or not holds:
            lost.setdefault(f"{extra.role} (keep={','.join(sorted(wanted))})", []).append(extra.name)
        else:
            if format == "torch" and extra.address is not None:
                extra = replace(extra, value=formats.load("dcp").read_extra(m.catalog, extra), address=None)
            if extra.address is None and not pickles.writable(extra.value):
                lost.setdefault("of a class that is not written", []).append(extra.name)
            else:
                carried.append(extra)
    return carried, lost


def _account(report: Report, models: Sequence[Model], lost: Mapping[str, Sequence[str]]) -> None:
    """Each stored name is mapped, carried or dropped, and the report says by which rule."""
    m = models[0]
    mapped = sum(n is not None for n in m.names)
    if m.source.reader is None:
        report.notes.append(f"{mapped} of {len(m.names)} stored tensors are written")
    for rule in {**m.dropped, **lost}:
        names = (*m.dropped.get(rule, ()), *lost.get(rule, ()))
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        report.notes.append(f"dropped, {rule}: {some}")


def _small_files(m: Model, d: task.Design, layout: Layout, cfg: Config, report: Report) -> dict[str, bytes | Path]:
    """Config, tokenizer and processor files of a target that is a model's folder."""
    found, made = sources.assets(m.source), {*layout.catalog.files, *layout.late, *layout.own}
    small: dict[str, bytes | Path] = {n: p for n, p in found.items() if n not in made}
    if cfg["target"]["format"] == "meta":
        small = {n: p for n, p in small.items() if n.startswith("tokenizer")}
        params = _params_json(m, report)
        return {**small, "params.json": _text(_sized(params, cfg, m))} if params else small
    config = _config_json(m, d, report)
    return {**small, "config.json": _text(_sized(config, cfg, m))} if config else small


def _sized(config: Config, cfg: Config, m: Model) -> Config:
    """Both files call the vocabulary the same; one that was asked for replaces the source's."""
    return config if cfg["target"]["vocab_size"] is None else {**config, "vocab_size": m.sizes["v"]}


def _text(config: Config) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _config_json(m: Model, d: task.Design, report: Report) -> dict[str, Any]:
    config = dict(m.source.config)
    floats = [e.dtype for e in d.target.entries if "float" in e.dtype]
    main = max(sorted(set(floats)), key=floats.count) if floats else None
    if configs.is_params(config) and m.family and {"v", "f"} <= set(m.sizes):
        head = any("head" in r.weights for r in d.target.rules if r)
        config = _translated(configs.to_hf(config, m.sizes, tied=not head), "params.json", report)
        config["torch_dtype"] = main  # the word that every version of transformers reads
    if megatron.is_args(config) and m.family and "v" in m.sizes:
        weights = {w for rule in d.target.rules if rule for w in rule.weights}
        kind = megatron.model_type(m.family.model_types, weights)
        if kind in megatron.CLASSES:
            config = _translated(megatron.to_hf(config, kind, m.sizes, tied="head" not in weights), "args", report)
            config["torch_dtype"] = main
    if m.family and m.family.further and FURTHER in m.dropped:
        config[m.family.further] = 0
    if config.pop("quantization_config", None):
        report.notes.append("quantization_config is left out of config.json: what is written is not quantised")
    if not configs.is_hf(config):
        report.warnings.append("no config.json was found, so none is written; transformers needs one: model.config=DIR")
        return {}
    for key in {"dtype", "torch_dtype"} & set(config) or {"dtype"}:
        if main and config.get(key) != main:
            config[key] = main
    if config.get("tie_word_embeddings") and any("both are kept" in w for w in report.warnings):
        config["tie_word_embeddings"] = False
    return config


def _params_json(m: Model, report: Report) -> dict[str, Any]:
    config = dict(m.source.config)
    if configs.is_hf(config) and {"v", "f"} <= set(m.sizes):
        return _translated(configs.to_meta(config, m.sizes), "config.json", report)
    if not configs.is_params(config):
        report.warnings.append("no params.json or config.json was found, so none is written: give model.config=PATH")
        return {}
    return config


def _translated(t: configs.Translation, where: str, report: Report) -> dict[str, Any]:
    report.guesses += t.guesses
    if t.lost:
        report.warnings.append(f"{where}: not translated: {', '.join(t.lost)}")
    return t.config


def _fingerprints(d: task.Design, done: Any, models: Sequence[Model], report: Report) -> dict[str, Any]:
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
        group, report, engine, "verify", p.design.canon, sides, None, _drain, digests=True, quiet=quiet, here=here
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


def _drain(tile: int, values: Any, dtypes: Sequence[str], want: str) -> None:
    for _ in values:
        pass


def record(
    cfg: Config, about: Config, models: Sequence[Model], given: Sequence[float], prints: Config, report: Report
) -> dict[str, bytes]:
    """`ckpt_dist.json`, and for an average `average.yaml`: recipe, sources, fingerprints."""
    if cfg["target"]["format"] in formats.ALONE:
        return {}
    beside = (
        f"{Path(cfg['target']['path']).name}." if cfg["target"]["format"] == "nemo" else ""
    )  # of files among others
    recipe = {"ckpt_dist": __version__, **about, "recipe": _plain(cfg), **prints, "report": report.to_dict()}
    found = {f"{beside}ckpt_dist.json": (json.dumps(recipe, indent=2, ensure_ascii=False, default=str) + "\n").encode()}
    if about["verb"] == "average":
        from omegaconf import OmegaConf

        each = [
            {"path": str(m.source.folder.absolute()), "step": m.step, "weight": w, "fingerprint": f}
            for m, w, f in zip(models, given, prints["source_fingerprints"], strict=True)
        ]
        document = {
            "ckpt_dist": __version__,
            "name": about["name"],
            "fingerprint": prints["fingerprint"],
            "sources": each,
            "recipe": _plain(cfg),
        }
        found[f"{beside}average.yaml"] = OmegaConf.to_yaml(OmegaConf.create(document)).encode()
    return found


def _plain(cfg: Any) -> Any:
    return json.loads(json.dumps(cfg, default=str))


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
