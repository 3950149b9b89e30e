"""Another tool, measured: `PYTHON benchmarks/peers.py NAME SOURCE... TARGET`; prints seconds and memory as JSON.

Each function imports what its tool needs and gives back the call to measure.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measure import clear, timed

BUFFER = 64 << 10  # stays in the cache of a core; pieces of 1 MiB take up to four times as long


def dcp_to_torch_save(source: str, target: str) -> Callable[[], object]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    return lambda: dcp_to_torch_save(source, target)


def accelerate(source: str, target: str) -> Callable[[], object]:
    from accelerate.utils import merge_fsdp_weights

    return lambda: merge_fsdp_weights(source, target)


def mergekit(*paths: str) -> Callable[[], object]:
    """The linear merge with equal weights, summed in fp32."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": path, "parameters": {"weight": 1.0}} for path in paths[:-1]]
    recipe = {"models": models, "merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16"}
    config = MergeConfiguration.model_validate(recipe)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    return lambda: run_merge(config, paths[-1], options)


def torch_plan(source: str, target: str) -> Callable[[], object]:
    """What `dcp.load` does before its first byte, on one rank: read the metadata, plan the reading of all of it."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import create_default_local_load_plan

    def work() -> None:
        metadata = FileSystemReader(source).read_metadata()
        state = {name: torch.empty(t.size, device="meta") for name, t in metadata.state_dict_metadata.items()}
        create_default_local_load_plan(state, metadata)

    return work


def mover(source: str, target: str) -> Callable[[], object]:
    """The floor: two processes that read and write all bytes, a buffer at a time, and do nothing else."""
    import multiprocessing

    def work() -> None:
        os.mkdir(target)
        halves = []
        for name in os.listdir(source):
            size = os.path.getsize(f"{source}/{name}")
            with open(f"{target}/{name}", "wb") as file:
                file.truncate(size)
            half = size // 2 // BUFFER * BUFFER
            halves += [(f"{source}/{name}", f"{target}/{name}", *part) for part in ((0, half), (half, size))]
        with multiprocessing.Pool(2) as pool:
            pool.map(move, halves, 1)

    return work


def move(part: tuple[str, str, int, int]) -> None:
    source, target, first, last = part
    a, b, buffer = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR), memoryview(bytearray(BUFFER))
    for at in range(first, last, BUFFER):
        piece = buffer[: min(BUFFER, last - at)]
        os.preadv(a, [piece], at)
        os.pwrite(b, piece, at)


if __name__ == "__main__":
    known = {f.__name__: f for f in (dcp_to_torch_save, accelerate, mergekit, torch_plan, mover)}
    work = known[sys.argv[1]](*sys.argv[2:])
    clear(Path(sys.argv[-1]))
    print(json.dumps(timed(work)))
