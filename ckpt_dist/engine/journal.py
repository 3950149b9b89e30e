"""The journal: which tiles a staged target already holds, so that a job that was ended goes on where it was.

Tiles do not depend on ranks, so a job may go on with any number of them. Each attempt of each rank appends to a
file of its own in the staging folder; `plan` beside them says which job they belong to.

Invariant: a tile is noted only after its bytes were written, and, if the job flushes, after they are on the disk.
A line that was cut off by the end of a process counts as not written.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt_dist.engine.fill import Done
from ckpt_dist.errors import CheckpointError
from ckpt_dist.whole import contents

FOLDER = ".ckpt_dist"
EVERY_BYTES = 256 << 20  # of a rank between two notes: what is lost when a rank is killed
PLAN = "plan"


def matches(staged: Path, plan: str) -> bool:
    """Whether a staging folder was left by this very job."""
    try:
        return contents(staged / FOLDER / PLAN) == plan.encode()
    except OSError:
        return False


def begin(staged: Path, plan: str) -> None:
    """A new folder, marked as this job's; once it has the name that is looked for it may be gone on with."""
    (staged / FOLDER).mkdir(parents=True)
    (staged / FOLDER / PLAN).write_text(plan)


def read(staged: Path) -> tuple[list[tuple[int, int]], Done]:
    """The tiles noted by all earlier attempts, as half-open runs, and what was learnt on the way."""
    tiles: list[tuple[int, int]] = []
    done = Done()
    for path in sorted((staged / FOLDER).glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                first, last, digests, runs = json.loads(line)
            except ValueError:
                break  # the last line of a rank that was killed
            tiles.append((first, last))
            done.digests.update({(k, t): bytes.fromhex(d) for k, t, d in digests})
            done.runs += [(file, offset, nbytes, crc) for file, offset, nbytes, crc in runs]
    return tiles, done


class Journal:
    """One rank's notes of one attempt. `flush` makes sure that the bytes written so far are on the disk.

    It is called beside the work, by a thread of its own: the disk writes while tiles are made. Nobody else may call it:
    what a flush was for is noted by the same thread, or not at all.
    """

    def __init__(self, staged: Path, flush: Callable[[], None]) -> None:
        self.path = staged / FOLDER / f"{uuid.uuid4().hex}.jsonl"
        self.flush = flush
        self.lock = threading.Lock()
        self.lines: list[str] = []
        self.nbytes = 0
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "journal")
        self.writing: concurrent.futures.Future[None] | None = None

    def note(self, first: int, last: int, done: Done) -> None:
        """Tiles first..last are written; `done` is what these tiles gave. Raises what an earlier flush has raised."""
        digests = [(k, t, d.hex()) for (k, t), d in done.digests.items()]
        line = json.dumps((first, last, digests, done.runs), separators=(",", ":"))
        with self.lock:
            self.lines.append(line)
            self.nbytes += done.bytes_written
            if self.writing and self.writing.done():
                self.writing.result()
                self.writing = None
            if self.writing is None and self.nbytes >= EVERY_BYTES:
                self.writing, self.nbytes = self.thread.submit(self._write), 0

    def close(self) -> None:
        """Write down what is left, also where the job has failed. Raises what a flush has raised."""
        self.thread.shutdown()
        if self.writing:
            self.writing.result()
        self._write()

    def _write(self) -> None:
        with self.lock:
            lines, self.lines = self.lines, []
        if not lines:
            return
        self.flush()
        try:
            with open(self.path, "a") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"Cannot write {self.path}: {error.strerror}. Nothing was published; free space or choose another target.path."
            ) from None


def plan_key(*facts: Any) -> str:
    """One word for everything that decides the bytes of a target."""
    import hashlib

    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
