"""Finding checkpoints: the folder that is meant, the steps of a run, the config and the files that travel along.

Invariant: nothing is guessed by modification time or listing order; steps are compared as numbers, what is
passed over is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_dist import configs, formats, megatron, merak, quantised
from ckpt_dist.catalog import Catalog, with_optimizers
from ckpt_dist.configs import read_config
from ckpt_dist.errors import CheckpointError, Missing, UsageError, nearest
from ckpt_dist.files.elsewhere import answers
from ckpt_dist.formats import nemo
from ckpt_dist.whole import contents

STEP = re.compile(
    r"(?:(?:global_?)?(?:step|iter|iteration|checkpoint|ckpt|epoch)|(?P<other>[A-Za-z][A-Za-z_]*[-_=]))?[-_=]?0*(?P<number>\d+)(?:_all_dp)?"
)
DAY = re.compile(r"\d{4}-\d\d-\d\d_ckpt")
NAMED = ("release", "best_model", "best_ckpt")  # the last one holds the one before, and its tracker says a step
INSIDE = {
    "param": ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin", "actor", "actor/dist_ckpt", "dist_ckpt", "model"),
    "ema": ("pytorch_ema_model_fsdp_0", "ema"),
    "master": (),
}
LATEST = ("latest", "latest_universal")  # DeepSpeed: the name of the folder that was saved last
BELOW = ("weights", "model_weights")  # of NeMo: where the arrays are if nothing beside them is a checkpoint
CONFIGS = ("config.json", "params.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found and scanned. `asked` is the path that was given, `step` the number it stands for."""

    catalog: Catalog
    asked: Path
    folder: Path
    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    config_path: Path | None = None
    notes: tuple[str, ...] = ()
    reader: Any = None  # gives the bytes where they are computed, not stored


def steps(parent: Path) -> dict[int, Path]:
    """The numbered checkpoints of a folder, in order: `step-10`, `checkpoint-5`, `iter_0000100`, `global_step_3`.

    Averages, `*-last` and other names without a number at their end are not among them, nor are those of other words than
    these (`eval_10`, `version_0`), unless there are no others.
    """
    found: dict[int, Path] = {}
    paths = [*sorted(p for p in parent.iterdir() if p.is_dir()), *nemo.files(parent)]
    plain = [p for p in paths if (match := STEP.fullmatch(p.name)) is None or match["other"] is None]
    for path in plain if any(number_of(p) is not None for p in plain) else paths:
        number = number_of(path)
        if number is None or (path / "average.yaml").exists():
            continue
        if number in found:
            raise CheckpointError(
                f"{parent} holds step {number} twice: {found[number].name} and {path.name}. Give the checkpoint "
                "itself, or those to average as a list."
            )
        found[number] = path
    return dict(sorted(found.items()))


def number_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; none for a copy of the last one, and for a save that did not end."""
    return None if nemo.passed(path) else _said(path.name)


def _said(name: str) -> int | None:
    name = name.removesuffix(nemo.ENDING)
    if nemo.RANK.fullmatch(name):
        return None
    match, named = STEP.fullmatch(name), nemo.NAMED.search(name)
    return int(match["number"]) if match else int(named[1]) if named else None


def choose(parent: Path, wanted: list[int] | None, last: int | None) -> dict[int, Path]:
    """Which steps of a folder: all, some by number, or the last so many; an unknown one is refused."""
    found = steps(parent)
    if not found:
        one = any(formats.load(name).claims(parent) for name in formats.FORMATS)
        what = f"no folder named like step-1000. {_content(parent)}"
        what = (
            "it is one itself. Give the folder of the steps, or several checkpoints: source.path=[a,b]."
            if one
            else what
        )
        raise CheckpointError(f"{parent} holds no checkpoints: {what}")
    if wanted is not None:
        if len(set(wanted)) != len(wanted):
            raise UsageError(f"steps={wanted}: a step is named twice.")
        unknown = [s for s in wanted if s not in found]
        if unknown:
            raise CheckpointError(
                f"{parent} has no step {unknown[0]}{_why(parent, unknown[0])}. It has {_some(list(found))}."
                f"{nearest(str(unknown[0]), map(str, found))}"
            )
        return {s: found[s] for s in sorted(wanted)}
    if last is not None:
        if last > len(found):
            raise CheckpointError(f"last={last}, but {parent} has only {len(found)} steps: {_some(list(found))}.")
        return dict(list(found.items())[-last:])
    return found


def _why(parent: Path, step: int) -> str:
    names = [p.name for p in sorted(parent.iterdir()) if _said(p.name) == step and nemo.passed(p)]
    return f": {names[0]} is passed over as a copy, or for the mark of an unfinished save" if names else ""


def _some(numbers: list[int]) -> str:
    text = [str(n) for n in numbers]
    return ", ".join(text if len(text) <= 12 else [*text[:5], "...", *text[-5:]])


def _content(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
    return f"It holds {', '.join(names)}." if names else "The folder is empty."


def open_source(keys: Mapping[str, Any], config: str | None = None) -> Source:
    """Find and scan what `source.path` (and step, weights, format) means. Runs on one rank; pure reading."""
    asked = Path(keys["path"]).expanduser()
    if not asked.exists():
        formats.detect(asked)
    weights, name = str(keys.get("weights", "param")), str(keys.get("format", "auto"))
    step = keys.get("step", "latest")
    folder = _here(asked, weights, name)
    beside = folder is None or keys.get("universal")  # a model beside the run it is of
    tracked = _tracked(asked) if step == "latest" and beside else None
    # beside the last model
    within = step not in ("latest", _said(asked.name)) and asked.is_dir() and step in steps(asked)
    if folder is not None and tracked is None and not within:
        return _of_step(_scan(asked, asked, folder, name, keys, config, ()), step)
    if not asked.is_dir():
        found = formats.detect(asked)
        _explain(asked, weights)
        raise CheckpointError(f"{asked} is one of format {found}, not {name}. Leave the key of the format out.")
    if step == "latest" and (named := _named(asked)):
        source = open_source({**keys, "path": named[0]}, config)
        return replace(source, asked=asked, notes=(named[1], *source.notes))
    if tracked is not None:
        path, tracker = tracked
        return _one(asked, path, weights, name, keys, config, (f"{path.name} is the latest by {tracker}",))
    numbered = steps(asked)
    if not numbered:
        _explain(asked, weights)
        formats.detect(asked)
        raise CheckpointError(f"No {name} checkpoint at {asked}. {_content(asked)}")
    if step != "latest":
        return _one(asked, choose(asked, [int(step)], None)[int(step)], weights, name, keys, config, ())
    return _latest(asked, numbered, weights, name, keys, config)


def _of_step(source: Source, step: Any) -> Source:
    """Itself, where no other step is asked for than the one it is of."""
    if step in ("latest", source.step):
        return source
    its = "of no step that its name says" if source.step is None else f"of step {source.step}"
    raise UsageError(
        f"source.step={step}: {source.asked} is one checkpoint, {its}, and holds no folder of that step. Leave source.step out, or "
        "give the folder of the steps."
    )


def _named(asked: Path) -> tuple[Path, str] | None:
    """Where there are no steps: the newest of Merak's folders of one day each, or a checkpoint that has a name."""
    if (asked / megatron.TRACKER).is_file() or steps(asked):
        return None
    days = sorted(p for p in asked.iterdir() if DAY.fullmatch(p.name) and p.is_dir())
    if days:
        return days[-1], f"{days[-1].name} is the newest of {len(days)} folders that are named after a day"
    here = next((asked / n for n in NAMED if (asked / n).is_dir()), None)
    return (here, f"{here.name} is the only checkpoint there") if here else None


def _tracked(asked: Path) -> tuple[Path, str] | None:
    """The checkpoint that the trainer's tracker file names, and that file: newer ones were not saved to their end."""
    trackers = (*LATEST, megatron.TRACKER)  # Megatron-DeepSpeed writes both, its folders are DeepSpeed's
    tracker = next((asked / n for n in trackers if (asked / n).is_file()), None)
    if tracker is None:
        return None
    text = contents(tracker)[:256].decode(errors="replace").strip()
    number = text.isascii() and text.isdecimal()
    if tracker.name == megatron.TRACKER and text != "release" and not number:
        raise CheckpointError(f"{tracker} says {text!r}: neither a number nor release. Give source.step=NUMBER.")
    names = [text]
    if tracker.name == megatron.TRACKER:
        count = int(text) if number else 0
        names = [megatron.STEPS.format(count) if number else text, megatron.STEPS.format(count) + merak.ALONE]
        names += [f"global_step{count}", f"global_step_{count}", NAMED[1]]  # Megatron-DeepSpeed's, verl's
    paths = [asked / formats.inside(asked, n, str(tracker)) for n in names]
    path = next((p for p in paths if os.path.isdir(p)), paths[0])  # also of a name that is too long for any folder
    if not os.path.isdir(path):
        raise CheckpointError(
            f"{tracker} says {_shown(text)}, but {_shown(path.name)} is not there. {_content(asked)} Give source.step=NUMBER to take another."
        )
    return path, tracker.name


def _shown(text: str) -> str:
    """A name out of a file, as a message can show it."""
    return (text if text.isprintable() else repr(text))[:80]


def _one(
    asked: Path,
    path: Path,
    weights: str,
    name: str,
    keys: Mapping[str, Any],
    config: str | None,
    notes: tuple[str, ...],
) -> Source:
    """The checkpoint at `path`, and no other."""
    folder = _here(path, weights, name)
    if folder is None:
        _explain(path, weights)
        formats.detect(path)
    return _scan(asked, path, folder or path, name, keys, config, notes)


def _latest(
    asked: Path, numbered: dict[int, Path], weights: str, name: str, keys: Mapping[str, Any], config: str | None
) -> Source:
    newer = [p.name for p in sorted(asked.iterdir()) if nemo.passed(p) and (_said(p.name) or 0) > max(numbered)]
    notes = [f"{name} is passed over as a copy, or for the mark of an unfinished save" for name in newer]
    for number, path in reversed(numbered.items()):
        folder = _here(path, weights, name)
        try:
            if folder is None:
                _explain(path, weights)
                formats.detect(path)
                raise CheckpointError(f"{path} holds no {name} checkpoint.")
            source = _scan(asked, path, folder, name, keys, config, ())
            said = f"step {number} is the latest complete one of {len(numbered)}"
            return replace(source, notes=(*notes, said, *source.notes))
        except CheckpointError as error:
            if isinstance(error, UsageError):
                raise  # what no step can give
            if isinstance(error, Missing) and "elsewhere" in keys and not answers(keys).knows(error):
                raise  # other nodes are asked first
            notes.append(f"step {number} passed over: {error}")
    raise CheckpointError(
        f"{asked} holds {len(numbered)} steps, none of them complete:\n  " + "\n  ".join(reversed(notes))
    )


def _here(path: Path, weights: str, name: str) -> Path | None:
    """The folder that holds the arrays: one inside a training checkpoint, or the path itself."""
    candidates = [path / n for n in INSIDE[weights]] if path.is_dir() else []
    candidates += [path] if weights != "ema" or path.name in INSIDE["ema"] else []
    candidates += [path / n for n in BELOW] if weights == "param" else []
    for folder in candidates:
        if not folder.exists():
            continue
        if name != "auto":
            if formats.load(name).claims(folder):
                return folder
        elif any(formats.load(n).claims(folder) for n in (formats.MASTERS if weights == "master" else formats.FORMATS)):
            return folder
    return None


def _no_masters(folder: Path, name: str) -> UsageError:
    return UsageError(
        f"source.weights=master: of {name} checkpoints ({folder}) only the model's own weights are read, master weights of "
        f"{', '.join(formats.MASTERS)}. Leave it out."
    )


def _explain(path: Path, weights: str) -> None:
    """Why these weights are not there, if others are."""
    if weights == "master" and (folder := _here(path, "param", "auto")) is not None:
        raise _no_masters(folder, formats.detect(folder))
    if weights == "ema" and _here(path, "param", "auto") is not None:
        raise CheckpointError(
            f"{path} has no EMA weights (no {INSIDE['ema'][0]} folder); its plain weights are there: source.weights=param."
        )


def _scan(
    asked: Path,
    path: Path,
    folder: Path,
    name: str,
    keys: Mapping[str, Any],
    config: str | None,
    notes: tuple[str, ...],
) -> Source:
    master = keys.get("weights") == "master"
    name = formats.detect(folder, formats.MASTERS if master else formats.FORMATS) if name == "auto" else name
    if master and name not in formats.MASTERS:
        raise _no_masters(folder, name)
    try:
        catalog = with_optimizers(formats.load(name).scan(folder, keys))
    except CheckpointError as error:
        if not isinstance(error, Missing) and (pointer := formats.lfs_pointer(folder)):
            raise CheckpointError(f"{str(error).rstrip('.')}; {pointer}.") from None
        raise
    if not catalog.entries:
        raise CheckpointError(f"{folder} is a {name} checkpoint without a single tensor.")
    about = catalog.about
    saved = "saved" in about
    notes = (*notes, *about.get("notes", ()))
    found, config_path = ({}, None) if saved and config is None else find_config(folder, path, asked, config)
    found = found or dict(catalog.config)
    if catalog.format == "hf":
        catalog = quantised.readable(catalog, found, keys.get("dtype_of", lambda entry: entry.dtype))
        notes = (*notes, *quantised.described(catalog))
    if saved:  # everything as it was where it was saved
        notes = (*notes, f"{folder} is a saved catalog of {about['folder']}")
        return Source(catalog, Path(about["asked"]), Path(about["folder"]), about["step"], found, None, notes)
    step = _said(path.parent.name if path.name in BELOW else path.name)
    return Source(catalog, asked, folder, step, found, config_path, notes)


def find_config(folder: Path, path: Path, asked: Path, given: str | None) -> tuple[dict[str, Any], Path | None]:
    """config.json or params.json: the given one, else beside the arrays, in `huggingface/`, or above up to the run."""
    if given is not None:
        place = Path(given).expanduser()
        places = [place / n for n in CONFIGS] if place.is_dir() else [place]
        hit = next((p for p in places if p.is_file()), None)
        if hit is None and not place.exists():
            return _preset(given)
        if hit is None:
            raise UsageError(f"model.config={given}: no config.json or params.json there.")
        return read_config(hit), hit
    start = folder if folder.is_dir() else folder.parent
    tops = [start, *start.parents]
    top = asked if asked.is_dir() else asked.parent
    last = tops.index(top) if top in tops else 0
    for place in tops[: last + 2]:
        for candidate in (place / n for n in (*CONFIGS, "huggingface/config.json")):
            if candidate.is_file():
                content = read_config(candidate)
                if {"model_type", "architectures", "hidden_size", "n_layers"} & set(content):
                    return content, candidate
    return {}, None


def _preset(name: str) -> tuple[dict[str, Any], Path]:
    known = configs.presets()
    if name not in known:
        raise UsageError(
            f"model.config={name}: no config.json or params.json there, and no model that is known by name.{nearest(name, known)} "
            f"Known: {', '.join(known)}."
        )
    return known[name], configs.folder("conf") / configs.PRESETS
