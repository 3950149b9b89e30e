"""The small files beside a checkpoint's weights: those that travel along with a model, and those that do not.

Invariant: nothing is opened; names and places decide.
"""

from __future__ import annotations

import os
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from ckpt_dist.sources import INSIDE, Source

ASIDE = {  # where training keeps the rest in files of its own
    "optimizer": ("*optim*",),
    "state": ("*scheduler*", "random_states_*", "rng_state*", "extra_state_*", "trainer_state.json"),
}
ALONE = ("fsdp", "dcp", "hf", "torch")  # formats in which it may
ADAPTER = "adapter_config.json"  # of peft
ASSETS = (
    "config.json",
    ADAPTER,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "tekken.json",
    "*tiktoken*",
    "*.spm",
    "modules.json",
    "*sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "processing_*.py",
    "image_processing_*.py",
)


def assets(source: Source) -> dict[str, Path]:
    """Config, tokenizer and processor files of a model, by name: from beside its config and beside its arrays."""
    places = [
        p
        for p in (source.folder, source.config_path.parent if source.config_path else None)
        if p is not None and p.is_dir()
    ]
    found: dict[str, Path] = {}
    for place in places:
        for pattern in (*ASSETS, *(["*.py"] if "auto_map" in source.config else [])):  # a model with code of its own
            found |= {
                p.relative_to(place).as_posix(): p
                for p in sorted(place.glob(pattern))
                if p.is_file() and not p.name.endswith(".index.json")
            }
    return found


def aside(source: Source) -> dict[str, list[str]]:
    """The files and folders beside a model in which its training keeps an optimizer, or its state, by role: accelerate's
    `optimizer_0`, verl's `optim_world_size_2_rank_0.pt`; they are not read with it."""
    if source.catalog.format not in ALONE or "saved" in source.catalog.about:
        return {role: [] for role in ASIDE}
    folder = source.folder if source.folder.is_dir() else source.folder.parent
    inner = {part for names in INSIDE.values() for name in names for part in name.split("/")}
    names: list[str] = []
    for place in [folder, folder.parent] if folder.name in inner else [folder]:
        with suppress(OSError):  # it may be on no disk of this node, or not be listed
            names += sorted(os.listdir(place))
    others = [n for n in names if n not in source.catalog.files]
    return {role: [n for n in others if any(fnmatch(n, form) for form in forms)] for role, forms in ASIDE.items()}


def left(source: Source) -> list[str]:
    """The files beside a Hugging Face model that are neither its weights nor carried."""
    if source.catalog.format != "hf" or not source.folder.is_dir():
        return []
    known = {*assets(source), *source.catalog.files, *(n for names in aside(source).values() for n in names)}
    there = [p for glob in ("*", "[0-9]_*/*") for p in sorted(source.folder.glob(glob)) if p.is_file()]
    names = [p.relative_to(source.folder).as_posix() for p in there]
    return [n for n in names if n not in known and not n.startswith(".") and not n.endswith(".index.json")]
