"""The verbs as functions. Keys are the command line's, nested or dotted:

    ckpt_dist.convert("run/step-1000", "model", dtype="bfloat16")
    ckpt_dist.average("run", "averages", last=5, **{"engine.memory": "1GiB"})

Invariant: a function does exactly what the command with the same keys does; errors are raised, not printed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["average", "convert", "fingerprint", "inspect", "merge", "seed", "verify"]

PathLike = str | os.PathLike[str]
TARGET: tuple[str, ...] = (
    "format",
    "dtype",
    "dialect",
    "key",
    "max_shard_size",
    "safetensors",
    "vocab_size",
    "tp",
    "pp",
    "vpp",
    "ep",
)
TARGET += ("partition", "partition_method", "release", "spec", "embedding", "universal", "shared", "placement")


def _config(verb: str, places: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    from ckpt_dist.config import fill
    from ckpt_dist.errors import UsageError

    values: dict[str, Any] = {"quiet": True}
    for name, value in places.items():
        if value is not None:
            values[f"{name}.path"] = (
                [os.fspath(v) for v in value] if isinstance(value, (list, tuple)) else os.fspath(value)
            )
    for name, value in options.items():
        values[f"target.{name}" if name in TARGET else name] = value
    cfg = fill(verb, values)
    if cfg["nproc"] != 1:
        raise UsageError(
            f"nproc={cfg['nproc']}: only the command starts processes. Start a program's own with torchrun."
        )
    return cfg


def convert(source: PathLike, target: PathLike, **options: Any) -> dict[str, Any]:
    """Convert one checkpoint; returns the report."""
    from ckpt_dist import run

    return run.convert(_config("convert", {"source": source, "target": target}, options))


def average(source: PathLike | list[PathLike], target: PathLike | None = None, **options: Any) -> dict[str, Any]:
    """Average the steps of a folder, or a list of checkpoints; returns the report with all fingerprints."""
    from ckpt_dist import run

    return run.average(_config("average", {"source": source, "target": target}, options))


def merge(path: PathLike, output: PathLike | None = None, weights: str = "param", **options: Any) -> Path:
    """Merge the shards of a training checkpoint into a Hugging Face model; returns its folder."""
    from ckpt_dist import run

    cfg = _config("merge", {"source": path, "target": output}, {"source.weights": weights, **options})
    return Path(run.merge(cfg)["target"])


def seed(config: PathLike, target: PathLike, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Make a checkpoint of first values from a config.json (or its folder); returns the report."""
    from ckpt_dist import run

    return run.seed(_config("seed", {"target": target}, {"model.config": os.fspath(config), "seed": seed, **options}))


def inspect(path: PathLike, **options: Any) -> dict[str, Any]:
    """What a checkpoint is."""
    from ckpt_dist import facts

    return facts.inspect(_config("inspect", {"source": path}, options))


def fingerprint(path: PathLike, **options: Any) -> str:
    """The digest of a model's values, the same for every format, dialect and sharding of it; keys as of `verify`."""
    from ckpt_dist import check

    return check.fingerprint(_config("verify", {"a": path}, options))


def verify(a: PathLike, b: PathLike | None = None, **options: Any) -> dict[str, Any]:
    """Compare two checkpoints, or check one; raises `ckpt_dist.errors.Difference` where they differ."""
    from ckpt_dist import check

    return check.verify(_config("verify", {"a": a, "b": b}, options))
