"""One job of ours, measured: `[torchrun ...] benchmarks/ours.py VERB key=value ...`; prints its report as JSON.

It is a process of the command's, where the garbage collector leaves alone what is there before the job (`run.COMMAND`).
Everything is imported and the ranks have met before the old target is deleted and the job starts, so that the job
finds the same freshly freed memory as `cp` does. The clock runs from the call of the verb to its return: it holds all
phases of the report, from the first scan to the publish.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist
import torch.distributed.checkpoint  # noqa: F401  a job that writes DCP needs it

import ckpt_dist.averages.tensors
import ckpt_dist.run
from benchmarks.measure import clear, timed, together
from ckpt_dist import config, family, formats


def main() -> None:
    verb, words = sys.argv[1], sys.argv[2:]
    ckpt_dist.run.COMMAND.set()
    cfg = config.load(verb, words)
    for name in formats.FORMATS:
        formats.load(name)
    for name in family.available():
        family.load(name)
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    if rank == 0:
        clear(Path(cfg["target"]["path"]))
    if dist.is_initialized():
        dist.barrier()
    report: dict[str, Any] = {}
    mine = timed(lambda: report.update(getattr(ckpt_dist.run, verb)(cfg)))
    said = together(mine)
    if rank == 0:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report["phases"].items())
        print(json.dumps({**report, **said, "note": phases}))


if __name__ == "__main__":
    main()
