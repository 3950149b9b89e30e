"""Convert, reshard, average, merge, inspect and verify distributed training checkpoints."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["average", "convert", "fingerprint", "inspect", "merge", "seed", "verify"]


def __getattr__(name: str) -> object:
    """The verbs are imported when first used, so that `import ckpt_dist` costs nothing."""
    if name in __all__:
        from ckpt_dist import api

        return getattr(api, name)
    raise AttributeError(f"module 'ckpt_dist' has no attribute {name!r}")
