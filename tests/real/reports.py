"""Jobs one after the other in the same ranks: `torchrun ... tests/real/reports.py JOBS REPORTS`.

JOBS is JSON, a list of [verb, {key: value}, nodes]; REPORTS becomes the list of what the verbs return. `nodes` tells each
job that its ranks are on so many machines.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from ckpt_dist import config, run


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for verb, keys, nodes in json.loads(Path(sys.argv[1]).read_text()):
        local = world // nodes
        os.environ |= {"LOCAL_WORLD_SIZE": str(local), "LOCAL_RANK": str(rank % local)}
        found.append(getattr(run, verb)(config.fill(verb, {"quiet": True, **keys})))
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
