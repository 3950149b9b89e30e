"""Any format, for a running program's own `torch.distributed.checkpoint.load` and `save`: no conversion on disk."""

from __future__ import annotations

from ckpt_dist.dcp.loading import Reader, reader
from ckpt_dist.dcp.saving import Writer, writer

__all__ = ["Reader", "Writer", "reader", "writer"]
