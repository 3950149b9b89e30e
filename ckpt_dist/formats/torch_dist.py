"""Megatron-core's distributed checkpoints: a DCP folder with `metadata.json` and `common.pt`, in `iter_NNNNNNN/`.

Facts: megatron-core 0.8 to 0.19; what is written was loaded by 0.16.1. Everything but tensors is in common.pt, since
0.19 in the object `common_state/shard_0_1`. A layer's `_extra_state` objects have to be there, if only as [None]: those
of linear layers, and of Transformer Engine's norms (from its version 2) and attentions (up to megatron-core 0.14).
NeMo puts the model under a key (`model.` in NeMo 1, `module.` in NeMo 2), has no args and no `iter_NNNNNNN/`.

Invariant: tensors are those of `dcp`; this file only adds what Megatron and NeMo keep beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ckpt_dist import megatron, megatron_args, nemo, slots
from ckpt_dist.catalog import Catalog, Entry, Extra
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files import inert, yamls
from ckpt_dist.formats import BESIDE, Layout, Spec, dcp
from ckpt_dist.formats import _megatron_buckets as buckets
from ckpt_dist.formats import torch as pt
from ckpt_dist.formats._megatron_optimizer import Unread
from ckpt_dist.whole import contents

METADATA, COMMON, COMMON_OBJECT = "metadata.json", "common.pt", "common_state/shard_0_1"
STATE = "_extra_state"  # of a layer of Transformer Engine
SETTINGS = "run_config.yaml"  # of Megatron Bridge, which keeps no args
BACKENDS = dict(
    sharded_backend="torch_dist", sharded_backend_version=1, common_backend="torch", common_backend_version=1
)
BUCKETS = re.compile(r"(chained_\d+\.)?optimizer\.distributed\.")
NEMO = {"model": "", "module": "weights/"}  # the key that NeMo 1 and NeMo 2 put a model under, and the folder
AROUND = r"(?:model\.|module\.)*"
LAYER = AROUND + r"(?:(?:en|de)coder\.layers\.(?:\d+\.)?|mtp\.layers\.\d+\.transformer_layer\.)"
LINEAR = re.compile(
    rf"({LAYER}(?:(?:self|cross)_attention|mlp)\.(?:(?:experts\.experts|shared_experts)\.)?linear_\w+"
    rf"|{AROUND}mtp\.layers\.\d+\.eh_proj)\.weight"
)
NORM = re.compile(rf"({AROUND}(?:(?:en|de)coder|mtp)\.(?:.+\.)?(?:\w*layernorm|[eh]norm))\.weight")
PROJECTION = re.compile(rf"({LAYER}(?:self|cross)_attention\.)linear_proj\.weight")


def claims(path: Path) -> bool:
    return path.is_dir() and (path / METADATA).is_file() and (path / ".metadata").is_file()


def scan(path: Path, options: Mapping[str, Any]) -> Catalog:
    """What dcp scans, with the args of the run as its config."""
    catalog: Catalog = dcp.scan(path, options)
    common = common_of(path / COMMON) if (path / COMMON).is_file() else common_in(catalog)
    found = around(catalog, common, _settings(path / SETTINGS) or settings_beside(path))
    master = options.get("weights") == "master"
    if master or "optimizer" in (options.get("keep") or ()):
        found = _with_names(found, options.get("unmatched") != "drop" and not options.get("universal"))
    return slots.masters(found) if master else found


def _with_names(catalog: Catalog, strict: bool) -> Catalog:
    """With what a distributed optimizer has in flat buffers under the names of weights."""
    names = [e.name for e in catalog.entries] + [x.name for x in catalog.extras]
    lost = [n for n in names if BUCKETS.match(n)]
    try:
        return buckets.named(catalog) if lost else catalog
    except Unread as error:
        if not strict:  # what is no optimizer of this model does not make one of the target
            roles = ("state" if BUCKETS.match(e.name) else e.role for e in catalog.entries)
            return replace(
                catalog, entries=tuple(replace(e, role=r) for e, r in zip(catalog.entries, roles, strict=True))
            )
        raise UsageError(
            f"{catalog.root}: {len(lost)} parts of its optimizer, first {lost[0]!r}, name no weights, and cannot be told apart: "
            f"{error}. Have Megatron save with --dist-ckpt-optim-fully-reshardable, or use keep=[weights] and the model's own."
        ) from None


def around(catalog: Catalog, common: Mapping[str, Any], settings: Mapping[str, Any]) -> Catalog:
    """The catalog of a dcp folder as Megatron's: the args of the run, the states of layers, and whether NeMo wrote it."""
    states = {x.name: x for x in catalog.extras if STATE in x.name}
    extras = tuple(x for x in catalog.extras if x.name not in states and x.name != COMMON_OBJECT)
    extras += tuple(Extra(k, (k,), "optimizer", common[k]) for k in BESIDE["torch_dist"] if k in common)
    about = {**catalog.about, "states": states, "lightning": of_lightning(common)}
    return replace(catalog, format="torch_dist", extras=extras, config=args_of(common) or settings, about=about)


def of_lightning(common: Mapping[str, Any]) -> bool:
    return "pytorch-lightning_version" in common or "state_dict" in common


locate = dcp.locate  # addresses of tensors are in the same headers


def common_in(catalog: Catalog) -> Mapping[str, Any]:
    """What newer versions of Megatron have instead of common.pt: an object among the others."""
    held = next((dcp.read_extra(catalog, x) for x in catalog.extras if x.name == COMMON_OBJECT and x.address), None)
    return _dict(held[0] if isinstance(held, list) and held else {}, Path(catalog.root))


def common_of(file: Path, base: int = 0, length: int | None = None) -> Mapping[str, Any]:
    """What is in a common.pt, by the allow-list."""
    tree, storages = pt.open_archive(file, base, length)
    return _dict(pt.with_small(tree, file, storages), file)


def _dict(tree: Any, where: Path) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{where}: {COMMON} holds {type(tree).__name__}, not a dict. Is it of another tool?")
    return tree


def _settings(path: Path) -> dict[str, Any]:
    """Args by a run's settings, which have NeMo 2's words for a model."""
    return nemo.settings(yamls.table(contents(path, yamls.MOST), str(path))) if path.is_file() else {}


def settings_beside(path: Path) -> dict[str, Any]:
    """Args by the first of NeMo's files that has them. One that is not plain YAML says nothing."""
    for file in (path / name for name in nemo.SETTINGS):
        if file.is_file() and (found := settings_in(contents(file, yamls.MOST))):
            return found
    return {}


def settings_in(text: bytes) -> dict[str, Any]:
    """Args by the content of one such file."""
    try:
        return nemo.settings(yamls.table(text, ""))
    except CheckpointError:
        return {}


def args_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The args of a run as plain values; what is of a class is left out."""
    state = tree.get("args")
    fields = state[-1] if isinstance(state, inert.Record) and len(state) else state
    return {k: v for k, v in fields.items() if megatron.plain(v)} if isinstance(fields, dict) else {}


def lay_out(spec: Spec) -> Layout:
    """A dcp folder with the objects that Megatron asks for, and what is beside them."""
    _one_style([e.name for e in spec.entries])
    held = held_states(spec, "torch_dist")
    objects = {name: Extra(name, (name,), "state", [None]) for name in layer_states(spec, held)} | (held or {})
    options = {**spec.options, "placement": None}  # rows are not what its ranks load, so every node has all of them
    beside = {x.name: x.value for x in spec.extras if x.name in BESIDE["torch_dist"]}
    planned = spec.source is not None and "saved" in spec.source.about  # a saved catalog has no settings
    if "optimizer" not in beside and not planned and any(e.role == "optimizer" for e in spec.entries):
        raise UsageError(
            "target.format=torch_dist: the source has an optimizer's moments and not its settings (param_groups), which "
            "Megatron asks for. Use keep=[weights]."
        )
    extras = [x for x in spec.extras if x.name not in beside]
    layout = dcp.lay_out(replace(spec, extras=(*extras, *objects.values()), options=options))
    return placed(spec, layout, "torch_dist")


def _one_style(names: Sequence[str]) -> None:
    """Megatron asks for all weights of a block's layers in one tensor each, or for those of each layer."""
    one = next((n for n in names if re.match(r"decoder\.layers\.\d", n)), None)
    every = next((n for n in names if re.match(r"decoder\.layers\.\D", n)), None)
    if one and every:
        raise UsageError(
            f"target.format=torch_dist: {one!r}, which is kept as it is, is of one layer, {every!r} of all: Megatron would not find "
            "the first. Give target.dialect=megatron, which has a key for each layer, or model=identity."
        )


def placed(spec: Spec, layout: Layout, backend: str) -> Layout:
    """The same files where Megatron or NeMo look for them, with metadata.json, common.pt and what is beside these."""
    step = int(spec.options.get("step") or 1)
    key = key_of(spec)
    folder = f"{megatron.STEPS.format(step)}/" if key is None else NEMO[key]
    late = {**layout.late, METADATA: json.dumps({**BACKENDS, "sharded_backend": backend}).encode}
    late |= (
        {COMMON: partial(_made_common, spec, step)} if key is None else {COMMON: partial(_common_of_nemo, spec, step)}
    )
    late = {folder + name: make for name, make in late.items()}
    if key is None:
        late[megatron.TRACKER] = lambda: str(step).encode()
    else:
        late |= {name: partial(contents, file) for name, file in _context(spec, folder).items()}
    catalog = replace(layout.catalog, format=backend, files=tuple(folder + f for f in layout.catalog.files))
    return replace(layout, catalog=catalog, late=late)


def key_of(spec: Spec) -> str | None:
    """The key of NeMo that the weights are under: `module` of `module.decoder.final_layernorm.weight`."""
    keys = {e.name.partition(".")[0] for e in spec.entries if e.role == "weight"}
    return next((k for k in NEMO if keys == {k}), None)


def _made_common(spec: Spec, step: int) -> bytes:
    args = dict(spec.options.get("args") or {})
    args |= dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, ckpt_format="torch_dist")
    args |= megatron_args.divisor(args, 1)
    common: dict[str, Any] = {"iteration": step, "checkpoint_version": 3.0}
    if any(e.role == "optimizer" for e in spec.entries):  # a run asks for it unless args say that it was not saved
        args["no_save_optim"] = False
        common |= {x.name: x.value for x in spec.extras if x.name in BESIDE["torch_dist"]}
    return pt.archive(common | {"args": inert.Namespace(args)}, "common")


def _common_of_nemo(spec: Spec, step: int) -> bytes:
    """As it is in the source, where NeMo wrote that: settings of classes that only NeMo can read are among it."""
    file = Path(spec.source.root) / COMMON if spec.source else None
    if spec.source and file and spec.source.about.get("lightning") and file.is_file():
        return contents(file)
    made = {"state_dict": {}, "epoch": 0, "global_step": step, "pytorch-lightning_version": "2.4.0"}
    return pt.archive(made, "common")


def _context(spec: Spec, folder: str) -> dict[str, Path]:
    """What NeMo 2 keeps beside `weights/`: the model's settings and its tokenizer. A link is left out."""
    held = folder and spec.source and spec.source.about.get("lightning")
    above = Path(spec.source.root).parent / "context" if held and spec.source else None
    if above is None or not above.is_dir():
        return {}
    files = sorted(p for p in above.rglob("*") if p.is_file() and not p.is_symlink())
    return {f"context/{p.relative_to(above)}": p for p in files}


def held_states(spec: Spec, backend: str) -> dict[str, Any] | None:
    """The states of layers that a source has under the same names: they are passed on. None if its names are others."""
    source = spec.source
    if (
        source is None
        or source.format != backend
        or not {e.name for e in spec.entries} <= {e.name for e in source.entries}
    ):
        return None
    return dict(source.about.get("states", {}))


def layer_states(spec: Spec, held: Mapping[str, Any] | None) -> list[str]:
    """The `_extra_state` of modules, without which Megatron does not load them: `KEY._extra_state/shard_0_4`. A source of
    the same names has those of Transformer Engine itself, if its modules are of that."""
    engine = held is None and spec.options.get("spec") != "local" and "local" not in str(spec.options.get("dialect"))
    return [name for entry in spec.entries for name in _objects(entry, engine)]


def _objects(entry: Entry, engine: bool) -> Iterator[str]:
    """Those of the module that a tensor is of, with Transformer Engine's also of the attention before it: one for each
    layer (and expert) of the tensor, by offset and count."""
    name = entry.name
    found = LINEAR.fullmatch(name) or (NORM.fullmatch(name) if engine else None)
    if found is None:
        return
    modules = [found[1], *(hit[1] + "core_attention" for hit in [PROJECTION.fullmatch(name)] if hit and engine)]
    stacked = re.search(r"\.layers\.(?!\d)", name) is not None
    counts = [entry.shape[0]] if stacked else []
    if ".experts.experts." in name:
        counts.append(entry.shape[1 if stacked else 0])
    places = product(*map(range, counts)) if counts else [(0,)]
    count = ".".join(map(str, counts or [1]))
    yield from (f"{m}.{STATE}/shard_{'.'.join(map(str, place))}_{count}" for place in places for m in modules)
