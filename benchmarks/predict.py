"""How well a plan foretells the seconds of its run: `python -m benchmarks.predict [--work DIR] [--layers N] [--repeat N]`.

For each job: `dry_run=true engine.calibrate=true`, then the job itself, in turns; the sources are in the page cache and
the target is deleted before each. Prints the medians of what was predicted and measured (the report's own seconds, from
the first scan to the publish), their ratio, the spread of what was measured, and how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, clear, process, warm
from ckpt_dist.report import table

KEPT = ("engine.fsync=false",)  # left in the page cache: what a shared disk takes differs by more than what is measured
JOBS = {
    "convert to hf": ("convert", "dcp_fsdp", KEPT),
    "convert to torch": ("convert", "dcp_fsdp", (*KEPT, "target.format=torch")),
    "convert to fp32": ("convert", "dcp_fsdp", (*KEPT, "target.dtype=fp32")),
    "convert, verified": ("convert", "dcp_fsdp", (*KEPT, "engine.verify=true")),
    "mean of 4": ("average", "run", KEPT),
    "convert, flushed": ("convert", "dcp_fsdp", ()),
}
SHAPES = ((1, "direct"), (2, "direct"), (2, "collective"))


def job(verb: str, num_ranks: int, *words: str) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks] if num_ranks > 1 else []
    out = process([sys.executable, *launcher, ROOT / "benchmarks/ours.py", verb, "quiet=true", *words])[0]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def once(work: Path, name: str, num_ranks: int, transport: str) -> tuple[float, float]:
    """(predicted, measured) seconds."""
    verb, source, more = JOBS[name]
    target = work / "predicted"
    words = (f"source.path={work / source}", f"target.path={target}", f"engine.transport={transport}", *more)
    clear(target)
    warm([work / source])
    plan = job(verb, num_ranks, *words, "dry_run=true", "engine.calibrate=true")
    run = job(verb, num_ranks, *words)
    expected = plan["transports"][transport]
    for key in ("bytes_read", "bytes_exchanged", "bytes_written"):
        if expected[key] != run[key]:
            raise SystemExit(f"{name}: the plan has {key}={expected[key]}, the run {run[key]}")
    return expected["seconds"], sum(run["phases"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/work")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--jobs", default="*", help="a pattern of names, such as 'convert to *'")
    args = parser.parse_args()
    fixtures = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4, ROOT / "benchmarks/fixtures.py"]
    process([sys.executable, *fixtures, args.work, args.layers])
    cases = [(name, *shape) for name in JOBS if fnmatch(name, args.jobs) for shape in SHAPES]
    found: dict[Any, list[tuple[float, float]]] = {case: [] for case in cases}
    busy = [os.getloadavg()[0]]
    for _ in range(args.repeat):
        for case in cases:
            found[case].append(once(args.work, *case))
            print(*case, *(f"{s:.2f}" for s in found[case][-1]), file=sys.stderr, flush=True)
            busy.append(os.getloadavg()[0])
    clear(args.work / "predicted")
    rows = []
    for (name, num_ranks, transport), pairs in found.items():
        predicted, measured = (statistics.median(side) for side in zip(*pairs, strict=True))
        low, high = (f(m for _, m in pairs) for f in (min, max))
        ratio = f"{predicted / measured:.2f}"
        rows.append((name, num_ranks, transport, f"{predicted:.2f}", f"{measured:.2f}", ratio, f"{low:.2f}-{high:.2f}"))
    print("\n".join(table(("job", "ranks", "transport", "predicted s", "measured s", "ratio", "spread"), rows)))
    print(f"{os.cpu_count()} cores, load {min(busy):.1f} to {max(busy):.1f}, {args.repeat} rounds")


if __name__ == "__main__":
    main()
