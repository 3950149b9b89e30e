"""Any checkpoint that can be read, for a running program's own `torch.distributed.checkpoint.load`: no conversion on disk.

    dcp.load(model_state, storage_reader=ckpt_dist.dcp.reader("Llama-3-8B"))

The program says which names it wants, under which sharding; the reader shows a checkpoint under every name that
it may be asked for (as stored, and in each dialect of its family), each as one whole tensor, and a rank reads the
boxes that its shards need straight into their memory. A name says by itself what it means, so nobody has to say
which dialect a model speaks; a name that two dialects use for different layouts is refused, not guessed.

Invariant: all of a load is planned and proven before its first byte is read; no code of a checkpoint is run.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt_dist import design, part, slots, spelling, task
from ckpt_dist import family as families
from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.config import fill
from ckpt_dist.dcp.shards import Shards, run, shards
from ckpt_dist.engine.fill import Side
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError, UsageError, nearest
from ckpt_dist.family import Rule
from ckpt_dist.model import Model
from ckpt_dist.spelling import Bound

STORED = "stored "  # in front of the name of what is no weight of a family: no weight is called so


def reader(
    path: str | os.PathLike[str],
    *,
    dialect: str = "auto",
    key: str = "",
    config: Any = None,
    like: Mapping[str, Any] | None = None,
    **options: Any,
) -> Reader:
    """What `dcp.load` reads a checkpoint through, whatever its format.

    `dialect` leaves only the names of one dialect, `key` puts them under a dict ("model"), `config` is the model's
    config.json or params.json where the checkpoint has none, and with `like`, the state dict that is to be loaded,
    all that does not fit is said at once. `options` are keys of the command line, such as `**{"source.step": 1000}`.
    """
    given = {"model.config": os.fspath(config)} if config is not None else {}
    settings = fill("inspect", {"source.path": os.fspath(path), **given, **options})
    return Reader(settings, dialect, key, like)


@dataclass(frozen=True)
class Offer:
    """What can be asked for: a tensor of the checkpoint, as some name spells it. `unsure` are dialects that disagree."""

    entry: Entry
    rule: Rule
    dialect: str
    unsure: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """An understood checkpoint: its stored arrays as weights, and every name it is offered under."""

    model: Model
    bound: Bound
    offers: Mapping[str, Offer]
    extras: Mapping[str, Extra]

    @property
    def catalog(self) -> Catalog:
        return self.model.catalog


def show(settings: Mapping[str, Any], dialect: str, key: str) -> Shown:
    """Scan a checkpoint and spell it in the dialects that are wanted."""
    settings = {**settings, "unmatched": "drop", "partial": True}  # still there under stored names
    m = design.open_model(settings["source"], settings)
    if unknown := m.catalog.about.get("unknown"):
        raise CheckpointError(
            f"{m.source.folder}: how tensor-parallel ranks divide {unknown[0]!r} is not known. Convert it first, which compares "
            "what they hold."
        )
    wanted = _dialects(m, dialect)
    bound = _bind(m)
    offers = _as_stored(m, bound, key, weights=dialect == "auto" or not wanted)
    if wanted:
        assert m.family is not None
        ties = m.family.ties if design.tied(m) else {}
        known = tuple(r if r and r.weights[0] in bound.axes else None for r in bound.rules)
        present = spelling.corners(m.family, bound, part.wholly(replace(bound, rules=known)))
        held = set(present)
        present |= {copy: present[of] for copy, of in ties.items() if copy not in held and of in held}
        for copy, (of, corners) in spelling.copied(m.family, present).items():
            present[copy], ties = corners, {**ties, copy: ties.get(of, of)}
        dtype_of = design.dtype_of_tied(design.stored_dtypes(bound), {c: o for c, o in ties.items() if c not in held})
        for spoken in wanted:
            for name, rule, shape in families.spell(m.family, spoken, present, m.sizes):
                real = replace(rule, weights=tuple(w if w in held else ties[w] for w in rule.weights))
                name = f"{key}.{name}" if key else name
                _offer(offers, Offer(Entry(name, dtype_of(rule), shape, (name,)), real, spoken))
    extras = {x.name: x for x in m.catalog.extras if x.name not in offers}
    return Shown(m, bound, offers, extras)


def _dialects(m: Model, asked: str) -> tuple[str, ...]:
    """The dialects whose names are offered; which of them cannot be made is said."""
    if m.family is None:
        if asked != "auto":
            raise UsageError(
                f"dialect={asked!r}: {m.source.folder} holds a model of no known family, so it can be asked for under its stored names only. "
                "Leave dialect out, or name its family: **{'model.family': NAME}."
            )
        return ()
    if asked not in ("auto", *m.family.dialects):
        raise UsageError(
            f"dialect={asked!r} is none of {m.family.name}.{nearest(asked, m.family.dialects)} Known: {', '.join(m.family.dialects)}."
        )
    if not m.unresolved:
        return tuple(m.family.dialects) if asked == "auto" else (asked,)
    text = f"{m.source.folder}: {m.unresolved} cannot be read from the checkpoint, so only its stored names ({m.dialect}) can be asked for"
    if asked not in ("auto", m.dialect):
        raise UsageError(f"{text}. Give its config.json or params.json: config=PATH.")
    warnings.warn(f"{text}; config=PATH of its config.json or params.json gives the others.", stacklevel=4)
    return ()


def _bind(m: Model) -> Bound:
    """Every stored array as a weight of the family, or as itself."""
    rules = []
    for entry, name in zip(m.catalog.entries, m.names, strict=True):
        known = m.family is not None and not m.unresolved and name is not None and entry.role == "weight"
        rule = families.match(m.family, m.dialect, name, m.sizes) if known else None  # type: ignore[arg-type]
        rules.append(rule or families.plain(entry, STORED + entry.name))
    axes = slots.axes(m.family, ()) if m.family is not None else {}
    return Bound(m.catalog.entries, tuple(rules), m.sizes, axes)


def _as_stored(m: Model, bound: Bound, key: str, weights: bool) -> dict[str, Offer]:
    """Whole arrays under their stored names, and weights also without the dicts around the model."""
    offers: dict[str, Offer] = {}
    again: dict[str, Offer] = {}
    for entry, rule, own in zip(bound.entries, bound.rules, m.names, strict=True):
        if entry.role == "weight" and not weights:
            continue
        assert rule is not None
        offers[entry.name] = Offer(entry, rule, STORED)
        if own is not None and entry.role == "weight":
            name = f"{key}.{own}" if key else own
            again[name] = Offer(replace(entry, name=name, path=(name,)), rule, STORED)
    return again | offers


def _offer(offers: dict[str, Offer], new: Offer) -> None:
    """Add a name. One that is stored means what is stored; one that two dialects lay out differently is unsure."""
    old = offers.setdefault(new.entry.name, new)
    if old.rule != new.rule and old.dialect != STORED:
        offers[new.entry.name] = replace(old, unsure=(*(old.unsure or (old.dialect,)), new.dialect))


class Reader(StorageReader):
    """Calls of a load: `reset` and `read_metadata` and `prepare_local_plan` and `read_data` by all ranks, no messages."""

    def __init__(
        self, settings: Mapping[str, Any], dialect: str, key: str, like: Mapping[str, Any] | None = None
    ) -> None:
        self.settings, self.dialect, self.key = settings, dialect, key
        self.shown = show(settings, dialect, key)  # here, not in read_metadata, whose errors torch wraps in its own
        self.bytes_read = 0
        if like is not None:
            _check(self.shown, like)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another path is another checkpoint, read in the same way."""
        if checkpoint_id is not None and os.fspath(checkpoint_id) != self.settings["source"]["path"]:
            source = {**self.settings["source"], "path": os.fspath(checkpoint_id)}
            self.settings = {**self.settings, "source": source}
            self.shown = show(self.settings, self.dialect, self.key)

    def read_metadata(self, *args: Any, **more: Any) -> Metadata:
        """Every name, each as one whole chunk: a rank then asks for exactly the boxes of its shards."""
        described: dict[str, Any] = {name: BytesStorageMetadata() for name in self.shown.extras}
        described |= {  # what this torch has no dtype for, nothing in it can ask for
            name: _described(offer.entry)
            for name, offer in self.shown.offers.items()
            if hasattr(torch, offer.entry.dtype)
        }
        paths: dict[str, Any] = {x.name: x.path or (x.name,) for x in self.shown.extras.values()}
        paths |= {name: o.entry.path or (name,) for name, o in self.shown.offers.items()}
        return Metadata(described, paths, {})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        for item in plan.items:
            offer = self.shown.offers.get(item.storage_index.fqn)
            if offer is not None and offer.unsure:
                raise UsageError(
                    f"{item.storage_index.fqn!r} means different layouts in the dialects {' and '.join(offer.unsure)} of "
                    f"{self.shown.model.family.name}. Say which the model speaks: reader(path, dialect=...)."  # type: ignore[union-attr]
                )
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's shards."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(_value(self.shown, item.storage_index.fqn)))
        items = [i for i in plan.items if i.type != LoadItemType.BYTE_IO]
        places = [planner.resolve_tensor(i).detach() for i in items]
        self.bytes_read += _fill(self.shown, items, places, self.settings["engine"])
        for item, place in zip(items, places, strict=True):
            planner.commit_tensor(item, place)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).exists()


def _described(entry: Entry) -> TensorStorageMetadata:
    shape = torch.Size(entry.shape)
    whole = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
    return TensorStorageMetadata(TensorProperties(getattr(torch, entry.dtype)), shape, [whole])


def _value(shown: Shown, name: str) -> bytes:
    """A value as torch.save writes it: read by the allow-list and written anew, for the planner unpickles it without one."""
    from ckpt_dist.formats import dcp
    from ckpt_dist.formats import torch as pt

    extra = shown.extras[name]
    value = dcp.read_extra(shown.catalog, extra)
    try:
        return pt.archive(value)
    except CheckpointError as error:
        raise CheckpointError(
            f"{shown.model.source.folder}: {name!r} cannot be passed on: {error} Leave it out of the state dict."
        ) from None


def _check(shown: Shown, like: Mapping[str, Any]) -> None:
    """All names and shapes of a state dict that the checkpoint does not have, in one error."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    asked, _ = flatten_state_dict(dict(like))
    lost = [n for n in asked if n not in shown.offers and n not in shown.extras]
    wrong = [
        f"  {n}: {list(shown.offers[n].entry.shape)} in the checkpoint, {list(value.shape)} in the model"
        for n, value in asked.items()
        if n in shown.offers and isinstance(value, torch.Tensor) and tuple(value.shape) != shown.offers[n].entry.shape
    ]
    lines = [f"  {n}: not in the checkpoint.{nearest(n, shown.offers)}" for n in lost[:10]] + wrong[:10]
    if lines:
        raise CheckpointError(
            f"{shown.model.source.folder}: {len(lost)} of {len(asked)} names are missing and {len(wrong)} have another shape:\n"
            + "\n".join(lines)
        )


def _fill(shown: Shown, items: Sequence[ReadItem], places: Sequence[torch.Tensor], engine: Mapping[str, Any]) -> int:
    """Read the boxes that items ask for into tensors; how many bytes of files that took."""
    if not items:
        return 0
    offers = [shown.offers[i.storage_index.fqn] for i in items]
    asked = Bound(tuple(o.entry for o in offers), tuple(o.rule for o in offers), shown.bound.sizes, shown.bound.axes)
    mine = shards(asked, [tuple(i.storage_offsets) for i in items], places)
    files = task.opened(shown.model)
    try:
        run(mine, _out_of(files, shown, mine), mine.side, mine.memory, engine)
        return int(files.bytes_read)
    finally:
        files.close()


def _out_of(files: Any, shown: Shown, mine: Shards) -> Side:
    """The side of the checkpoint: proven to hold all that is wanted, with the exact addresses of what is touched."""
    alone, m = Group(alone=True), shown.model
    (found,) = part.parts(alone, [(m, shown.bound)], mine.tiles)
    (who,) = part.readers(alone, [m], False)
    found = part.located(alone, who, shown.bound, found, mine.tiles)
    w = part.wanted(who, found, mine.tiles, np.zeros(len(mine.numel), bool))
    return Side(files, w.moves, w.file, w.dtypes, exact=True)
