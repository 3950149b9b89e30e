"""Files that are read as a whole, such as an index or a config.

Invariant: what is no plain file, such as a pipe or a device, is not read, nor is more than a file of its kind ever has.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ckpt_dist.errors import CheckpointError

MOST = 1 << 28
MOST_SETTINGS = 1 << 22  # of a model, by hand or by a training program


def contents(path: str | Path, most: int = MOST) -> bytes:
    """The bytes of a file."""
    with open(path, "rb", opener=_at_once) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(f"{path} is no plain file, so it is not read. Put the file itself there.")
        if about.st_size > most:
            raise CheckpointError(f"{path} has {about.st_size} bytes, {most} are the most of such a file.")
        return file.read(about.st_size)


def _at_once(path: str, flags: int) -> int:
    """A pipe would wait for somebody to write."""
    return os.open(path, flags | os.O_NONBLOCK)
