"""Zip archives as torch.save writes them: the directory of one that exists, the bytes of one that does not yet.

Records are stored, not compressed; every record's data begins at a multiple of 64 bytes from the archive's start.
An archive may be a part of a file (a blob inside a `.distcp`). Local headers hold no sizes (they come in a data
descriptor), so only the central directory is believed, and every address in it is checked.

Invariant: no record reaches outside its archive; what is laid out is a valid zip once data and CRCs are filled in.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from isal.isal_zlib import crc32 as _crc32

from ckpt_dist.errors import CheckpointError

ALIGNMENT = 64
TAIL = 4096
END, END64, LOCATOR, CENTRAL, LOCAL, DESCRIPTOR = (
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"PK\x07\x08",
)
FLAGS = 0x0808  # names are UTF-8, sizes come in a data descriptor
SMALL = 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """One stored file of an archive; `offset` is absolute in the file that holds the archive."""

    name: str
    offset: int
    nbytes: int


def directory(fd: int, base: int, length: int, where: str) -> dict[str, Record]:
    """All records of the archive at `base`, by name, from its central directory."""
    tail = os.pread(fd, min(length, TAIL), base + max(length - TAIL, 0))
    at = tail.rfind(END)
    if at < 0 or at + 22 > len(tail):
        raise _no_archive(fd, base, length, where)
    count, size, start = struct.unpack_from("<HII", tail, at + 10)
    locator = at - 20
    if locator >= 0 and tail[locator : locator + 4] == LOCATOR:
        end64 = _read(fd, base, length, struct.unpack_from("<Q", tail, locator + 8)[0], 56, where)
        if end64[:4] != END64:
            raise CheckpointError(f"{where} is damaged: its zip64 directory is not where it should be.")
        count, size, start = struct.unpack_from("<QQQ", end64, 32)
    first = max(length - TAIL, 0)
    central = (
        tail[start - first : start - first + size] if start >= first else _read(fd, base, length, start, size, where)
    )
    if len(central) != size:
        raise CheckpointError(f"{where} is damaged: its directory of {size} bytes does not end before byte {length}.")
    return _records(fd, base, length, central, count, where)


def _read(fd: int, base: int, length: int, at: int, size: int, where: str) -> bytes:
    if at < 0 or size < 0 or at + size > length:
        raise CheckpointError(f"{where} is damaged: bytes {at} to {at + size} are asked for, the archive has {length}.")
    data = os.pread(fd, size, base + at)
    if len(data) != size:
        raise CheckpointError(f"{where} is truncated: {size} bytes are needed at {base + at}, {len(data)} are there.")
    return data


def _no_archive(fd: int, base: int, length: int, where: str) -> CheckpointError:
    head = os.pread(fd, min(length, 16), base)
    if head.startswith(b"PK\x03\x04"):
        return CheckpointError(
            f"{where} is truncated: it starts as a zip archive, but its end of {length} bytes holds no directory. Fetch it again."
        )
    if head[:2] in (b"\x80\x02", b"\x80\x04") or b"\x8a\x0al\xfc" in head:
        return CheckpointError(
            f"{where} was saved by torch before 1.6; load it there and save it again with torch.save."
        )
    return CheckpointError(f"{where} is no file of torch.save: it does not begin as a zip archive.")


def _records(fd: int, base: int, length: int, central: bytes, count: int, where: str) -> dict[str, Record]:
    found: dict[str, Record] = {}
    at = 0
    for _ in range(count):
        if central[at : at + 4] != CENTRAL or at + 46 > len(central):
            raise CheckpointError(f"{where} is damaged: its directory says {count} records, {len(found)} are there.")
        flags, method = struct.unpack_from("<HH", central, at + 8)
        packed, nbytes, names, extras, comments = struct.unpack_from("<IIHHH", central, at + 20)
        header = struct.unpack_from("<I", central, at + 42)[0]
        name = central[at + 46 : at + 46 + names].decode("utf-8", "replace")
        extra = central[at + 46 + names : at + 46 + names + extras]
        if SMALL in (packed, nbytes, header):
            nbytes, packed, header = _wide(extra, nbytes, packed, header, where)
        if method != 0 or packed != nbytes or flags & 1:
            raise CheckpointError(
                f"{where}: the record {name!r} is compressed or encrypted, which torch.save never does."
            )
        local = _read(fd, base, length, header, 30, where)
        data = header + 30 + sum(struct.unpack_from("<HH", local, 26))
        if local[:4] != LOCAL or data + nbytes > length or name in found:
            raise CheckpointError(
                f"{where} is damaged: the record {name!r} of {nbytes} bytes at {data} does not lie in the archive's {length} bytes, or is there twice."
            )
        found[name] = Record(name, base + data, nbytes)
        at += 46 + names + extras + comments
    return found


def _wide(extra: bytes, nbytes: int, packed: int, header: int, where: str) -> tuple[int, int, int]:
    """The 64-bit numbers of a zip64 extra field, present only for those that did not fit."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1 and at + 4 + size <= len(extra):
            numbers = list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            try:
                return tuple(numbers.pop(0) if n == SMALL else n for n in (nbytes, packed, header))  # type: ignore[return-value]
            except IndexError:
                break
        at += 4 + size
    raise CheckpointError(f"{where} is damaged: a record's 64-bit sizes are missing.")


def find(records: Mapping[str, Record], ending: str, where: str) -> Record:
    """The only record whose name ends so: torch puts the file's own name before `/data.pkl`."""
    found = [r for name, r in records.items() if name.endswith(ending) or name == ending.lstrip("/")]
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: {len(found)} records end in {ending!r}, one is needed. Was it made by torch.save?"
        )
    return found[0]


def storages(records: Mapping[str, Record], data_pkl: Record) -> dict[str, Record]:
    """The records of an archive's tensors by key: those in the folder `data` beside its data.pkl, as torch finds them."""
    folder = data_pkl.name.removesuffix("data.pkl") + "data/"
    return {name.removeprefix(folder): r for name, r in records.items() if name.startswith(folder)}


@dataclass(frozen=True)
class Layout:
    """An archive to be: fixed `pieces`, the `addresses` of all records' data, and where their CRCs stand."""

    pieces: tuple[tuple[int, bytes], ...]
    addresses: tuple[int, ...]
    length: int
    crc_at: tuple[tuple[int, ...], ...]


def lay_out(records: Sequence[tuple[str, bytes | int]], prefix: str = "archive") -> Layout:
    """The archive of some records; an int stands for that many bytes which are filled in later, with their CRC.

    `lay_out([("data.pkl", b"..."), ("data/0", 4096)]).addresses` -> `(64, 192)`, relative to the archive.
    """
    pieces: list[tuple[int, bytes]] = []
    addresses, crc_at, central, at = [], [], [], 0
    for name, content in records:
        label = f"{prefix}/{name}".encode()
        nbytes = content if isinstance(content, int) else len(content)
        crc = 0 if isinstance(content, int) else crc32(content)
        wide = nbytes >= SMALL
        header = at
        zip64 = struct.pack("<HHQQ", 1, 16, 0, 0) if wide else b""
        fill = -(at + 30 + len(label) + len(zip64) + 4) % ALIGNMENT
        extra = zip64 + struct.pack("<HH", 0x4246, fill) + b"Z" * fill
        fixed = struct.pack(
            "<4sHHHHHIIIHH",
            LOCAL,
            0,
            FLAGS,
            0,
            0,
            0,
            0,
            SMALL if wide else 0,
            SMALL if wide else 0,
            len(label),
            len(extra),
        )
        data = at + len(fixed) + len(label) + len(extra)
        descriptor = struct.pack("<4sIQQ" if wide else "<4sIII", DESCRIPTOR, crc, nbytes, nbytes)
        body = b"" if isinstance(content, int) else content
        if isinstance(content, int):
            pieces += [(at, fixed + label + extra), (data + nbytes, descriptor)]
        else:
            pieces.append((at, fixed + label + extra + body + descriptor))
        addresses.append(data)
        central.append((label, crc, nbytes, header))
        crc_at.append(data + nbytes + 4)
        at = data + nbytes + len(descriptor)
    text, crc_in_central = _central(central, at)
    pieces.append((at, text))
    positions = tuple((a, b) for a, b in zip(crc_at, crc_in_central, strict=True))
    return Layout(tuple(pieces), tuple(addresses), at + len(text), positions)


def _central(records: Sequence[tuple[bytes, int, int, int]], start: int) -> tuple[bytes, list[int]]:
    """The central directory and the end records, and where each record's CRC stands."""
    parts, crc_at, at = [], [], start
    for label, crc, nbytes, header in records:
        wide = [n for n in (nbytes, nbytes, header) if n >= SMALL]
        extra = struct.pack("<HH", 1, 8 * len(wide)) + struct.pack(f"<{len(wide)}Q", *wide) if wide else b""
        fixed = struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            CENTRAL,
            0,
            0,
            FLAGS,
            0,
            0,
            0,
            crc,
            min(nbytes, SMALL),
            min(nbytes, SMALL),
            len(label),
            len(extra),
            0,
            0,
            0,
            0,
            min(header, SMALL),
        )
        crc_at.append(at + 16)
        parts.append(fixed + label + extra)
        at += len(parts[-1])
    size, count = at - start, len(records)
    parts.append(struct.pack("<4sQHHIIQQQQ", END64, 44, 45, 45, 0, 0, count, count, size, start))
    parts.append(struct.pack("<4sIQI", LOCATOR, 0, at, 1))
    small = min(count, 0xFFFF)
    parts.append(struct.pack("<4sHHHHIIH", END, 0, 0, small, small, min(size, SMALL), min(start, SMALL), 0))
    return b"".join(parts), crc_at


def crc32(data: bytes | memoryview, before: int = 0) -> int:
    """CRC-32 as zip files hold it."""
    return int(_crc32(data, before))


POLYNOMIAL = 0xEDB88320


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's, in its bit-reversed form."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """x to the power of 8 * nbytes: what appending that many zero bytes multiplies a CRC with."""
    result, power, n = 1 << 31, 1 << 23, nbytes
    while n:
        if n & 1:
            result = _times(result, power)
        power, n = _times(power, power), n >> 1
    return result


def combine(first: int, second: int, nbytes: int) -> int:
    """The CRC of two runs put together; `nbytes` is the second one's length."""
    return _times(_shift(nbytes), first) ^ second


def crc_of_zeros(nbytes: int) -> int:
    """The CRC of a hole: `crc_of_zeros(5)` == `crc32(bytes(5))`."""
    return _times(_shift(nbytes), 0xFFFFFFFF) ^ 0xFFFFFFFF


def combine_runs(runs: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    """`(start, nbytes, crc)` of runs that together are one: `combine_runs([(0, 4, a), (4, 2, b)])` -> `(0, 6, c)`."""
    ordered = sorted(runs)
    start, total, crc = ordered[0]
    for at, nbytes, value in ordered[1:]:
        assert at == start + total, f"a gap or an overlap at byte {at}; {start + total} was expected"
        crc, total = combine(crc, value, nbytes), total + nbytes
    return start, total, crc
