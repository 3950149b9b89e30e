"""Skeleton, fill, publish: a target appears whole or not at all.

Files are made at their full size in a hidden folder beside the target; any rank fills any address; one rename publishes.
Calls, in order: `check` and `create` and `finish` and `publish` by rank 0 only, filling by all ranks in between. Where each
node has a disk of its own, the first rank of each makes all calls, none before all have come to an end with the one
before, and `settle` at last: until then what was published is taken back if another node fails.

Files that join a folder are renamed one by one, those last by which readers find the others; a list of them (`ORDER`) is
there as long as not all have come, and by it they are taken back if a rename fails, or by the next job if one was killed.

Invariant: nothing under the target's name is touched before `publish`; sources are never written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from itertools import compress
from os.path import lexists  # of a link, wherever it leads: a relative one leads nowhere from the staging folder
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.engine import journal
from ckpt_dist.engine.claims import claim, release, taken
from ckpt_dist.engine.files import reserve
from ckpt_dist.engine.removal import end, gone, litter, sync, sync_tree
from ckpt_dist.errors import CheckpointError, Taken, UsageError
from ckpt_dist.files.zips import combine_runs, crc_of_zeros
from ckpt_dist.formats import Layout, held, inside
from ckpt_dist.whole import contents

Runs = Sequence[tuple[int, int, int, int]]
LONGEST_NAME = 255  # bytes, in the file systems there are
ORDER, OLD = f"{journal.FOLDER}/order", f"{journal.FOLDER}/old"  # what joins a folder, and what it takes the place of


@dataclass(frozen=True)
class Staging:
    """Where the target will be and where it is made. `single`: one file, not a folder; `into`: add to a folder.

    `node` is the one whose disk that is, or None where all nodes share it.
    """

    target: Path
    single: bool = False
    into: bool = False
    node: int | None = None

    @property
    def folder(self) -> Path:
        return self.target.parent / f".{self.target.name}.ckpt_dist"

    @property
    def old(self) -> Path:
        return self.target.parent / f".{self.target.name}.ckpt_dist-old"

    @property
    def unsettled(self) -> bool:
        """Whether what has the target's name may still be taken back: it was published here, perhaps not on all nodes."""
        return self.node is not None and (self.target / journal.FOLDER / journal.PLAN).is_file()

    def joining(self) -> list[str]:
        """The files that were about to join a folder, first to last: those that are not staged any more are there."""
        path = self.folder / ORDER
        if not path.is_file():
            return []
        try:
            return [inside(self.target, name, str(path)) for name in json.loads(contents(path))]
        except (ValueError, TypeError, RecursionError):
            raise CheckpointError(
                f"{path} is no list of the files that a job was adding to {self.target}. Remove {self.folder} if no job made it."
            ) from None

    def there(self, name: str) -> bool:
        """Whether a folder has a file that is its own, and none of an attempt that did not come to its end."""
        ours = name in self.joining() and not lexists(self.folder / name)
        return lexists(self.folder / OLD / name) or (not ours and lexists(self.target / name))


def check(staging: Staging, layout: Layout, more: Sequence[str], sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse a target that exists, a name that cannot be published and a disk that is too small, before any work."""
    target, names = staging.target, (*layout.catalog.files, *layout.late, *layout.own, *more)
    for name in names:  # some are made of names that a source has
        inside(target, name, f"What is to be written to {target}")
    _keep_sources(staging, [target / n for n in names], sources)
    if staging.into:
        _one_disk(staging, names)
    if not overwrite:
        _free(staging, names)
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if len(os.fsencode(gone(staging.old).name)) > LONGEST_NAME:
        raise UsageError(
            f"target.path={target}: its name is too long to be published. Nothing was written; choose a shorter one."
        )
    if staging.single and target.is_dir():
        raise UsageError(
            f"{target} is a folder, and would be replaced by a file; nothing was written. Choose another target.path."
        )
    need, room = int(np.array(layout.sizes, np.int64)[held(layout, staging.node)].sum()), shutil.disk_usage(parent).free
    room += _reserved(staging.folder)  # by an earlier attempt, which is gone on with or removed
    if need > room:
        raise CheckpointError(
            f"Not enough space for {target}: {need} bytes are needed, {room} are free on its disk. Nothing was written."
        )


def _free(staging: Staging, names: Sequence[str]) -> None:
    """Nothing has the target's name, or, in a folder that files join, one of these."""
    target = staging.target
    if staging.into:
        taken = [n for n in names if staging.there(n)]
        if taken:
            raise UsageError(
                f"{target} already holds {taken[0]}; nothing was written. Give another target.path, or overwrite=true."
            )
    elif lexists(target) and (staging.old.exists() or not staging.unsettled):
        raise UsageError(f"{target} exists; nothing was written. Choose another target.path, or give overwrite=true.")


def _reserved(folder: Path) -> int:
    """Bytes that the files of a folder take on their disk."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # of a job that ends at this moment
            found += path.lstat().st_blocks * 512
    return found


def _one_disk(staging: Staging, names: Sequence[str]) -> None:
    """Files join a folder by renames, which do not go from one disk to another."""
    made = staging.folder.parent
    for place in sorted({(staging.target / n).parent for n in names}):
        while not place.exists():
            place = place.parent
        if place.stat().st_dev != made.stat().st_dev:
            raise UsageError(
                f"{place} is on another disk than {made}, where the files that are to join it are made; nothing was written. "
                "Give a new folder as target.path."
            )


def _keep_sources(staging: Staging, made: Sequence[Path], sources: Sequence[Path]) -> None:
    """Publishing must not replace a file or a folder that is read from, whatever the user allows."""
    place = staging.target.resolve()
    for source in (s.resolve() for s in sources):
        inside = place in source.parents and not staging.into
        if source == place or inside or source in [m.resolve() for m in made if m.exists()]:
            raise UsageError(
                f"target.path={staging.target} would replace the source {source}. Sources are never changed; choose another target.path."
            )


def create(staging: Staging, layout: Layout, plan: str, resume: bool) -> bool:
    """The skeleton: every file at its full size, with its header bytes. Whether an earlier attempt's is gone on with."""
    folder = staging.folder
    # where it is published already, that job may be waiting for other nodes
    claimed = claim(staging.target if staging.unsettled else folder, staging.target)
    _take_back(staging)
    resumed = resume and journal.matches(folder, plan)
    if claimed is False and not resumed:  # with the same job nobody is in the way: it writes the same bytes
        raise UsageError(
            f"{folder} is there from another job for {staging.target}, and its disk has no locks that would say whether that "
            "still runs. If it does not, remove this folder; or choose another target.path."
        )
    # nobody looks for a new one under this name, so it is found whole and claimed, or not at all
    made = folder if resumed else folder.with_name(f"{folder.name}-new-{uuid4().hex[:8]}")
    try:
        if not resumed:
            staging.target.parent.mkdir(parents=True, exist_ok=True)
            litter(folder)
            _abandoned(staging)
            journal.begin(made, plan)
            if claim(made, staging.target) is None:
                raise taken(staging.target)
        _skeleton(made, layout, held(layout, staging.node))
        if not resumed:
            os.replace(made, folder)
    except OSError as error:
        if not resumed:
            shutil.rmtree(made, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and lexists(folder):
            raise taken(staging.target) from None
        raise CheckpointError(
            f"Cannot write to {error.filename or folder}: {error.strerror}. Nothing was written; choose another target.path."
        ) from None
    return resumed


def _skeleton(folder: Path, layout: Layout, here: NDArray[np.bool_]) -> None:
    """Every file at its full size with the bytes that are known. What is there already stays: this is done again when a
    job goes on, for after a power failure only what tiles were noted for is known to be on the disk."""
    for name, size in compress(zip(layout.catalog.files, layout.sizes, strict=True), here):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "ab") as file:
            file.truncate(size)
            reserve(file.fileno(), size)
    by_file = dict[int, list[tuple[int, bytes]]]()
    for number, offset, data in layout.pieces:
        if here[number]:
            by_file.setdefault(number, []).append((offset, data))
    for number, pieces in by_file.items():
        with open(folder / layout.catalog.files[number], "r+b") as file:
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)


def _abandoned(staging: Staging) -> None:
    """Remove what jobs that were killed before their skeleton was finished have left."""
    for path in staging.folder.parent.glob(escape(f"{staging.folder.name}-new-") + "*"):
        with suppress(UsageError, OSError):
            if (path / journal.FOLDER / journal.PLAN).exists() and claim(path, staging.target) is not False:
                litter(path)


def _take_back(staging: Staging) -> None:
    """Undo a publishing that did not come to its end: what was made is staged again, what was there is back."""
    names = staging.joining()
    try:
        for name in reversed(names):
            if not lexists(staging.folder / name) and lexists(staging.target / name):
                os.rename(staging.target / name, staging.folder / name)
            if lexists(staging.folder / OLD / name):
                (staging.target / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(staging.folder / OLD / name, staging.target / name)
        if names:
            (staging.folder / ORDER).unlink()
    except OSError as error:
        raise CheckpointError(
            f"Some files of a job that did not come to its end are in {staging.target}, and cannot be taken back: "
            f"{error.filename}: {error.strerror}. What was there before is in {staging.folder / OLD}; the next job with this "
            "target.path tries again."
        ) from None
    if not staging.unsettled:
        return
    shutil.rmtree(staging.folder, ignore_errors=True)
    os.rename(staging.target, staging.folder)
    if staging.old.exists():
        os.rename(staging.old, staging.target)


def finish(staging: Staging, layout: Layout, runs: Runs, small: Mapping[str, bytes | Path]) -> None:
    """The CRCs, the late files, and the small files that travel along."""
    try:
        _patch_crcs(staging, layout, runs)
        own = {name: partial(make, staging.node or 0) for name, make in layout.own.items()}
        for name, content in {**layout.late, **own, **small}.items():
            path = staging.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                content if isinstance(content, bytes) else content() if callable(content) else _read(content)
            )
        if staging.into and staging.target.is_dir():
            order = dict.fromkeys([*small, *reversed(layout.catalog.files), *layout.late])  # what finds others is last
            part = staging.folder / f"{ORDER}.part"
            part.write_text(json.dumps(list(order)))
            os.replace(part, staging.folder / ORDER)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {error.filename or staging.folder}: {error.strerror}. Nothing was published."
        ) from None


def _read(path: Path) -> bytes:
    """A small file of a source, which is not where the target is made."""
    try:
        return contents(path)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}. Nothing was published.") from None


def _patch_crcs(staging: Staging, layout: Layout, runs: Runs) -> None:
    here = held(layout, staging.node)
    pending: dict[int, list[tuple[int, int, int]]] = {}
    for number, offset, nbytes, crc in sorted(runs):
        pending.setdefault(number, []).append((offset, nbytes, crc))
    for number in sorted({c.file for c in layout.crcs if here[c.file]}):
        mine, at = pending.get(number, []), 0
        with open(staging.folder / layout.catalog.files[number], "r+b") as file:
            for entry in sorted((c for c in layout.crcs if c.file == number), key=lambda c: c.offset):
                first = at
                while at < len(mine) and mine[at][0] < entry.offset + entry.nbytes:
                    at += 1
                own = mine[first:at]  # none where the file keeps the zeros that it began with
                value = combine_runs(own)[2] if own else crc_of_zeros(entry.nbytes)
                for position in entry.positions:
                    file.seek(position)
                    file.write(value.to_bytes(4, "little"))


def publish(staging: Staging, layout: Layout, fsync: bool, overwrite: bool) -> None:
    """Give the finished files the target's name: one rename, or one for each file when they join a folder."""
    folder, target = staging.folder, staging.target
    if not overwrite:
        try:
            _free(staging, layout.catalog.files)
        except UsageError:
            raise Taken(
                f"Somebody has made {target}, or files in it, since this job began, so nothing was published. Move that away, and "
                "run the same command again to go on from here; or with overwrite=true."
            ) from None
    try:
        if staging.joining():
            _join(staging, fsync)
            return
        if staging.node is None:
            end(folder / journal.FOLDER, gone(folder))
        if fsync:
            sync_tree(folder)
        if staging.single:
            os.replace(next(p for p in folder.iterdir()), target)
        else:
            if overwrite and (target.exists() or target.is_symlink()):
                litter(staging.old)
                os.rename(target, staging.old)
            os.rename(folder, target)
    except OSError as error:
        raise CheckpointError(
            f"Cannot publish {target}: {error.strerror}. Nothing was published; what was there is as it was."
        ) from None
    if staging.single:
        litter(folder)
    elif staging.node is None:
        litter(staging.old)
    try:
        if fsync:
            sync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target.parent} could not be flushed to its disk: {error.strerror}. {target} is whole, if it is there after a "
            "power failure."
        ) from None


def _join(staging: Staging, fsync: bool) -> None:
    """Each file takes its place; the one before it, if there is one, is kept until all have."""
    folder, target, names = staging.folder, staging.target, staging.joining()
    if fsync:
        sync_tree(folder)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if lexists(target / name):
            (folder / OLD / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(target / name, folder / OLD / name)
        os.rename(folder / name, target / name)
    for place in {(target / name).parent for name in names} if fsync else ():
        sync(place)
    os.rename(folder / journal.FOLDER, folder / "done")  # no list and no journal: nothing to take back or to go on with
    release()
    litter(folder)


def settle(staging: Staging) -> None:
    """All nodes have published."""
    end(staging.target / journal.FOLDER, gone(staging.folder))
    litter(staging.old)


def discard(staging: Staging) -> None:
    """No trace of an attempt, and what was there before it is there again."""
    _take_back(staging)
    with suppress(OSError):
        end(staging.folder, gone(staging.folder))
    if staging.old.exists() and not staging.target.exists():  # an end between the two renames of `publish`
        os.rename(staging.old, staging.target)
