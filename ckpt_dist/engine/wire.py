"""What carries bytes between ranks: gloo from memory to memory, or NCCL by way of the memory of GPUs.

Either carries from and to the memory that its `room` gives. Waves are double-buffered by `exchange`: while one is
carried the next is read and the one before is made, so a wire only has to bring one wave over.

Invariant: every rank makes the same choice and the same calls, also with nothing to send, and bytes arrive as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = "NDArray[np.uint8]"
Parcels: TypeAlias = "Sequence[tuple[int, Bytes]]"  # the other rank, and the memory
TIMEOUT = timedelta(days=7)  # ranks may wait long for a slow one; dead ones are found by their watch


class Wire(Protocol):
    def room(self, nbytes: int) -> Bytes:
        """Memory to carry from or to."""

    def carry(self, going: Parcels, coming: Parcels) -> None:
        """Bring what is going to other ranks there, and what is coming from others here."""

    def close(self) -> None:
        """All has been carried."""


class Memory:
    """The ranks' own process group: gloo, through sockets."""

    def room(self, nbytes: int) -> Bytes:
        return np.empty(nbytes, np.uint8)

    def carry(self, going: Parcels, coming: Parcels) -> None:
        import torch
        import torch.distributed as dist

        requests: list[Any] = [dist.isend(torch.from_numpy(data), rank) for rank, data in going]
        requests += [dist.irecv(torch.from_numpy(into), rank) for rank, into in coming]
        for request in requests:
            request.wait()

    def close(self) -> None:
        """The group is not its own."""


class Device:
    """A process group of devices: pinned memory, a copy to the device, its network, a copy back, all on a stream of its own.

    `Device(torch.device("cpu"), "gloo")` takes the same way without a GPU.
    """

    def __init__(self, device: Any, backend: str) -> None:
        import torch
        import torch.distributed as dist

        self.device, self.stream = device, None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.group = dist.new_group(backend=backend, timeout=TIMEOUT)
        with self._streaming():  # the first call of a group has to be everyone's, and fails here if it has to
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self._finished()

    def _streaming(self) -> Any:
        import torch

        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def _finished(self) -> None:
        if self.stream:
            self.stream.synchronize()

    def room(self, nbytes: int) -> Bytes:
        import torch

        found: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.stream is not None).numpy()
        return found

    def carry(self, going: Parcels, coming: Parcels) -> None:
        import torch
        import torch.distributed as dist

        with self._streaming():
            sent = [torch.from_numpy(data).to(self.device, non_blocking=True) for _, data in going]
            got = [torch.empty(len(into), dtype=torch.uint8, device=self.device) for _, into in coming]
            calls = [dist.P2POp(dist.isend, t, rank, self.group) for t, (rank, _) in zip(sent, going, strict=True)]
            calls += [dist.P2POp(dist.irecv, t, rank, self.group) for t, (rank, _) in zip(got, coming, strict=True)]
            for request in dist.batch_isend_irecv(calls) if calls else []:
                request.wait()
            for value, (_, into) in zip(got, coming, strict=True):
                torch.from_numpy(into).copy_(value, non_blocking=True)
        self._finished()

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group(self.group)


def gpu(local_rank: int, local_world: int) -> Any:
    """The GPU that NCCL may use for this rank, which has it for itself; None if there are not enough of them."""
    import torch
    import torch.distributed as dist

    enough = torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= local_world
    return torch.device("cuda", local_rank) if enough else None
