"""Jobs one after the other in the same ranks: `torchrun ... tests/real/reports.py JOBS REPORTS [staged]`.

JOBS is JSON, a list of [verb, {key: value}, nodes, *stopped]; REPORTS becomes the list of what the verbs return, or
{"error": what they say}. `nodes` tells each job that its ranks are on so many machines, `{node}` in a value is the one
that a rank is on; ranks that are `stopped` have got a signal before they begin. `staged`: what ranks exchange takes the way
that it takes with GPUs, through buffers of a device and a group of its own; the device is the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckpt_dist import config, run
from ckpt_dist.cli import leave
from ckpt_dist.engine import wire
from ckpt_dist.errors import STOP, CheckpointError


class Staged(wire.Device):
    carried = 0

    def __init__(self, device: torch.device, backend: str) -> None:
        assert backend == "nccl"
        super().__init__(device, "gloo")

    def carry(self, going: wire.Parcels, coming: wire.Parcels) -> None:
        super().carry(going, coming)
        Staged.carried += sum(len(data) for _, data in going)


def job(verb: str, keys: dict[str, Any]) -> dict[str, Any]:
    try:
        done: dict[str, Any] = getattr(run, verb)(config.fill(verb, {"quiet": True, **keys}))
        return done
    except CheckpointError as error:
        return {"error": str(error)}


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if "staged" in sys.argv[3:]:
        wire.gpu, wire.Device = lambda local_rank, local_world: torch.device("cpu"), Staged  # type: ignore[misc,assignment]
    found = []
    for verb, keys, nodes, *stopped in json.loads(Path(sys.argv[1]).read_text()):
        local = world // nodes
        node = str(rank // local)
        os.environ |= {"LOCAL_WORLD_SIZE": str(local), "LOCAL_RANK": str(rank % local), "GROUP_RANK": node}
        if rank in stopped:
            STOP.set()
        found.append(job(verb, {k: v.replace("{node}", node) if type(v) is str else v for k, v in keys.items()}))
        found[-1]["staged"], Staged.carried = Staged.carried, 0
        STOP.clear()
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found, default=str))
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
