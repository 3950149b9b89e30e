"""Folders that nobody needs any more, and what is flushed to its disk before others rely on it.

Invariant: what is removed has another name first, so that what is left of it is in nobody's way and is never put back.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from glob import escape
from os.path import lexists
from pathlib import Path
from uuid import uuid4

from ckpt_dist.engine.claims import release


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def litter(path: Path) -> None:
    """Remove what nobody needs any more. What cannot be removed stays, hidden, and the next job tries again: under a name
    of its own, for what is left of it must be in nobody's way, and never be put back."""
    with suppress(OSError):
        if lexists(path):
            os.rename(path, gone(path))
    for rest in (path, *path.parent.glob(escape(f"{path.name}-gone-") + "*")):
        with suppress(OSError):
            _remove(rest)


def gone(path: Path) -> Path:
    """A new name beside a path, for what is to be removed."""
    return path.with_name(f"{path.name}-gone-{uuid4().hex[:8]}")


def end(path: Path, away: Path) -> None:
    """Remove what may hold the journal: from now on there is nothing to go on with. What is claimed is closed before: NFS
    keeps a file that is open, under another name, and then its folder is not empty."""
    os.rename(path, away)
    release()
    with suppress(OSError):
        _remove(away)


def sync_tree(folder: Path) -> None:
    """Flush a folder and all that is in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
