"""Programs that the tests start: real training runs and loaders of other tools, each in processes of its own."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """End a torch program that is done, but for taking the interpreter apart. Something in torch (DTensor, FSDP2) keeps
    the process group alive, so a thread of gloo may let go of its last tensor meanwhile, and abort (once in 30 to 60 runs).
    """
    atexit._run_exitfuncs()  # others' processes end here: megatron-core has some
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
