"""The configuration of a verb: defaults from `conf/`, values from a person, one check for both ways in.

Hydra composes the files of `conf/`. Values never pass through Hydra's grammar, so paths with `=`, commas, `$` or
quotes need no care: a word of the command line is split at its first `=`, and the reader of its key (`keys.py`)
does the rest. `load` (command line) and `fill` (Python) both end in `_checked`.

Invariant: a configuration that leaves this file is complete, and every value in it has passed its key's reader.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from ckpt_dist import keys
from ckpt_dist.configs import folder as folder
from ckpt_dist.errors import UsageError, nearest

VERBS = ("convert", "average", "merge", "inspect", "verify", "seed")
MISSING = "???"  # OmegaConf's mark of a value that has to be given
SHORT = {"model": "model.family"}  # model=NAME
EXAMPLES = {
    "source.path": "source.path=run/step-1000",
    "target.path": "target.path=model",
    "a.path": "a.path=run/step-1000",
    "model.config": "model.config=config.json",
}
EXCLUSIVE = (("steps", "last"),)
WORD = re.compile(r"(?P<sign>~|\+{0,2})(?P<key>[^=]*)(?P<given>=(?P<value>.*))?", re.DOTALL)
YAML_LINE = re.compile(r"( *)(- )?([\w./@]+)(:)? *([^#]*?) *(?:# (.*))?")

HYDRA = Lock()  # there is one for all threads

Flat = dict[str, Any]


# ---- defaults


def defaults(verb: str, recipe: str | None = None) -> dict[str, Any]:
    """What `conf/<verb>.yaml` says, and a recipe on top of it, nested; values that have to be given are `???`."""
    with HYDRA:
        return copy.deepcopy(_composed(verb, recipe))


@lru_cache
def _composed(verb: str, recipe: str | None) -> dict[str, Any]:
    from hydra import compose
    from omegaconf import OmegaConf

    with _own_hydra(folder("conf")):
        cfg = OmegaConf.to_container(compose(verb, [f"+recipe@_global_={recipe}"] if recipe else []), resolve=True)
    assert isinstance(cfg, dict)
    return {str(k): v for k, v in cfg.items()}


@contextmanager
def _own_hydra(conf: Path) -> Iterator[None]:
    """Hydra for our files, without a trace in a caller's program that uses Hydra itself."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import VersionBase

    theirs, base = GlobalHydra.instance(), VersionBase.instance()
    VersionBase.set_instance(copy.copy(base))
    running = theirs.hydra
    theirs.clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            yield
    finally:
        theirs.hydra = running
        GlobalHydra.set_instance(theirs)
        VersionBase.set_instance(base)


# ---- values


def load(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """From the words of a command line: `load("inspect", ["source.path=run/step=10"])`"""
    return fill(verb, dict(_split(verb, word) for word in overrides))


def fill(verb: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """From Python, nested or dotted: `fill("inspect", {"source": {"path": "run"}, "json": True})`"""
    given = _known(verb, values)
    return _nested(_checked(verb, _usual(verb, given) | given))


def preview(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration as it would be read, in a person's own words; what has still to be given is `???`."""
    given = _known(verb, dict(_split(verb, word) for word in overrides))
    for key, value in given.items():
        _read(verb, key, value, None)
    return _nested(_usual(verb, given) | given)


def _usual(verb: str, given: Flat) -> Flat:
    """What the keys are where nothing is given: the verb's own defaults, or those of the recipe that is."""
    recipe = _read(verb, "recipe", given["recipe"], None) if "recipe" in given else None
    return _flat(verb, defaults(verb, recipe))


def sweep(verb: str, overrides: Sequence[str]) -> list[list[str]]:
    """`["last=2,4", "name=a"]` -> `[["last=2", "name=a"], ["last=4", "name=a"]]`; a path with a comma stays one."""
    return [list(words) for words in itertools.product(*(_choices(verb, word) for word in overrides))]


def _choices(verb: str, word: str) -> list[str]:
    key, value = _split(verb, word)
    if key.endswith("path") and Path(value).exists():
        return [word]
    return [f"{key}={value}" for value in keys.pieces(value)]


def _split(verb: str, word: str) -> tuple[str, str]:
    """A word of the command line as (key, value); the signs `+` and `++` say nothing here."""
    found = WORD.fullmatch(word)
    assert found
    key, value = found["key"].strip(), found["value"]
    if found["sign"] == "~":
        _known(verb, {key: None})
        raise UsageError(f"{word!r} would remove a key, and {verb} needs all. Leave it out to have its default.")
    if not found["given"]:
        hint = f" Write {_example(verb, key)}." if key in _plain_keys(verb) else nearest(key, _plain_keys(verb))
        hint = hint or f" A checkpoint is given as {_first_path(verb)}={word}."
        raise UsageError(f"{word!r} is not of the form key=value.{hint} `ckpt-dist {verb} --help` lists the keys.")
    return key, value


def without_dashes(verb: str, word: str) -> str:
    """The hint for `--dry-run` or `--source.path=run`: the same as a word of ours."""
    key, _, value = word.lstrip("-").partition("=")
    key = key.replace("-", "_")
    example = f"{key}={value}" if value else _example(verb, key if key in _plain_keys(verb) else _first_path(verb))
    return f" Keys have no dashes: {example}."


def _example(verb: str, key: str) -> str:
    kind = keys.kind(verb, key)
    return EXAMPLES.get(key) or f"{key}={'true' if kind is keys.FLAG else '...'}"


def _known(verb: str, values: Mapping[str, Any]) -> Flat:
    given: Flat = {}
    for key, value in _pairs(verb, values):
        name = SHORT.get(key, key)
        if name not in _plain_keys(verb):
            raise UsageError(_unknown(verb, name))
        if name in given:
            raise UsageError(f"{name} is given twice, as {given[name]!r} and as {value!r}. Leave one out.")
        given[name] = value
    return given


def _unknown(verb: str, key: str) -> str:
    known = _plain_keys(verb)
    under = [k for k in known if k.startswith(key + ".")]
    same = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    if under:
        return f"{key!r} is a group of keys. Give one of them: {', '.join(under)}."
    hint = f" Did you mean {' or '.join(map(repr, same))}?" if same else nearest(key, known)
    if not hint and key not in keys.KEYS:
        hint = nearest(key.rpartition(".")[2], {k.rpartition(".")[2] for k in known})
    if key.startswith("hydra"):
        hint = " Hydra's own settings are not used: no log files or folders are made."
    elsewhere = "" if hint or key not in keys.KEYS else " Other verbs have it."
    return f"{verb} has no key {key!r}.{hint}{elsewhere} `ckpt-dist {verb} --help` lists the keys."


def _checked(verb: str, flat: Flat) -> Flat:
    """Every value read, or one error that names the key, the value and what fits."""
    lacking = [key for key, value in flat.items() if isinstance(value, str) and value == MISSING]
    if lacking:
        plural = "are" if len(lacking) > 1 else "is"
        example = " ".join(_example(verb, key) for key in lacking)
        raise UsageError(f"{' and '.join(lacking)} {plural} missing. For example: ckpt-dist {verb} {example}")
    before = _flat(verb, defaults(verb))
    done = {key: _read(verb, key, value, before[key]) for key, value in flat.items()}
    for one, other in EXCLUSIVE:
        if done.get(one) is not None and done.get(other) is not None:
            raise UsageError(f"{one}={flat[one]} and {other}={flat[other]} exclude each other. Leave one out.")
    return done


def _read(verb: str, key: str, value: Any, default: Any) -> Any:
    """The value of one key. `null` means the default where that is nothing."""
    if default is None and (value is None or (isinstance(value, str) and value in ("null", "None"))):
        return None
    kind = keys.kind(verb, key)
    try:
        return kind.read(value)
    except (ValueError, TypeError, KeyError):
        shown = "nothing (an empty variable?)" if isinstance(value, str) and not value else repr(value)
        hint = _meant(value, kind.choices) if isinstance(value, str) else ""
        raise UsageError(f"{key} is {shown}.{hint} Give {kind.says}.") from None


def _meant(value: str, choices: tuple[str, ...]) -> str:
    """What other tools call it, or the nearest; of a list the first word that is no choice."""
    words = [keys.bare(w) for w in keys.pieces(keys.inside(value, "[]") or value)]
    word = next((w for w in words if w not in choices), value)
    ours = keys.WORDS.get(word.lower().replace("-", "_"))
    return f" Here it is called {ours!r}." if ours in choices else nearest(word, choices)


# ---- shapes


@lru_cache
def _plain_keys(verb: str) -> tuple[str, ...]:
    return tuple(listing(verb))


def _first_path(verb: str) -> str:
    return next(k for k in _plain_keys(verb) if k.endswith(".path"))


def _pairs(verb: str, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; a dict under a known key is that key's value (`target.dtype` may be rules)."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in _plain_keys(verb) or not isinstance(value, Mapping):
            yield key, value
        else:
            yield from _pairs(verb, value, key + ".")


def _flat(verb: str, values: Mapping[str, Any]) -> Flat:
    return dict(_pairs(verb, values))


def _nested(flat: Flat) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        node = out
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return out


# ---- help


def listing(verb: str) -> dict[str, tuple[str, str]]:
    """key -> (default as written, comment), from the text of the files; works without Hydra."""
    out: dict[str, tuple[str, str]] = {}
    for key, value, comment in _lines(verb, ""):
        out[key] = (value, comment or out.get(key, ("", ""))[1])
    return out


def header(verb: str) -> list[str]:
    """What the verb does and its examples: the comment that its file opens with."""
    lines = (folder("conf") / f"{verb}.yaml").read_text().splitlines()
    return [line[2:] for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]


def recipes(verb: str) -> dict[str, str]:
    """recipe -> what it is for, of a verb that has any."""
    names = keys.kind(verb, "recipe").choices if "recipe" in listing(verb) else ()
    return {name: header(f"recipe/{name}")[0] for name in names}


def _lines(name: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    path: list[str] = []
    for line in (folder("conf") / f"{name}.yaml").read_text().splitlines():
        found = YAML_LINE.fullmatch(line)
        if found is None or found[3] == "_self_":
            continue
        if found[2]:
            file, _, package = found[3].partition("@")
            yield from _lines(file, "" if package == "_global_" else package + ".")
            continue
        path[len(found[1]) // 2 :] = [found[3]]
        if found[5]:
            yield prefix + ".".join(path), found[5], found[6] or ""
