"""Speed and memory against `cp -r` and against other tools, side by side in one run.

    python benchmarks/bench.py [--work DIR] [--scale small] [--repeat 5] [--rows PATTERN,...] [--mergekit PYTHON] [--out FILE]

The rows of a group take turns (A B C, B C A, ...), after one round to warm up; before each run its sources are read into
the page cache, its old target is deleted and the disk is flushed. The tables hold medians; README.md says what they mean.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import beside
from benchmarks.measure import ROOT, Once, Row, answer, copy, ours, peer, process, warm

LAYERS = {"small": 2, "full": 18}
MIB = 1 << 20
RANKS = {1: "1 rank", 2: "2 ranks"}


@dataclass(frozen=True)
class Limit:
    """`what` of row `of`, divided by that of `by` if there is one, against a bound. `least`: not below it; else not above."""

    what: str
    of: str
    by: str | None
    bound: float
    least: bool = False


def median(runs: Sequence[Once], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


# ---- what is measured


def groups(work: Path, mergekit: str | None, core: str | None) -> dict[str, list[Row]]:
    """Rows that take turns. The sources of one group fit into the page cache together."""
    return {f"beside: {task.name}": task.rows(work) for task in beside.tasks(work, core)} | {
        "tenfold": beside.tenfold(work),
        "convert": conversions(work),
        "average": averages(work, mergekit),
        "megatron": megatron(work),
        "answer": answers(work),
        "memory": memory(work),
    }


def conversions(work: Path) -> list[Row]:
    fsdp, tp, hf, out = work / "dcp_fsdp", work / "dcp_tp", work / "hf", work / "out"
    rows = [
        Row("cp -r hf", copy(hf, out), (hf,)),
        Row("cp -r hf, flushed", copy(hf, out, flush=True), (hf,)),
        Row("cp -r dcp_fsdp", copy(fsdp, out), (fsdp,)),
        Row("two-process byte mover", peer("mover", hf, out), (hf,)),
    ]
    for n, ranks in RANKS.items():
        to_hf, to_dcp = f"target.path={out}", f"target.path={out} target.format=dcp"
        for name, source, keys in (
            ("DCP (FSDP) -> HF", fsdp, to_hf),
            ("DCP (FSDP) -> HF in 4 files", fsdp, f"{to_hf} target.max_shard_size=500MB"),
            ("DCP (TP) -> HF", tp, to_hf),
            ("HF -> DCP", hf, to_dcp),
        ):
            words = [f"source.path={source}", *keys.split()]
            rows.append(Row(f"{name}, {ranks}", ours("convert", n, "engine.fsync=false", *words), (source,)))
            if source != tp:
                rows.append(Row(f"{name}, {ranks}, flushed", ours("convert", n, *words), (source,)))
    rows.append(Row("torch dcp_to_torch_save", peer("dcp_to_torch_save", fsdp, out), (fsdp,)))
    rows.append(Row("accelerate merge_fsdp_weights", peer("accelerate", fsdp, out), (fsdp,)))
    return rows


def averages(work: Path, mergekit: str | None) -> list[Row]:
    """Of DCP checkpoints against `cp -r` of the result, then of the same values as HF models against mergekit."""
    out, run, models = work / "out", work / "run", tuple(work / f"hf_{k}" for k in (1, 2, 3, 4))
    paths = ",".join(map(str, models))
    rows = [Row("cp -r result", copy(models[0], out), models[:1])]
    rows.append(Row("cp -r result, flushed", copy(models[0], out, flush=True), models[:1]))
    for n, ranks in RANKS.items():
        keys = [f"source.path={run}", f"target.path={out}"]
        rows.append(Row(f"mean of 4 DCP -> HF, {ranks}", ours("average", n, "engine.fsync=false", *keys), (run,)))
        rows.append(Row(f"mean of 4 DCP -> HF, {ranks}, flushed", ours("average", n, *keys), (run,)))
    keys = [f"source.path=[{paths}]", f"target.path={out}", "engine.fsync=false"]
    for n, ranks in RANKS.items():
        rows.append(Row(f"mean of 4 HF -> HF, {ranks}", ours("average", n, *keys), models))
    rows.append(Row("mean of 4 HF -> HF, 1 rank of 1 thread", ours("average", 1, *keys, "engine.workers=1"), models))
    rows.append(Row("two-thread floor, 4 HF -> HF", peer("plain_mean", *models, out), models))
    if mergekit:
        rows.append(Row("mergekit linear, 4 HF -> HF", peer("mergekit", *models, out, python=mergekit), models))
    return rows


def megatron(work: Path) -> list[Row]:
    """Between Megatron's layouts, and from them to HF."""
    ranks_of, dist, out = work / "mp_tp4pp2", work / "torch_dist", work / "out"
    rows = [Row("cp -r hf", copy(work / "hf", out), (work / "hf",))]
    stages = "target.partition=5,5,4,4"
    for n, ranks in RANKS.items():
        for name, source, keys in (
            ("TP4 PP2 -> TP2 PP4", ranks_of, f"target.format=megatron target.tp=2 target.pp=4 {stages}"),
            ("TP4 PP2 -> HF", ranks_of, ""),
            ("torch_dist -> HF", dist, ""),
        ):
            words = [f"source.path={source}", f"target.path={out}", "engine.fsync=false", *keys.split()]
            rows.append(Row(f"{name}, {ranks}", ours("convert", n, *words), (source,)))
    return rows


def answers(work: Path) -> list[Row]:
    chunks, fsdp, hf, out = work / "chunks_512k", work / "dcp_fsdp", work / "hf", work / "planned"
    plan = ours("convert", 1, f"source.path={chunks}", f"target.path={out}", "target.format=torch", "dry_run=true")
    dry = [f"target.path={work / 'dry'}", "dry_run=true", "quiet=true"]
    return [
        Row("open and plan 512,000 chunks", plan, (chunks / ".metadata",)),
        Row("torch: read and plan 512,000 chunks", peer("torch_plan", chunks, out), (chunks / ".metadata",)),
        Row("inspect, DCP", answer("inspect", f"source.path={fsdp}")),
        Row("inspect, HF", answer("inspect", f"source.path={hf}")),
        Row("dry_run, DCP -> HF", answer("convert", f"source.path={fsdp}", *dry)),
        Row("dry_run, HF -> DCP", answer("convert", f"source.path={hf}", "target.format=dcp", *dry)),
    ]


def tenth(work: Path) -> int:
    """An engine.memory of which the checkpoint has ten times as much."""
    return sum(p.stat().st_size for p in (work / "hf").iterdir()) // 10


def memory(work: Path) -> list[Row]:
    out, limit = work / "out", f"engine.memory={tenth(work)}"
    eight = [work / f"run/step-{k}" for k in (1, 2, 3, 4)] + [work / n for n in ("dcp_fsdp", "dcp_tp", "hf", "hf_1")]
    paths = ",".join(map(str, eight))
    keys = {
        "DCP (TP) -> HF": ("convert", f"source.path={work / 'dcp_tp'}"),
        "HF -> DCP": ("convert", f"source.path={work / 'hf'}", "target.format=dcp"),
        "mean of 8 -> HF": ("average", f"source.path=[{paths}]"),
    }
    return [
        Row(f"{name} in a tenth, {ranks}", ours(verb, n, limit, "engine.fsync=false", f"target.path={out}", *words))
        for name, (verb, *words) in keys.items()
        for n, ranks in RANKS.items()
    ]


# ---- what is promised


def limits(work: Path) -> list[Limit]:
    found = []
    for n, ranks in RANKS.items():
        fsdp, average = f"DCP (FSDP) -> HF, {ranks}", f"mean of 4 HF -> HF, {ranks}"
        found += [
            Limit("seconds", fsdp, "cp -r hf", 1.2 if n == 1 else 0.9),
            Limit("seconds", f"{fsdp}, flushed", "cp -r hf, flushed", 1.2 if n == 1 else 0.9),
            Limit("seconds", f"DCP (FSDP) -> HF in 4 files, {ranks}", "cp -r hf", 1.2 if n == 1 else 0.9),
            Limit("seconds", f"DCP (TP) -> HF, {ranks}", fsdp, 1.25),
            Limit("seconds", f"HF -> DCP, {ranks}", "cp -r hf", 1.0),
            Limit("seconds", f"HF -> DCP, {ranks}, flushed", "cp -r hf, flushed", 1.0),
            Limit("seconds", f"mean of 4 DCP -> HF, {ranks}", "cp -r result", 2.0),
            Limit("seconds", f"mean of 4 DCP -> HF, {ranks}, flushed", "cp -r result, flushed", 2.0),
        ]
        for tool in ("torch dcp_to_torch_save", "accelerate merge_fsdp_weights"):
            found += [Limit("seconds", tool, fsdp, 4, least=True), Limit("peak", fsdp, tool, 0.5)]
        tool = "mergekit linear, 4 HF -> HF"
        found += [Limit("seconds", tool, average, 3, least=True), Limit("peak", average, tool, 0.5)]
    single, two = (f"mean of 4 HF -> HF, {which}" for which in ("1 rank of 1 thread", RANKS[2]))
    found.append(Limit("seconds", single, two, beside.BY_TWO_RANKS, least=True))
    for name, bound in (("TP4 PP2 -> TP2 PP4", 1.2), ("TP4 PP2 -> HF", 1.3), ("torch_dist -> HF", 1.2)):
        found.append(Limit("seconds", f"{name}, {RANKS[2]}", "cp -r hf", bound))
    found.append(Limit("cpu", "open and plan 512,000 chunks", None, 2.0))
    names = ("inspect, DCP", "inspect, HF", "dry_run, DCP -> HF", "dry_run, HF -> DCP")
    found += [Limit("wall", name, None, 1.0) for name in names]
    above = tenth(work) + 256 * MIB
    found += [Limit("growth", row.name, None, above) for row in memory(work)]
    return found


def verdicts(times: dict[str, list[Once]], promised: Sequence[Limit]) -> list[str]:
    lines = ["| promised | measured | limit | |", "|---|---|---|---|"]
    for limit in promised:
        if limit.of not in times or (limit.by is not None and limit.by not in times):
            continue
        value = median(times[limit.of], limit.what) / (median(times[limit.by], limit.what) if limit.by else 1)
        good = value >= limit.bound if limit.least else value <= limit.bound
        scale, unit = (MIB, " MiB") if limit.what == "growth" else (1, "" if limit.by else " s")
        places = 0 if limit.what == "growth" else 2
        claim = f"{limit.what} of {limit.of}" + (f" / {limit.by}" if limit.by else "")
        bound = f"{'>=' if limit.least else '<='} {limit.bound / scale:.{places}f}{unit}"
        lines.append(f"| {claim} | {value / scale:.{places}f}{unit} | {bound} | {'pass' if good else '**FAIL**'} |")
    return lines


# ---- the run


def prepare(work: Path, layers: int) -> None:
    """The fixtures, each made once for a work folder and a number of layers."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4]
    process([*launcher, ROOT / "benchmarks/fixtures.py", work, layers])
    sources = {"hf": "dcp_fsdp"} | {f"hf_{k}": f"run/step-{k}" for k in (1, 2, 3, 4)}
    megatron = {"mp_tp4pp2": "megatron target.tp=4 target.pp=2", "torch_dist": "torch_dist"}
    keys = {name: f"target.format={text} model.config={work / 'hf'}" for name, text in megatron.items()}
    for k in (1, 2):
        sources[f"mean_{k}.pt"], keys[f"mean_{k}.pt"] = f"run/step-{k}", "target.format=torch"
    for name, source in (sources | dict.fromkeys(megatron, "hf")).items():
        if not (work / name).exists():
            words = [f"source.path={work / source}", f"target.path={work / name}", "quiet=true"]
            words += keys.get(name, "").split()
            process([sys.executable, ROOT / "jobs/convert.py", *words])


def measure(rows: Sequence[Row], work: Path, first: int, last: int) -> dict[str, list[Once]]:
    """All rows in each turn from first to last, each turn in an order of its own; turn 0 is not counted.

    Where a target will be, each row finds a fresh copy of the model and deletes it: the same memory is free for all.
    """
    times: dict[str, list[Once]] = {row.name: [] for row in rows}
    for turn in range(first, last + 1):
        for row in random.Random(turn).sample(rows, len(rows)):
            if row.sources:
                copy(work / "hf", work / "out")()
                warm(row.sources)
            got = row.run()
            print(f"{turn or 'warm-up'} {row.name}: {got.seconds:.2f} s {got.note}", file=sys.stderr, flush=True)
            if turn:
                times[row.name].append(got)
    return times


def table(times: dict[str, list[Once]]) -> list[str]:
    """Medians; ratios to the first row if that is `cp`, or to the flushed one."""
    head = [
        "what",
        "median s",
        "min .. max",
        "/ `cp -r`",
        "start, s",
        "CPU s",
        "peak MiB",
        "above imports",
        "read MB",
        "written MB",
        "of the median run",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    first = next(iter(times))
    for name, runs in times.items():
        seconds = sorted(run.seconds for run in runs)
        by = times.get(f"{first}, flushed" if name.endswith("flushed") else first, []) if first.startswith("cp") else []
        middle = min(runs, key=lambda run: abs(run.seconds - statistics.median(seconds)))
        cells = [
            name,
            f"{statistics.median(seconds):.2f}",
            f"{seconds[0]:.2f} .. {seconds[-1]:.2f}",
            f"{statistics.median(seconds) / median(by, 'seconds'):.2f}" if by else "",
            f"{statistics.median(run.wall - run.seconds for run in runs):.1f}",
            f"{median(runs, 'cpu'):.2f}",
            f"{median(runs, 'peak') / MIB:.0f}",
            f"{median(runs, 'growth') / MIB:.0f}" if middle.growth else "",
            *(f"{median(runs, what) / 1e6:.0f}" for what in ("read", "written")),
            middle.note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def machine(work: Path, layers: int, repeat: int, mergekit: str | None) -> str:
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.processor())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "llvmlite", "accelerate")]
    if mergekit:
        ask = "import importlib.metadata as m; print(m.version('mergekit'))"
        versions.append(f"mergekit {process([mergekit, '-c', ask])[0].strip()}")
    versions.append(subprocess.run(["cp", "--version"], capture_output=True, text=True).stdout.splitlines()[0])
    size = sum(p.stat().st_size for p in (work / "hf").iterdir())
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return (
        f"{time.strftime('%Y-%m-%d')}. {os.cpu_count()} x {cpu}, {ram} GiB, Linux {platform.release()}, Python {platform.python_version()}, "
        f"{', '.join(versions)}. {size / 1e9:.2f} GB in bf16, {layers} layers; medians of {repeat}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks/work", help="where checkpoints are made and kept"
    )
    parser.add_argument("--scale", choices=LAYERS, default="full")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--rows",
        default="*",
        help="patterns of row names, or groups: beside, tenfold, convert, average, megatron, answer, memory",
    )
    parser.add_argument("--core", metavar="PYTHON", help="the Python of an environment that has megatron-core")
    parser.add_argument("--mergekit", metavar="PYTHON", help="the Python of an environment that has mergekit")
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    args = parser.parse_args()
    layers = LAYERS[args.scale]
    work = args.work.resolve() / args.scale
    prepare(work, layers)
    chosen: Callable[[str], bool] = lambda name: any(fnmatch.fnmatch(name, p) for p in args.rows.split(","))  # noqa: E731
    about = machine(work, layers, args.repeat, args.mergekit)
    times: dict[str, list[Once]] = {}
    tables: list[str] = []
    lines: list[str] = []
    for group, rows in groups(work, args.mergekit, args.core).items():
        rows = (
            rows
            if chosen(group) or chosen(group.split(":")[0])
            else [row for row in rows if chosen(row.name.replace(",", "")) or row.name.startswith("cp")]
        )
        if all(row.name.startswith("cp") for row in rows):
            continue
        found = (
            measure(rows, work, 1, 1) if group in ("memory", "tenfold") else measure(rows, work, 0, args.repeat)
        )  # memory hardly varies
        times |= found
        tables += ["", f"## {group}", "", *table(found)]
        promised = [*verdicts(times, limits(work)), *beside.promises(times, beside.tasks(work, args.core))]
        lines = ["# Results", "", about, "", "## limits", "", *promised, *tables]
        if args.out:  # after each group: a run takes its time
            args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
