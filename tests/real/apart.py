"""`torchrun ... tests/real/apart.py VERB key=value ...`: a command whose ranks are told that each is a node of its own.

Ranks of one node never exchange what all of them see, so this is how one machine shows what several would do.
"""

from __future__ import annotations

import os
import sys

from ckpt_dist.cli import leave, main

if __name__ == "__main__":
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": os.environ["RANK"]}
    leave(main(sys.argv[1], sys.argv[2:]))
