"""Plain tar archives: where each file lies in them. A member is one run of bytes, so its tensors have addresses.

Only headers are read. What is compressed has no addresses and is refused with the command that unpacks it; so are links,
devices, sparse members and names that leave the folder, whether they would be used or not.

Invariant: no member reaches outside its archive, and no name is there twice.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ckpt_dist.errors import CheckpointError

PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
MOST_MEMBERS, MOST_WORDS = 1 << 20, 256  # and of a pax header, which tarfile copies for each member


@dataclass(frozen=True)
class Member:
    """One file of an archive: where it begins, and how long it is."""

    offset: int
    nbytes: int


def directory(path: Path) -> dict[str, Member]:
    """All files by name, without a leading `./`."""
    with open(path, "rb") as file:
        head = file.read(2)
        file.seek(0)
        if head in PACKED:
            raise CheckpointError(
                f"{path} is packed with {PACKED[head]}, so nothing in it has an address. Unpack it first and give the folder: "
                f"mkdir {path.stem} && tar -xf {path.name} -C {path.stem}"
            )
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                return _members(path, archive)
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise CheckpointError(
                f"{path} is no tar archive that can be read: {error!s:.200}. Fetch it again."
            ) from None


def _members(path: Path, archive: tarfile.TarFile) -> dict[str, Member]:
    found: dict[str, Member] = {}
    total = path.stat().st_size
    for count, one in enumerate(iter(archive.next, None)):
        archive.members = []  # type: ignore[attr-defined]  # each has a copy of what the archive says of all of them
        pure = PurePosixPath(one.name)
        name = str(pure)
        if count >= MOST_MEMBERS:
            raise CheckpointError(f"{path} has more than {MOST_MEMBERS} members, which no checkpoint has.")
        if pure.is_absolute() or ".." in pure.parts or "\0" in one.name:
            raise CheckpointError(
                f"{path} names the file {one.name!r}, which lies outside the archive's folder; refused."
            )
        if one.isdir():
            continue
        if not one.isreg() or one.issparse():
            raise CheckpointError(
                f"{path}: {one.name!r} is a link, a device or a sparse file, which no checkpoint needs; refused."
            )
        if len(one.pax_headers) > MOST_WORDS:
            raise CheckpointError(
                f"{path} says {len(one.pax_headers)} things of {name!r}, which no checkpoint needs; refused."
            )
        if one.size < 0:
            raise CheckpointError(f"{path} is damaged: {name!r} is {one.size} bytes long. Fetch it again.")
        if one.offset_data + one.size > total:
            raise CheckpointError(
                f"{path} is truncated: {name!r} ends at byte {one.offset_data + one.size}, the file has {total}. Fetch it again."
            )
        if name in found:
            raise CheckpointError(f"{path} holds {name!r} twice.")
        found[name] = Member(one.offset_data, one.size)
    return found
