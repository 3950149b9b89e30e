"""A sign of life from each rank, so that a dead or hanging one ends the job on all ranks and not on none.

Each rank has a thread that counts up its own key in the rendezvous store, reads that of the next rank, and looks
for a verdict. A rank that makes no progress while it should gives the verdict on itself. The first rank that sees
a verdict prints it; all end at once, because a thread that waits inside a collective cannot be called back.

Invariant: what was noted in the journal stays, so that the job can go on later.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from typing import Any

from ckpt_dist.errors import STOP, Stopped

GONE = "gone"
JOBS = itertools.count()
LEFT = -1  # the count of a rank that has come to its end in order


class Watch:
    """The thread of one rank. `moved` tells it of progress; between `begin` and `end` progress is expected."""

    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.name = f"rank {rank} ({socket.gethostname()})"
        self.address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        job = f"ckpt_dist{next(JOBS)}"  # ranks make the same jobs in the same order, and a store outlives a job
        self.store = PrefixStore(job, TCPStore(*self.address, is_master=False, wait_for_workers=False))
        self.last = time.monotonic()
        self.expected = False
        self.over = threading.Event()
        self.store.set(f"name{rank}", self.name)
        self.contact = time.monotonic()
        self.pause = min(max(timeout_s / 20, 0.2), 5.0)
        self.threads = [threading.Thread(target=t, name="watch", daemon=True) for t in (self._run, self._guard)]
        for thread in self.threads:
            thread.start()

    def begin(self) -> None:
        self.moved()
        self.expected = True

    def end(self) -> None:
        self.expected = False

    def moved(self) -> None:
        self.last = time.monotonic()

    def wait(self) -> None:
        """Give the thread the time to end this process with a verdict; where a launcher ends all ranks it has its own."""
        self.end()
        if STOP.wait(3 * self.timeout_s):
            _die("", self.name)

    def close(self, in_order: bool) -> None:
        """Stop. A rank that failed on its own leaves no farewell, so the others soon miss it."""
        self.in_order = in_order
        self.over.set()
        self.threads[0].join(self.timeout_s)

    def _run(self) -> None:
        beats, seen, since = 0, 0, time.monotonic()
        other = (self.rank + 1) % self.world
        while not self.over.wait(self.pause):
            beats += 1
            now = time.monotonic()
            try:
                self.store.set(f"beat{self.rank}", str(beats))
                if self.store.check([GONE]):
                    self._end(self.store.get(GONE).decode())
                count = int(self.store.get(f"beat{other}")) if self.store.check([f"beat{other}"]) else 0
                self.contact = time.monotonic()
            except Exception:  # whatever the store raises when its host is gone; the guard counts the seconds
                continue
            if count != seen:
                seen, since = count, now
            if self.expected and now - self.last > self.timeout_s:
                self._tell(f"{self.name} has moved no byte for {self.timeout_s:.0f} s: its storage or network hangs")
            elif seen != LEFT and now - since > self.timeout_s:
                name = (
                    self.store.get(f"name{other}").decode() if self.store.check([f"name{other}"]) else f"rank {other}"
                )
                self._tell(f"{name} gives no sign of life since {self.timeout_s:.0f} s: it was ended or hangs")
        try:
            if self.in_order:
                self.store.set(f"beat{self.rank}", str(LEFT))
        except Exception:  # the others were quicker, and took the store with them
            return

    def _guard(self) -> None:
        """A store whose host hangs does not answer at all, so somebody else must look at the clock."""
        while not self.over.wait(self.pause):
            if time.monotonic() - self.contact > self.timeout_s:
                host = ":".join(map(str, self.address))
                _die(f"the rendezvous host {host} does not answer since {self.timeout_s:.0f} s", self.name)

    def _tell(self, verdict: str) -> None:
        self._end(self.store.compare_set(GONE, "", verdict).decode())

    def _end(self, verdict: str) -> None:
        first = self.store.add("said", 1) == 1
        _die(verdict if first else "", self.name)


def _die(verdict: str, name: str) -> Any:
    if verdict:
        more = "Nothing was published. Run the same command again to go on from here."
        print(f"Error: {verdict} (said by {name}). {more}", file=sys.stderr, flush=True)
    os._exit(Stopped.exit_code)
