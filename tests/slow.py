"""`python tests/slow.py SECONDS VERB key=value ...`: a job that takes its time over each write and notes each batch.

Small batches, a note after each, which the job waits for: so a test can end a job of a few megabytes at any moment.
Once a file with the name in HURRY is there, it takes its time no longer. With APART in the environment each rank is
told that it is a node of its own.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ckpt_dist.cli import leave, main
from ckpt_dist.engine import fill, journal
from ckpt_dist.engine.files import Files

pause = float(sys.argv[1])
fast = Files.write


def slow(self: Files, file: int, offset: int, data: memoryview) -> None:
    if not os.path.exists(os.environ.get("HURRY", "")):
        time.sleep(pause)
    fast(self, file, offset, data)


def noted(self: journal.Journal, first: int, last: int, done: fill.Done) -> None:
    note(self, first, last, done)
    if self.writing:
        self.writing.result()


note, journal.Journal.note = journal.Journal.note, noted  # type: ignore[method-assign]
Files.write = slow  # type: ignore[method-assign]
if "APART" in os.environ:
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": os.environ["RANK"]}
fill.BATCH, journal.EVERY_BYTES = 1, 1
if __name__ == "__main__":
    leave(main(sys.argv[2], sys.argv[3:]))
