"""Open files: exact reads and writes at offsets, many threads, few descriptors.

Invariant: sources are opened read-only; a short read or a failed write is an error that names the file and
both numbers; descriptors of one thread are not closed by another before `close`, when none works any more.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Protocol

from ckpt_dist.errors import CheckpointError

OPEN_FILES = 32  # for each thread
PIECE = 1 << 17  # bytes written by one call, up to a multiple of it: see docs/design/05-skeleton-fill-publish.md


def reserve(file: int, nbytes: int) -> None:
    """Space for all of a new file at once, where the file system can give it: later writes need half the time, and a
    full disk is seen before any work. Raises OSError if there is not so much space.

    `os.posix_fallocate` will not do: where the file system cannot, the C library writes a byte into every block.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or nbytes == 0:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(file, 0, 0, nbytes) and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Reader(Protocol):
    """What tiles are gathered from: files, or what has arrived from other ranks."""

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Fill `into` from a place of a file."""


class Writer(Protocol):
    """What tiles are scattered to: files, or the memory of tensors."""

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Put all of `data` at a place of a file."""

    def copy(
        self, source: Reader, from_file: int, from_at: int, file: int, at: int, nbytes: int, buffer: memoryview
    ) -> None:
        """Bytes as they are from a place of `source` to a place of a file."""


class Files:
    """The files of one checkpoint, opened when first used by each thread."""

    def __init__(self, root: Path | str, names: Sequence[str], *, writable: bool = False) -> None:
        self.paths = [Path(root) / n for n in names]
        self.flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self.local = threading.local()
        self.opened: list[OrderedDict[int, int]] = []
        self.written: set[int] = set()  # since the last `sync`
        self.lock = threading.Lock()
        self.counts: list[list[int]] = []  # one for each thread, so that none is lost

    @property
    def bytes_read(self) -> int:
        return sum(count for (count,) in self.counts)

    def descriptor(self, file: int) -> int:
        cache: OrderedDict[int, int] | None = getattr(self.local, "cache", None)
        if cache is None:
            cache = self.local.cache = OrderedDict()
            self.opened.append(cache)
            self.local.count = [0]
            self.counts.append(self.local.count)
        if file in cache:
            cache.move_to_end(file)
            return cache[file]
        if len(cache) >= OPEN_FILES:
            os.close(cache.popitem(last=False)[1])
        try:
            cache[file] = os.open(self.paths[file], self.flags)
        except OSError as error:
            raise CheckpointError(f"Cannot open {self.paths[file]}: {error.strerror}.") from None
        return cache[file]

    def read(self, file: int, offset: int, into: memoryview) -> None:
        fd, done = self.descriptor(file), 0
        while done < len(into):
            try:
                count = os.preadv(fd, [into[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"Cannot read {self.paths[file]} at byte {offset + done}: {error.strerror}."
                ) from None
            if count == 0:
                size = os.fstat(fd).st_size
                raise CheckpointError(
                    f"{self.paths[file]} is truncated: it has {size} bytes, {offset + len(into)} are needed. Fetch it again."
                )
            done += count
        self.local.count[0] += done

    def write(self, file: int, offset: int, data: memoryview) -> None:
        fd, done = self.descriptor(file), 0
        while done < len(data):
            try:
                done += os.pwrite(fd, data[done : done + PIECE - (offset + done) % PIECE], offset + done)
            except OSError as error:
                raise self.failed(file, error) from None
        with self.lock:
            self.written.add(file)  # after its bytes: a `sync` in between may not have seen them

    def failed(self, file: int, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"Cannot write {self.paths[file]}: {error.strerror}. Nothing was published; free space or choose another target.path."
        )

    def copy(
        self, source: Reader, from_file: int, from_at: int, file: int, at: int, nbytes: int, buffer: memoryview
    ) -> None:
        """Bytes from file to file, in pieces that stay in the cache of a core; `buffer` holds PIECE bytes."""
        done = 0
        while done < nbytes:
            piece = buffer[: min(nbytes - done, PIECE - (at + done) % PIECE)]
            source.read(from_file, from_at + done, piece)
            self.write(file, at + done, piece)
            done += len(piece)

    def sync(self) -> None:
        """Flush what this process has written since the last call to the disk; other threads may go on writing.

        Where it fails, nothing that was written before is known to be on the disk, then or later.
        """
        with self.lock:
            files, self.written = self.written, set()
        for file in sorted(files):
            try:
                fd = os.open(self.paths[file], self.flags)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise self.failed(file, error) from None

    def close(self) -> None:
        for cache in self.opened:
            while cache:
                os.close(cache.popitem()[1])


class Computed:
    """Files of which some are computed (`made`, by number); to a tile it is a reader like any other."""

    def __init__(self, files: Files, made: Container[int]) -> None:
        self.files, self.made = files, made

    @property
    def bytes_read(self) -> int:
        return self.files.bytes_read

    def close(self) -> None:
        self.files.close()

    def read(self, file: int, offset: int, into: memoryview) -> None:
        if file in self.made:
            self.compute(file, offset, into)
        else:
            self.files.read(file, offset, into)

    def compute(self, file: int, offset: int, into: memoryview) -> None:
        """Fill `into` with what a computed file would have at a place."""
        raise NotImplementedError
