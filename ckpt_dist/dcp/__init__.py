"""Any format, for a running program's own `torch.distributed.checkpoint.load` and `save`: no conversion on disk."""

from __future__ import annotations

from ckpt_dist.dcp.loading import Reader, reader

__all__ = ["Reader", "reader"]
