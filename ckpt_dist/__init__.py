"""Convert, reshard, average, merge, inspect and verify distributed training checkpoints."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["average", "convert", "dcp", "fingerprint", "inspect", "merge", "seed", "verify"]


def __getattr__(name: str) -> object:
    """The verbs, and `dcp` for running programs, are imported when first used: `import ckpt_dist` costs nothing."""
    if name == "dcp":
        from importlib import import_module

        return import_module("ckpt_dist.dcp")
    if name in __all__:
        from ckpt_dist import api

        return getattr(api, name)
    raise AttributeError(f"module 'ckpt_dist' has no attribute {name!r}")
