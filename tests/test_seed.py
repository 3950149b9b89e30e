"""Contract: a seed is what transformers would make of the same config, but for the numbers: the same names, shapes and
dtypes, the same constants, normal numbers of the same deviation; bit-equal for any rank count, format and dialect, and
within the memory of any other job. transformers, FSDP2 and torchtitan load it.

Not checked here: that a model trains from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import ckpt_dist
from ckpt_dist import cli, draw, families, family, initial
from ckpt_dist import config as config_module
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.plan import TILE
from tests.conftest import ROOT, torchrun
from tests.real.seeds import TARGETS, seeds
from tests.test_memory import MEMORY, peak
from tests.test_resume import noted, same, start, wait

Tensors = dict[str, torch.Tensor]
SIZES = dict(
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=131,
    max_position_embeddings=64,
)
EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)
LATENT = dict(kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=14, num_key_value_heads=4)
DEEPSEEK = dict(**EXPERTS, **LATENT, num_hidden_layers=3, n_routed_experts=4, n_group=2, topk_group=1)
PLAIN = dict(n_embd=48, n_layer=2, n_head=4, vocab_size=131)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": dict(attention_bias=True, mlp_bias=True, initializer_range=0.3, pad_token_id=5),
    "mistral": dict(head_dim=8, attention_bias=True),  # which has none, whatever its config says
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16, initializer_range=0.05),
    "qwen3-biases": dict(head_dim=8, attention_bias=True, tie_word_embeddings=True, pad_token_id=-1),
    "mixtral": dict(num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": dict(**EXPERTS, head_dim=8, num_experts=4, num_hidden_layers=3, mlp_only_layers=[1]),
    "qwen3_moe-sparse": dict(**EXPERTS, head_dim=8, num_experts=4, num_hidden_layers=4, decoder_sparse_step=2),
    "deepseek_v3": dict(**DEEPSEEK, q_lora_rank=20, n_shared_experts=2, first_k_dense_replace=1),
    "deepseek_v3-lite": dict(**DEEPSEEK, q_lora_rank=None, n_shared_experts=1, first_k_dense_replace=0),
    "gpt_oss": dict(head_dim=8, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.1),
    "gemma2": dict(head_dim=16),
    "gemma3_text": dict(head_dim=16, tie_word_embeddings=False),
    "phi3": dict(pad_token_id=7),
    "olmo2": dict(pad_token_id=None),
    "gpt2": {**PLAIN, "n_positions": 64, "n_layer": 8},
    "gpt2-inner": dict(**PLAIN, n_positions=64, n_inner=72, tie_word_embeddings=False),
    "bloom": dict(hidden_size=48, n_layer=2, n_head=4, vocab_size=131),
}


def config(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **values}))
    return folder / "config.json"


def hf(folder: Path, path: Path, **options: Any) -> Tensors:
    ckpt_dist.seed(path, folder, **options)
    return load_file(folder / "model.safetensors")


# ---- the same as transformers


def saved(model: Any, folder: Path) -> None:
    model.generation_config.pad_token_id = None  # some releases of transformers refuse to save a negative one
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_would_save_but_for_the_numbers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {} if kind.startswith(("gpt2", "bloom")) else SIZES
    given = AutoConfig.for_model(kind.partition("-")[0], **{**own, **KINDS[kind]})
    torch.manual_seed(0)
    saved(AutoModelForCausalLM.from_config(given), tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    ours = hf(tmp_path / "ours", tmp_path / "theirs/config.json")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    for name, mine in ours.items():
        his = theirs[name]
        still = torch.equal(his, his.flatten()[0].expand_as(his))
        assert torch.equal(mine, his) if still else torch.equal(mine == 0, his == 0), name  # a padding row is zeros
        if not still:  # two samples, of five deviations each
            mine, his = mine[mine != 0], his[his != 0]
            assert abs((mine.std() / his.std()).log().item()) < 5 / mine.numel() ** 0.5, name

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved(model, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == ours.keys() and all(torch.equal(again[n], t) for n, t in ours.items())
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 6)


LEFT_OUT: dict[str, dict[str, Any]] = {
    **{k: {} for k in ("mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss", "gemma2", "gemma3_text")},
    "deepseek_v3": dict(num_hidden_layers=4),
    "olmo2": dict(num_key_value_heads=4),
    "phi3": dict(num_key_value_heads=4, vocab_size=32001),
    "gpt2": PLAIN,
    "bloom": dict(hidden_size=48, n_layer=2, n_head=4, vocab_size=131),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, "num_attention_heads": 32, "hidden_size": 64, "vocab_size": 64, "num_key_value_heads": None}
    values = {**({} if kind in ("gpt2", "bloom") else sizes), **LEFT_OUT[kind]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **{k: v for k, v in values.items() if v is not None}}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = model.state_dict()
    cfg = config_module.fill("seed", {"model.config": str(path), "target.path": "none"})
    source = initial.checkpoint(cfg).source
    ours = {e.name: e.shape for e in source.catalog.entries}
    tied = model.config.tie_word_embeddings
    count = sum(t.numel() for n, t in theirs.items() if not (tied and n == "lm_head.weight"))
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == count
    assert {n for n in ours if "expert" not in n and "sparse" not in n} <= set(theirs)
    row = model.get_input_embeddings().padding_idx
    assert source.reader.starts[0].zero_row == row


def test_a_folder_brings_its_tokenizer_and_its_config(tmp_path: Path) -> None:
    config(tmp_path / "hf", dtype="float32", rope_theta=123.0)
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    made = hf(tmp_path / "out", tmp_path / "hf", dtype="bf16")
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {**json.loads((tmp_path / "hf/config.json").read_text()), "dtype": "bfloat16"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    record = json.loads((tmp_path / "out/ckpt_dist.json").read_text())
    assert (record["verb"], record["seed"], record["init"]["q"]) == ("seed", 0, "normal, std 0.02")


# ---- the same bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of seeds that so many ranks have made, of a model with weights of several tiles."""
    top, done = tmp_path_factory.mktemp("seeds"), dict[int, Path]()
    path = config(top, hidden_size=256, vocab_size=5000)

    def folder(num_ranks: int) -> Path:
        if num_ranks not in done:
            done[num_ranks] = top / str(num_ranks)
            if num_ranks == 1:
                seeds(path, done[1])
            else:
                ran = torchrun(num_ranks, "-m", "tests.real.seeds", path, done[num_ranks])
                assert ran.returncode == 0, ran.stderr[-20_000:]
        return done[num_ranks]

    return folder


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_rank_count_makes_the_same_bytes(made: Callable[[int], Path], num_ranks: int) -> None:
    for name in TARGETS:
        assert same(made(num_ranks) / name, made(1) / name), name
    assert same(made(num_ranks) / "exchanged", made(1) / "hf")


def test_a_seed_is_one_model_in_every_format(made: Callable[[int], Path], tmp_path: Path) -> None:
    wide = {
        n: ckpt_dist.fingerprint(made(1) / n, **{"model.config": str(made(1) / "hf")}) for n in ("hf", "dcp", "titan")
    }
    assert len(set(wide.values())) == 1
    for format, tp in (("torch_dist", 1), ("megatron", 2)):
        words = {"seed": 7, "format": format, "target.tp": tp, "quiet": True}
        ckpt_dist.seed(made(1) / "hf/config.json", tmp_path / format, **words)
        assert ckpt_dist.fingerprint(tmp_path / format) == wide["hf"], format
    record = json.loads((made(1) / "titan/ckpt_dist.json").read_text())
    assert record["fingerprint"] == wide["hf"]
    whole = load_file(made(1) / "hf/model.safetensors")
    narrow = torch.load(made(1) / "torch/model.pt", weights_only=True)
    assert sorted(narrow) == sorted(whole)
    assert all(torch.equal(narrow[n], t.bfloat16()) for n, t in whole.items())  # cast once


def test_dcp_load_under_fsdp2_gives_the_same_model(made: Callable[[int], Path]) -> None:
    loaded = load_file(made(2) / "loaded.safetensors")
    whole = load_file(made(1) / "hf/model.safetensors")
    assert sorted(loaded) == sorted(whole) and all(torch.equal(loaded[n], t) for n, t in whole.items())


def test_a_tied_head_is_a_copy_where_the_dialect_needs_one(tmp_path: Path) -> None:
    path = config(tmp_path, tie_word_embeddings=True)
    ckpt_dist.seed(path, tmp_path / "titan", format="dcp", dialect="torchtitan")
    state = {n: torch.zeros(131, 48) for n in ("tok_embeddings.weight", "lm_head.weight")}
    dcp.load(state, checkpoint_id=tmp_path / "titan")
    whole = hf(tmp_path / "hf", path)
    assert "lm_head.weight" not in whole
    assert all(torch.equal(t, whole["model.embed_tokens.weight"]) for t in state.values())


TITAN = """
import sys
try:
    from torchtitan.models.llama3 import model_registry
except ImportError as error:
    sys.exit(f"SKIP {error}")
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
spec = model_registry("debugmodel")
model = spec.model.build()
state = model.state_dict()
for tensor in state.values():
    tensor.zero_()
dcp.load(state, checkpoint_id=sys.argv[1])
model.load_state_dict(state)
theirs = spec.state_dict_adapter(spec.model, None).to_hf(model.state_dict())
ours = load_file(sys.argv[2])
assert sorted(theirs) == sorted(ours)
assert all(torch.equal(theirs[n], t) for n, t in ours.items())
"""


def test_torchtitan_loads_it(tmp_path: Path) -> None:
    debug = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=2048)
    path = config(tmp_path, **debug, num_attention_heads=16, num_key_value_heads=16)
    ckpt_dist.seed(path, tmp_path / "titan", format="dcp", dialect="torchtitan")
    ckpt_dist.seed(path, tmp_path / "hf")
    words = [sys.executable, "-c", TITAN, str(tmp_path / "titan"), str(tmp_path / "hf/model.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.stderr.startswith("SKIP"):
        pytest.skip(f"torchtitan cannot be imported: {done.stderr[5:].strip()}")
    assert done.returncode == 0, done.stderr[-3000:]


# ---- the numbers


def numbers(name: str, seed: int = 7, count: int = 2 * TILE) -> Any:
    out = np.empty(count, np.float32)
    draw.normal(draw.key(seed, name), 0, 1.0, out)
    return out


def test_the_numbers_are_normal() -> None:
    z = numbers("w").astype(np.float64)
    n = len(z)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.std() - 1) < 5 / (2 * n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    cdf = torch.special.ndtr(torch.from_numpy(np.sort(z))).numpy()
    assert np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 2.2 / n**0.5  # Kolmogorov: 1 in 10,000


def test_weights_layers_tiles_seeds_and_neighbours_have_nothing_in_common() -> None:
    names = [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ]
    parts = [numbers(n) for n in names] + [numbers(names[0], seed=8)]
    tiles = [p[k * TILE : (k + 1) * TILE] for p in parts for k in range(2)]
    tiles += [tiles[0][lag:].copy() for lag in (1, 2, 3, 4)]
    for one, two in combinations(tiles, 2):
        n = min(len(one), len(two))
        for f in (lambda x: x, np.abs):
            a, b = f(one[:n]).astype(np.float64), f(two[:n]).astype(np.float64)
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5


def test_a_number_does_not_depend_on_how_a_tensor_is_cut() -> None:
    whole = numbers("w", count=200_000)
    for first, last in [(0, 1), (1, 2), (3, 70_000), (65_535, 65_537), (131_073, 200_000)]:
        part = np.empty(last - first, np.float32)
        draw.normal(draw.key(7, "w"), first, 1.0, part)
        assert np.array_equal(part, whole[first:last])


def test_the_transform_is_box_and_mullers() -> None:
    bits = np.random.Philox(key=draw.key(7, "w")).random_raw(100_000)
    one, two = ((bits[k::2] >> np.uint64(11)).astype(float) for k in (0, 1))
    radius, angle = np.sqrt(-2 * np.log((one + 1) / 2**53)), np.pi * (two / 2**53 - 0.5)
    sign = 1 - 2 * (bits[1::2] % 2).astype(float)
    z = draw._standard(draw.key(7, "w"), 0, 25_000)
    assert np.abs(z[0::2] - sign * radius * np.cos(angle)).max() < 1e-12
    assert np.abs(z[1::2] - radius * np.sin(angle)).max() < 1e-12


def test_the_numbers_of_a_seed_are_frozen() -> None:
    """On every machine, with every version of numpy: whoever changes this changes everybody's seeds."""
    assert hashlib.sha256(numbers("model.norm.weight").tobytes()).hexdigest()[:16] == "50523354a57d0483"


PROCESSOR = """
import hashlib, sys, numpy as np
from ckpt_dist import draw
out = np.empty(1 << 18, np.float32)
draw.normal(draw.key(7, "w"), 0, 1.0, out)
print(hashlib.sha256(out).hexdigest())
"""


def test_processors_agree() -> None:
    """numpy without the instructions of newer processors, whose own logarithm then has other last bits."""
    from numpy._core import _multiarray_umath as numpy_core

    newer = " ".join(numpy_core.__cpu_dispatch__)
    env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": newer}
    words = [sys.executable, "-W", "ignore", "-c", PROCESSOR]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(numbers("w", count=1 << 18)).hexdigest()


# ---- like every other job


def test_a_seed_stays_within_its_memory(tmp_path: Path) -> None:
    big = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8, vocab_size=8192)
    path = config(tmp_path, **big, num_key_value_heads=8)
    before, after = peak("seed", path, tmp_path / "out", format="dcp", dialect="torchtitan")
    written = (tmp_path / "out/__0_0.distcp").stat().st_size
    print(f"{written >> 20} MiB: {before >> 20} MiB after imports, {after >> 20} MiB at the peak")
    assert after - before < MEMORY + (64 << 20) < written / 2


def test_a_seed_that_was_ended_goes_on(tmp_path: Path) -> None:
    path = config(tmp_path, hidden_size=256, vocab_size=20_000)
    words = [f"model.config={path}", f"target.path={tmp_path / 'out'}", "seed=3", "engine.workers=2"]
    job = start(1, 0.05, "seed", *words)
    wait(lambda: noted(tmp_path / ".out.ckpt_dist") >= 2 or job.poll() is not None)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 75 and not (tmp_path / "out").exists()
    report = ckpt_dist.seed(path, tmp_path / "out", seed=3, **{"engine.workers": 2})
    assert any("tiles were there already" in note for note in report["notes"])
    ckpt_dist.seed(path, tmp_path / "straight", seed=3)
    assert same(tmp_path / "out", tmp_path / "straight")


def test_a_dry_run_writes_nothing_and_verify_reads_it_again(tmp_path: Path) -> None:
    path = config(tmp_path / "c")
    plan = ckpt_dist.seed(path, tmp_path / "out", dry_run=True)
    assert plan["bytes"] > 0 and [p.name for p in tmp_path.iterdir()] == ["c"]
    report = ckpt_dist.seed(path, tmp_path / "out", **{"engine.verify": True})
    assert any("read back" in note for note in report["notes"])
    assert plan["files"]["model.safetensors"] == (tmp_path / "out/model.safetensors").stat().st_size


# ---- what goes wrong


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (dict(model_type="gpt_nope"), "'gpt_nope'.*llama, mistral"),
        (dict(model_type=None), "None"),
        (dict(hidden_size=None), "do not fit|lengths of axes"),
        (dict(num_hidden_layers=0), "'l': 0"),
        (dict(num_hidden_layers="two"), "'l': 'two'"),
        (dict(num_hidden_layers=10**9), "more than any model has"),
        (dict(vocab_size=10**15), "more than any model has"),
        (dict(num_attention_heads=0), "sizes do not fit"),
        (dict(num_attention_heads=3), "3 heads in 2 groups"),
        (dict(hidden_size=50), "hidden size 50"),
        (dict(head_dim=7), "7 elements"),
        (dict(initializer_range="wide"), "deviation"),
        (dict(initializer_range=-1), "-1"),
        (dict(pad_token_id=131), "pad_token_id is 131"),
        (dict(model_type="olmo2", attention_bias=True), "attention_bias is True, and olmo2 is known with False only"),
        (dict(model_type="deepseek_v3", first_k_dense_replace="one"), "'l < first_k_dense_replace' cannot be computed"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    path = config(tmp_path / "c", **values)
    with pytest.raises(CheckpointError, match=says) as error:
        ckpt_dist.seed(path, tmp_path / "out")
    assert error.value.exit_code == 3 and str(path) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("key", sorted(set(SIZES) - {"max_position_embeddings", "num_key_value_heads"}))
def test_a_size_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    path = config(tmp_path / "c")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(CheckpointError, match=key):
        ckpt_dist.seed(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "model.config is missing"),
        (["model.config=nowhere.json"], 2, "no config.json"),
        (["model.config=CONFIG", "target.dtype=int8"], 2, "target.dtype"),
        (["model.config=CONFIG", "seed=-1"], 2, "seed"),
        (["model.config=CONFIG", "model=identity"], 2, "identity"),
        (["model.config=CONFIG", "target.dialect=klingon"], 2, "klingon"),
        (["model.config=BIASES", "target.dialect=torchtitan"], 3, "q_bias"),
        (["model.config=BROKEN"], 3, "no readable JSON"),
    ],
)
def test_a_wrong_command_says_so_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    places = {"CONFIG": config(tmp_path / "c"), "BIASES": config(tmp_path / "b", attention_bias=True)}
    places["BROKEN"] = tmp_path / "c/broken.json"
    places["BROKEN"].write_text("{")
    for name, path in places.items():
        words = [w.replace(name, str(path)) for w in words]
    assert cli.main("seed", [*words, f"target.path={tmp_path / 'out'}"]) == code
    assert says in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"b", "c"}


def test_a_family_without_init_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ckpt_dist.families.llama.init")
    with pytest.raises(CheckpointError, match="the family llama has no `init` table"):
        ckpt_dist.seed(config(tmp_path / "c"), tmp_path / "out")


def test_the_config_is_never_written_over(tmp_path: Path) -> None:
    path = config(tmp_path / "c")
    with pytest.raises(UsageError, match="would replace the source"):
        ckpt_dist.seed(path, tmp_path / "c", overwrite=True)
    assert path.exists()


TOY = """
model_types = ("toy",)
weights = dict(embed="v e", q="l g d e", k="l g d e", v="l g d e", up="l x f e", scale="l e")
dialects = dict(hf={
    "wte": "embed: v e",
    "h.{l}.qkv": "q, k, v: e ((1 + 1 + 1) g d)",
    "h.{l}.experts.{x}.up": "up: f e",
    "h.{l}.scale": "scale: e",
})
init = {"scale": "ones", "up": "normal init_std / (2 * n_layer) ** 0.5", "*": "normal init_std"}
optional = dict(up="num_experts")
def _sizes(c):
    found = dict(l=c["n_layer"], v=c["n_vocab"], e=32, g=2, d=8, f=24)
    return {**found, "x": c["num_experts"]} if "num_experts" in c else found
sizes = dict(hf=_sizes)
"""


def test_another_family_needs_only_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and transposed arrays, an array for each expert, deviations that depend on depth."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families/toy.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    monkeypatch.delitem(sys.modules, "ckpt_dist.families.toy", raising=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(model_type="toy", n_layer=2, n_vocab=50, num_experts=3, init_std=0.5)))
    made = hf(tmp_path / "out", path)
    layers = {f"h.{i}.qkv": (32, 48) for i in range(2)} | {f"h.{i}.scale": (32,) for i in range(2)}
    experts = {f"h.{i}.experts.{x}.up": (24, 32) for i in range(2) for x in range(3)}
    assert {n: tuple(t.shape) for n, t in made.items()} == {"wte": (50, 32), **layers, **experts}
    for name, std in {"wte": 0.5, **dict.fromkeys(experts, 0.25), "h.0.qkv": 0.5}.items():
        assert abs(made[name].std().item() / std - 1) < 5 / (2 * made[name].numel()) ** 0.5
    assert torch.equal(made["h.1.scale"], torch.ones(32))
    assert len({t.numpy().tobytes() for n, t in made.items() if "scale" not in n}) == len(made) - 2
    path.write_text(json.dumps(dict(model_type="toy", n_layer=2, n_vocab=50, init_std=0.5)))
    assert sorted(hf(tmp_path / "dense", path)) == sorted({"wte", *layers})
    (tmp_path / "families/toy.py").write_text(TOY.replace("e=32, ", ""))
    monkeypatch.delitem(sys.modules, "ckpt_dist.families.toy")
    with pytest.raises(CheckpointError, match="lengths of e"):
        ckpt_dist.seed(path, tmp_path / "no")


def test_a_dry_run_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from ckpt_dist.cli import main; code = main('seed', sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    words = [f"model.config={config(tmp_path)}", f"target.path={tmp_path / 'out'}", "dry_run=true"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", family.available())
def test_every_init_table_can_be_read(name: str) -> None:
    """Each weight has a rule that is understood, and what is optional or has defaults is there."""
    table = family.load(name)
    assert table.init, f"{name} has no init table"
    assert set(table.layers) <= set(table.weights)
    assert set(table.optional) <= set(table.weights) and set(table.defaults) <= set(table.model_types)
    for weight in table.weights:
        rule = next(how for pattern, how in table.init.items() if initial.fnmatchcase(weight, pattern))
        assert initial.HOW.fullmatch(rule), f"{weight}: {rule}"


def test_deviations_may_depend_on_depth() -> None:
    where = Path("config.json")
    config = dict(initializer_range=0.02, n_layer=8)
    assert initial._deviation("initializer_range / (2 * n_layer) ** 0.5", config, where) == 0.02 / 4
    assert initial._deviation("init_std or 0.5", config, where) == 0.5
    for text in ("init_std / 2", "n_layer / 0", "__import__('os').getpid()", "-n_layer", "n_layer.real", "'a'"):
        with pytest.raises(CheckpointError, match=r"cannot be computed|number, 0 or more"):
            initial._deviation(text, config, where)
