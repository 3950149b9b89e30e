"""What a person sees of a job: sizes, one progress bar, and the report at the end.

Everything here goes to stderr (stdout belongs to results), from rank 0 only, and nothing here decides anything.
rich is imported only when something is drawn.

Invariant: a report is plain data (`Report.to_dict`); what is drawn is made from it and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from ckpt_dist.errors import UsageError, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

UNITS = (
    {"": 1, "B": 1}
    | {p + "B": 1000**n for n, p in enumerate("KMGTP", 1)}
    | {p + "iB": 1024**n for n, p in enumerate("KMGTP", 1)}
)
SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
EVERY_S = 5.0  # between two plain progress lines
WIDEST = 160  # column of a table: a name may have as many letters as its file, and each row would have as many blanks
STATUS = "/proc/self/status"  # of Linux


def size(num_bytes: float) -> str:
    """`size(1610612736)` -> `1.5 GiB`"""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} PiB"


def parse_size(text: str | int) -> int:
    """Bytes: `parse_size("5GB")` -> 5000000000, `parse_size("2GiB")` -> 2147483648; a bare number is bytes."""
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    found = SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = {u.upper(): u for u in UNITS}.get(found[2].upper()) if found else None
    num_bytes = int(float(found[1]) * UNITS[unit]) if found and unit is not None else 0
    if num_bytes < 1:
        raise UsageError(f"{text!r} is not a size. Write a number above 0 and a unit: 512MiB, 2GiB (1024), 5GB (1000).")
    return num_bytes


def peak_memory() -> int:
    """Most bytes of memory that this process has held at one time.

    What `getrusage` says begins with what the program held that started this one: it counts the time between fork and exec.
    """
    import resource

    if os.path.exists(STATUS):
        with open(STATUS) as file:
            if found := re.search(r"^VmHWM:\s*(\d+) kB$", file.read(), re.MULTILINE):
                return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@dataclass
class Report:
    """What a job did. `peak_memory` has one number per rank; `guesses` says what was chosen without being told."""

    verb: str
    target: str | None = None
    phases: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_exchanged: int = 0
    peak_memory: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `phases[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": sum(self.phases.values())}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def facts(self) -> list[tuple[str, str]]:
        """The rows of the table: (what, how much)."""
        rows = [(name, f"{seconds:.2f} s") for name, seconds in self.phases.items()]
        rows.append(("all", f"{sum(self.phases.values()):.2f} s"))
        rows += [("read", self._rate(self.bytes_read)), ("written", self._rate(self.bytes_written))]
        if self.bytes_exchanged:
            rows.append(("exchanged", self._rate(self.bytes_exchanged)))
        if self.peak_memory:
            num_ranks = len(self.peak_memory)
            rows.append(("peak memory", f"{size(max(self.peak_memory))} in the largest of {num_ranks} ranks"))
        return rows

    def _rate(self, num_bytes: int) -> str:
        seconds = sum(self.phases.values())
        return size(num_bytes) + (f" ({num_bytes / seconds / 1e9:.2f} GB/s)" if seconds and num_bytes else "")

    def remarks(self) -> list[str]:
        kinds = (("warning", self.warnings), ("guessed", self.guesses), ("note", self.notes))
        return [f"{kind}: {text}" for kind, texts in kinds for text in texts]

    def lines(self, width: int = 100) -> list[str]:
        """The report as text, as `show` prints it."""
        from io import StringIO

        out = StringIO()
        self._draw(out, width)
        return out.getvalue().splitlines()

    def show(self, quiet: bool = False) -> None:
        if not quiet and rank() == 0:
            self._draw(sys.stderr, None)

    def _draw(self, out: TextIO, width: int | None) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console(file=out, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)
        table = Table(title=self.verb, title_justify="left", show_header=False)
        for row in self.facts():
            table.add_row(*row)
        console.print(table)
        for line in self.remarks() + ([f"-> {self.target}"] if self.target else []):
            console.print(visible(line))


class Progress:
    """One bar for all bytes of a job, on rank 0; plain lines when stderr is no terminal. `advance` is thread-safe.

    `with Progress("copy", 3 * 2**30) as p: p.advance(2**20)`
    """

    def __init__(self, what: str, total_bytes: int, quiet: bool = False, out: TextIO | None = None) -> None:
        self.what, self.total, self.done = what, total_bytes, 0
        self.out = out or sys.stderr
        self.live = not quiet and rank() == 0
        self.lock = threading.Lock()
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        self.start = self.said = time.monotonic()
        if self.live and self.out.isatty():
            self.bar = _bar(self.out)
            self.task = self.bar.add_task(self.what, total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            self.bar.stop()

    def advance(self, num_bytes: int) -> None:
        with self.lock:
            self.done += num_bytes
            now = time.monotonic()
            pause = 0.1 if self.bar is not None else EVERY_S
            if not self.live or now - self.said < pause:
                return
            self.said = now
            if self.bar is not None:
                self.bar.update(self.task, completed=self.done)
            else:
                print(self._line(now - self.start), file=self.out, flush=True)

    def _line(self, seconds: float) -> str:
        """`copy: 1.5 of 3.0 GiB (50%), 1.20 GB/s, 2 s left`"""
        rate = self.done / max(seconds, 1e-9)
        left = max(self.total - self.done, 0) / max(rate, 1.0)
        part = 100 * self.done / max(self.total, 1)
        how_much = f"{size(self.done)} of {size(self.total)} ({part:.0f}%)"
        return f"{self.what}: {how_much}, {rate / 1e9:.2f} GB/s, {left:.0f} s left"


def _bar(out: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(file=out))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> list[str]:
    """A plain text table, for results on stdout: columns are as wide as their longest cell, or WIDEST."""
    cells = [[visible(str(c)).replace("\n", "\\n") for c in row] for row in (header, *rows)]
    widths = [min(max(len(row[i]) for row in cells), WIDEST) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [line[:width] for line in lines]


def show_result(result: Mapping[str, Any], as_json: bool) -> None:
    """A verb's result on stdout, from rank 0: JSON, or the lines under `text` if the verb made any."""
    if rank() != 0:
        return
    if as_json:
        print(
            json.dumps({k: v for k, v in result.items() if k != "text"}, indent=2, default=str)
        )  # ASCII: for any terminal
    elif result.get("text"):
        text = result["text"]
        print(visible(text if isinstance(text, str) else "\n".join(text)))
