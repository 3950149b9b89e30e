"""`torchrun ... tests/real/several.py FILE`: the commands listed in a JSON file, one after another on the same ranks.

Rank 0 says `CODES` and the exit code of each, on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from ckpt_dist.cli import leave, main

if __name__ == "__main__":
    dist.init_process_group("gloo")  # once for all jobs
    codes = [main(verb, words) for verb, *words in json.loads(Path(sys.argv[1]).read_text())]
    if os.environ["RANK"] == "0":
        print("CODES", json.dumps(codes), file=sys.stderr)
    dist.destroy_process_group()
    leave(0)
