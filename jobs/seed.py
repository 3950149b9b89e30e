"""Make a checkpoint of first values from a config; --help lists the keys.

torchrun --nproc-per-node 2 jobs/seed.py model.config=config.json target.path=model seed=7
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if sys.path and os.path.abspath(sys.path[0]) == HERE:
    del sys.path[0]  # Python puts a script's folder first; inspect.py in it would hide the standard library's
if os.path.isdir(os.path.join(ROOT, "ckpt_dist")):
    sys.path.insert(0, ROOT)  # a checkout runs its own code, whatever else is installed

from ckpt_dist.cli import leave, main  # noqa: E402

if __name__ == "__main__":
    leave(main("seed", sys.argv[1:]))
