"""From understood sources to a published target: prepare, fill, publish; or a plan of that.

Invariant: a whole target is published with its report, or an error is raised and no trace of the target is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist import __version__, beside, cost, design, formats, plan, sources, task
from ckpt_dist.altered import ZEROS
from ckpt_dist.engine import journal
from ckpt_dist.engine import staging as stage
from ckpt_dist.engine.claims import release
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, Done, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import STOP, STOPPED, CheckpointError, Stopped, Taken, UsageError
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Model
from ckpt_dist.prepared import Prepared, prepare
from ckpt_dist.report import Report, peak_memory, size
from ckpt_dist.spelling import Bound, canonical

Config = Mapping[str, Any]
Times: TypeAlias = "Mapping[str, tuple[int, int]]"
T = TypeVar("T")


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
    # of each node what it sees, since it was scanned
    times = saved(models) if group.local_rank == 0 and not cfg.get("dry_run") else {}
    with report.phase("plan"):
        p = prepare(group, report, models, cfg, path, combination, into)
    if cfg.get("dry_run"):
        return _dry(group, report, p, engine, path)
    if p.combine is not keep or _casts(p.design):
        from ckpt_dist.averages.tensors import use

        device = group.together(lambda: use(str(engine["device"]), group.local_rank))
        report.notes.append(f"computed on {device}")
    staged = _begun(group, p, lambda: begin(p, cfg, about, given, times))
    if staged.finished:
        report.notes.append(f"resumed: {sum(hi - lo for lo, hi in staged.finished)} tiles were there already")
    try:
        prints = _fill(group, report, p, cfg, engine, about, given, staged, times)
    except CheckpointError as error:  # nobody will go on with what is wrong; anything else may be resumed
        if not isinstance(error, (Stopped, Taken)) and (group.rank == 0 or (p.local and group.local_rank == 0)):
            stage.discard(p.staging)
        raise
    finally:
        release()
    report.target = str(path)
    return {**report.to_dict(), **prints}


def _only_for_plans(models: Sequence[Model], engine: Config) -> None:
    """A job that writes needs data and real ranks."""
    for m in models:
        needs_data(m.catalog)
    given = {f"bandwidth.{k}": v for k, v in (engine.get("bandwidth") or {}).items()}
    given |= {k: engine.get(k) for k in ("ranks", "nodes", "calibrate")}
    for key, value in given.items():
        if value:
            raise UsageError(
                f"engine.{key}={value} is only for dry_run=true. Ranks are started by torchrun, or by nproc=."
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
        release()
        raise


def begin(p: Prepared, cfg: Config, about: Config, given: Sequence[float], times: Times) -> task.Staged:
    """The staging folder: new, or as an earlier attempt at the very same job left it."""
    settings = {k: cfg.get(k) for k in ("source", "target", "model", "keep", "unmatched")}
    entries = [(e.name, e.dtype, e.shape) for e in p.layout.catalog.entries]
    headers = b"".join(b"%d %d " % (n, at) + data for n, at, data in p.layout.pieces)
    laid_out = (entries, p.layout.catalog.files, p.layout.sizes, journal.plan_key(headers.hex()))
    understood = [
        (m.dialect, m.sizes, repr(m.source.config)) for m in p.models
    ]  # a config.json beside may say other heads
    facts = (__version__, about, given, settings, cfg["engine"]["verify"], times, understood, laid_out, p.staging.node)
    resumed = stage.create(p.staging, p.layout, journal.plan_key(*facts), bool(cfg.get("resume", True)))
    finished, done = journal.read(p.staging.folder) if resumed else ([], Done())
    return task.Staged(p.staging.folder, finished, done)


def saved(models: Sequence[Model]) -> Times:
    """Size and time of each file of the sources that this node sees."""
    found: dict[str, tuple[int, int]] = {}
    for path in {os.path.join(m.catalog.root, f) for m in models for f in m.catalog.files if f != ZEROS}:
        with suppress(OSError):
            found[path] = (s := os.stat(path)).st_size, s.st_mtime_ns
    return found


def unchanged(models: Sequence[Model], before: Times, more: str = "") -> None:
    """Refuse what was read from two saves."""
    now = saved(models)
    changed = sorted(path for path in {*now, *before} if now.get(path) != before.get(path))
    if changed:
        others = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{changed[0]}{others} changed while it was read{more}. Run the same command again when nobody writes there."
        )


def _wanted() -> None:
    """Who has asked for an end is told of one, and finds no target."""
    if STOP.is_set():
        raise Stopped(STOPPED)


def _fill(
    group: Group,
    report: Report,
    p: Prepared,
    cfg: Config,
    engine: Config,
    about: Config,
    given: Sequence[float],
    staged: task.Staged,
    times: Times,
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
    name = plan.tile_names(p.design.canon.entries)
    if beyond := sorted({name(tile) for tile in done.beyond}):
        more = f" and {len(beyond) - 1} more tensors" if len(beyond) > 1 else ""
        report.warnings.append(f"{beyond[0]}{more}: values beyond 65504 do not fit into float16 and are infinite there")
    if staged.finished and any(e.dtype == "float16" for e in p.design.target.entries) and _casts(p.design):
        report.notes.append("tiles of the attempt before were not looked at for values beyond what fits into float16")
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
        said = "; nothing was published"
        group.together(lambda: unchanged(p.models, times, said) if group.local_rank == 0 else None)
        group.together(_wanted)
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
    once(lambda: stage.publish(p.staging, p.layout, fsync, overwrite))
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


def _fingerprints(d: design.Design, done: Any, models: Sequence[Model], report: Report) -> dict[str, Any]:
    """The result's fingerprint, and each source's, taken in passing."""
    if not canonical(d.dialect) and not d.canon.axes:
        report.warnings.append(
            f"no fingerprint: it is taken of the Hugging Face spelling, which needs {models[0].unresolved}; give model.config=PATH"
        )
        return {"fingerprint": None, "source_fingerprints": [None] * len(models)}
    written, held = design.stored_dtypes(d.target), {w for r in d.target.rules if r for w in r.weights}
    canon_dtypes = {
        e.name: written(r) if held.issuperset(r.weights) else e.dtype
        for e, r in zip(d.canon.entries, d.canon.rules, strict=True)
        if r
    }
    dtypes = [_dtypes(d, design.stored_dtypes(bound)) for bound in d.sources]
    prints = [
        task.fingerprint_of(task.weight_digests(d.canon, done, k, own)) for k, own in enumerate([*dtypes, canon_dtypes])
    ]
    return {"fingerprint": prints[-1], "source_fingerprints": prints[:-1]}


def _dtypes(d: design.Design, stored: Callable[[Any], str]) -> dict[str, str]:
    """Canonical name -> the dtype that one source has it in."""
    pairs = zip(d.canon.entries, d.canon.rules, strict=True)
    return {e.name: stored(r) for e, r in pairs if r and e.role == "weight"}


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
