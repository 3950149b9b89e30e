"""The verbs that write: convert, average, merge, seed. Each is one straight line over the steps of `task`.

Invariant: a verb either publishes a whole target and a report, or raises and leaves no trace of the target.
"""

from __future__ import annotations

import fnmatch
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from ckpt_dist import design, formats, initial, part, plan, replicas, sources, task, writing
from ckpt_dist.engine.fill import Combine, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import UsageError
from ckpt_dist.model import Model
from ckpt_dist.prepared import made
from ckpt_dist.report import Report

Config = Mapping[str, Any]
FACTORS = ("*lora_[ABab]*", "*lora_embedding_[AB]*", "*adapter*.linear_in.*")  # of peft, torchtune, NeMo
COMMAND = Event()  # set where this process is one of the command's
FROZEN = gc.get_freeze_count()  # by the interpreter itself: Python 3.12 does, others do not


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
    ours = COMMAND.is_set() and gc.get_freeze_count() <= FROZEN
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def convert(cfg: Config) -> dict[str, Any]:
    """One checkpoint into another format, dialect or dtype."""
    cfg = _universal(cfg)
    with job("convert", cfg) as (group, report):
        with report.phase("scan"):
            m = part.scanned(group, lambda more: design.open_model({**cfg["source"], **more}, cfg))
            if "replicated" not in m.catalog.about:
                replicas.first_only(cfg["source"], m.catalog.format)
            average = cfg["source"]["replicas"] == "average"
            copies = replicas.others(group, report, m, cfg, average)
        cfg = _as_stored(cfg, m)
        target = Path(cfg["target"]["path"])
        if copies:
            replicas.settle(group, report, [m, *copies], task.engine_of(cfg), average)
        if average and copies:
            even = [1 / (1 + len(copies))] * (1 + len(copies))
            return writing.write(
                group, report, [m, *copies], cfg, target, lambda d: _mean(d, even), {"verb": "convert"}
            )
        return writing.write(group, report, [m], cfg, target, lambda d: keep, {"verb": "convert"})


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
    if about.get("lightning") and target["key"] == "auto":  # NeMo's, also where names are read without it
        target["key"] = m.around or "auto"
    if m.catalog.format == "megatron":
        asked = {k: target[k] for k in ("tp", "pp", "vpp", "ep") if target[k] != 1}
        uneven = len(set(about["partition"])) > 1 and not asked and target["partition"] is None
        target |= {k: about[k] for k in ("tp", "pp", "vpp", "ep", "spec", *(["partition"] if uneven else []))} | asked
    return {**cfg, "target": target}


def merge(cfg: Config) -> dict[str, Any]:
    """The shards of a training checkpoint into one Hugging Face model, by default inside the checkpoint itself."""
    replicas.first_only(cfg["source"], "merge")
    with job("merge", cfg) as (group, report):
        with report.phase("scan"):
            m = part.scanned(group, lambda more: design.open_model({**cfg["source"], **more}, cfg))
        replicas.known(group, report, m, cfg)
        given = cfg["target"].get("path")
        into = None if given else _checkpoint_of(m)
        return writing.write(
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
    replicas.first_only(cfg["source"], "average")
    with job("average", cfg) as (group, report):
        with report.phase("scan"):
            models = part.scanned(group, lambda more: _open_all(cfg, more))
        for m in models:
            replicas.known(group, report, m, cfg)
        given, from_user = _coefficients(cfg.get("weights"), models, report)
        cfg = _as_stored(cfg, models[-1])
        label = _label(cfg)
        target = _average_target(cfg, label, models[-1])
        beside = cfg["target"]["format"] == "nemo"  # a file more in the folder of each rank
        cfg = {**cfg, "target": {**cfg["target"], "path": str(target)}} if beside else cfg
        table = [(m.step, str(m.source.folder), w) for m, w in zip(models, given, strict=True)]
        for step, folder, w in table:
            report.notes.append(f"{'step ' + str(step) if step is not None else folder}: weight {w:.6g}")
        report.warnings += _factors(models[0])
        report.notes += [f"{target.name}.ckpt, one in the folder of each rank"] if beside else []
        about = {"verb": "average", "name": label, "weights": "as given" if from_user else "uniform"}
        place = target.parent if beside else target
        return writing.write(
            group, report, models, cfg, place, lambda d: _mean(d, given), about, into=beside, given=given
        )


def seed(cfg: Config) -> dict[str, Any]:
    """A checkpoint of first values, from a config alone: a conversion whose source is computed."""
    with job("seed", cfg) as (group, report):
        with report.phase("scan"):
            m = group.on_first(lambda: initial.checkpoint(cfg))
        about = {"verb": "seed", "seed": cfg["seed"], "init": initial.described(m)}
        return writing.write(group, report, [m], cfg, Path(cfg["target"]["path"]), lambda d: made, about)


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
    return [design.open_model({**cfg["source"], **more, "path": str(p), "as_is": as_is}, cfg) for p in found]


def _coefficients(given: Sequence[float] | None, models: Sequence[Model], report: Report) -> tuple[list[float], bool]:
    if given is None:
        return [1 / len(models)] * len(models), False
    if len(given) != len(models):
        raise UsageError(f"weights= has {len(given)} numbers, there are {len(models)} checkpoints.")
    total = sum(given)
    if not abs(total) > 1e-12:
        raise UsageError(f"weights={list(given)} sum to {total}; they cannot be normalised.")
    scaled = abs(total - 1) > 1e-9
    weights = [w / total if scaled else float(w) for w in given]
    if not all(abs(w) <= float(np.finfo(np.float32).max) for w in weights):
        raise UsageError(f"weights={list(given)}: {max(weights, key=abs):.3g} does not fit into float32.")
    if scaled:
        report.warnings.append(f"weights sum to {total:.6g}; they were divided by it")
    return weights, True


def _factors(m: Model) -> list[str]:
    """What to say of an adapter's factors: the product of two means is no mean of products."""
    factor = next((n for n in m.names if n and any(fnmatch.fnmatch(n, pattern) for pattern in FACTORS)), None)
    return (
        [
            f"{factor} and the like are factors of an adapter and averaged each for itself, which is not the mean of what adapters "
            "add; for that merge each into its model first"
        ]
        if factor
        else []
    )


def _label(cfg: Config) -> str:
    """What an average is named after: the name that is given, or that of the folder of the steps."""
    label = str(cfg.get("name") or os.path.basename(_first_path(cfg)))
    if "/" in label or "\0" in label:
        raise UsageError(f"name={label!r:.80} names no folder of its own. Give the folder with target.path.")
    return label


def _first_path(cfg: Config) -> str:
    """As a whole, so that `.` and `..` have a name too."""
    return os.path.abspath(os.path.expanduser(_paths(cfg)[0]))


def _average_target(cfg: Config, label: str, m: Model) -> Path:
    """`target.path`, or `<name>-averaged` below it when a name is given, or beside the steps when nothing is."""
    path, name = cfg["target"].get("path"), cfg.get("name")
    if cfg["naming"] == "nemo":
        steps = ["_".join(map(str, cfg["steps"]))] if cfg.get("steps") else []
        return Path(path or _among(cfg, m)).absolute() / "-".join([label, *steps, "averaged"])
    if path and not name:
        return Path(path)
    parent = Path(path) if path else Path(_first_path(cfg)).parent
    return parent / f"{label}-averaged"


def _among(cfg: Config, m: Model) -> Path:
    """The folder of the steps; where several checkpoints are named, that of the last."""
    if isinstance(cfg["source"]["path"], str):
        return Path(_first_path(cfg))
    return Path(m.catalog.root) if m.catalog.format == "nemo" else m.source.asked.parent


def _mean(d: design.Design, coefficients: Sequence[float]) -> Combine:
    """The combination of an average: the mean, except where training sets a value without gradients."""
    from ckpt_dist.averages.tensors import COPIED, last, mean

    each = [any(fnmatch.fnmatch(e.name, pattern) for pattern in COPIED) for e in d.canon.entries]
    copied = np.repeat(np.array(each, bool), plan.tile_counts(d.canon.entries))

    def combine(tile: int, values: Any, dtypes: Sequence[str], want: str) -> Any:
        if copied[tile]:
            return keep(tile, iter([last(values)]), dtypes[-1:], want)
        return mean(values, dtypes, coefficients, want)

    return combine
