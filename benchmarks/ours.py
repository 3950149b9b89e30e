"""One job, measured: `[torchrun ...] benchmarks/ours.py VERB key=value ...`; prints its report as JSON.

Everything is imported and the ranks have met before the old target is deleted and the job starts, so that the job
finds the same freshly freed memory as `cp` does; start and imports are measured apart.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

import ckpt_dist.averages.tensors
import ckpt_dist.run
from benchmarks.bench import clear
from ckpt_dist import config


def main() -> None:
    verb, words = sys.argv[1], sys.argv[2:]
    cfg = config.load(verb, words)
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        import torch.distributed.checkpoint  # what a job that writes DCP needs

        dist.init_process_group("gloo")
    if rank == 0:
        clear(Path(cfg["target"]["path"]))
    if dist.is_initialized():
        dist.barrier()
    report = getattr(ckpt_dist.run, verb)(cfg)
    if rank == 0:
        print(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
