"""The verbs that write: convert, average, merge, seed. Each is one straight line over the steps of `task`.

Invariant: a verb either publishes a whole target and a report, or raises and leaves no trace of the target.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_dist import __version__, configs, cost, formats, initial, megatron, part, plan, quantised, sources, task
from ckpt_dist.catalog import Extra
from ckpt_dist.engine import journal
from ckpt_dist.engine import staging as stage
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Combine, Done, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError, Stopped, UsageError
from ckpt_dist.files import pickles
from ckpt_dist.formats import Layout, Spec
from ckpt_dist.formats.catalog import needs_data
from ckpt_dist.model import Bound, Model, bind_plain, canonical, resized
from ckpt_dist.report import Report, parse_size, peak_memory, size

Config = Mapping[str, Any]


@contextmanager
def job(verb: str, cfg: Config) -> Iterator[tuple[Group, Report]]:
    """The ranks and the report of one job."""
    with Group(cfg["engine"]["timeout"]) as group:
        report = Report(verb)
        yield group, report
        report.show(bool(cfg.get("quiet")))


def engine_of(cfg: Config) -> dict[str, Any]:
    """The engine's settings with sizes in bytes."""
    engine = dict(cfg["engine"])
    engine["memory"] = parse_size(engine["memory"])
    return engine


def convert(cfg: Config) -> dict[str, Any]:
    """One checkpoint into another format, dialect or dtype."""
    with job("convert", cfg) as (group, report):
        with report.phase("scan"):
            m = part.scanned(group, lambda more: task.open_model({**cfg["source"], **more}, cfg))
        cfg = _as_stored(cfg, m)
        return _write(group, report, [m], cfg, Path(cfg["target"]["path"]), lambda d: keep, {"verb": "convert"})


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
    staged = group.on_first(lambda: begin(p, cfg, about, given))
    if staged.finished:
        report.notes.append(f"resumed: {sum(hi - lo for lo, hi in staged.finished)} tiles were there already")
    try:
        prints = _fill(group, report, p, cfg, engine, about, given, staged)
    except CheckpointError as error:  # nobody will go on with what is wrong; anything else may be resumed
        if group.rank == 0 and not isinstance(error, Stopped):
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
    facts = (__version__, about, given, settings, cfg["engine"]["verify"], times, laid_out)
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
    layout = _lay_out(d, models[-1], extras, cfg, path)
    report.guesses += layout.catalog.about.get("guesses", ())
    if target["format"] in ("megatron", "torch_dist", "zarr"):
        _translated(_args(d, models[0]), "config.json", report)
    proof = task.prove_all(group, d, models, layout.catalog.chunks)
    staging = stage.Staging(path.absolute(), single=_single(layout, path, cfg), into=into)
    carries = target["format"] in formats.FOLDERS and not staging.single
    small = _small_files(models[0], d, layout, cfg, report) if carries else {}
    if into:  # what a checkpoint has of its own stays as it is
        small = {n: f for n, f in small.items() if not (staging.target / n).exists()}
    used = [Path(m.catalog.root) / f for m in models for f in m.catalog.files]
    if not any("saved" in m.catalog.about for m in models):  # plans may be made on another machine
        group.on_first(lambda: stage.check(staging, layout, list(small), used, bool(cfg.get("overwrite"))))
    _account(report, models, lost | task.unsaid(models[0], d))
    combine = combination(d)
    if combine is keep and any(quantised.of(m.catalog) for m in models):
        combine = _made
    return Prepared(models, d, combine, layout, proof, staging, small)


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
    target = (p.design.target, p.layout, files, p.proof.target)
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
        )
    if engine.get("verify"):
        with report.phase("verify"):
            _reread(group, report, p, done, engine, quiet)
    with report.phase("publish"):
        runs = [run for part in group.gather(done.runs) for run in part]
        report.peak_memory = group.gather(peak_memory())
        prints = _fingerprints(p.design, done, p.models, report) if digests else {}
        kept = {} if p.staging.single else record(cfg, about, p.models, given, prints, report)
        group.on_first(lambda: finish(p.staging, p.layout, runs, {**p.small, **kept}, engine, cfg))
    return prints


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


def finish(
    staging: stage.Staging,
    layout: Layout,
    runs: stage.Runs,
    small: Mapping[str, bytes | Path],
    engine: Config,
    cfg: Config,
) -> None:
    stage.finish(staging, layout, runs, small)
    stage.publish(staging, bool(engine.get("fsync", True)), bool(cfg.get("overwrite")))


def _lay_out(d: task.Design, m: Model, extras: Sequence[Extra], cfg: Config, path: Path) -> Layout:
    target = cfg["target"]
    options = {
        **target,
        "max_shard_size": parse_size(target["max_shard_size"]),
        "sizes": m.sizes,
        "args": _args(d, m).config,
        "step": m.step,
        "file": path.name if _is_file_name(path, target["format"]) else None,
    }
    if target["format"] == "fsdp":
        raise UsageError("target.format=fsdp is only read; write dcp instead, which FSDP loads under any sharding.")
    for key in ("tp", "pp", "vpp", "ep"):
        if target[key] != 1 and target["format"] not in ("megatron", *(["meta"] if key == "tp" else [])):
            raise UsageError(
                f"target.{key}={target[key]}: {target['format']} has no files of such ranks. Leave it out."
            )
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
    for extra in m.catalog.extras:
        if "saved" in m.catalog.about and extra.role in wanted:
            lost.setdefault("its value is not in the saved catalog", []).append(extra.name)
        elif extra.role == "weight":
            lost.setdefault("not a tensor", []).append(extra.name)
        elif extra.role not in wanted or format not in ("dcp", "torch"):
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
    found, made = sources.assets(m.source), {*layout.catalog.files, *layout.late}
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


def _reread(group: Group, report: Report, p: Prepared, done: Done, engine: Config, quiet: bool) -> None:
    """Read the staged target again, through its own addresses, and compare with what was meant to be written."""
    result, sides = len(p.models), [_as_source(p)]
    again = task.run_tiles(
        group, report, engine, "verify", p.design.canon, sides, None, _drain, digests=True, quiet=quiet
    )
    wrong = [key for key, value in done.digests.items() if key[0] == result and again.digests.get((0, key[1])) != value]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tiles of {p.staging.target} read back differ from what was written; nothing was published. Check the disk."
        )
    report.notes.append("every tile was read back and is equal to what was written")


def _as_source(p: Prepared) -> tuple[Model, Bound]:
    """The staged target, to be read."""
    folder = p.staging.folder
    catalog = replace(p.layout.catalog, root=str(folder), format="hf")  # addresses are exact: nothing to locate
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
        (p.design.target, layout, Files(path, ()), p.proof.target),
        _as_source(p) if verify else None,
        p.combine,
        p.combine is not keep or verify,
    )
    facts, said = cost.estimate(group, report, job, engine, path)
    total = sum(layout.sizes)
    tiles = int(plan.tile_counts(p.design.canon.entries).sum())
    lines = [
        f"{path} ({layout.catalog.format}), {len(layout.catalog.entries)} tensors, {size(total)} in {len(layout.sizes)} files, nothing written"
    ]
    lines += [f"  {n}  {size(b)}" for n, b in zip(layout.catalog.files, layout.sizes, strict=True)]
    lines += [f"  {n}  small" for n in layout.late]
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
