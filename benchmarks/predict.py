"""How well a plan foretells the seconds of its run: `python -m benchmarks.predict [--work DIR] [--rounds N] [--set KEY=VALUE]`.

For each job: `dry_run=true engine.calibrate=true`, then the job itself; a first such pair warms up and does not count.
The sources are in the page cache, and a fresh copy of the model is deleted before each, as in `bench.py`. Pairs of one
case follow each other: what a virtual machine's host has taken back of its memory makes the next few jobs slower.
Prints the medians of what was predicted and measured (the report's own seconds, from the first scan to the publish),
their ratio, and the spread. A pair counts only if other processes used less than a tenth of the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, clear, process, warm
from ckpt_dist.report import table

JOBS = {  # as they are run by default, which is until everything is on the disk
    "convert to hf": ("convert", "dcp_fsdp", ()),
    "convert to torch": ("convert", "dcp_fsdp", ("target.format=torch",)),
    "convert to fp32": ("convert", "dcp_fsdp", ("target.dtype=fp32",)),
    "convert, verified": ("convert", "dcp_fsdp", ("engine.verify=true",)),
    "mean of 4": ("average", "run", ()),
    "convert, not flushed": ("convert", "dcp_fsdp", ("engine.fsync=false",)),
}
SHAPES = ((1, "direct"), (2, "direct"), (2, "collective"))
BUSY = 0.1  # of the machine, used by others
Pair = tuple[float, float, float]


def used() -> float:
    """CPU seconds of all processes, since the machine was started."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def job(verb: str, num_ranks: int, *words: str) -> tuple[dict[str, Any], float]:
    """Its report, and the part of the machine that others used meanwhile."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks] if num_ranks > 1 else []
    before = used()
    out, _, all_of_it = process([sys.executable, *launcher, ROOT / "benchmarks/ours.py", verb, "quiet=true", *words])
    others = (used() - before - all_of_it.cpu) / all_of_it.wall / (os.cpu_count() or 1)
    return json.loads(out.splitlines()[-1]), others


def wait_for_quiet(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = used()
        time.sleep(2)
        if (used() - before) / 2 / (os.cpu_count() or 1) < BUSY:
            return


def replaced(work: Path, target: Path, copies: int) -> None:
    """As much as the job will write where its target will be, for the job to delete: so each finds memory freshly freed."""
    clear(target)
    target.mkdir()
    for k in range(copies):
        process(["cp", "-r", work / "dcp_fsdp", target / str(k)])


def once(work: Path, name: str, num_ranks: int, transport: str, further: Sequence[str]) -> Pair:
    """(predicted seconds, measured seconds, part of the machine that others used)."""
    verb, source, more = JOBS[name]
    target = work / "predicted"
    words = (f"source.path={work / source}", f"target.path={target}", f"engine.transport={transport}", *more, *further)
    warm([work / source])
    wait_for_quiet(60)
    copies = 2 if "fp32" in name else 1  # twice the bytes of bf16
    replaced(work, target, copies)
    plan, others = job(verb, num_ranks, *words, "dry_run=true", "engine.calibrate=true")
    replaced(work, target, copies)
    run, more_others = job(verb, num_ranks, *words)
    expected = plan["transports"][transport]
    for key in ("bytes_read", "bytes_exchanged", "bytes_written"):
        if expected[key] != run[key]:
            raise SystemExit(f"{name}: the plan has {key}={expected[key]}, the run {run[key]}")
    return expected["seconds"], sum(run["phases"].values()), max(others, more_others)


def row(name: str, num_ranks: int, transport: str, pairs: list[Pair]) -> tuple[object, ...]:
    quiet = [p for p in pairs if p[2] < BUSY]
    if not quiet:
        return name, num_ranks, transport, "", "", "never quiet", "", f"0 of {len(pairs)}"
    predicted, measured = (statistics.median(p[k] for p in quiet) for k in (0, 1))
    low, high = (f(p[1] for p in quiet) for f in (min, max))
    numbers = (f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured:.2f}", f"{low:.2f}-{high:.2f}")
    return name, num_ranks, transport, *numbers, f"{len(quiet)} of {len(pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/work")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", default="*", help="a pattern of names, such as 'convert to *'")
    parser.add_argument("--set", action="append", default=[], help="one more setting of all jobs: engine.fsync=false")
    args = parser.parse_args()
    fixtures = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4, ROOT / "benchmarks/fixtures.py"]
    process([sys.executable, *fixtures, args.work, args.layers])
    found: dict[Any, list[Pair]] = {(n, *s): [] for n in JOBS if fnmatch(n, args.jobs) for s in SHAPES}
    for case, pairs in found.items():
        for k in range(args.rounds + 1):
            pair = once(args.work, *case, args.set)
            pairs += [pair] if k else []
            print(*case, "predicted {:.2f} s, measured {:.2f} s, others {:.2f}".format(*pair), file=sys.stderr)
    clear(args.work / "predicted")
    head = ("job", "ranks", "transport", "predicted s", "measured s", "ratio", "spread", "quiet pairs")
    print("\n".join(table(head, [row(*case, pairs) for case, pairs in found.items()])))


if __name__ == "__main__":
    main()
