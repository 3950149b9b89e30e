"""Megatron's checkpoints against megatron-core itself, on CPUs: what it saves is read, what is written it loads.

One torchrun of four ranks runs every model under every layout (tests/real/megatron_core.py): it loads what we made of
transformers' models, gives logits, and saves again in both of its formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

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
}
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
    "qwen3": ({}, dict(qk_layernorm=True), ("tp2pp2", "vpp2")),
    "gpt2": (dict(n_embd=32, n_head=4, n_layer=4, n_positions=64, n_inner=96, vocab_size=64), {}, ("tp1", "tp2pp2")),
    "mixtral": (dict(num_local_experts=4, num_experts_per_tok=2), dict(num_moe_experts=4), MOE),
    "qwen3_moe": (EXPERTS, dict(qk_layernorm=True, num_moe_experts=4), MOE),
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
    if kind == "deepseek_v3":
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
        load=str(loaded),
        ids=IDS,
        logits=str(top / f"{layout}.logits"),
        save=str(top / f"dist-{layout}/iter_0000007"),
        legacy=str(top / f"legacy-{layout}"),
    )  # fmt: skip


def transformer(kind: str, folder: Path) -> torch.Tensor:
    """A model of transformers in a folder, and its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    base = {} if kind == "gpt2" else SMALL
    given = AutoConfig.for_model(kind.partition("-")[0], **{**base, **KINDS[kind][0]})
    model = AutoModelForCausalLM.from_config(given, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            torch.nn.init.uniform_(buffer, -0.1, 0.1)
    model.save_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(IDS)).logits
    return found


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
        own = (
            {}
            if "num_moe_experts" not in more or kind == "deepseek_v3"
            else {"target.dialect": "megatron_local_stacked"}
        )
        ckpt_dist.convert(top / kind / "hf", top / kind / "ours", format="torch_dist", **own)
        jobs += [job(top / kind, kind, layout, top / kind / "ours/iter_0000001") for layout in layouts]
    (top / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(4, "-m", "tests.real.megatron_core", top / "jobs.json")
    assert done.returncode == 0, done.stderr[-20_000:]
    return lambda kind: (top / kind, wanted[kind])


CASES = [(kind, layout) for kind, (*_, layouts) in KINDS.items() for layout in layouts]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_megatron_computes_what_transformers_computes(ran: Ran, kind: str, layout: str) -> None:
    top, theirs = ran(kind)
    ours = torch.load(top / f"{layout}.logits")
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_what_megatron_saves_is_the_same_model(ran: Ran, kind: str, layout: str) -> None:
    top, _ = ran(kind)
    wanted = ckpt_dist.fingerprint(top / "hf")
    assert ckpt_dist.fingerprint(top / f"dist-{layout}") == wanted
    assert ckpt_dist.fingerprint(top / f"legacy-{layout}") == wanted


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_rank_file_is_what_the_module_of_that_rank_holds(ran: Ran, tmp_path: Path, kind: str, layout: str) -> None:
    top, _ = ran(kind)
    keys = {f"target.{k}": v for k, v in LAYOUTS[layout].items() if k != "first"}
    keys |= {"target.partition": [1, 3]} if layout == "first" else {}
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
