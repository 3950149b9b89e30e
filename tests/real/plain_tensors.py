"""megatron-core reads all tensors of a distributed checkpoint: argv[1] -> a torch file argv[2]."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist


def main() -> None:
    from megatron.core import dist_checkpointing, parallel_state

    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    found = dist_checkpointing.load_plain_tensors(sys.argv[1])
    torch.save({k: v for k, v in found.items() if isinstance(v, torch.Tensor)}, sys.argv[2])


if __name__ == "__main__":
    main()
