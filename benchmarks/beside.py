"""Tasks that other tools do as well: our rows and theirs, in turns, and what we promise beside them.

Invariant: every task makes the same tensors from the same source, whoever does it, and is measured warm.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Once, Row, copy, ours, peer

NEVER_SLOWER, THAN_MEDIAN, BY_TWO_RANKS, COLLECTIVE, FLAT = 1.0, 4.0, 1.5, 1.5, 1.1


@dataclass(frozen=True)
class Task:
    """A task, its sources, what is asked of us, and who else does it: (label, peer of peers.py, ranks, its python)."""

    name: str
    sources: tuple[Path, ...]
    verb: str
    keys: tuple[str, ...]
    others: tuple[tuple[str, str, int, str | None], ...]

    def rows(self, work: Path) -> list[Row]:
        target = work / "out"  # where each row finds, and deletes, as much as it will write: see bench.measure
        keys = (f"target.path={target}", "engine.fsync=false", *self.keys)
        found = [Row(f"cp -r {self.name}", copy(self.sources[0], target), self.sources)]
        for label, ranks, more in WAYS:
            found.append(Row(f"{self.name}: ours, {label}", ours(self.verb, ranks, *keys, *more), self.sources))
        for label, name, ranks, python in self.others:
            options = {"python": python} if python else {}
            run = peer(name, *self.sources, target, num_ranks=ranks, **options)
            found.append(Row(f"{self.name}: {label}", run, self.sources))
        return found


WAYS = (
    ("1 rank", 1, ()),
    ("1 rank of 1 thread", 1, ("engine.workers=1",)),
    ("2 ranks", 2, ()),  # of one thread each, on 2 cores
    ("2 ranks collective", 2, ("engine.transport=collective",)),
)


def tasks(work: Path, megatron: str | None) -> list[Task]:
    fsdp, hf, shards, ranks = (work / n for n in ("dcp_fsdp", "hf", "hf_sharded", "ranks"))
    files = (work / "mean_1.pt", work / "mean_2.pt")
    core = (("megatron-core", "megatron_core", 1, megatron),) if megatron else ()
    hf_tools = (
        ("accelerate merge_fsdp_weights", "accelerate", 1, None),
        ("torchtitan convert_to_hf", "torchtitan", 1, None),
    )
    return [
        Task("DCP to HF", (fsdp,), "convert", (f"source.path={fsdp}",), hf_tools),
        Task("DCP to torch", (fsdp,), "convert", (f"source.path={fsdp}", "target.format=torch"),
             (("torch dcp_to_torch_save", "dcp_to_torch_save", 1, None),)),
        Task("HF to DCP", (hf,), "convert", (f"source.path={hf}", "target.format=dcp"),
             (("safetensors load + dcp.save", "safetensors_to_dcp", 1, None),)),
        Task("DCP resharded", (fsdp,), "convert", (f"source.path={fsdp}", "target.format=dcp"),
             (("dcp.load + dcp.save, 2 ranks", "dcp_reshard", 2, None),)),
        Task("HF shards to HF", (shards,), "convert", (f"source.path={shards}",),
             (("torch consolidate_safetensors_files", "hf_consolidation", 1, None),)),
        Task("FSDP pickles to HF", (ranks,), "convert", (f"source.path={ranks}",),
             (("per-rank merging script", "fsdp_ranks", 1, None),)),
        Task("mean of 2 torch files", files, "average",
             (f"source.path=[{files[0]},{files[1]}]", "target.format=torch", f"model.config={hf}"),
             (("torch.load, sum, torch.save", "naive_mean", 1, None),)),
        *([Task("torch_dist to torch_dist", (work / "torch_dist",), "convert",
                (f"source.path={work / 'torch_dist'}", "target.format=torch_dist", f"model.config={hf}"), core)] if core else []),
    ]  # fmt: skip


def tenfold(work: Path) -> list[Row]:
    """The same job on a model and on one with a tenth of its bytes; memory is what is looked at."""
    rows = []
    for name in ("dcp_tenth", "dcp_fsdp"):
        for label, ranks, more in WAYS:
            keys = (f"source.path={work / name}", f"target.path={work / 'out'}", "engine.fsync=false", *more)
            rows.append(Row(f"{name} to HF: {label}", ours("convert", ranks, *keys), (work / name,)))
    return rows


# ---- what is promised


def promises(times: Mapping[str, Sequence[Once]], asked: Sequence[Task]) -> list[str]:
    """Lines of a table; a task that was not run has none."""
    lines = []

    def promise(claim: str, value: float, bound: float, least: bool) -> None:
        good = value >= bound if least else value <= bound
        lines.append(
            f"| {claim} | {value:.2f} | {'>=' if least else '<='} {bound} | {'pass' if good else '**FAIL**'} |"
        )

    def seconds(row: str) -> float:
        return statistics.median(run.seconds for run in times[row])

    for task in asked:
        one, single, two, exchanged = (f"{task.name}: ours, {label}" for label, *_ in WAYS)
        others = [f"{task.name}: {label}" for label, *_ in task.others]
        if not all(row in times for row in (one, single, two, exchanged, *others)):
            continue
        us = min(seconds(one), seconds(two))
        promise(f"{task.name}: best peer / ours", min(map(seconds, others)) / us, NEVER_SLOWER, True)
        promise(f"{task.name}: median peer / ours", statistics.median(map(seconds, others)) / us, THAN_MEDIAN, True)
        promise(f"{task.name}: 1 rank / 2 ranks", seconds(one) / seconds(two), BY_TWO_RANKS, True)
        promise(f"{task.name}: 1 rank / 2 ranks, 1 thread each", seconds(single) / seconds(two), BY_TWO_RANKS, True)
        promise(f"{task.name}: collective / direct, 2 ranks", seconds(exchanged) / seconds(two), COLLECTIVE, False)
    for label, *_ in WAYS:
        small, large = (times.get(f"{name} to HF: {label}", ()) for name in ("dcp_tenth", "dcp_fsdp"))
        if small and large:
            peaks = [statistics.median(run.peak for run in runs) for runs in (large, small)]
            promise(f"peak memory of ten times the model / of one, {label}", peaks[0] / peaks[1], FLAT, False)
    return lines
