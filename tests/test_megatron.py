"""Megatron's checkpoints against megatron-core itself, on CPUs: what it saves is read, what is written it loads.

One torchrun of four ranks runs every model under every layout (tests/real/megatron_core.py): it loads what we made of
transformers' models, gives logits, and saves again in both of its formats.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_dist
from ckpt_dist.errors import CheckpointError, UsageError
from tests.conftest import torchrun

IDS = [[1, 2, 3, 4, 5, 6, 7]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": dict(tp=2),
    "pp2": dict(pp=2),
    "tp2pp2": dict(tp=2, pp=2),
    "vpp2": dict(pp=2, vpp=2),
    "first": dict(pp=2, first=1),
    "tp4": dict(tp=4),
    "ep2": dict(ep=2),
    "ep2pp2": dict(ep=2, pp=2),
    "stages": dict(pp=4, stages="Et|tt||tL"),
    "apart": dict(pp=4, stages="Ett|tt|m|L"),
}
APART = "apart"  # only saved: there one stage hands two tokens' states to the next, and no other writes files like that
PARTITIONS = {"first": [1, 3], "stages": [1, 2, 0, 1]}
STRICT = (  # all of megatron-core's StrictHandling; what the first one loads is what is compared
    "assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "raise_all", "return_unexpected", "return_all", "ignore_all",
)  # fmt: skip
DENSE = ("tp1", "tp2pp2", "vpp2", "first", "tp4")
MOE = ("tp1", "ep2", "ep2pp2")
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    initializer_range=0.3,
    rms_norm_eps=1e-6,
    attn_implementation="eager",
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16, num_experts=4, norm_topk_prob=True)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {  # config.json, TransformerConfig, layouts
    "llama": ({}, {}, DENSE),
    "llama-tied": (dict(tie_word_embeddings=True), {}, ("tp1", "tp2pp2", "pp2")),
    "mistral": (dict(sliding_window=None), {}, ("tp2",)),
    "qwen2": ({}, dict(add_qkv_bias=True), ("tp1", "tp2pp2", "tp4")),
    "qwen3": ({}, dict(qk_layernorm=True), ("tp2pp2", "vpp2", "stages")),
    "qwen3-te": ({}, dict(qk_layernorm=True), ("tp2",)),  # its norms have states, as those of Transformer Engine
    "gpt2": (dict(n_embd=32, n_head=4, n_layer=4, n_positions=64, n_inner=96, vocab_size=64), {}, ("tp1", "tp2pp2")),
    "mixtral": (
        dict(num_local_experts=4, num_experts_per_tok=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        dict(num_moe_experts=4),
        MOE,
    ),
    "qwen3_moe": (EXPERTS, dict(qk_layernorm=True, num_moe_experts=4), MOE),
    "gpt_oss": (
        dict(
            num_local_experts=4, num_experts_per_tok=2, sliding_window=4, intermediate_size=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        dict(
            num_moe_experts=4, add_bias_linear=True, add_qkv_bias=True, activation_func="quick_gelu", glu_linear_offset=1.0,
            activation_func_clamp_value=7.0, softmax_type="learnable", window_size=(3, 0), window_attn_skip_freq=2,
        ),
        MOE,
    ),
    "deepseek_v3": (
        dict(
            q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=4,
            n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
            n_group=1, topk_group=1, head_dim=4, routed_scaling_factor=1.0, rope_scaling=None, num_nextn_predict_layers=0,
        ),
        dict(
            multi_latent_attention=True, qk_layernorm=True, q_lora_rank=12, kv_lora_rank=16, qk_head_dim=8,
            qk_pos_emb_head_dim=4, v_head_dim=8, num_moe_experts=4, moe_layer_freq=[0, 1, 1, 1],
            moe_shared_expert_intermediate_size=16, moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True, rope_type="rope",
        ),
        ("tp1", "ep2"),
    ),
}  # fmt: skip
KINDS["deepseek_v3-mtp"] = (  # all layers alike, and one more behind them
    KINDS["deepseek_v3"][0] | dict(num_nextn_predict_layers=1, first_k_dense_replace=0),
    KINDS["deepseek_v3"][1] | dict(mtp_num_layers=1, moe_layer_freq=1),
    ("tp2", "ep2pp2", "apart"),
)


def settings(kind: str) -> dict[str, Any]:
    """megatron-core's TransformerConfig of such a model."""
    more = KINDS[kind][1]
    if kind == "gpt2":
        return dict(
            num_layers=4, hidden_size=32, ffn_hidden_size=96, num_attention_heads=4, normalization="LayerNorm",
            add_bias_linear=True, gated_linear_unit=False, activation_func="gelu_tanh", layernorm_epsilon=1e-5,
        )  # fmt: skip
    base = dict(
        num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True, activation_func="silu", layernorm_epsilon=1e-6,
    )  # fmt: skip
    if "num_moe_experts" in more:
        base |= dict(
            moe_router_topk=2, moe_router_pre_softmax=False, moe_ffn_hidden_size=48 if kind == "mixtral" else 16
        )
    if kind.startswith("deepseek_v3"):
        base |= dict(num_query_groups=4)
    return base | more


def job(top: Path, kind: str, layout: str, loaded: Path) -> dict[str, Any]:
    gpt2, tied = kind == "gpt2", kind in ("llama-tied", "gpt2")
    return dict(
        name=f"{kind} {layout}",
        settings=settings(kind),
        model=dict(
            vocab_size=64, max_sequence_length=64, position_embedding_type="learned_absolute" if gpt2 else "rope",
            share_embeddings_and_output_weights=tied, rotary_base=10000,
        ),
        args=dict(
            swiglu=not gpt2, untie_embeddings_and_output_weights=not tied, padded_vocab_size=64, rotary_base=10000,
            position_embedding_type="learned_absolute" if gpt2 else "rope", max_position_embeddings=64,
        ),
        layout=LAYOUTS[layout],
        states=kind.endswith("-te"),
        load=str(loaded),
        strict=STRICT if layout == KINDS[kind][2][0] and not kind.endswith("-te") else STRICT[:1],
        ids=IDS,
        logits=str(top / f"{layout}.logits") if layout != APART else None,
        save=str(top / f"dist-{layout}/iter_0000007"),
        legacy=str(top / f"legacy-{layout}"),
    )  # fmt: skip


def transformer(kind: str, folder: Path) -> torch.Tensor:
    """A model of transformers in a folder, and its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    base = {} if kind == "gpt2" else SMALL
    further = KINDS[kind][0].get("num_nextn_predict_layers", 0)
    depth = dict(num_hidden_layers=SMALL["num_hidden_layers"] + further) if further else {}
    given = AutoConfig.for_model(kind.partition("-")[0], **{**base, **KINDS[kind][0], **depth})
    model = AutoModelForCausalLM.from_config(given, attn_implementation="eager").eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            torch.nn.init.uniform_(buffer, -0.1, 0.1)
    if further:
        return predicting(model, folder)
    model.save_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(IDS)).logits
    return found


def predicting(model: Any, folder: Path) -> torch.Tensor:
    """As DeepSeek-V3 was published: the last layer is not of the model, but predicts one more token. And its logits."""
    last = model.config.num_hidden_layers - 1
    own = f"model.layers.{last}."
    more = {f"{own}{n}.weight": torch.rand(32) + 0.5 for n in ("enorm", "hnorm", "shared_head.norm")}
    more[own + "eh_proj.weight"] = torch.randn(32, 64) * 0.3
    copies = {
        own + "embed_tokens.weight": "model.embed_tokens.weight",
        own + "shared_head.head.weight": "lm_head.weight",
    }
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more | {n: tensors[of].clone() for n, of in copies.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= dict(num_hidden_layers=last, num_nextn_predict_layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    return predicted(model, more)


@torch.no_grad()
def predicted(model: Any, more: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the next token and of the one after it, which the last layer of the model predicts.

    transformers leaves such layers out, so how it is computed is written here, from the report of DeepSeek-V3.
    """
    last = model.config.num_hidden_layers - 1
    layer, model.model.layers = model.model.layers[last], model.model.layers[:last]

    def normed(name: str, value: torch.Tensor) -> torch.Tensor:
        weight = more[f"model.layers.{last}.{name}.weight"]
        return torch.nn.functional.rms_norm(value, weight.shape, weight, model.config.rms_norm_eps)

    ids = torch.tensor(IDS)
    following = torch.cat([ids[:, 1:], ids[:, :1] * 0], 1)
    hidden = model.model(ids).last_hidden_state
    both = torch.cat([normed("enorm", model.model.embed_tokens(following)), normed("hnorm", hidden)], -1)
    inside = both @ more[f"model.layers.{last}.eh_proj.weight"].T
    places = torch.arange(ids.shape[1])[None]
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    turned = model.model.rotary_emb(inside, places)
    out = layer(inside, attention_mask=mask, position_ids=places, position_embeddings=turned)
    out = normed("shared_head.norm", out[0] if isinstance(out, tuple) else out)
    return torch.stack([model.lm_head(hidden), model.lm_head(out)])


Ran = Callable[[str], tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """For each kind the folder with what megatron-core made of it, and transformers' logits."""
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed")
    top = tmp_path_factory.mktemp("megatron")
    jobs, wanted = [], {}
    for kind, (_, more, layouts) in KINDS.items():
        wanted[kind] = transformer(kind, top / kind / "hf")
        dialect = "megatron_local" + ("" if kind == "deepseek_v3" else "_stacked")
        own = {"target.dialect": dialect} if "num_moe_experts" in more else {}
        own |= {} if kind.endswith("-te") else {"target.spec": "local"}
        ckpt_dist.convert(top / kind / "hf", top / kind / "ours", format="torch_dist", **own)
        jobs += [job(top / kind, kind, layout, top / kind / "ours/iter_0000001") for layout in layouts]
    (top / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(4, "-m", "tests.real.megatron_core", top / "jobs.json", timeout=540)
    assert done.returncode == 0, done.stderr[-20_000:]
    return lambda kind: (top / kind, wanted[kind])


SAVED = [(kind, layout) for kind, (*_, layouts) in KINDS.items() for layout in layouts]
CASES = [(kind, layout) for kind, layout in SAVED if layout != APART]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_megatron_computes_what_transformers_computes(ran: Ran, kind: str, layout: str) -> None:
    top, theirs = ran(kind)
    ours = torch.load(top / f"{layout}.logits")
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("kind", "layout"), SAVED)
def test_what_megatron_saves_is_the_same_model(ran: Ran, kind: str, layout: str) -> None:
    top, _ = ran(kind)
    wanted = ckpt_dist.fingerprint(top / "hf")
    assert ckpt_dist.fingerprint(top / f"dist-{layout}") == wanted
    assert ckpt_dist.fingerprint(top / f"legacy-{layout}") == wanted


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_rank_file_is_what_the_module_of_that_rank_holds(ran: Ran, tmp_path: Path, kind: str, layout: str) -> None:
    top, _ = ran(kind)
    keys = {f"target.{k}": v for k, v in LAYOUTS[layout].items() if k not in ("first", "stages")}
    keys |= {"target.partition": PARTITIONS[layout]} if layout in PARTITIONS else {}
    ckpt_dist.convert(top / "hf", tmp_path / "made", format="megatron", **{"target.spec": "local", **keys})
    theirs = sorted((top / f"legacy-{layout}").rglob("*.pt"))
    ours = sorted((tmp_path / "made").rglob("*.pt"))
    assert [f.parent.name for f in ours] == [f.parent.name for f in theirs]
    for mine, his in zip(ours, theirs, strict=True):
        a, b = (torch.load(f, weights_only=False) for f in (mine, his))
        keys_of = [k for k in b if k.startswith("model")]
        assert keys_of == [k for k in a if k.startswith("model")]
        for key in keys_of:
            held = {n: t for n, t in b[key].items() if isinstance(t, torch.Tensor)}
            assert sorted(a[key]) == sorted(held)
            assert all(torch.equal(a[key][n], t) and a[key][n].dtype == t.dtype for n, t in held.items())


# ---- without megatron-core: what it once wrote, every layout to every other, older files, files that are not whole


@pytest.mark.parametrize("place", ["torch_dist", "legacy"])
def test_a_model_that_megatron_began_predicts_further_tokens(tmp_path: Path, place: str) -> None:
    """`tests/data/make_mtp.py`: its own first values, its own logits; the config.json is made of its args alone."""
    from transformers import AutoModelForCausalLM

    top = Path(__file__).parent / "data/megatron-core-0.16-mtp"
    report = ckpt_dist.convert(top / place, tmp_path / "hf")
    assert report["warnings"] == []
    depth = json.loads((tmp_path / "hf/config.json").read_text())["num_hidden_layers"] + 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", num_hidden_layers=depth, attn_implementation="eager")
    ours, theirs = predicted(model.eval(), load_file(tmp_path / "hf/model.safetensors")), torch.load(top / "logits.pt")
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert ckpt_dist.fingerprint(tmp_path / "hf") == ckpt_dist.fingerprint(top / place)
    for keys in ({"format": "torch_dist", "target.dialect": "megatron_local"}, {"format": "megatron", **SPLIT}):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / f"made-{keys['format']}", **keys)
        assert ckpt_dist.fingerprint(tmp_path / f"made-{keys['format']}") == ckpt_dist.fingerprint(top / place)
    for mine, his in zip(rank_files(tmp_path / "made-megatron"), rank_files(top / "legacy"), strict=True):
        a, b = (torch.load(f, weights_only=False)["model"] for f in (mine, his))
        b = {n: t for n, t in b.items() if t is not None}
        assert a.keys() == b.keys() and all(torch.equal(a[n], t) for n, t in b.items())


SPLIT = {"target.tp": 2, "target.pp": 2, "target.spec": "local"}


def test_the_newer_name_of_a_layer_that_predicts_further_tokens(tmp_path: Path) -> None:
    """Megatron-LM of August 2026, from source."""
    top = Path(__file__).parent / "data/megatron-core-0.16-mtp/legacy"
    shutil.copytree(top, tmp_path / "newer")
    rewritten(
        tmp_path / "newer",
        lambda tree, number: tree.update(
            model={n.replace(".transformer_layer.", ".mtp_model_layer."): t for n, t in tree["model"].items()}
        ),
    )
    assert ckpt_dist.fingerprint(tmp_path / "newer") == ckpt_dist.fingerprint(top)


PLACES: dict[str, dict[str, Any]] = {
    "hf": dict(format="hf"),
    "stacked": dict(format="torch_dist"),
    "per_layer": dict(format="torch_dist", **{"target.dialect": "megatron"}),
    "tp2pp2": dict(format="megatron", **{"target.tp": 2, "target.pp": 2}),
    "tp4": dict(format="megatron", **{"target.tp": 4}),
    "vpp": dict(format="megatron", **{"target.pp": 2, "target.vpp": 2, "target.spec": "local"}),
    "uneven": dict(format="megatron", **{"target.pp": 3, "target.partition": [1, 2, 1]}),
    "tp2pp2ep2": dict(format="megatron", **{"target.tp": 2, "target.pp": 2, "target.ep": 2}),
    "sfpt": dict(format="sfpt"),
    "dcp": dict(format="dcp"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    top = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        if not (top / kind).exists():
            transformer(kind, top / kind)
        return top / kind

    return folder


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "mixtral", "deepseek_v3", "deepseek_v3-mtp"])
def test_every_layout_becomes_every_other(models: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    source = models(kind)
    wanted = ckpt_dist.fingerprint(source)
    experts = kind in ("mixtral", "deepseek_v3", "deepseek_v3-mtp")
    names = [n for n in PLACES if (experts or "ep" not in n) and not (kind == "deepseek_v3" and n == "stacked")]
    for one in names:
        ckpt_dist.convert(source, tmp_path / one, **PLACES[one])
        assert ckpt_dist.fingerprint(tmp_path / one, **{"model.config": str(source)}) == wanted, one
    for one in names:
        for other in names if kind in ("llama", "mixtral") else names[names.index(one) - 1 :][:1]:
            made = tmp_path / f"{one}-{other}"
            ckpt_dist.convert(tmp_path / one, made, **{"model.config": str(source), **PLACES[other]})
            assert ckpt_dist.fingerprint(made, **{"model.config": str(source)}) == wanted, (one, other)


def rank_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("model_optim_rng.pt"))


def rewritten(folder: Path, change: Callable[[dict[str, Any], int], None]) -> None:
    """Each rank's file loaded by torch, changed and saved again."""
    for number, path in enumerate(rank_files(folder)):
        tree = torch.load(path, weights_only=False)
        change(tree, number)
        torch.save(tree, path)


OLDER = {
    "input_layernorm": "input_norm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_norm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


@pytest.mark.parametrize("version", [None, 1.0, 2.0])
def test_files_from_before_megatron_core(models: Callable[[str], Path], tmp_path: Path, version: float | None) -> None:
    keys = {"target.tp": 2, "target.pp": 2, "target.spec": "local"}
    ckpt_dist.convert(models("gpt2"), tmp_path / "old", format="megatron", **keys)

    def older(tree: dict[str, Any], number: int) -> None:
        encoder, rest = {}, {}
        for name, tensor in tree["model"].items():
            if "linear_qkv" in name and version is None:  # [heads, 3, width] becomes [3, heads, width]
                tensor = tensor.view(2, 3, 8, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
            if "linear_qkv" in name and version == 1.0:  # [heads, width, 3]
                tensor = tensor.view(2, 3, 8, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
            for new, old in OLDER.items():
                name = name.replace(new, old)
            if name.startswith("decoder."):
                encoder[name.removeprefix("decoder.")] = tensor.contiguous()
            else:
                rest[name] = tensor
        model: dict[str, Any] = {"encoder": encoder}
        if "embedding.word_embeddings.weight" in rest:
            inner = {"word_embeddings": {"weight": rest.pop("embedding.word_embeddings.weight")}}
            inner["position_embeddings"] = {"weight": rest.pop("embedding.position_embeddings.weight")}
            model["embedding"] = inner
        tree["model"] = {"language_model": model}
        if "output_layer.weight" in rest:
            tree["model"]["word_embeddings_for_head"] = {"weight": rest.pop("output_layer.weight")}
        assert not rest
        del tree["checkpoint_version"]
        if version:
            tree["checkpoint_version"] = version

    rewritten(tmp_path / "old", older)
    assert ckpt_dist.fingerprint(tmp_path / "old") == ckpt_dist.fingerprint(models("gpt2"))


def test_experts_in_one_tensor(models: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {"target.tp": 2, "target.ep": 2, "target.spec": "local"}
    ckpt_dist.convert(models("mixtral"), tmp_path / "grouped", format="megatron", **keys)

    def grouped(tree: dict[str, Any], number: int) -> None:
        model = tree["model"]
        for layer in range(4):
            own = f"decoder.layers.{layer}.mlp.experts."
            for k, linear in ((1, "linear_fc1"), (2, "linear_fc2")):
                each = [model.pop(f"{own}local_experts.{x}.{linear}.weight").T for x in range(2)]
                whole = torch.stack(each)  # (experts, in, out)
                model[f"{own}weight{k}"] = whole.reshape(32, -1) if k == 1 else whole.reshape(-1, 32)

    rewritten(tmp_path / "grouped", grouped)
    assert ckpt_dist.fingerprint(tmp_path / "grouped") == ckpt_dist.fingerprint(models("mixtral"))


def test_a_vocabulary_is_padded_for_more_ranks(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"target.tp=4.*length 66"):
        keys = {"target.tp": 4, "target.vocab_size": 66}
        ckpt_dist.convert(models("llama"), tmp_path / "no", format="megatron", **keys)
    keys = {"target.tp": 2, "target.vocab_size": 70}
    ckpt_dist.convert(models("llama"), tmp_path / "padded", format="megatron", **keys)
    tree = torch.load(rank_files(tmp_path / "padded")[1], weights_only=False)
    assert tree["model"]["output_layer.weight"].shape == (35, 32) and tree["args"].padded_vocab_size == 70
    assert not tree["model"]["output_layer.weight"][29:].any()
    ckpt_dist.convert(tmp_path / "padded", tmp_path / "cut", **{"target.vocab_size": 64})
    assert ckpt_dist.fingerprint(tmp_path / "cut") == ckpt_dist.fingerprint(models("llama"))


def drop_a_rank(folder: Path) -> None:
    rank_files(folder)[2].unlink()


def another_save(folder: Path) -> None:
    rewritten(folder, lambda tree, number: tree.update(iteration=number))


def another_model(folder: Path) -> None:
    rewritten(
        folder, lambda tree, number: tree["model"].update({"decoder.final_layernorm.weight": torch.ones(9 + number)})
    )


def other_args(folder: Path) -> None:
    rewritten(folder, lambda tree, number: setattr(tree["args"], "num_layers", 5))


def no_args(folder: Path) -> None:
    rewritten(folder, lambda tree, number: tree.pop("args") and None)
    for path in rank_files(folder):
        if path.parent.name.startswith("mp_rank_01"):
            path.unlink()


def lost_layer(folder: Path) -> None:
    def change(tree: dict[str, Any], number: int) -> None:
        for name in [n for n in tree["model"] if n.startswith("decoder.layers.0.")]:
            del tree["model"][name]

    rewritten(folder, change)


def a_billion_stages(folder: Path) -> None:
    rewritten(folder, lambda tree, number: setattr(tree["args"], "pipeline_model_parallel_size", 10**6))


def no_number(folder: Path) -> None:
    rewritten(folder, lambda tree, number: setattr(tree["args"], "tensor_model_parallel_size", float("inf")))


def a_layer_far_away(folder: Path) -> None:
    name = "decoder.layers.999999999.mlp.linear_fc1.weight"
    rewritten(folder, lambda tree, number: tree["model"].update({name: torch.ones(2, 2)}))


def a_layer_beyond_numbers(folder: Path) -> None:
    name = f"decoder.layers.{'9' * 5000}.mlp.linear_fc1.weight"
    rewritten(folder, lambda tree, number: tree["model"].update({name: torch.ones(2, 2)}))


def no_matrix(folder: Path) -> None:
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    rewritten(folder, lambda tree, number: tree["model"].update({name: torch.ones(3)}))


def no_version(folder: Path) -> None:
    rewritten(folder, lambda tree, number: tree.update(checkpoint_version=[3]))


def no_width(folder: Path) -> None:
    rewritten(folder, lambda tree, number: setattr(tree["args"], "hidden_size", "x"))


def experts_of_nobody(folder: Path) -> None:
    def change(tree: dict[str, Any], number: int) -> None:
        tree["args"].num_experts = 10**6
        layer = "decoder.layers.0.mlp.experts."
        tree["model"] |= {layer + "weight1": torch.ones(32, 8), layer + "weight2": torch.ones(8, 32)}

    rewritten(folder, change)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (a_billion_stages, r"the files of 1999996 of them are not there"),
        (no_number, r"tensor_model_parallel_size is inf, no number"),
        (a_layer_far_away, r"lacks layer 2 of its stage"),
        (a_layer_beyond_numbers, r"stored names are unknown"),
        (no_matrix, r"linear_fc2.weight has shape \[3\]; it should have 2 dims"),
        (no_version, r"checkpoint_version is \[3\], not a number"),
        (no_width, r"its config says 'x' for the length e"),
        (experts_of_nobody, r"holds 8 rows for 1000000 experts"),
        (drop_a_rank, r"mp_rank_01_000 is missing: the run had 2 x 2 x 1"),
        (another_save, r"is of iteration 1, mp_rank_00_000/model_optim_rng.pt of 0"),
        (another_model, r"'decoder.final_layernorm.weight' is part of float32\[10\]"),
        (other_args, r"holds 4 layers, args say num_layers=5"),
        (no_args, r"whether its second number is a pipeline stage or an expert-parallel rank is not said"),
        (lost_layer, r"lacks layer 0 of its stage"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_files_that_are_not_one_whole_save(
    models: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    ckpt_dist.convert(models("llama"), tmp_path / "it", format="megatron", **{"target.tp": 2, "target.pp": 2})
    damage(tmp_path / "it")
    with pytest.raises(CheckpointError, match=says):
        ckpt_dist.convert(tmp_path / "it", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"target.pp": 3}, r"4 layers cannot be divided evenly"),
        ({"target.pp": 2, "target.partition": [1, 2]}, r"2 stages of 3 layers; the model has 4 layers"),
        ({"target.ep": 3}, r"target.ep=3: 4 experts"),
    ],
)
def test_layouts_that_do_not_fit(
    models: Callable[[str], Path], tmp_path: Path, keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        ckpt_dist.convert(models("mixtral"), tmp_path / "no", format="megatron", **keys)
    assert not (tmp_path / "no").exists()


def test_single_files_and_back_without_any_config(models: Callable[[str], Path], tmp_path: Path) -> None:
    ckpt_dist.convert(models("llama"), tmp_path / "dist", format="torch_dist", **{"target.dialect": "megatron"})
    ckpt_dist.convert(tmp_path / "dist", tmp_path / "single", format="sfpt")
    files = sorted(p for p in (tmp_path / "single").glob("*.pt"))
    assert len(files) == 27 == len(list((tmp_path / "single").iterdir()))  # FlagScale's converter opens every file
    for path in files:
        tree = torch.load(path)
        assert list(tree) == [path.stem] and tree[path.stem].is_contiguous()
    ckpt_dist.convert(tmp_path / "single", tmp_path / "back", format="torch_dist")
    config = {"model.config": str(models("llama"))}
    assert ckpt_dist.fingerprint(tmp_path / "back", **config) == ckpt_dist.fingerprint(models("llama"))
    (tmp_path / "single/stray.pt").write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointError, match="is stored in"):
        ckpt_dist.inspect(tmp_path / "single")
