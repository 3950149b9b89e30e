"""How one run is measured: the old target deleted, the disk flushed, the sources in the page cache; then the clock.

Start and imports are outside of `seconds` and `cpu`, for us as for the others. Only the standard library is used, so
that this file runs in any tool's environment.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRON = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}  # an installed package has its bytecode


@dataclass(frozen=True)
class Once:
    """One run. `seconds` and `cpu` (of all processes) of the work, `wall` of everything, `peak` bytes of the largest
    process, `growth` by how much that peak is above what the process had after its imports. `read` and `written` are the
    bytes that its calls have moved, from and to anything but memory maps, also where the page cache had them."""

    seconds: float
    wall: float
    cpu: float
    peak: int
    growth: int = 0
    note: str = ""
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Row:
    """A line of the table: what is run, and which files are brought into the page cache before."""

    name: str
    run: Callable[[], Once]
    sources: tuple[Path, ...] = ()


def clear(*targets: Path) -> None:
    """Delete what an earlier run left, and leave the disk nothing to do."""
    for target in targets:
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
    os.sync()


def warm(sources: Iterable[Path]) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(4 << 20)
    for source in sources:
        for path in source.rglob("*") if source.is_dir() else [source]:
            if path.is_file():
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def timed(work: Callable[[], object]) -> dict[str, Any]:
    """Seconds, CPU seconds and growth of memory of one call."""
    before, moved, cpu, start = resident(), io(), cpu_seconds(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    read, written = (b - a for a, b in zip(moved, io(), strict=True))
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "growth": peak - before, "read": read, "written": written}


def io(pid: int | str = "self") -> tuple[int, int]:
    """(bytes read, bytes written) so far by a process and its threads, without its children."""
    with open(f"/proc/{pid}/io") as file:
        counts = dict(line.split(": ") for line in file.read().splitlines())
    return int(counts["rchar"]), int(counts["wchar"])


def resident() -> int:
    """Bytes of memory this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def process(command: list[object]) -> tuple[str, str, Once]:
    """(stdout, stderr, measures) of a command and its children; `seconds` is its whole life."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        child = subprocess.Popen(words, stdout=out, stderr=err, cwd=ROOT, env={**os.environ, **ENVIRON})
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - start
        moved = io(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        texts = out.read(), err.read()
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{texts[1][-3000:]}")
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return *texts, Once(seconds, seconds, cpu, peak, read=moved[0], written=moved[1])


def reported(command: list[object]) -> Once:
    """A process that measures its own work with `timed` and prints that as its last line."""
    out, _, whole = process(command)
    said = json.loads(out.splitlines()[-1])
    peak = said["peak"] if "ranks" in said else max(whole.peak, said["peak"])
    moved = said["read"], said["written"]
    return Once(said["seconds"], whole.wall, said["cpu"], peak, said["growth"], said.get("note", ""), *moved)


def copy(source: Path, target: Path, flush: bool = False) -> Callable[[], Once]:
    """`cp -r`, and if asked until the disk has the copy."""

    def run() -> Once:
        clear(target)
        cp = process(["cp", "-r", source, target])[2]
        flushed = process(["sync", "-f", target])[2].seconds if flush else 0.0
        seconds = cp.seconds + flushed
        return Once(seconds, seconds, cp.cpu, cp.peak, read=cp.read, written=cp.written)

    return run


def ours(verb: str, num_ranks: int, *keys: str) -> Callable[[], Once]:
    """One of our jobs, on some torchrun ranks."""
    words = [ROOT / "benchmarks/ours.py", verb, "quiet=true", *keys]
    return lambda: reported([sys.executable, *launcher(num_ranks), *words])


def peer(name: str, *paths: Path, python: str = sys.executable, num_ranks: int = 1) -> Callable[[], Once]:
    """Another tool, of those in peers.py; the last path is what it makes."""
    return lambda: reported([python, *launcher(num_ranks), ROOT / "benchmarks/peers.py", name, *paths])


def launcher(num_ranks: int) -> list[object]:
    """What comes before a script that several ranks run."""
    words: list[object] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    return words if num_ranks > 1 else []


def together(mine: dict[str, Any]) -> dict[str, Any]:
    """What all ranks have measured, as one: sums of work, the largest of memory."""
    import torch.distributed as dist

    every: list[Any] = [mine]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        dist.destroy_process_group()
    sums = {k: sum(e[k] for e in every) for k in ("cpu", "read", "written")}
    return {**mine, **sums, **{k: max(e[k] for e in every) for k in ("peak", "growth")}, "ranks": len(every)}


def answer(verb: str, *keys: str) -> Callable[[], Once]:
    """A whole command, from the start of the interpreter to its end, and whether it imported torch."""
    code = f"""import sys
from ckpt_dist.cli import main
code = main({verb!r}, {list(keys)!r})
print("torch imported" if "torch" in sys.modules else "torch not imported", file=sys.stderr)
sys.exit(code)"""

    def run() -> Once:
        _, err, whole = process([sys.executable, "-c", code])
        return Once(whole.seconds, whole.wall, whole.cpu, whole.peak, 0, err.splitlines()[-1])

    return run
