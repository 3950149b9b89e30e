"""What a target has beside its tensors: config, tokenizer, training state, and the record of the job that made it.

Invariant: what cannot be carried or translated is listed in the report; nothing is left out without a word.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ckpt_dist import __version__, assets, configs, design, formats, megatron, megatron_args
from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.engine.group import Group
from ckpt_dist.errors import CheckpointError, listed, translating
from ckpt_dist.files import pickles
from ckpt_dist.formats import Layout
from ckpt_dist.model import Model
from ckpt_dist.report import Report
from ckpt_dist.spelling import rules

Config = Mapping[str, Any]


def extras(group: Group, m: Model, cfg: Config, stays: bool) -> tuple[list[Extra], dict[str, list[str]]]:
    """What is no tensor: carried where it was asked for and the target can hold it, else listed as dropped. What modules keep
    in a model's own dict is state where names stay, and has no name where they do not."""
    chosen: list[Extra] = []
    lost: dict[str, list[str]] = {}
    wanted = set(cfg.get("keep") or ["weights"])
    weights = [e for e in m.catalog.entries if e.role == "weight"]
    dicts, heads = {e.path[:-1] for e in weights} - {()}, {_head(e) for e in weights if len(e.path) < 2}
    format = cfg["target"]["format"]
    holds = format in formats.NESTED or format == m.catalog.format == "deepspeed"
    for extra in m.catalog.extras:
        among = _head(extra) in heads or any(extra.path[:k] in dicts for k in range(len(extra.path)))
        held = stays and "state" in wanted and holds and m.catalog.format != "deepspeed"
        if extra.role == "weight" and extra.path and (held or not among):
            extra = replace(extra, role="state")
        if "saved" in m.catalog.about and extra.role in wanted:
            lost.setdefault("its value is not in the saved catalog", []).append(extra.name)
        elif extra.role == "weight":
            lost.setdefault("not a tensor", []).append(extra.name)
        elif extra.role not in wanted or not (holds or extra.name in formats.BESIDE.get(format, ())):
            lost.setdefault(f"{extra.role} (keep={','.join(sorted(wanted))})", []).append(extra.name)
        else:
            chosen.append(extra)
    carried: list[Extra] = []
    for extra in _read(group, m, chosen, format):
        if extra.address is None and not pickles.writable(extra.value):
            lost.setdefault("of a class that is not written", []).append(extra.name)
            if any(type(part) is int for part in extra.path):  # what comes after it in a list stays there
                carried.append(replace(extra, value=None))
        else:
            carried.append(extra)
    return carried, lost


def lacking(report: Report, m: Model, carried: Sequence[Extra], cfg: Config) -> None:
    """Say where something was asked for, and nothing of it is carried: a warning where there is some."""
    there = {e.role for e, name in zip(m.catalog.entries, m.names, strict=True) if name is not None}
    there |= {x.role for x in carried}
    stored = {e.role for e in m.catalog.entries} | {x.role for x in m.catalog.extras}
    for role, names in assets.aside(m.source).items():
        if role not in (cfg.get("keep") or ()) or role in there:
            continue
        held = role in stored
        more = f"; {listed(names, 3)} beside it {'is' if len(names) == 1 else 'are'} not read with it" if names else ""
        text = f"keep={role}: {m.source.folder} has none{' that is carried' if held else ''}{more}"
        (report.warnings if held or names else report.notes).append(text)


def aside(m: Model) -> list[str]:
    """A note of what lies beside the weights, and is no part of what was read."""
    names = [n for found in assets.aside(m.source).values() for n in found]
    return [f"beside the weights, and not read with them: {listed(names, 3)}"] if names else []


def _head(x: Entry | Extra) -> str:
    """The first word of a name."""
    return str(x.path[0] if x.path else x.name).partition(".")[0]


def with_states(group: Group, m: Model, format: str) -> Catalog:
    """A source's catalog with the states of layers that torch_dist passes on, and which lie in its files."""
    states = m.catalog.about.get("states")
    if not states or "saved" in m.catalog.about or not format == m.catalog.format == "torch_dist":
        return m.catalog
    found = dict(zip(states, _read(group, m, list(states.values()), format), strict=True))
    return replace(m.catalog, about={**m.catalog.about, "states": found})


def _read(group: Group, m: Model, chosen: Sequence[Extra], format: str) -> list[Extra]:
    """The same with what lies in files: its value for `torch`, else the bytes. Each is read by a node that sees it."""
    dcp, there = formats.load("dcp"), [k for k, x in enumerate(chosen) if x.address is not None]
    if not there:
        return list(chosen)

    def seen(wanted: Sequence[int]) -> dict[int, Any]:
        read = dcp.read_extra if format == "torch" else dcp.raw_extra
        files = {k: Path(m.catalog.root) / m.catalog.files[chosen[k].address[0]] for k in wanted}  # type: ignore[index]
        return {k: read(m.catalog, chosen[k]) for k, file in files.items() if file.is_file()}

    values = group.on_first(lambda: seen(there))
    if away := [k for k in there if k not in values]:
        for found in group.gather(group.together(lambda: seen(away if group.local_rank == 0 else []))):
            values |= {k: v for k, v in found.items() if k not in values}
    for k in away:
        if k not in values:
            file = m.catalog.files[chosen[k].address[0]]  # type: ignore[index]
            raise CheckpointError(f"{m.catalog.root}: {file}, which holds {chosen[k].name}, is on no node.")
    bare = format == "torch"
    return [
        replace(x, value=values[k], address=None if bare else x.address) if k in values else x
        for k, x in enumerate(chosen)
    ]


def account(report: Report, models: Sequence[Model], d: design.Design, lost: Mapping[str, Sequence[str]]) -> None:
    """Each stored name is mapped, carried or dropped, and the report says by which rule."""
    m, made = models[0], {e.name for e in d.target.entries}
    rules = {**m.dropped, **{rule: (*m.dropped.get(rule, ()), *names) for rule, names in lost.items()}}
    again = {f"{m.around}.{c}".lstrip(".") for c in m.copies if any(f".{n}".endswith(f".{c}") for n in made)}
    mapped = sum(n is not None for n in m.names) + len(again)
    if m.source.reader is None:
        report.notes.append(f"{mapped} of {len(m.names)} stored tensors are written")
    for rule, names in rules.items():
        if gone := [n for n in names if n not in again]:
            report.notes.append(f"dropped, {rule}: {listed(gone, 3)}")
    report.notes += aside(m)


def small_files(m: Model, d: design.Design, layout: Layout, cfg: Config, report: Report) -> dict[str, bytes | Path]:
    """Config, tokenizer and processor files of a target that is a model's folder."""
    found, made = assets.assets(m.source), {*layout.catalog.files, *layout.late, *layout.own}
    adapter = formats.is_adapter(m.catalog)
    if not adapter and assets.ADAPTER in found:
        del found[assets.ADAPTER]
        report.warnings.append(
            f"the adapter beside the model ({assets.ADAPTER}) is left out; give its own file as source.path"
        )
    small: dict[str, bytes | Path] = {n: p for n, p in found.items() if n not in made}
    if left := assets.left(m.source):
        report.notes.append(f"beside the model and not carried: {listed(left, 6)}")
    if cfg["target"]["format"] == "meta":
        small = {n: p for n, p in small.items() if n.startswith("tokenizer")}
        with translating(_settings(m)):
            params = _params_json(m, report)
        return {**small, "params.json": _text(_sized(params, cfg, m))} if params else small
    with translating(_settings(m)):
        config = {} if adapter else _config_json(m, d, report)
    if config and cfg["target"]["vocab_size"] is None and _unlike_rows(config, m, report):
        config["vocab_size"] = m.sizes["v"]
    return {**small, "config.json": _text(_sized(config, cfg, m))} if config else small


def led(m: Model, small: Mapping[str, bytes | Path]) -> list[str]:
    """What to say of files that links take from outside the source's folders, and from outside a hub's cache of it: who
    made a checkpoint may have meant a file of whoever reads it."""
    config = m.source.config_path
    tops = [top.resolve() for top in (m.source.folder, *([config.parent] if config else []))]
    near = [*tops, *(top.parent.parent / "blobs" for top in tops if top.parent.name == "snapshots")]
    places = {n: p.resolve() for n, p in small.items() if isinstance(p, Path)}
    names = [n for n, p in places.items() if not any(p.is_relative_to(top) for top in near)]
    return [f"{listed(names, 3)}: carried from where links lead, first from {places[names[0]]}"] if names else []


def _settings(m: Model) -> Path:
    """Where a source's config was found: the file, or the checkpoint that holds it."""
    return m.source.config_path or m.source.folder


def _sized(config: Config, cfg: Config, m: Model) -> Config:
    """Both files call the vocabulary the same; one that was asked for replaces the source's."""
    return config if cfg["target"]["vocab_size"] is None else {**config, "vocab_size": m.sizes["v"]}


def _unlike_rows(config: Config, m: Model, report: Report) -> bool:
    """Whether a config.json says another vocabulary than is stored, such as one that ranks of Megatron have padded: with
    it transformers does not load the model."""
    said, rows = config.get("vocab_size"), m.sizes.get("v", 0)
    if type(said) is not int or not rows or said == rows:
        return False
    report.warnings.append(
        f"config.json says a vocabulary of {said}, {rows} rows are stored and written: vocab_size becomes {rows}. "
        f"target.vocab_size={said} writes {said} rows"
    )
    return True


def _text(config: Config) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _config_json(m: Model, d: design.Design, report: Report) -> dict[str, Any]:
    config = dict(m.source.config)
    elements: Counter[str] = Counter()
    for entry in d.target.entries:
        elements[entry.dtype] += prod(entry.shape) if "float" in entry.dtype else 0
    main = max(sorted(+elements), key=lambda dtype: elements[dtype], default=None)
    if configs.is_params(config) and m.family and {"v", "f"} <= set(m.sizes):
        head = any("head" in r.weights for r in d.target.rules if r)
        config = translated(configs.to_hf(config, m.sizes, tied=not head), "params.json", report)
        config["torch_dtype"] = main  # the word that every version of transformers reads
    if megatron.is_args(config) and m.family and "v" in m.sizes:
        weights = _layers(d)
        kind = megatron_args.model_type(m.family.model_types, weights)
        if kind in megatron_args.CLASSES:
            made = megatron_args.to_hf(config, kind, m.sizes, "head" not in weights, weights)
            config = translated(made, "args", report)
            config["torch_dtype"] = main
    for axis, key in m.family.further.items() if m.family else ():
        there = axis in {a for rule in rules(m) if rule for a, _ in rule.fixed}
        if there or config.get(key):
            config[key] = m.sizes[axis] if there else 0
    if config.pop("quantization_config", None):
        report.notes.append("quantization_config is left out of config.json: what is written is not quantised")
    if not configs.is_hf(config):
        report.warnings.append("no config.json was found, so none is written; transformers needs one: model.config=DIR")
        return {}
    for key in {"dtype", "torch_dtype"} & set(config) or {"dtype"}:
        if main and config.get(key) != main:
            config[key] = main
    if any("both are kept" in w for w in report.warnings):
        config["tie_word_embeddings"] = False
    return config


def _params_json(m: Model, report: Report) -> dict[str, Any]:
    config = dict(m.source.config)
    if configs.is_hf(config) and {"v", "f"} <= set(m.sizes):
        return translated(configs.to_meta(config, m.sizes), "config.json", report)
    if not configs.is_params(config):
        report.warnings.append("no params.json or config.json was found, so none is written: give model.config=PATH")
        return {}
    return config


def flavour(m: Model) -> str | None:
    """What torchtitan builds the model as, by its config, if that is known."""
    with translating(_settings(m)):
        return configs.flavour(m.source.config)


def unlike_titan(d: design.Design, m: Model) -> str:
    """What of a config.json torchtitan's Llama has no code for, in words; its names alone would not tell."""
    config = m.source.config
    if d.dialect != "torchtitan" or m.family is None or m.family.name != "llama" or not configs.is_hf(config):
        return ""
    usual = {k: (None, v) for k, v in configs.IMPLIED.items()} | {"model_type": (None, *m.family.model_types)}
    odd = [f"{k}={config[k]!r}" for k, values in usual.items() if config.get(k) not in values]
    return f"torchtitan's Llama does not compute what config.json says: {', '.join(odd)}" if odd else ""


def args(d: design.Design, m: Model) -> configs.Translation:
    """What Megatron calls args, for a model of a known family."""
    weights = _layers(d)
    if m.unresolved:
        return configs.Translation(
            dict(megatron_args.SPLIT),
            (),
            (f"{m.unresolved} are not known, so args do not say them: give model.config=PATH",),
        )
    config, tied = m.source.config, "head" not in weights
    with translating(_settings(m)):
        if configs.is_params(config) and {"v", "f"} <= set(m.sizes):
            config = configs.to_hf(config, m.sizes, tied).config
        made = megatron_args.to_args(config, m.sizes, weights, tied)
    if megatron.is_args(config):
        return made
    adds = {"apply_layernorm_1p": True} if centred(m) else {}
    return replace(made, config={**made.config, **adds, **_tokenizer(m)}, lost=(*_odd(config, m, tied), *made.lost))


def centred(m: Model) -> bool:
    """Whether norms of this family are stored as what is added to one."""
    return m.family is not None and m.family.init.get("*norm") == "zeros"


def _layers(d: design.Design) -> dict[str, set[int]]:
    """The weights that a target has, and those of its layers in whose names each stands."""
    found: dict[str, set[int]] = {}
    for rule in filter(None, d.target.rules):
        for weight in rule.weights:
            found.setdefault(weight, set()).update(k for axis, k in rule.fixed if axis == "l")
    return found


def _odd(config: Config, m: Model, tied: bool) -> list[str]:
    """What Megatron would compute of a model otherwise than its config.json says, though its names are those of a family."""
    if m.family is None or not configs.is_hf(config):
        return []
    kind, types = config.get("model_type"), m.family.model_types
    shared = (
        [] if kind in (None, *types) else [f"model_type={kind!r}, whose names are also those of {', '.join(types)}"]
    )
    alone = tied and not design.tied(m)
    return shared + (["no output layer, for none is stored: args say it is the embedding"] if alone else [])


def _tokenizer(m: Model) -> dict[str, str]:
    """What Megatron reads a folder's tokenizer with, where there is one."""
    file = next((p for n, p in assets.assets(m.source).items() if n.startswith("tokenizer")), None)
    return dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(file.parent.absolute())) if file else {}


def translated(t: configs.Translation, where: str, report: Report) -> dict[str, Any]:
    report.guesses += t.guesses
    if t.lost:
        report.warnings.append(f"{where}: not translated: {', '.join(t.lost)}")
    return t.config


def record(
    cfg: Config, about: Config, models: Sequence[Model], given: Sequence[float], prints: Config, report: Report
) -> dict[str, bytes]:
    """`ckpt_dist.json`, and for an average `average.yaml`: recipe, sources, fingerprints."""
    if cfg["target"]["format"] in formats.ALONE:
        return {}
    beside = (
        f"{Path(cfg['target']['path']).name}." if cfg["target"]["format"] == "nemo" else ""
    )  # of files among others
    recipe = {"ckpt_dist": __version__, **about, "recipe": _plain(cfg), **prints, "report": report.to_dict()}
    found = {f"{beside}ckpt_dist.json": (json.dumps(recipe, indent=2, default=str) + "\n").encode()}
    if about["verb"] == "average":
        import yaml

        each = [
            {"path": str(m.source.folder.absolute()), "step": m.step, "weight": w, "fingerprint": f}
            for m, w, f in zip(models, given, prints["source_fingerprints"], strict=True)
        ]
        document = {
            "ckpt_dist": __version__,
            "name": about["name"],
            "fingerprint": prints["fingerprint"],
            "sources": each,
            "recipe": _plain(cfg),
        }
        found[f"{beside}average.yaml"] = yaml.safe_dump(document, sort_keys=False).encode()
    return found


def _plain(cfg: Any) -> Any:
    return json.loads(json.dumps(cfg, default=str))
