"""Speed and memory against `cp -r` and against other tools, side by side in one run.

    python benchmarks/bench.py [--work DIR] [--layers 18] [--repeat 5] [--rows PATTERN] [--mergekit PYTHON] [--out FILE]

Commands take turns (A B C A B C ...), the page cache warm.
Ours is measured by its own report: from the first scan to the publish; interpreter start and imports are shown
apart, for the others as well. Every one deletes its old target and flushes the disk just before its clock starts. Medians; ratios to `cp -r` of the same run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "DCP (4 FSDP ranks) -> HF, 1 rank": 1.2, "DCP (4 FSDP ranks) -> HF, 2 ranks": 0.9, "DCP (TP) -> HF, 1 rank": 1.5, "DCP (TP) -> HF, 2 ranks": 1.125,
    "HF -> DCP, 1 rank": 1.0, "HF -> DCP, 2 ranks": 1.0, "mean of 4 -> HF, 1 rank": 2.0, "mean of 4 -> HF, 2 ranks": 2.0,
}  # fmt: skip


@dataclass
class Once:
    """One run: seconds of the work itself, of the whole process, CPU seconds, and the peak memory of its largest process."""

    seconds: float
    wall: float
    cpu: float
    peak: int


Row = Callable[[], Once]


def process(command: list[str], env: dict[str, str] | None = None) -> tuple[str, float, float, int]:
    """(stdout, wall seconds, CPU seconds, peak bytes) of a command and its children."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **(env or {})})
    assert child.stdout and child.stderr
    out, err = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{err[-2000:]}")
    return out, time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def clear(*targets: Path) -> None:
    for target in targets:
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
    os.sync()


def copy(source: Path, target: Path, flush: bool = False) -> Row:
    def once() -> Once:
        clear(target)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        if flush:
            subprocess.run(["sync", "-f", target], check=True)
        seconds = time.perf_counter() - start
        return Once(seconds, seconds, 0, 0)

    return once


def ours(verb: str, num_ranks: int, target: Path, *keys: str, fsync: bool = False) -> Row:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    words = [f"target.path={target}", f"engine.fsync={str(fsync).lower()}", "json=true", "quiet=true", *keys]

    def once() -> Once:
        out, wall, cpu, _ = process([sys.executable, *launcher, "benchmarks/ours.py", verb, *words], {"OMP_NUM_THREADS": "1"})
        report = json.loads(out)
        return Once(report["seconds"], wall, cpu, max(report["peak_memory"]))

    return once


def script(code: str, *targets: Path, python: str = sys.executable) -> Row:
    """Another tool: `code` sets up, then calls `work()`, which is timed."""
    clearing = f"sys.path.insert(0, {str(ROOT)!r}); from benchmarks.bench import clear; from pathlib import Path; clear(*map(Path, {[str(t) for t in targets]!r}))"
    text = f"import json, sys, time\n{code}\n{clearing}\nstart = time.perf_counter(); work(); print(json.dumps(time.perf_counter() - start))"

    def once() -> Once:
        out, wall, cpu, peak = process([python, "-c", text])
        return Once(json.loads(out.splitlines()[-1]), wall, cpu, peak)

    return once


MOVER = """
import multiprocessing, os
def part(args):
    source, target, first, last = args
    a, b, buffer = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR), bytearray(1 << 20)
    for at in range(first, last, 1 << 20):
        n = os.preadv(a, [memoryview(buffer)[: min(1 << 20, last - at)]], at)
        os.pwrite(b, memoryview(buffer)[:n], at)
def work():
    jobs = []
    os.mkdir({target!r})
    for name in os.listdir({source!r}):
        size, out = os.path.getsize(os.path.join({source!r}, name)), os.path.join({target!r}, name)
        with open(out, "wb") as file:
            file.truncate(size)
        jobs += [(os.path.join({source!r}, name), out, 0, size // 2), (os.path.join({source!r}, name), out, size // 2, size)]
    with multiprocessing.Pool(2) as pool:
        pool.map(part, jobs, 1)
"""


def rows(work: Path, mergekit: str | None) -> dict[str, Row]:
    out = work / "out"
    fsdp, tp, hf = f"source.path={work / 'dcp_fsdp'}", f"source.path={work / 'dcp_tp'}", f"source.path={work / 'hf'}"
    found: dict[str, Row] = {"cp -r": copy(work / "hf", out), "cp -r, flushed": copy(work / "hf", out, flush=True)}
    found["two-process byte mover"] = script(MOVER.format(source=str(work / "hf"), target=str(out)), out)
    for n in (1, 2):
        ranks = f"{n} rank{'s' * (n > 1)}"
        found |= {
            f"DCP (4 FSDP ranks) -> HF, {ranks}": ours("convert", n, out, fsdp),
            f"DCP (4 FSDP ranks) -> HF, {ranks}, flushed": ours("convert", n, out, fsdp, fsync=True),
            f"DCP (TP) -> HF, {ranks}": ours("convert", n, out, tp),
            f"HF -> DCP, {ranks}": ours("convert", n, out, hf, "target.format=dcp"),
            f"mean of 4 -> HF, {ranks}": ours("average", n, out, f"source.path={work / 'run'}"),
        }
    merged = work / "merged.pt"
    found["torch dcp_to_torch_save"] = script(
        "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as f\n"
        f"def work(): f({str(work / 'dcp_fsdp')!r}, {str(merged)!r})", merged,
    )  # fmt: skip
    found["accelerate merge_fsdp_weights"] = script(
        f"from accelerate.utils import merge_fsdp_weights as f\ndef work(): f({str(work / 'dcp_fsdp')!r}, {str(out)!r})", out
    )
    if mergekit:
        found["mergekit linear, mean of 4"] = script(
            "import torch, yaml\nfrom mergekit.config import MergeConfiguration\nfrom mergekit.merge import run_merge\nfrom mergekit.options import MergeOptions\n"
            f"models = [dict(model=f'{work}/hf_{{k}}', parameters=dict(weight=1.0)) for k in (1, 2, 3, 4)]\n"
            "config = MergeConfiguration.model_validate(dict(models=models, merge_method='linear', dtype='float32', out_dtype='bfloat16'))\n"
            f"def work(): run_merge(config, {str(out)!r}, MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))", out, python=mergekit,
        )  # fmt: skip
    return found


def prepare(work: Path, layers: int, mergekit: str | None) -> None:
    """The fixtures, made once for a work folder and a number of layers."""
    stamp = work / f"made-{layers}"
    if not stamp.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        process([sys.executable, *launcher, "benchmarks/fixtures.py", str(work), str(layers)], {"OMP_NUM_THREADS": "1"})
        process([sys.executable, "jobs/convert.py", f"source.path={work / 'dcp_fsdp'}", f"target.path={work / 'hf'}", "quiet=true"])
        stamp.touch()
    for k in (1, 2, 3, 4):
        if mergekit and not (work / f"hf_{k}").exists():
            process([sys.executable, "jobs/convert.py", f"source.path={work / 'run' / f'step-{k}'}", f"target.path={work / f'hf_{k}'}", "quiet=true"])


def measure(chosen: dict[str, Row], repeat: int) -> dict[str, list[Once]]:
    times: dict[str, list[Once]] = {name: [] for name in chosen}
    for turn in range(repeat + 1):
        for name, once in chosen.items():
            got = once()
            print(f"{'warm-up' if turn == 0 else turn} {name}: {got.seconds:.2f} s", file=sys.stderr, flush=True)
            if turn:
                times[name].append(got)
    return times


def table(times: dict[str, list[Once]]) -> list[str]:
    middle = {n: statistics.median(o.seconds for o in runs) for n, runs in times.items()}
    base, flushed = middle.get("cp -r"), middle.get("cp -r, flushed")
    lines = ["| what | median s | min .. max | ratio to `cp -r` | limit | start and imports, s | CPU s | peak MiB |", "|---|---|---|---|---|---|---|---|"]
    for name, runs in times.items():
        seconds, reference = [o.seconds for o in runs], flushed if "flushed" in name else base
        ratio = f"{middle[name] / reference:.2f}" if reference else ""
        limit = f"{LIMITS[name]:g}" if name in LIMITS else ""
        apart = statistics.median(o.wall - o.seconds for o in runs)
        cpu, peak = statistics.median(o.cpu for o in runs), statistics.median(o.peak for o in runs)
        lines.append(
            f"| {name} | {middle[name]:.2f} | {min(seconds):.2f} .. {max(seconds):.2f} | {ratio} | {limit} | {apart:.1f} | {cpu:.1f} | {peak / 2**20:.0f} |"
        )
    return lines


def machine(work: Path, layers: int) -> str:
    import torch

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    size = sum(p.stat().st_size for p in (work / "hf").iterdir())
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} x {cpu}, Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}; {size / 1e9:.2f} GB, {layers} layers, bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/work")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", default="*")
    parser.add_argument("--mergekit", help="a Python that has mergekit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    prepare(work, args.layers, args.mergekit)
    chosen = {n: r for n, r in rows(work, args.mergekit).items() if any(fnmatch.fnmatch(n, p) for p in args.rows.split(";")) or n.startswith("cp")}
    lines = [machine(work, args.layers), "", *table(measure(chosen, args.repeat))]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
