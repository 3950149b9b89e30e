"""Locks by which a job claims the folder in which it makes its target.

Invariant: a claim ends with its process, however that ends; a disk without locks says so.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from ckpt_dist.engine import journal
from ckpt_dist.errors import UsageError

_claims: list[int] = []


def claim(folder: Path, target: Path) -> bool | None:
    """Two jobs must not make one target at the same time; a claim ends with the process, however that ends. None where
    there is nothing to claim, False where the disk has no locks (Lustre that is mounted without them)."""
    try:
        fd = os.open(folder / journal.FOLDER / journal.PLAN, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # nobody has begun
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _claims.append(fd)
        return True
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise taken(target) from None
        return False


def taken(target: Path) -> UsageError:
    return UsageError(f"Another job is making {target} at this moment. Wait for it, or choose another target.path.")


def release() -> None:
    """Give back what `create` has claimed."""
    while _claims:
        os.close(_claims.pop())
