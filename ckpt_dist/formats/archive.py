"""`.nemo` archives: a plain tar of NeMo's settings and weights, read in place.

Facts: NeMo 1.x, from source. The weights are `model_weights.ckpt`, one in the folder of each rank, or a distributed
checkpoint in `model_weights/`; the model's settings are in `model_config.yaml`.

Invariant: nothing is unpacked; each tensor is at its address in the archive.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ckpt_dist.box import ints
from ckpt_dist.catalog import Catalog
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import tars
from ckpt_dist.files.tars import Member
from ckpt_dist.formats import dcp, nemo, torch_dist, zarr
from ckpt_dist.formats import torch as pt

FOLDER = "model_weights/"
CONFIG = "model_config.yaml"


def claims(path: Path) -> bool:
    return path.suffix == ".nemo" and path.is_file()


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The archive's directory, then what the format of its weights reads."""
    members = tars.directory(path)
    args = torch_dist.settings_in(_read(path, members[CONFIG])) if CONFIG in members else {}
    held = {n.removeprefix(FOLDER): m for n, m in members.items() if n.startswith(FOLDER)}
    if ".metadata" in held:
        found = _in_place(
            dcp.described(path, {f"{path}: .metadata": _read(path, held[".metadata"])}, _sizes(path, held)), path, held
        )
        return torch_dist.around(found, _common(path, held) or torch_dist.common_in(found), args)
    if torch_dist.METADATA in held:
        sizes = {n: m.nbytes for n, m in held.items()}
        found = zarr.described(path, sizes, lambda name: _read(path, held[name]), {})
        if found.about.get("packed"):
            raise CheckpointError(f"{path}: its arrays are compressed inside. Unpack it with: tar -xf {path.name}")
        config = torch_dist.args_of(_common(path, held)) or args
        return replace(_in_place(found, path, held), config=config, about={})
    names = sorted(n for n in members if PurePosixPath(n).name == nemo.WEIGHTS)
    if not names:
        some = ", ".join(sorted(members)[:8])
        raise CheckpointError(f"{path} has neither {nemo.WEIGHTS} nor {FOLDER}. It holds {some}.")
    opened = [pt.open_archive(path, members[n].offset, members[n].nbytes) for n in names]
    return _in_place(
        nemo.assembled(path, names, opened, args, options.get("replica")), path, dict.fromkeys(names, Member(0, 0))
    )


def _read(path: Path, member: Member) -> bytes:
    if member.nbytes > dcp.MOST_METADATA:
        raise CheckpointError(f"{path}: a member of {member.nbytes} bytes is no description of a model.")
    with open(path, "rb") as file:
        return os.pread(file.fileno(), member.nbytes, member.offset)


def _sizes(path: Path, held: Mapping[str, Member]) -> dict[str, int]:
    return {str(path / n): m.nbytes for n, m in held.items()}


def _common(path: Path, held: Mapping[str, Member]) -> Mapping[str, Any]:
    member = held.get(torch_dist.COMMON)
    return torch_dist.common_of(path, member.offset, member.nbytes) if member else {}


def _in_place(catalog: Catalog, path: Path, held: Mapping[str, Member]) -> Catalog:
    """The same chunks at their addresses in the archive, which is the only file."""
    base = ints([held[f].offset for f in catalog.files])
    chunks = catalog.chunks
    chunks = replace(chunks, file=chunks.file * 0, offset=chunks.offset + base[chunks.file])
    extras = tuple(
        x if x.address is None else replace(x, address=(0, x.address[1] + int(base[x.address[0]]), x.address[2]))
        for x in catalog.extras
    )
    return replace(catalog, root=str(path.parent), files=(path.name,), chunks=chunks, extras=extras)
