"""A running program's own `torch.distributed.checkpoint.save` into any format that is written, under its own sharding.

    dcp.save({"model": model.state_dict()}, storage_writer=ckpt_dist.dcp.writer("export", format="hf", config="hf/config.json"))

To the plan the state dict is a checkpoint like any other, whose chunks lie in the memory of the ranks. The coordinator
proves that they hold all of the target and makes its skeleton; then each rank writes its own shards to their places in
the files, which takes no message; then the coordinator publishes. All that ranks say to each other is said by `save`.

Invariant: a failure on any rank leaves no trace of the target, and is raised on all of them.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckpt_dist import beside, design, plan, sources, task, writing
from ckpt_dist.api import TARGET
from ckpt_dist.catalog import Catalog, Chunks, Entry, Extra, padded, role
from ckpt_dist.config import fill
from ckpt_dist.dcp import shards
from ckpt_dist.engine import staging as stage
from ckpt_dist.engine.claims import release
from ckpt_dist.engine.files import Files
from ckpt_dist.engine.fill import Done, keep
from ckpt_dist.engine.group import Group
from ckpt_dist.engine.memory import Memory
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.model import Model
from ckpt_dist.prepared import Prepared, prepare
from ckpt_dist.report import Report
from ckpt_dist.sources import Source
from ckpt_dist.spelling import Bound

PROGRAM = Path("the state dict")  # what errors call the source
ABOUT = {"verb": "save"}


def writer(path: str | os.PathLike[str], format: str = "hf", *, config: Any = None, **options: Any) -> Writer:
    """What `dcp.save` writes a model's weights through. The target appears whole, when all ranks are done, or not at all.

    `config` is the model's config.json (or its folder, whose tokenizer files travel along); `options` are keys of
    `convert`, those of the target without their group: `dtype="bfloat16"`, `dialect="hf"`, `overwrite=True`.
    """
    given = {"model.config": os.fspath(config)} if config is not None else {}
    keys = {f"target.{k}" if k in TARGET else k: v for k, v in {"format": format, **options}.items()}
    return Writer(_settings({"target.path": os.fspath(path), **given, **keys}))


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    settings = fill("convert", {"source.path": str(PROGRAM), "quiet": True, "resume": False, **values})
    for key, on in (("dry_run", settings["dry_run"]), ("engine.verify", settings["engine"]["verify"])):
        if on:
            raise UsageError(f"{key}: a writer does not do that. Leave it out; ckpt_dist.verify compares afterwards.")
    if settings["resume"] or settings["keep"] != ["weights"]:
        raise UsageError(
            f"keep={','.join(settings['keep'])} resume={settings['resume']}: a writer writes weights, and all of them. "
            "Save the state of a training with torch's own writer."
        )
    return settings


@dataclass(frozen=True)
class Errand:
    """What one rank has to do: which items of its plan are written, and the chunks of the target that they touch."""

    folder: Path
    files: tuple[str, ...]
    crc_files: frozenset[int]
    items: tuple[int, ...]
    source: Bound
    target: Bound
    chunks: Chunks


class Writer(StorageWriter):
    """Calls of a save: `prepare_global_plan` and `finish` by the coordinator, the others by all ranks, no messages."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.prepared: Prepared | None = None
        self.report = Report("save")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another path is another checkpoint, written in the same way."""
        if checkpoint_id is not None:
            self.settings = {**self.settings, "target": {**self.settings["target"], "path": os.fspath(checkpoint_id)}}
        self._abandon()

    def _abandon(self) -> None:
        if self.prepared is not None:
            stage.discard(self.prepared.staging)
            release()
        self.prepared = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise UsageError("use_collectives=False: no rank would know whether the others have the rest of the model.")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Prove that the ranks hold the model, make the skeleton, and say to each rank where its shards go."""
        if not all(getattr(p, "usable", True) for p in plans):
            raise UsageError(
                "enable_plan_caching=True: the plans of a save are needed each time. Leave it out of the planner."
            )
        if not self.settings["target"]["shared"]:
            raise UsageError("target.shared=false: a running program saves to a disk of all nodes, or with dcp.save.")
        self.report = Report("save")
        m = _model(_catalog(plans), self.settings)
        self.report.notes += [m.lacks] if m.lacks else []
        path = Path(self.settings["target"]["path"])
        p = prepare(Group(alone=True), self.report, [m], self.settings, path, lambda d: keep, False)
        errands = _errands(p, m.catalog, plans)
        writing.begin(p, self.settings, ABOUT, (), {})
        self.prepared = p
        return [replace(one, storage_data=errand) for one, errand in zip(plans, errands, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards. An error is part of the result: the coordinator has to clean up, and raises it."""
        result: Done | Exception
        try:
            result = _put(plan, planner, self.settings["engine"])
        except CheckpointError as error:
            result = error.with_traceback(None)
        except Exception:
            result = RuntimeError(traceback.format_exc())
        done: Future[list[WriteResult]] = Future()
        nbytes = result.bytes_written if isinstance(result, Done) else 0
        done.set_result([WriteResult(MetadataIndex("shards of a rank"), nbytes, result)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish, if all ranks have written all."""
        p, all_done = self.prepared, [one.storage_data for rank in results for one in rank]
        assert p is not None
        try:
            for rank, failed in enumerate(all_done):
                if isinstance(failed, Exception):
                    raise type(failed)(f"rank {rank}: {failed}")
            self._say()  # where a warning is an error, it is one before the target is there
            self._publish(p, all_done)
        except BaseException:
            self._abandon()
            raise
        release()
        self.prepared = None

    def _publish(self, p: Prepared, all_done: Sequence[Done]) -> None:
        self.report.target = self.settings["target"]["path"]
        self.report.bytes_written = sum(d.bytes_written for d in all_done)
        kept = {} if p.staging.single else beside.record(self.settings, ABOUT, p.models, (), {}, self.report)
        runs = [one for d in all_done for one in d.runs]
        writing.finish(p, lambda work: work(), runs, {**p.small, **kept}, self.settings)

    def _say(self) -> None:
        """What was left out, and what is missing for others to read the target."""
        for text in (*self.report.warnings, *(n for n in self.report.notes if n.startswith("dropped, "))):
            if not text.startswith("dropped, derived buffer"):
                warnings.warn(f"{self.settings['target']['path']}: {text}", stacklevel=2)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))


def _catalog(plans: Sequence[SavePlan]) -> Catalog:
    """All ranks' shards as the chunks of a checkpoint: file r is the memory of rank r."""
    paths = {name: path for p in plans for name, path in (p.planner_data or {}).items()}
    items = [(rank, i.index.fqn, i.tensor_data) for rank, p in enumerate(plans) for i in p.items]
    held = [(rank, name, data) for rank, name, data in items if data is not None]
    whole = {name: data for _, name, data in held}
    entries = tuple(_entry(name, data, paths.get(name) or (name,)) for name, data in whole.items())
    number = {e.name: k for k, e in enumerate(entries)}
    width = max((len(e.shape) for e in entries), default=0)
    start = padded([tuple(data.chunk.offsets) for *_, data in held], width, 0)
    size = padded([tuple(data.chunk.sizes) for *_, data in held], width, 1)
    ranks = [rank for rank, *_ in held]
    chunks = Chunks.dense([number[name] for _, name, _ in held], start, start + size, ranks, [0] * len(held))
    values = {name: paths.get(name) or (name,) for _, name, data in items if data is None}
    extras = tuple(Extra(name, path, role(path)) for name, path in values.items())
    return Catalog("dcp", str(PROGRAM), tuple(f"rank {r}" for r in range(len(plans))), entries, chunks, extras)


def _entry(name: str, data: Any, path: tuple[str | int, ...]) -> Entry:
    return Entry(name, str(data.properties.dtype).partition(".")[2], tuple(data.size), path, role(path))


def _model(catalog: Catalog, settings: Mapping[str, Any]) -> Model:
    if not catalog.entries:
        raise CheckpointError("The state dict holds no tensor: there is nothing to write.")
    given = settings["model"]["config"]
    found, where = sources.find_config(PROGRAM, PROGRAM, PROGRAM, given) if given is not None else ({}, None)
    source = Source(catalog, PROGRAM, PROGRAM, None, found, where, (), Memory([]))
    return design.understand(source, settings["source"], {**settings, "partial": True})  # a program knows what it saves


def _errands(p: Prepared, catalog: Catalog, plans: Sequence[SavePlan]) -> list[Errand]:
    """For each rank the chunks of the target that its shards touch, and no others."""
    source, laid_out = p.design.sources[0], p.layout.catalog
    laid, held = plan.align(p.proof.target, source.views(catalog.chunks))
    hits = plan.join(laid, held)
    rank = catalog.chunks.file[held.chunk[hits.b]]
    pairs = np.unique(np.stack([rank, laid.chunk[hits.a]], 1), axis=0)
    cuts = np.searchsorted(pairs[:, 0], np.arange(len(plans) + 1))
    known = {e.name: (e, r) for e, r in zip(source.entries, source.rules, strict=True) if r is not None}
    crc_files = frozenset(c.file for c in p.layout.crcs)
    found = []
    for r, one in enumerate(plans):
        items = tuple(k for k, i in enumerate(one.items) if i.index.fqn in known)
        mine = [known[one.items[k].index.fqn] for k in items]
        chunks = laid_out.chunks.take(pairs[cuts[r] : cuts[r + 1], 1])
        there, entry = np.unique(chunks.entry, return_inverse=True)
        names = [(p.design.target.entries[e], p.design.target.rules[e]) for e in there.tolist()]
        source_part, target_part = _bound(mine, source), _bound(names, p.design.target)
        found.append(
            Errand(
                p.staging.folder,
                laid_out.files,
                crc_files,
                items,
                source_part,
                target_part,
                replace(chunks, entry=entry),
            )
        )
    return found


def _bound(pairs: Sequence[tuple[Entry, Any]], like: Bound) -> Bound:
    return Bound(tuple(e for e, _ in pairs), tuple(r for _, r in pairs), like.sizes, like.axes)


def _put(plan: SavePlan, planner: SavePlanner, engine: Mapping[str, Any]) -> Done:
    """Write this rank's shards to where they belong."""
    errand: Errand = plan.storage_data
    items = [plan.items[k] for k in errand.items]
    if not items:
        return Done()
    places = [planner.resolve_data(i) for i in items]
    assert all(isinstance(p, torch.Tensor) for p in places)
    starts = [tuple(i.tensor_data.chunk.offsets) for i in items if i.tensor_data is not None]
    mine = shards.shards(errand.source, starts, [p.detach() for p in places if isinstance(p, torch.Tensor)])
    files = Files(errand.folder, errand.files, writable=True)
    try:
        views = errand.target.views(errand.chunks)
        side = task.target_side(errand.target, errand.chunks, files, views, mine.tiles, len(mine.numel))
        done = shards.run(mine, mine.side, side, files, engine, errand.crc_files)
        if engine["fsync"]:
            files.sync()
        return done
    finally:
        files.close()
