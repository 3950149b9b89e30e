"""Compressed chunks of zarr arrays: the few codecs that are read, and what is known of a chunk before it is opened.

gzip and zlib are Python's own; blosc, lz4 and zstd are those of the package numcodecs, which the extra `zarr` installs.

Invariant: no codec is looked up by what a file says, and none makes more bytes than the chunk is said to have.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ckpt_dist.errors import CheckpointError

WINDOWS = {"gzip": 31, "zlib": 15}  # zlib's word for the kind of header
CLASSES = {"blosc": "Blosc", "lz4": "LZ4", "zstd": "Zstd"}  # of numcodecs, in modules of these names
CODECS = tuple(sorted((*WINDOWS, *CLASSES)))


@dataclass(frozen=True)
class Packed:
    """A file that holds one compressed chunk: its codec, its bytes, and those of the chunk."""

    file: int
    codec: str
    stored_bytes: int
    nbytes: int


def decoder(codec: str) -> Any:
    """numcodecs' own, for one of the codecs that it is needed for."""
    try:
        return getattr(import_module(f"numcodecs.{codec}"), CLASSES[codec])()
    except ImportError:
        raise CheckpointError(
            f"The chunks are compressed by {codec}, which needs the package numcodecs: pip install 'ckpt-dist[zarr]'."
        ) from None


def unpacked(packed: Packed, data: bytearray, where: str) -> bytes | bytearray:
    """The chunk, exactly as long as it is said to be."""
    said = _length(packed, data)
    if said < 0 and packed.codec == "zstd" and len(data) > 8 and data.startswith(b"\x28\xb5\x2f\xfd"):
        raise CheckpointError(
            f"{where}: a frame of zstd that does not say how long its content is; only those that do are read. Write the "
            "array anew without compression (compressor=None)."
        )
    try:
        if said != packed.nbytes:
            raise ValueError(f"{said} bytes inside, {packed.nbytes} by .zarray")
        if packed.codec not in WINDOWS:
            codec, out = decoder(packed.codec), bytearray(packed.nbytes)
            if packed.codec == "blosc" and (whole := int.from_bytes(data[12:16], "little")) != len(data):
                raise ValueError(f"{len(data)} of {whole} bytes")  # it would read on behind them
            codec.decode(data, out=out)
            return out
        stream = zlib.decompressobj(WINDOWS[packed.codec])
        made = stream.decompress(data, packed.nbytes)
        if (
            len(made) != packed.nbytes
            or stream.decompress(stream.unconsumed_tail, 1)
            or stream.unused_data
            or not stream.eof
        ):
            raise ValueError(f"not {packed.nbytes} bytes inside, which .zarray says")
        return made
    except (RuntimeError, ValueError, zlib.error) as error:
        raise CheckpointError(f"{where} is damaged: {packed.codec}: {error!s:.200}. Fetch it again.") from None


def _length(packed: Packed, data: bytearray) -> int:
    """How long the chunk is by the compressed bytes themselves; zlib's do not say it, and -1 is for those that lack it."""
    if packed.codec in WINDOWS:
        return packed.nbytes
    if packed.codec in ("blosc", "lz4"):
        return int.from_bytes(data[4:8] if packed.codec == "blosc" else data[:4], "little") if len(data) > 8 else -1
    head = data[4] if len(data) > 8 else 0
    alone, width = head >> 5 & 1, (head >> 5 & 1, 2, 4, 8)[head >> 6]  # of one segment; of the field with the length
    at = 6 - alone + (0, 1, 2, 4)[head & 3]
    return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0) if width else -1
