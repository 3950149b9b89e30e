"""Another tool, measured: `[torchrun ...] benchmarks/peers.py NAME SOURCE... TARGET`; prints seconds and memory as JSON.

Each function imports what its tool needs and gives back the call to measure. Where a tool has settings (threads, files),
they are what its own documentation or launcher uses.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measure import clear, timed, together

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


def safetensors_to_dcp(source: str, target: str) -> Callable[[], object]:
    """What one writes to start training from a Hugging Face model: all tensors into memory, then dcp.save."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    def work() -> None:
        state = {}
        for path in sorted(Path(source).glob("*.safetensors")):
            state |= load_file(path)
        dcp.save({"model": state}, checkpoint_id=target, no_dist=True)

    return work


def dcp_reshard(source: str, target: str) -> Callable[[], object]:
    """FSDP's shards into tensor-parallel ones: every rank loads its new part, and all save."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, zeros

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def empty(name: str, of: Any) -> DTensor:
        dim = 1 if "o_proj" in name or "down_proj" in name else 0
        place = Shard(dim) if len(of.size) > 1 else Replicate()
        return zeros(of.size, dtype=of.properties.dtype, device_mesh=mesh, placements=[place])

    def work() -> None:
        metadata = dcp.FileSystemReader(source).read_metadata()
        state = {name: empty(name, of) for name, of in metadata.state_dict_metadata.items()}
        dcp.load(state, checkpoint_id=source)
        dcp.save(state, checkpoint_id=target)

    return work


def torchtitan(source: str, target: str) -> Callable[[], object]:
    """As torchtitan's convert_to_hf does it: load everything, save with torch's writer, and let it consolidate."""
    import torch
    import torch.distributed.checkpoint as dcp

    def work() -> None:
        metadata = dcp.FileSystemReader(source).read_metadata()
        tensors = metadata.state_dict_metadata.items()
        state = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in tensors}
        dcp.load(state, checkpoint_id=source, no_dist=True)
        state = {name.removeprefix("model."): value for name, value in state.items()}
        writer = dcp.HuggingFaceStorageWriter(
            path=target,
            save_distributed=True,
            fqn_to_index_mapping=dict.fromkeys(state, 1),
            enable_consolidation=True,
            thread_count_consolidation=5,
        )
        dcp.save(state, storage_writer=writer, no_dist=True)

    return work


def hf_consolidation(source: str, target: str) -> Callable[[], object]:
    """torch's script that makes one file of the shards its own writer leaves."""
    from safetensors import safe_open
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    def work() -> None:
        os.mkdir(target)
        names: set[str] = set()
        for path in Path(source).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names |= set(file.keys())
        consolidate_safetensors_files(source, target, dict.fromkeys(names, 1), num_threads=os.cpu_count() or 1)

    return work


def fsdp_ranks(source: str, target: str) -> Callable[[], object]:
    """As the merging scripts of training repositories do it: load the pickles of all ranks, join, save."""
    import torch
    import torch.distributed.tensor
    from safetensors.torch import save_file

    def work() -> None:
        count = len(list(Path(source).glob("model_world_size_*_rank_*.pt")))
        files = [Path(source) / f"model_world_size_{count}_rank_{r}.pt" for r in range(count)]
        ranks = [torch.load(f, map_location="cpu", weights_only=False) for f in files]
        whole = {}
        for name, first in ranks[0].items():
            place = first.placements[0]
            parts = [rank.pop(name)._local_tensor for rank in ranks[1:]]
            whole[name] = torch.cat([first._local_tensor, *parts], dim=place.dim) if place.is_shard() else parts[0]
        os.mkdir(target)
        save_file(whole, f"{target}/model.safetensors", {"format": "pt"})

    return work


def naive_mean(*paths: str) -> Callable[[], object]:
    """The loop that everyone has written once: a running sum in fp32 over files loaded one after the other."""
    import torch

    def work() -> None:
        total: dict[str, torch.Tensor] = {}
        for path in paths[:-1]:
            for name, value in torch.load(path, map_location="cpu", weights_only=True)["model"].items():
                total[name] = value.float() if name not in total else total[name] + value.float()
        mean = {name: (value / (len(paths) - 1)).bfloat16() for name, value in total.items()}
        torch.save({"model": mean}, paths[-1])

    return work


def plain_mean(*paths: str) -> Callable[[], object]:
    """The floor of a mean: two threads that read, average as we do, and write the bytes of files of one layout, and know
    nothing of checkpoints (the header comes out as numbers too)."""
    import threading

    import numpy as np
    import torch

    from ckpt_dist.averages.tensors import mean

    torch.set_num_threads(1)  # as in a job
    names = [n for n in os.listdir(paths[0]) if n.endswith(".safetensors")]
    piece, count = 1 << 20, len(paths) - 1

    def part(name: str, first: int, last: int) -> None:
        files = [os.open(f"{folder}/{name}", os.O_RDONLY) for folder in paths[:-1]]
        out, buffers = os.open(f"{paths[-1]}/{name}", os.O_RDWR), np.empty((count, piece // 2), np.uint16)
        for at in range(first, last, piece):
            values = [buffer[: min(piece, last - at) // 2] for buffer in buffers]
            for file, value in zip(files, values, strict=True):
                os.preadv(file, [memoryview(value).cast("B")], at)
            rounded = memoryview(mean(values, ["bfloat16"] * count, [1 / count] * count, "bfloat16")).cast("B")
            for k in range(0, len(rounded), 2 * BUFFER):
                os.pwrite(out, rounded[k : k + 2 * BUFFER], at + k)

    def work() -> None:
        os.mkdir(paths[-1])
        for name in names:
            size = os.path.getsize(f"{paths[0]}/{name}")
            with open(f"{paths[-1]}/{name}", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            half = size // 2 // piece * piece
            threads = [threading.Thread(target=part, args=(name, *ends)) for ends in ((0, half), (half, size))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    return work


def megatron_core(source: str, target: str) -> Callable[[], object]:
    """megatron-core's own loading and saving of a distributed checkpoint, whole tensors on one rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    folder = next(p.parent for p in Path(source).rglob(".metadata"))
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29377", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if not torch.cuda.is_available():  # it takes one for granted
        from tests.real.megatron_core import on_cpu

        on_cpu()

    def work() -> None:
        state = dist_checkpointing.load_plain_tensors(str(folder))
        os.mkdir(target)
        tensors = {k: ShardedTensor.from_rank_offsets(k, v) for k, v in state.items() if isinstance(v, torch.Tensor)}
        dist_checkpointing.save({**state, **tensors}, target)

    return work


PEERS = (
    dcp_to_torch_save, accelerate, mergekit, torch_plan, mover, safetensors_to_dcp, dcp_reshard, torchtitan,
    hf_consolidation, fsdp_ranks, naive_mean, plain_mean, megatron_core,
)  # fmt: skip


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    work = {f.__name__: f for f in PEERS}[sys.argv[1]](*sys.argv[2:])
    if rank == 0:
        clear(Path(sys.argv[-1]))
    if "WORLD_SIZE" in os.environ:
        dist.barrier()
    mine = timed(work)
    said = together(mine) if "WORLD_SIZE" in os.environ else mine
    if rank == 0:
        print(json.dumps(said), flush=True)
    os._exit(0)  # what a peer leaves running may bring its process down at the end, after its work


if __name__ == "__main__":
    main()
