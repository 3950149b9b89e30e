"""The ranks of a job: a process group when torchrun made several, and nothing at all when it did not.

Invariant: every rank makes the same calls in the same order, and an error on one rank is raised on all of
them, as one message, printed by rank 0.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import Ints, ints
from ckpt_dist.engine import wire
from ckpt_dist.engine.watch import Watch
from ckpt_dist.errors import STOPPED, CheckpointError, Stopped

T = TypeVar("T")
Bytes: TypeAlias = "NDArray[np.uint8]"


class Elsewhere(CheckpointError):
    """Another rank has failed, and will say why."""


class Group:
    """`rank`, `world` and `local_world` come from torchrun's environment; a job without torchrun is world size 1.

    A rank that is `alone` sends no messages: it is one of another program's, which has its own order of calls.
    """

    def __init__(self, timeout_s: float = 300, *, alone: bool = False) -> None:
        environ: Mapping[str, str] = {} if alone else os.environ
        self.rank = int(environ.get("RANK", "0"))
        self.world = int(environ.get("WORLD_SIZE", "1"))
        self.local_world = int(environ.get("LOCAL_WORLD_SIZE", str(self.world)))
        self.local_rank = int(environ.get("LOCAL_RANK", "0"))
        self.node = int(environ.get("GROUP_RANK", str(self.rank // self.local_world))) if self.world > 1 else 0
        self.nodes = 1
        self.mine = False
        if self.world > 1:
            import torch.distributed as dist

            self.dist = dist
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=wire.TIMEOUT)
                self.mine = True
            self.watch = Watch(self.rank, self.world, timeout_s)
            self.nodes = max(self.gather(self.node)) + 1  # nodes may have unlike numbers of ranks

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on every rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        self.collective(lambda: self.dist.all_gather_object(out, value))
        return out

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        self.collective(lambda: self.dist.broadcast_object_list(box, src=0))
        return box[0]

    def collective(self, call: Callable[[], Any]) -> None:
        """A call that all ranks make. Where it breaks, a rank has died: the watch is left the time to say which."""
        busy = self.world > 1 and self.watch.expected
        if busy:
            self.watch.end()  # whoever waits for others is not the one that hangs
        try:
            call()
        except RuntimeError:
            self.watch.wait()
            raise
        if busy:
            self.watch.begin()

    def all_to_all(self, send: Bytes, sizes: Ints, into: Bytes, arriving: Ints, by: wire.Wire | None = None) -> None:
        """Fill `into` with what each rank has for this one; `sizes` bytes go to and `arriving` come from each.

        What stays here is copied; only the rest is a collective, `by` a wire whose memory both are.
        """
        ends, begins = np.cumsum(sizes), np.cumsum(arriving)
        going = [send[end - size : end] for end, size in zip(ends, sizes)]
        coming = [into[end - size : end] for end, size in zip(begins, arriving)]
        coming[self.rank][:] = going[self.rank]
        if self.world == 1:
            return
        after = [(self.rank + step) % self.world for step in range(1, self.world)]  # not all to one at a time
        carry = (by or wire.Memory()).carry
        parts = [(r, going[r]) for r in after if len(going[r])], [(r, coming[r]) for r in after[::-1] if len(coming[r])]
        self.collective(lambda: carry(*parts))

    @contextmanager
    def carrier(self, device: str) -> Iterator[wire.Wire]:
        """What carries much between ranks: NCCL, if every rank has a GPU for itself and `device` is not `cpu`; else gloo."""
        mine = wire.gpu(self.local_rank, self.local_world) if self.world > 1 and device != "cpu" else None
        found: wire.Wire = wire.Memory()
        if all(self.gather(mine is not None)):
            made: list[wire.Wire] = []
            self.collective(lambda: made.append(wire.Device(mine, "nccl")))
            found = made[0]
        yield found
        found.close()  # not after a failure: the ranks would wait for each other

    def swap(self, parts: Sequence[Ints]) -> list[Ints]:
        """One array of integers for each rank; the arrays that the ranks have for this one, flat."""
        lengths = np.array([p.size * 8 for p in parts], np.int64)
        eights = np.full(self.world, 8)
        coming = np.empty(self.world, np.int64)
        self.all_to_all(lengths.view(np.uint8), eights, coming.view(np.uint8), eights)
        flat = np.concatenate([p.reshape(-1) for p in parts]).astype(np.int64, copy=False)
        got = np.empty(int(coming.sum()) // 8, np.int64)
        self.all_to_all(flat.view(np.uint8), lengths, got.view(np.uint8), coming)
        return np.split(got, np.cumsum(coming // 8)[:-1])

    def deal(self, make: Callable[[int], Ints]) -> Ints:
        """What rank 0 makes for each rank, one after the other: it never holds more than one of them."""
        if self.world == 1:
            return make(0)
        import torch

        if self.rank == 0:
            for rank in range(1, self.world):
                self.collective(partial(self._hand, make(rank), rank))
            return make(0)
        length = torch.zeros(1, dtype=torch.int64)
        self.collective(lambda: self.dist.recv(length, 0))
        got = torch.empty(int(length), dtype=torch.int64)
        if len(got):
            self.collective(lambda: self.dist.recv(got, 0))
        return ints(got.numpy())

    def _hand(self, values: Ints, rank: int) -> None:
        import torch

        self.dist.send(torch.tensor([values.size]), rank)
        if values.size:
            self.dist.send(torch.from_numpy(values), rank)

    def all_well(self, failure: BaseException | None, stop: bool) -> None:
        """Raise on all ranks if one has failed or was asked to stop: each its own reason, or Elsewhere."""
        failed, stopped = failure is not None, stop
        if self.world > 1:
            import torch

            state = torch.tensor([failed, stopped], dtype=torch.int32)
            self.collective(lambda: self.dist.all_reduce(state, self.dist.ReduceOp.MAX))
            failed, stopped = map(bool, state.tolist())
        if failure is not None:
            raise failure
        if failed:
            raise Elsewhere("another rank has failed")
        if stopped:
            raise Stopped(STOPPED)

    def together(self, work: Callable[[], T]) -> T:
        """Do the work on every rank; if it fails on one, all ranks raise the first failure."""
        if self.world == 1:
            return work()
        result, error = _attempt(work)
        failures = [(r, e) for r, e in enumerate(self.gather(error)) if e is not None]
        failures.sort(key=lambda failure: isinstance(failure[1], Elsewhere))
        if failures:
            raise self._shared(_first(failures, self.rank, error))
        return result  # type: ignore[return-value]

    def _shared(self, error: BaseException) -> BaseException:
        """Marked as raised on all ranks: rank 0 says it, the others need not."""
        error.shared = self.rank > 0  # type: ignore[attr-defined]
        return error

    def on_first(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 only and give its result, or its failure, to every rank."""
        if self.world == 1:
            return work()
        result, error = _attempt(work) if self.rank == 0 else (None, None)
        result, error = self.broadcast((result, error))
        if error is not None:
            raise self._shared(_first([(0, error)], self.rank, error))
        return result  # type: ignore[return-value]

    def on_nodes(self, work: Callable[[], T]) -> T:
        """Do the work on the first rank of each node and give its result to the ranks of that node; a failure on one is
        raised on all."""
        if self.world == 1:
            return work()
        found = self.together(lambda: work() if self.local_rank == 0 else None)
        every = self.gather((self.node, self.local_rank, found))
        return next(x for node, rank, x in every if (node, rank) == (self.node, 0))  # type: ignore[return-value]

    @contextmanager
    def busy(self) -> Iterator[Callable[[], None]]:
        """A piece of work that makes progress; gives what to call at each step of it."""
        if self.world == 1:
            yield lambda: None
            return
        self.watch.begin()
        try:
            yield self.watch.moved
        finally:
            self.watch.end()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.world > 1:
            self.watch.close(in_order=kind is None)
        if self.mine:
            self.dist.destroy_process_group()


def _attempt(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return None, error.with_traceback(None)
    except Exception as error:
        import traceback

        if isinstance(error, OSError) and error.filename is not None:  # no mistake of ours, as in one process
            return None, CheckpointError(f"{error.filename!r:.300}: {error.strerror}.")
        return None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _first(failures: list[tuple[int, BaseException]], rank: int, own: BaseException | None) -> BaseException:
    failed, error = failures[0]
    if isinstance(error, CheckpointError):
        return error
    return (
        own if own is not None and failed == rank else RuntimeError(f"rank {failed} ({socket.gethostname()}): {error}")
    )
