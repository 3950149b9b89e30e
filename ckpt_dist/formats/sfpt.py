"""FlagScale's single file per tensor: a flat folder of `KEY.pt`, each a torch.save of `{KEY: whole tensor}`.

Facts: FlagScale's dcp_to_sfpt and sfpt_to_dcp of 2025. Keys are those of Megatron's distributed checkpoints, one for
each layer or stacked. The key inside a file counts, not the file's name.

Invariant: one file holds one tensor, and no tensor is in two files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_dist.catalog import Catalog
from ckpt_dist.errors import CheckpointError
from ckpt_dist.files import inert
from ckpt_dist.formats import Layout, Spec
from ckpt_dist.formats import torch as pt

KEYS = ("decoder.", "embedding.", "output_layer.", "mtp.")


def claims(path: Path) -> bool:
    """Megatron's names, or, of a model of no known family, several files of one tensor each, under the file's own name."""
    files = sorted(p for p in path.iterdir() if p.suffix == ".pt") if path.is_dir() else []
    return any(p.name.startswith(KEYS) for p in files) or (len(files) > 1 and _alone(files[0]))


def _alone(file: Path) -> bool:
    try:
        tree, _ = pt.open_archive(file)
    except CheckpointError:
        return False
    return isinstance(tree, Mapping) and [*tree] == [file.stem] and isinstance(tree[file.stem], inert.TensorRef)


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """The pickle of every file; the optimizer's and other tensors are told apart by their keys."""
    files = sorted(p.name for p in path.iterdir() if p.suffix == ".pt")
    catalog = pt.scan_files(path, files, options)
    if len(catalog.entries) != len(files) or catalog.extras:
        raise CheckpointError(
            f"{path}: {len(files)} files hold {len(catalog.entries)} tensors and {len(catalog.extras)} other values; "
            "each has to hold one tensor. Was another file put there?"
        )
    return Catalog("sfpt", catalog.root, catalog.files, catalog.entries, catalog.chunks)


def lay_out(spec: Spec) -> Layout:
    """A file for each tensor."""
    names = [f"{e.name}.pt" for e in spec.entries]
    long = next((n for n in names if len(n.encode()) > 255 or "/" in n), None)
    if long:
        raise CheckpointError(f"target.format=sfpt: {long!r} is no name of a file. Use another target.format.")
    return pt.lay_out_files(spec, names, [[k] for k in range(len(names))])
