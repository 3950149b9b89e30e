"""Contract: for every family, what transformers saves and what is in its memory are the same model to us, bit for bit;
transformers loads what we write and computes the same. A family is a table: one made here works like the others.
Not checked: families in the names of other frameworks than transformers (test_real has Llama's).
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file, save_model

import ckpt_dist
from ckpt_dist import families, family, formats
from ckpt_dist.cli import main
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.pattern import parse
from tests.conftest import ROOT, torchrun

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
)
LATENT = dict(
    q_lora_rank=20, kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=14, n_group=2, topk_group=1
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, **EXPERTS, head_dim=16, num_experts=12, mlp_only_layers=[0]
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=16),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=64),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        **LATENT,
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=2,
        first_k_dense_replace=1,
    ),
    "deepseek_v3_lite": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4, **LATENT, "q_lora_rank": None},
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=0,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "llama": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama_plain": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
}
NAMES = {"gemma2": "gemma", "gemma3_text": "gemma", "deepseek_v3_lite": "deepseek_v3"} | dict.fromkeys(
    ("llama_plain", "qwen2", "mistral"), "llama"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A model of transformers with random values, also where it would begin with ones or zeros, and as it is saved."""
    known: dict[str, tuple[Any, Path]] = {}

    def of(name: str) -> tuple[Any, Path]:
        if name not in known:
            torch.manual_seed(len(known))
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
            with torch.no_grad():
                for value in model.state_dict().values():
                    if value.is_floating_point():
                        value.copy_(torch.randn_like(value) * 0.2)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder / "hf")
            dcp.save(dict(model.state_dict()), checkpoint_id=folder / "memory", no_dist=True)
            known[name] = model, folder
        return known[name]

    return of


def equal(one: Path, two: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_becomes_what_transformers_saves(
    name: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """The state_dict of a running model, as FSDP2 and trainers save it, has other names and other shapes of experts."""
    model, folder = made(name)
    out = tmp_path / "out"
    report = ckpt_dist.convert(folder / "memory", out, format="hf", **{"model.config": str(folder / "hf")}, quiet=True)
    assert equal(out, folder / "hf"), report
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.arange(1, 33).reshape(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_dialect_there_and_back(name: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = made(name)
    print_ = ckpt_dist.fingerprint(folder / "hf")
    table = family.load(NAMES.get(name, name))
    held = set(load_file(folder / "hf/model.safetensors"))
    used = {w for n in held for rule in [family.match(table, "hf", n)] if rule for w in rule.weights}
    for dialect, rules in table.dialects.items():
        if not used <= {w for text in rules.values() for w in parse(text.partition(" if ")[0]).weights}:
            continue  # this dialect has no name for a bias of this model
        there, back = tmp_path / dialect, tmp_path / f"{dialect}-back"
        if "megatron" in dialect and "stacked" in dialect and name in MIXED:
            with pytest.raises(UsageError, match="some layers have weights that others lack"):
                ckpt_dist.convert(folder / "hf", there, format="dcp", dialect=dialect, quiet=True)
            continue
        ckpt_dist.convert(folder / "hf", there, format="dcp", dialect=dialect, quiet=True)
        ckpt_dist.convert(there, back, format="hf", **{"model.config": str(folder / "hf")}, quiet=True)
        assert equal(back, folder / "hf")
        assert ckpt_dist.fingerprint(back) == print_


@pytest.mark.parametrize("name", sorted({NAMES.get(n, n) for n in CONFIGS}))
def test_every_format_holds_every_family_that_has_its_dialect(
    name: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """The README's table of families x dialects x formats, cell by cell."""
    _, folder = made({"llama": "llama_plain"}.get(name) or next(n for n in CONFIGS if NAMES.get(n, n) == name))
    print_, spoken = ckpt_dist.fingerprint(folder / "hf"), family.load(name).dialects
    for format in (f for f in formats.FORMATS if hasattr(formats.load(f), "lay_out") and f != "nemo"):  # only averages
        out = tmp_path / format / ("all.pt" if format == "torch" else "out")
        universal = format == "deepspeed"
        if set(formats.DIALECTS.get(format, spoken)) & set(spoken) and name in formats.ONLY.get(format, (name,)):
            ckpt_dist.convert(folder / "hf", out, format=format, universal=universal, quiet=True)
            assert ckpt_dist.fingerprint(out, **{"model.config": str(folder / "hf")}) == print_, format
        else:
            with pytest.raises(
                UsageError, match=f"target.format={format}.*({name} has hf|it holds models of bloom and gpt2)"
            ):
                ckpt_dist.convert(folder / "hf", out, format=format, quiet=True)
            assert not out.exists()


MIXED = ("qwen3_moe", "deepseek_v3")  # some of their layers are dense


@pytest.mark.parametrize("name", CONFIGS)
def test_names_alone_say_the_family(name: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = made(name)
    save_file(load_file(folder / "hf/model.safetensors"), tmp_path / "model.safetensors")
    assert ckpt_dist.inspect(tmp_path)["family"] == NAMES.get(name, name)


@pytest.mark.parametrize("name", sorted({NAMES.get(n, n) for n in CONFIGS}))
def test_a_table_is_whole(name: str) -> None:
    table = family.load(name)
    for dialect, rules in table.dialects.items():
        named = set()
        for stored, text in rules.items():
            pattern = parse(text.partition(" if ")[0])
            for branch, weight in enumerate(pattern.weights):
                axes = (*family.axes_in(stored), *pattern.axes(branch))
                assert sorted(axes) == sorted(table.axes(weight)), (dialect, stored)
                named.add(weight)
        assert set(table.weights) - named <= {*table.optional, *table.zeros}, dialect


@pytest.mark.parametrize("name", sorted({NAMES.get(n, n) for n in CONFIGS}))
def test_ranks_tell_each_other_of_every_family(name: str) -> None:
    assert pickle.loads(pickle.dumps(family.load(name))) == family.load(name)


def test_two_ranks_convert_a_mixture_of_experts(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = made("mixtral")
    keys = {"source.path": folder / "memory", "target.path": tmp_path / "out", "model.config": folder / "hf"}
    done = torchrun(2, ROOT / "jobs/convert.py", *(f"{k}={v}" for k, v in keys.items()))
    assert done.returncode == 0, done.stderr[-3000:]
    assert equal(tmp_path / "out", folder / "hf")


def test_every_family_is_here() -> None:
    assert set(family.available()) == {NAMES.get(n, n) for n in CONFIGS}


TINY = """
from ckpt_dist import megatron
model_types = ("tiny",)
weights = dict(embed="v e", mix="l e f", gain="l e", out="f v")
optional = {}
dialects = dict(
    hf={"emb": "embed: v e", "blocks.{l}.mix": "mix: e f", "blocks.{l}.gain": "gain: e", "out": "out: f v"},
    other={"embedding": "embed: e v", "mixes": "mix: l f e", "gains": "gain: l e", "outs": "out: (f v)"},
    **megatron.dialects({
        "embedding.word_embeddings.weight": "embed: v e",
        "decoder.layers.{l}.mlp.linear_fc2.weight": "mix: e f",
        "decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight": "gain: e",
        "output_layer.weight": "out: f v",
    }),
)
sizes = dict(hf=lambda c: dict(l=c["layers"], e=c["width"], f=c["inner"], v=c["vocab"]))
"""


@pytest.mark.parametrize("format", ["hf", "dcp", "torch", "torch_dist", "megatron", "sfpt"])
def test_a_family_that_is_only_a_table(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("ckpt_dist.families.tiny")
    exec(TINY, module.__dict__)
    monkeypatch.setitem(sys.modules, "ckpt_dist.families.tiny", module)
    monkeypatch.setattr(families, "tiny", module, raising=False)
    known = family.available()
    monkeypatch.setattr(family, "available", lambda: [*known, "tiny"])
    tensors = {"emb": torch.randn(11, 6), "out": torch.randn(10, 11)}
    tensors |= {f"blocks.{k}.mix": torch.randn(6, 10) for k in range(4)}
    tensors |= {f"blocks.{k}.gain": torch.randn(6) for k in range(4)}
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(
        '{"model_type": "tiny", "layers": 4, "width": 6, "inner": 10, "vocab": 11}'
    )
    config = {"model.config": str(tmp_path / "hf")}
    dialect = "auto" if format in formats.DIALECTS and format != "hf" else "other"
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "there", format=format, dialect=dialect, quiet=True)
    ckpt_dist.convert(tmp_path / "there", tmp_path / "back", format="hf", dialect="hf", **config, quiet=True)
    assert equal(tmp_path / "back", tmp_path / "hf")
    if format == "hf":
        mixes = load_file(tmp_path / "there/model.safetensors")["mixes"]
        assert torch.equal(mixes, torch.stack([tensors[f"blocks.{k}.mix"].T for k in range(4)]))


def published(folder: Path, source: Path) -> dict[str, torch.Tensor]:
    """As DeepSeek-V3 was published: one more layer than num_hidden_layers, which transformers ignores; its tensors."""
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    last = config["num_hidden_layers"]
    more = {n.replace(f".{last - 1}.", f".{last}.", 1): t for n, t in tensors.items() if f"layers.{last - 1}." in n}
    more |= {f"model.layers.{last}.{n}.weight": torch.randn(32) for n in ("enorm", "hnorm", "shared_head.norm")}
    more |= {f"model.layers.{last}.eh_proj.weight": torch.randn(32, 64)}
    more = {n: t + 1 for n, t in more.items()}
    more |= {f"model.layers.{last}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone()}
    more |= {f"model.layers.{last}.shared_head.head.weight": tensors["lm_head.weight"].clone()}
    folder.mkdir()
    save_file(tensors | more, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return tensors | more


def test_layers_that_predict_further_tokens(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    source = made("deepseek_v3")[1] / "hf"
    tensors = published(tmp_path / "in", source)
    own, without = ckpt_dist.fingerprint(tmp_path / "in"), ckpt_dist.fingerprint(source)
    assert own != without
    for format in ("hf", "torch_dist", "megatron", "sfpt"):
        ckpt_dist.convert(tmp_path / "in", tmp_path / format, format=format, quiet=True)
        config = {"model.config": str(tmp_path / "in")}
        assert ckpt_dist.fingerprint(tmp_path / format, **config) == own
        ckpt_dist.convert(tmp_path / format, tmp_path / f"{format}-back", quiet=True, **config)
        back = load_file(tmp_path / f"{format}-back/model.safetensors")
        assert back.keys() == tensors.keys() and all(torch.equal(back[n], t) for n, t in tensors.items())
        assert json.loads((tmp_path / f"{format}-back/config.json").read_text())["num_nextn_predict_layers"] == 1
    # torchtitan has no such layers
    report = ckpt_dist.convert(tmp_path / "in", tmp_path / "titan", format="dcp", dialect="torchtitan", quiet=True)
    lost = len(tensors) - len(load_file(source / "model.safetensors"))
    assert any("predicts further tokens" in note and f"and {lost - 3} more" in note for note in report["notes"])
    assert ckpt_dist.fingerprint(tmp_path / "titan", **{"model.config": str(source)}) == without
    ckpt_dist.convert(tmp_path / "titan", tmp_path / "less", quiet=True, **{"model.config": str(tmp_path / "in")})
    assert json.loads((tmp_path / "less/config.json").read_text())["num_nextn_predict_layers"] == 0
    loaded = {n: torch.empty_like(t) for n, t in tensors.items()}
    reader = ckpt_dist.dcp.reader(tmp_path / "torch_dist", config=tmp_path / "in")
    torch.distributed.checkpoint.load(loaded, storage_reader=reader, no_dist=True)
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())


def test_moments_with_and_without_further_layers(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    source = made("deepseek_v3")[1] / "hf"
    published(tmp_path / "in", source)
    slot, config = "optimizer.state.exp_avg.", {"model.config": str(tmp_path / "in"), "quiet": True}
    for folder, axis in ((source, 0), (tmp_path / "in", 1)):
        ckpt_dist.convert(folder, tmp_path / "weights.pt", format="torch", dialect="megatron", overwrite=True, **config)
        state = torch.load(tmp_path / "weights.pt")
        moments = {slot + n: torch.randn(t.shape) for n, t in state.items()}
        torch.save(state | moments, tmp_path / "both.pt")
        keys: dict[str, Any] = {"keep": ["weights", "optimizer"], "format": "torch", "overwrite": True, **config}
        ckpt_dist.convert(tmp_path / "both.pt", tmp_path / "titan.pt", dialect="torchtitan", **keys)
        found = torch.load(tmp_path / "titan.pt")
        assert torch.equal(found[slot + "norm.weight"], moments[slot + "decoder.final_layernorm.weight"])
        ckpt_dist.convert(tmp_path / "both.pt", tmp_path / "local.pt", dialect="megatron_local", **keys)
        found = torch.load(tmp_path / "local.pt")
        assert len(found) == len(state | moments) and any(n.startswith(slot + "mtp.") for n in found) == bool(axis)


def test_a_copy_that_is_none_is_kept_or_refused(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    tensors = published(tmp_path / "in", made("deepseek_v3")[1] / "hf")
    name = next(n for n in tensors if n.endswith("shared_head.head.weight"))
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "in/model.safetensors")
    report = ckpt_dist.convert(tmp_path / "in", tmp_path / "out", quiet=True)
    assert any("is no copy of lm_head.weight" in w for w in report["warnings"])
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], tensors[name] + 1)
    with pytest.raises(CheckpointError, match=r"'mtp_head' .* has no name .* were it equal to 'head'"):
        ckpt_dist.convert(tmp_path / "in", tmp_path / "no", format="megatron", quiet=True)
    config = json.loads((tmp_path / "in/config.json").read_text())
    for wrong in ({"num_nextn_predict_layers": [1]}, {"num_hidden_layers": "x"}, {"num_hidden_layers": float("nan")}):
        (tmp_path / "in/config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(CheckpointError, match="its config says"):
            ckpt_dist.inspect(tmp_path / "in")
    for wrong in ({"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": None}, {"num_hidden_layers": 2}):
        (tmp_path / "in/config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(CheckpointError, match=r"the config says \d of them"):
            ckpt_dist.inspect(tmp_path / "in")
    save_file(tensors, tmp_path / "in/model.safetensors")
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"rope_scaling": "yarn"}))
    with pytest.raises(CheckpointError, match="rope_scaling is 'yarn'"):
        ckpt_dist.convert(tmp_path / "in", tmp_path / "no", format="megatron", quiet=True)


# ---- layers that are not there, and weights of layers


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "layers.1.self_attn.q_proj"), ("gpt2", "h.0.ln_1"), ("mixtral", "layers.1.*experts.2.w1"),
     ("qwen3_moe", "layers.1.mlp.experts.1.up_proj"), ("deepseek_v3", "layers.1.self_attn.o_proj")],
)  # fmt: skip
@pytest.mark.parametrize("format", ["hf", "torch_dist"])
def test_a_weight_that_other_layers_have_is_missed(
    family: str, name: str, format: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    shutil.copytree(made(family)[1] / "hf", tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    gone = [
        n for n in tensors if re.search(name.replace(".", r"\.").replace(r"*experts", ".*experts") + r"\.weight$", n)
    ]
    assert len(gone) == 1, [*tensors]
    save_file({n: t for n, t in tensors.items() if n not in gone}, tmp_path / "in/model.safetensors")
    with pytest.raises(CheckpointError, match=r"layer \d.* has no '\w+' of \w+, which others have"):
        ckpt_dist.convert(tmp_path / "in", tmp_path / "out", format=format, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", CONFIGS)
def test_a_weight_that_no_layer_has_is_missed(
    case: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """Every kind of tensor that transformers saves, one after the other: what the config implies is not there."""
    hf = made(case)[1] / "hf"
    tensors = load_file(hf / "model.safetensors")
    shutil.copytree(hf, tmp_path / "in")
    kinds = {re.sub(r"\.\d+(?=\.)", ".*", n) for n in tensors}
    for kind in sorted(kinds):
        held = {n: t for n, t in tensors.items() if re.sub(r"\.\d+(?=\.)", ".*", n) != kind}
        save_file(held, tmp_path / "in/model.safetensors")
        with pytest.raises(CheckpointError, match=r"no tensor is the '\w+' of \w+, which such a model has"):
            ckpt_dist.convert(tmp_path / "in", tmp_path / "out", dry_run=True, quiet=True)
    ckpt_dist.convert(hf, tmp_path / "out", dry_run=True, quiet=True)


@pytest.mark.parametrize("case", ["gpt2", "bloom", "gemma2"])
def test_of_tied_weights_either_may_be_the_one_that_is_stored(
    case: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """What safetensors' own `save_model` leaves of them: the head, which comes first by name."""
    model, folder = made(case)
    shutil.copytree(folder / "hf", tmp_path / "in")
    save_model(model, str(tmp_path / "in/model.safetensors"))
    assert "lm_head.weight" in load_file(tmp_path / "in/model.safetensors")
    for format, start in (("torch_dist", "in"), ("hf", "torch_dist")) if case != "gemma2" else (("hf", "in"),):
        ckpt_dist.convert(tmp_path / start, tmp_path / format, format=format, quiet=True)
    assert equal(tmp_path / "hf", folder / "hf")


@pytest.mark.parametrize("said", [dict(num_hidden_layers=3.0), dict(architectures=5), dict(architectures=[None])])
def test_a_config_may_say_things_in_odd_ways(
    said: dict[str, Any], made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    shutil.copytree(made("llama")[1] / "hf", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False, **said}))
    ckpt_dist.convert(tmp_path / "in", tmp_path / "there", format="dcp", quiet=True)
    ckpt_dist.convert(
        tmp_path / "there", tmp_path / "back", **{"model.config": str(made("llama")[1] / "hf")}, quiet=True
    )
    assert equal(tmp_path / "back", tmp_path / "in")


def test_a_layer_that_predicts_further_tokens_is_missed(
    made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """No target says two of them, and has one; all of them may be missing, as transformers saves such a model."""
    source = made("deepseek_v3")[1] / "hf"
    tensors, last = published(tmp_path / "in", source), 3
    config = json.loads((tmp_path / "in/config.json").read_text())
    assert config["num_hidden_layers"] == last
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))
    second = {n.replace(f"layers.{last}.", f"layers.{last + 1}."): t.clone() for n, t in tensors.items()}
    for number, held in ((1, tensors), (0, second)):
        save_file(held, tmp_path / "in/model.safetensors")
        says = rf"2 layers that predict further tokens, the tensors have 1: number {number} of them is the first"
        for format in ("hf", "torch_dist", "megatron"):
            with pytest.raises(CheckpointError, match=says):
                ckpt_dist.convert(tmp_path / "in", tmp_path / "no", format=format, quiet=True)
        assert not (tmp_path / "no").exists()
    save_file(tensors | second, tmp_path / "in/model.safetensors")
    ckpt_dist.convert(tmp_path / "in", tmp_path / "both", format="torch_dist", quiet=True)
    save_file(load_file(source / "model.safetensors"), tmp_path / "in/model.safetensors")
    ckpt_dist.convert(tmp_path / "in", tmp_path / "none", format="torch_dist", quiet=True)


def without(folder: Path, target: Path, layer: int) -> Path:
    """A model of transformers that lost a layer, beside a config that says it has it."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    left = {
        n: t for n, t in tensors.items() if f".{layer}." not in n.partition("layers")[2][:4] and f".h.{layer}." not in n
    }
    assert len(left) < len(tensors)
    save_file(left, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", ["llama_plain", "gpt2", "bloom", "deepseek_v3", "qwen3_moe", "gpt_oss", "gemma2"])
def test_a_layer_that_the_config_says_is_missed(
    name: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one between two others, by every verb that makes or judges a model; looking at it is still possible."""
    hf = made(name)[1] / "hf"
    for layer in (2, 1):
        source = without(hf, tmp_path / f"{layer}", layer)
        says = f"its config.json has 3 layers, the tensors have 2: layer {layer} is the first that is missing"
        for words in (
            ["target.format=hf"],
            ["target.format=dcp", "unmatched=drop"],
            ["target.format=hf", "dry_run=true"],
        ):
            assert main("convert", [f"source.path={source}", f"target.path={tmp_path / 'no'}", *words]) == 3
            assert says in capsys.readouterr().err
        for verb, keys in ((ckpt_dist.fingerprint, {}), (ckpt_dist.verify, {"b": hf}), (ckpt_dist.verify, {})):
            with pytest.raises(CheckpointError, match=re.escape(says)):
                verify: Any = verb
                verify(source, quiet=True, **keys)
        assert any(says in note for note in ckpt_dist.inspect(source)["notes"])
        ckpt_dist.convert(source, tmp_path / f"as-is-{layer}", format="hf", model="identity", quiet=True)
        assert equal(tmp_path / f"as-is-{layer}", source)
    assert not (tmp_path / "no").exists()


def test_fewer_layers_are_a_model_if_the_config_says_so(
    made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    source = without(made("llama_plain")[1] / "hf", tmp_path / "two", 2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "layer_types": None}))
    ckpt_dist.convert(source, tmp_path / "out", format="hf", quiet=True)
    assert equal(tmp_path / "out", source)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_layers_without_a_config_have_no_gap(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    hf = made("llama_plain")[1] / "hf"
    for layer in (2, 1):
        (without(hf, tmp_path / f"{layer}", layer) / "config.json").unlink()
    assert len(ckpt_dist.fingerprint(tmp_path / "2")) == 32  # nobody says that there were more
    with pytest.raises(CheckpointError, match="its names count 3 layers, the tensors have 2: layer 1 is the first"):
        ckpt_dist.fingerprint(tmp_path / "1")


def test_a_layer_that_is_left_out_on_request_is_not_missed(
    made: Callable[[str], tuple[Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = made("llama_plain")[1] / "hf"
    source = without(hf, tmp_path / "odd", 2)
    tensors = load_file(source / "model.safetensors") | {"model.layers.2.strange.weight": torch.ones(2)}
    save_file(tensors, source / "model.safetensors")
    words = [f"source.path={source}", f"target.path={tmp_path / 'out'}", "target.format=hf"]
    assert main("convert", words) == 3 and "unknown to llama" in capsys.readouterr().err
    assert main("convert", [*words, "unmatched=drop"]) == 0
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys() - {"model.layers.2.strange.weight"}


def test_a_head_of_another_kind_is_kept_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model: transformers' class has a `score` in place of the head, which no framework's Llama has."""
    config = transformers.LlamaConfig(
        **dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        **dict(vocab_size=64, num_labels=1, pad_token_id=0, tie_word_embeddings=False),
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    words = [f"source.path={tmp_path / 'hf'}", f"target.path={tmp_path / 'titan'}", "target.format=dcp"]
    words += ["target.dialect=torchtitan"]
    assert main("convert", words) == 3
    said = capsys.readouterr().err
    assert "first 'score.weight'." in said and "Did you mean" not in said and "unmatched=keep" in said
    assert main("convert", [*words, "unmatched=keep"]) == 0
    assert {"score.weight", "layers.1.attention.qkv_linear.wq.weight"} <= dcp.FileSystemReader(
        tmp_path / "titan"
    ).read_metadata().state_dict_metadata.keys()
    more = {"model.config": str(tmp_path / "hf"), "quiet": True, "unmatched": "keep"}
    ckpt_dist.convert(tmp_path / "titan", tmp_path / "back", format="hf", **more)
    assert ckpt_dist.fingerprint(tmp_path / "back") == ckpt_dist.fingerprint(tmp_path / "hf")
    assert equal(tmp_path / "hf", tmp_path / "back")
    again = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "back").eval()
    tokens = torch.arange(1, 13)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    words = [words[0], f"target.path={tmp_path / 'it'}", "target.format=megatron"]
    assert main("convert", [*words, "unmatched=keep"]) == 2
    assert "'score.weight' is not what a layer of Megatron" in (said := capsys.readouterr().err)
    assert "left out with unmatched=drop" in said and main("convert", [*words, "unmatched=drop"]) == 0
    assert "no output layer, for none is stored" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["torch_dist", "megatron", "dcp", "hf"])
@pytest.mark.parametrize("name", ["llama_plain", "qwen3_moe"])
def test_the_fingerprint_that_is_recorded_is_the_results_own(
    name: str, format: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """Also where one tensor holds all layers or experts, and has another dtype than the source."""
    hf = made(name)[1] / "hf"
    more = {"target.dialect": "torchtitan"} if format == "dcp" else {}
    for number, dtype in enumerate(("bfloat16", {"default": "bfloat16", "*norm*": "float32"})):
        out = tmp_path / f"{format}{number}"
        done = ckpt_dist.average([hf, hf], out, format=format, dtype=dtype, quiet=True, **more)
        assert done["fingerprint"] == ckpt_dist.fingerprint(out, **{"model.config": str(hf)})
        assert done["source_fingerprints"] == [ckpt_dist.fingerprint(hf)] * 2


def test_experts_of_a_layer_have_the_dtype_of_that_layer(
    made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """Joined over experts, not over layers: one layer in float32 does not make the others so."""
    hf = made("qwen3_moe")[1] / "hf"
    shutil.copytree(hf, tmp_path / "hf")
    tensors = {k: v if ".layers.1." in k else v.bfloat16() for k, v in load_file(hf / "model.safetensors").items()}
    save_file(tensors, tmp_path / "hf/model.safetensors")
    done = ckpt_dist.convert(tmp_path / "hf", tmp_path / "t", format="dcp", dialect="torchtitan", quiet=True)
    stored = dcp.FileSystemReader(tmp_path / "t").read_metadata().state_dict_metadata
    kinds = {n: m.properties.dtype for n, m in stored.items() if n.endswith("_EFD") or n.endswith("_EDF")}
    assert {kind for n, kind in kinds.items() if "layers.1." in n} == {torch.float32}
    assert {kind for n, kind in kinds.items() if "layers.2." in n} == {torch.bfloat16}
    assert not any("unlike dtypes" in w for w in done["warnings"])


def test_what_is_kept_has_no_name_of_another_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(
        **dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2),
        **dict(vocab_size=64, tie_word_embeddings=False),
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    save_file({**tensors, "norm.weight": torch.ones(32)}, tmp_path / "hf/model.safetensors")
    words = [f"source.path={tmp_path / 'hf'}", f"target.path={tmp_path / 'titan'}", "target.format=dcp"]
    assert main("convert", [*words, "target.dialect=torchtitan", "unmatched=keep"]) == 2
    assert "'norm.weight' cannot be kept: it is another weight's name in the target" in capsys.readouterr().err
    assert not (tmp_path / "titan").exists()


@pytest.mark.parametrize("format", ["merak", "megatron", "torch_dist", "dcp", "torch", "sfpt"])
def test_a_config_that_says_more_layers_is_refused_in_every_format(
    format: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    hf = made("llama_plain")[1] / "hf"
    ckpt_dist.convert(hf, tmp_path / "there", format=format, quiet=True)
    config = json.loads((hf / "config.json").read_text()) | {"num_hidden_layers": 4, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    more = {"model.config": str(tmp_path / "config.json"), "quiet": True}
    with pytest.raises(CheckpointError, match=r"has 4 layers, the tensors have 3|does not fit llama .* a dim of 4"):
        ckpt_dist.convert(tmp_path / "there", tmp_path / "no", format="hf", **more)
    ckpt_dist.convert(tmp_path / "there", tmp_path / "out", format="hf", **{**more, "model.config": str(hf)})
    assert equal(tmp_path / "out", hf)


def test_bad_input(made: Callable[[str], tuple[Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = made("mixtral")
    tensors = load_file(folder / "hf/model.safetensors")

    def refused(changed: dict[str, torch.Tensor], *words: str, code: int = 3, config: bool = True) -> str:
        source = tmp_path / f"source{len(list(tmp_path.iterdir()))}"
        source.mkdir()
        save_file(changed, source / "model.safetensors")
        if config:
            (source / "config.json").write_bytes((folder / "hf/config.json").read_bytes())
        target = tmp_path / "target"
        words = (f"source.path={source}", f"target.path={target}", "target.format=dcp", *words)
        assert main("convert", list(words)) == code
        assert not target.exists()
        return capsys.readouterr().err

    stacked = "target.dialect=hf_stacked"
    lost = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert "which others have" in refused({k: v for k, v in tensors.items() if k != lost}, stacked)
    assert "unknown to mixtral" in refused({**tensors, "model.layers.0.extra.weight": torch.ones(2)}, stacked)
    assert "index 7 of axis l" in refused({**tensors, lost.replace("1", "7", 1): tensors[lost].clone()}, stacked)
    assert "fit" in refused({**tensors, lost: torch.ones(7, 32)}, stacked)
    assert "model=gpt2: 2% of the 60 stored names" in refused(tensors, "model=gpt2")
    assert "hf_stacked" in refused(tensors, "target.dialect=hf_staked", code=2)


# ---- models as they are published


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama_plain", "qwen3", "gemma3_text", "mixtral", "gpt_oss"])
def test_a_model_that_was_saved_without_a_head(
    name: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """As GPT-2, BLOOM and models of embeddings are published: no name begins with `transformer.` or `model.`"""
    model = made(name)[0].base_model
    model.save_pretrained(tmp_path / "hf")
    assert {"h.0.ln_1.weight", "h.0.input_layernorm.weight", "norm.weight"} & set(
        load_file(tmp_path / "hf/model.safetensors")
    )
    assert ckpt_dist.inspect(tmp_path / "hf")["family"] == NAMES.get(name, name)
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "same", quiet=True)
    assert equal(tmp_path / "same", tmp_path / "hf")
    assert (tmp_path / "same/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()
    report = ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="torch_dist", quiet=True)
    tied = model.config.tie_word_embeddings
    assert any("no output layer" in text for text in report["warnings"]) is not tied
    assert ckpt_dist.inspect(tmp_path / "it")["dialect"].startswith("megatron")
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back", quiet=True, **{"model.config": str(tmp_path / "hf")})
    ckpt_dist.verify(tmp_path / "hf", tmp_path / "back", quiet=True)
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.arange(1, 33).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens)[0], model(tokens)[0])


OTHERS: dict[str, Callable[[], Any]] = {  # types that no family has, in names that one has
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "exaone4": lambda: transformers.Exaone4Config(**SMALL),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SMALL, **EXPERTS, head_dim=16, n_routed_experts=16, n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_type_that_no_family_has_keeps_its_names(name: str, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(OTHERS[name]()).save_pretrained(tmp_path / "hf")
    assert ckpt_dist.inspect(tmp_path / "hf")["family"] == "unknown"
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "dcp", format="dcp", quiet=True)
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "back", quiet=True, **{"model.config": str(tmp_path / "hf")})
    assert equal(tmp_path / "back", tmp_path / "hf")
    with pytest.raises(CheckpointError):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / "no", format="megatron", quiet=True)


def test_megatron_is_told_of_a_type_that_only_shares_names(tmp_path: Path) -> None:
    """ERNIE 4.5 has Llama's names and rotates adjacent pairs, which no key of its config.json says."""
    config = transformers.Ernie4_5Config(**SMALL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    report = ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="torch_dist", quiet=True)
    assert any("model_type='ernie4_5', whose names are also those of llama" in text for text in report["warnings"])


@pytest.mark.parametrize("format", ["megatron", "torch_dist", "dcp"])
def test_rows_that_were_added_are_said_in_the_config(
    format: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """With the length of the vocabulary that the original had transformers would not load it."""
    model, folder = made("gpt2")
    ckpt_dist.convert(folder / "hf", tmp_path / "it", format=format, vocab_size=128, quiet=True)
    config = {"model.config": str(folder / "hf"), "quiet": True}
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "longer", **config)
    assert any("vocabulary of 64, 128 rows are stored" in text for text in report["warnings"])
    tokens = torch.arange(1, 33).reshape(2, 16)
    report = ckpt_dist.convert(tmp_path / "it", tmp_path / "cut", vocab_size=64, **config)
    assert not report["warnings"] and equal(tmp_path / "cut", folder / "hf")
    for name in ("longer", "cut"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits[..., :64], model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "gemma3_text"])
def test_a_type_may_tie_what_its_config_does_not(
    name: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """The config.json of GPT-2, BLOOM and Gemma, as published, has no `tie_word_embeddings`; a state_dict has the head."""
    model, folder = made(name)
    config = json.loads((folder / "hf/config.json").read_text())
    assert config.pop("tie_word_embeddings", True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    keys = {"model.config": str(tmp_path), "quiet": True}
    ckpt_dist.convert(folder / "memory", tmp_path / "hf", **keys)
    assert equal(tmp_path / "hf", folder / "hf")
    ckpt_dist.convert(folder / "memory", tmp_path / "it", format="megatron", **keys)
    saved = torch.load(next((tmp_path / "it").rglob("model_optim_rng.pt")), weights_only=False)
    assert (
        not vars(saved["args"])["untie_embeddings_and_output_weights"] and "output_layer.weight" not in saved["model"]
    )
    head = {"lm_head.weight": torch.randn(64, 32)}
    torch.save({**model.state_dict(), **head}, tmp_path / "other.pt")
    report = ckpt_dist.convert(tmp_path / "other.pt", tmp_path / "untied", format="hf", **keys)
    assert any("differ although the config ties them" in text for text in report["warnings"])
    assert json.loads((tmp_path / "untied/config.json").read_text())["tie_word_embeddings"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(loaded.lm_head.weight, head["lm_head.weight"])


def test_the_dtype_of_a_config_is_that_of_most_elements(tmp_path: Path) -> None:
    """As where a small vision tower in fp32 has more tensors than the language model."""
    small = {f"vision.{n}.weight": torch.ones(2) for n in range(9)}
    (tmp_path / "hf").mkdir()
    save_file({**small, "text.weight": torch.ones(8, 8).bfloat16()}, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text('{"model_type": "llava", "dtype": "bfloat16"}')
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "llava", "dtype": "bfloat16"}


LIKE = {  # what is stored -> which of it is of another dtype
    "queries": ("bfloat16", "float32", "q_proj"),
    "keys": ("float32", "bfloat16", "k_proj"),
    "up": ("float16", "bfloat16", "up_proj"),
    "layer": ("bfloat16", "float32", ".layers.1."),
}


@pytest.mark.parametrize("format", ["torch_dist", "megatron"])
@pytest.mark.parametrize("name", LIKE)
def test_tensors_of_unlike_dtypes_are_joined_in_one_that_holds_all(
    name: str, format: str, made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """A fused query, key and value has one dtype; by that of the first, the others lost half of their bits."""
    first, second, part = LIKE[name]
    tensors = {
        n: t.to(getattr(torch, second if part in n else first))
        for n, t in load_file(made("llama_plain")[1] / "hf/model.safetensors").items()
    }
    shutil.copytree(made("llama_plain")[1] / "hf", tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "hf/pytorch_model.bin")
    report = ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format=format, quiet=True)
    whole = format == "megatron" and name == "layer"  # of which each layer has tensors of its own
    assert any("join stored ones of unlike dtypes" in text for text in report["warnings"]) is not whole
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back", quiet=True, **{"model.config": str(tmp_path / "hf")})
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[n].double(), t.double()) for n, t in tensors.items())
    if whole:
        assert all(back[n].dtype == t.dtype for n, t in tensors.items())
    loaded = {n: torch.empty(t.shape, dtype=torch.float64) for n, t in tensors.items()}
    dcp.load(loaded, storage_reader=ckpt_dist.dcp.reader(tmp_path / "it", config=tmp_path / "hf"), no_dist=True)
    assert all(torch.equal(loaded[n], t.double()) for n, t in tensors.items())


def test_bloom_in_the_words_of_its_published_config(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = made("bloom")
    shutil.copytree(folder / "hf", tmp_path / "hf")
    words = dict(n_embed=32, n_layer=3, num_attention_heads=4, vocab_size=64, offset_alibi=100, seq_length=2048)
    words |= dict(masked_softmax_fusion=True, bias_dropout_fusion=True, attention_softmax_in_fp32=True, unk_token_id=0)
    config = dict(architectures=["BloomForCausalLM"], model_type="bloom", layer_norm_epsilon=1e-5, **words)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(1, 33).reshape(2, 16)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    report = ckpt_dist.convert(tmp_path / "hf", tmp_path / "it", format="megatron", quiet=True)
    assert not report["warnings"]
    args = vars(torch.load(next((tmp_path / "it").rglob("model_optim_rng.pt")), weights_only=False)["args"])
    assert (args["num_layers"], args["hidden_size"], args["num_attention_heads"], args["ffn_hidden_size"]) == (
        3,
        32,
        4,
        128,
    )
    ckpt_dist.convert(tmp_path / "it", tmp_path / "back", quiet=True, **{"model.config": str(tmp_path / "hf")})
    assert equal(tmp_path / "back", folder / "hf")
    assert json.loads((tmp_path / "back/config.json").read_text()) == config | {"dtype": "float32"}
