"""What each key may hold: one reader per key, for text from the command line and for values from Python alike.

`KEYS["last"].read("5")` -> 5, and the same for `read(5)`; what does not fit raises ValueError, and `says` tells
a person what would. The keys and their defaults are in `conf/`; a test compares the two lists.

Invariant: a reader never opens anything but the names of folders, and reading twice changes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_dist.report import parse_size

QUOTES = ("'", '"')
OPEN, CLOSE = "[{(", "]})"
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}
WORDS = {
    "huggingface": "hf", "safetensors": "hf", "pt": "torch", "pth": "torch", "mcore": "torch_dist",
    "megatron_core": "torch_dist", "distcp": "dcp", "fsdp": "dcp", "fsdp2": "dcp",
}  # fmt: skip
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Kind:
    """`says` completes the sentence "Give ..."; `choices` are shown in the help and searched for a near miss."""

    says: str
    read: Callable[[Any], Any]
    choices: tuple[str, ...] = ()


def pieces(text: str) -> list[str]:
    """Split at the commas outside quotes and brackets: `a,"b,c",[1,2]` -> `a`, `"b,c"`, `[1,2]`"""
    parts, depth, quote = [""], 0, ""
    for c in text:
        quote = "" if c == quote else c if not quote and c in QUOTES else quote
        depth += 0 if quote else (c in OPEN) - (c in CLOSE)
        if c == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts]


def bare(text: str) -> str:
    """Without the quotes that some people put for Hydra: `"a,b"` -> `a,b`"""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES else text


def inside(text: str, brackets: str) -> str | None:
    """What is between these two brackets, or None: `inside("[1,2]", "[]")` -> `1,2`"""
    text = text.strip()
    return text[1:-1] if text[:1] == brackets[0] and text[-1:] == brackets[1] else None


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[str(value).lower()]


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, (bool, float)) or int(value) < least:
            raise ValueError
        return int(value)

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool) or not abs(float(value)) < float("inf"):
        raise ValueError
    return float(value)


def _tolerance(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError
    return _number(value)


def _word(value: Any) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or not str(value).strip():
        raise ValueError
    return bare(str(value))


def _path(value: Any) -> str:
    """A path that exists is taken as it is, whatever characters it has; else `~` is the home folder, also of a target."""
    path = os.fspath(value)
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ValueError
    if os.path.lexists(path):
        return path
    own = os.path.expanduser(bare(path))
    if (
        ADDRESS.match(own) or own.startswith("~") or own in ("null", "None")
    ):  # folders of these names would be made here
        raise ValueError
    return own


def _paths(value: Any) -> str | list[str]:
    if not isinstance(value, (str, os.PathLike)):
        return _some(_path)(value)
    path = _path(value)
    if os.path.lexists(path) or not isinstance(value, str):
        return path
    listed = inside(value, "[]")
    found = [_path(p) for p in pieces(value if listed is None else listed)]
    return found if len(found) > 1 or listed is not None else path


def _some(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """A list that is not empty: `1000,2000`, `[1000, 2000]`, `1000`, or a list from Python."""

    def read_all(value: Any) -> list[Any]:
        if isinstance(value, str):
            listed = inside(value, "[]")
            value = [bare(p) for p in pieces(value if listed is None else listed)]
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy, of torch
        values = list(value) if isinstance(value, (list, tuple, range)) else [value]
        if not values:
            raise ValueError
        return [read(v) for v in values]

    return read_all


def _placement(value: Any) -> str | list[int]:
    return str(value) if value in ("ranks", "all") else _some(_whole(0))(value)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return read


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.")  # a program may give torch.bfloat16 itself
    return _one_of("keep", *DTYPES)(ALIASES.get(name, name))


def _dtypes(value: Any) -> str | dict[str, str]:
    """`bf16` -> `bfloat16`; `{default: bf16, "*norm*": fp32}` -> a dict in the same order."""
    rules = inside(value, "{}") if isinstance(value, str) else None
    if rules is not None:
        pairs = [p.rpartition(":") for p in pieces(rules)]
        value = {bare(name.strip()): bare(dtype.strip()) for name, _, dtype in pairs}
    if not isinstance(value, Mapping):
        return _dtype(value)
    if not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError
    return {name: _dtype(dtype) for name, dtype in value.items()}


def _step(value: Any) -> str | int:
    return "latest" if value == "latest" else _whole(0)(value)


def choice(*choices: str) -> Kind:
    return Kind("one of " + ", ".join(choices), _one_of(*choices), choices)


def modules(folder: str) -> tuple[str, ...]:
    """The tables of a folder of the package: one file is one format or family."""
    files = (Path(__file__).parent / folder).glob("*.py")
    return tuple(sorted(f.stem for f in files if not f.stem.startswith("_")))


FLAG = Kind("true or false", _flag, ("true", "false"))
COUNT = Kind("a whole number, 1 or more", _whole(1))
WORD = Kind("some text", _word)
LOCAL = "of a file system (object stores are not read or written)"
PATH = Kind(f"a path {LOCAL}", _path)
STEP = Kind("latest, or the number of a step", _step)
SIZE = Kind("a size such as 512MiB, 2GiB or 5GB", parse_size)
CARRIED = ("weights", "optimizer", "state")
FORMATS = modules("formats")
WRITTEN = tuple(n for n in FORMATS if n not in ("fsdp", "catalog", "archive"))  # dcp replaces fsdp's own pickles
FAMILIES = tuple(sorted({"identity", *modules("families")}))  # identity keeps the names: it has no table
RECIPES = ("dcp_to_sfpt", "dcp_to_torch", "hf_to_torchtitan", "llama_to_dcp", "sfpt_to_dcp", "torchtitan_to_hf")

_SOURCE = {
    "path": PATH, "format": choice("auto", *FORMATS), "dialect": WORD,
    "weights": choice("param", "ema", "master"), "step": STEP,
    "replicas": choice("first", "average"),
}  # fmt: skip
KEYS: dict[str, Kind] = {
    **{f"{side}.{key}": kind for side in ("source", "a", "b") for key, kind in _SOURCE.items()},
    "target.path": PATH,
    "target.format": choice(*WRITTEN, "same"),
    "target.dialect": WORD,
    "target.key": WORD,
    "target.dtype": Kind(f"keep, {', '.join(DTYPES)}, or rules {{default: bfloat16, '*norm*': float32}}", _dtypes),
    "target.max_shard_size": SIZE,
    "target.safetensors": FLAG,
    "target.vocab_size": COUNT,
    **{f"target.{key}": COUNT for key in ("tp", "pp", "vpp", "ep")},
    "target.partition": Kind("layers of each stage such as 3,5 (merak: bounds such as 0,3,7)", _some(_whole(0))),
    "target.partition_method": choice("uniform", "uniform_floor"),
    "target.release": FLAG,
    "target.spec": choice("te", "local"),
    "target.universal": FLAG,
    "target.embedding": choice("auto", "vocabulary", "hidden", "whole"),
    "target.shared": FLAG,
    "target.placement": Kind("ranks, all, or the node of each rank such as 0,0,1,1", _placement, ("ranks", "all")),
    "model.family": choice("auto", *FAMILIES),
    "model.config": PATH,
    "engine.memory": SIZE,
    "engine.transport": choice("auto", "direct", "collective"),
    "engine.timeout": COUNT,
    "engine.device": choice("auto", "cpu", "cuda"),
    "engine.workers": COUNT,
    "engine.verify": FLAG,
    "engine.fsync": FLAG,
    "engine.ranks": COUNT,
    "engine.nodes": COUNT,
    "engine.calibrate": FLAG,
    "engine.bandwidth.read": SIZE,
    "engine.bandwidth.exchange": SIZE,
    "engine.bandwidth.write": SIZE,
    "unmatched": choice("error", "drop", "keep"),
    "overwrite": FLAG,
    "resume": FLAG,
    "dry_run": FLAG,
    "keep": Kind(f"a list of {', '.join(CARRIED)}", _some(_one_of(*CARRIED)), CARRIED),
    "steps": Kind("steps such as 1000,2000", _some(_whole(0))),
    "last": COUNT,
    "weights": Kind("numbers such as 0.25,0.75", _some(_number)),
    "name": WORD,
    "seed": Kind("a whole number, 0 or more", _whole(0)),
    "match": WORD,
    "stats": FLAG,
    "save_catalog": PATH,
    "rtol": Kind("a number, 0 or more", _tolerance),
    "atol": Kind("a number, 0 or more", _tolerance),
    "json": FLAG,
    "quiet": FLAG,
    "nproc": COUNT,
    "recipe": choice(*RECIPES),
    "naming": choice("plain", "nemo"),
}
SPECIAL: dict[tuple[str, str], Kind] = {
    ("average", "source.path"): Kind(f"a path {LOCAL}, or a list of paths: [a,b]", _paths),
    ("merge", "target.format"): choice("hf"),
    ("average", "recipe"): choice("nemo_average"),
}


def kind(verb: str, key: str) -> Kind:
    return SPECIAL.get((verb, key)) or KEYS[key]
