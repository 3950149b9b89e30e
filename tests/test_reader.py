"""Contract: `dcp.load` through `ckpt_dist.dcp.reader` gives a running program the same bits as loading the whole
checkpoint and cutting it up, from any format and dialect, under any sharding, reading about the bytes of its shards;
what does not fit is said by name. Not checked here: the formats themselves (test_formats), conversions (test_real).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_dist
from ckpt_dist.errors import CheckpointError, UsageError
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
Tensors = dict[str, torch.Tensor]
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=130
)  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm", "model.layers": "layers",
}  # fmt: skip


def to_meta(hf: Tensors, config: Any) -> Tensors:
    """By the rule of transformers' own conversion script, backwards: rotary halves become adjacent pairs."""
    out = {}
    for name, value in hf.items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.view(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        out[name] = value
    return out


def to_torchtitan(hf: Tensors, config: Any) -> Tensors:
    """Meta's layout under the names of torchtitan 0.3."""
    new = {".wq.": ".qkv_linear.wq.", ".wk.": ".qkv_linear.wk.", ".wv.": ".qkv_linear.wv.", "output.": "lm_head."}
    out = {}
    for name, value in to_meta(hf, config).items():
        for old in new:
            name = name.replace(old, new[old])
        out[name] = value
    return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as transformers saves it (one file, and several), as Meta's .pth and as a torchtitan folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("reader")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(out / "hf")
    model.save_pretrained(out / "split", max_shard_size="50KB")
    hf = load_file(out / "hf/model.safetensors")
    torch.save(to_meta(hf, model.config), out / "consolidated.00.pth")
    dcp.save(to_torchtitan(hf, model.config), checkpoint_id=out / "titan", no_dist=True)
    places = {"hf": out / "hf", "split": out / "split", "meta": out / "consolidated.00.pth", "titan": out / "titan"}
    assert len(list((out / "split").glob("*.safetensors"))) > 3
    return places


def zeros(like: Tensors, **options: Any) -> Tensors:
    return {k: torch.zeros_like(v, **options) for k, v in like.items()}


def load(state: dict[str, Any], path: Path, **options: Any) -> Any:
    reader = ckpt_dist.dcp.reader(path, **options)
    dcp.load(state, storage_reader=reader)
    return reader


def same(a: Tensors, b: Tensors) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def program(name: str, *args: Path) -> str:
    """What four forked ranks print."""
    words = [sys.executable, str(ROOT / "tests/real" / name), *map(str, args)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_four_ranks_of_fsdp2_and_tensor_parallelism_load_and_save(sources: dict[str, Path], tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    printed = program("program.py", sources["hf"], out, *(sources[k] for k in ("split", "meta", "titan")))
    read = json.loads(printed.splitlines()[-1])
    assert len(read["rank"]) == 9 and any("ranks" in path for path in read["rank"])
    assert all(0.99 <= ratio <= 1.1 for scope in read.values() for ratio in scope.values()), read

    hf = load_file(sources["hf"] / "model.safetensors")
    assert sorted(p.name for p in out.iterdir()) == ["hf", "titan-dcp", "titan-hf", "titan-torch"]
    assert len(list((out / "titan-hf").glob("*.safetensors"))) > 3
    assert (out / "hf/model.safetensors").read_bytes() != b""
    for folder in ("hf", "titan-hf"):
        same(dict(AutoModelForCausalLM.from_pretrained(out / folder).state_dict()), hf)
    config = AutoModelForCausalLM.from_pretrained(out / "hf").config
    titan = to_torchtitan(hf, config)
    (whole,) = (out / "titan-torch").glob("*.pt")
    assert zipfile.ZipFile(whole).testzip() is None
    same(torch.load(whole, weights_only=True)["model"], titan)
    dcp_to_torch_save(out / "titan-dcp", out / "whole.pt")
    same(torch.load(out / "whole.pt", weights_only=True)["model"], {k: v.bfloat16() for k, v in titan.items()})


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_torchtitans_own_model_loads_and_saves_a_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=16, vocab_size=2048)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "hf", max_shard_size="50MB")
    printed = program("program_torchtitan.py", tmp_path / "hf", tmp_path / "again")
    assert "57 tensors, 44 of them on both dims, are what torchtitan's adapter makes" in printed


@pytest.mark.parametrize("kind", ["hf", "split", "meta", "titan"])
def test_every_name_of_every_dialect_can_be_asked_for_at_once(sources: dict[str, Path], kind: str) -> None:
    from transformers import LlamaConfig

    hf = load_file(sources["hf"] / "model.safetensors")
    config = LlamaConfig(**SIZES)
    whole = hf | to_meta(hf, config) | to_torchtitan(hf, config)
    state = zeros(whole)
    load(state, sources[kind], config=sources["hf"])
    same(state, whole)


def test_key_and_dialect_leave_only_the_names_that_are_meant(sources: dict[str, Path]) -> None:
    hf = load_file(sources["hf"] / "model.safetensors")
    state = {"model": zeros(hf)}
    load(state, sources["split"], key="model")
    same(state["model"], hf)
    state = {"model": zeros(hf), "step": 7}  # type: ignore[dict-item]
    with pytest.raises(CheckpointException, match=r"(?s)Missing key in checkpoint state_dict: model\.lm_head"):
        load(state, sources["split"], key="model", dialect="meta")


def test_dtypes_strides_and_parts_of_tensors_are_those_of_the_program(sources: dict[str, Path]) -> None:
    hf = load_file(sources["hf"] / "model.safetensors")
    threads = torch.get_num_threads()
    half = {k: torch.empty(v.shape[::-1], dtype=torch.bfloat16).t() for k, v in hf.items() if v.dim() == 2}
    load(half, sources["meta"], config=sources["hf"])
    same(half, {k: hf[k].bfloat16() for k in half})
    some = {"model.norm.weight": torch.zeros(2, 64)[1]}  # a view into a larger tensor
    reader = load(some, sources["hf"])
    same(some, {"model.norm.weight": hf["model.norm.weight"]})
    assert reader.bytes_read == 64 * 4
    assert torch.get_num_threads() == threads


def test_a_tied_head_is_read_from_the_embedding(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")
    whole = dict(model.state_dict())
    state = zeros(whole)
    load(state, tmp_path / "hf", like=state)
    same(state, whole)


def test_an_unknown_model_is_loaded_by_its_own_names(tmp_path: Path) -> None:
    whole = {
        "a.weight": torch.randn(5, 7),
        "b": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    torch.save({"model": whole, "epoch": 3}, tmp_path / "x.pt")
    state = zeros(whole)
    load(state, tmp_path / "x.pt")
    same(state, whole)
    stored: dict[str, Any] = {"model": zeros(whole), "epoch": 0}
    load(stored, tmp_path / "x.pt")
    same(stored["model"], whole)
    assert stored["epoch"] == 3
    with pytest.raises(UsageError, match="no known family"):
        ckpt_dist.dcp.reader(tmp_path / "x.pt", dialect="hf")


def test_a_training_state_is_resumed_with_optimizer_and_scheduler(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def training() -> tuple[Any, Any, Any]:
        model = torch.nn.Linear(6, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def state(model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optim": moments, "lr_scheduler": scheduler.state_dict(), "note": "x"}

    one = training()
    for _ in range(3):
        one[0](torch.randn(2, 6)).sum().backward()
        one[1].step()
        one[2].step()
    dcp.save(state(*one), checkpoint_id=tmp_path / "step-3", no_dist=True)
    two = training()
    asked = state(*two)
    load(asked, tmp_path, like=asked)  # the folder of the run: its latest step
    set_state_dict(two[0], two[1], model_state_dict=asked["model"], optim_state_dict=asked["optim"])
    same(dict(two[0].state_dict()), dict(one[0].state_dict()))
    for mine, theirs in zip(two[1].state.values(), one[1].state.values(), strict=True):
        same(mine, theirs)
    assert asked["lr_scheduler"] == one[2].state_dict() and asked["note"] == "x"


def test_a_value_that_could_run_code_is_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2), "evil": Evil()}, checkpoint_id=tmp_path / "x", no_dist=True)
    with pytest.raises(CheckpointException, match=r"(?s)evil.*(nothing was run|cannot be passed on)"):
        load({"w": torch.zeros(2), "evil": None}, tmp_path / "x")
    state = {"w": torch.zeros(2)}
    load(state, tmp_path / "x")
    same(state, {"w": torch.ones(2)})


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


def test_what_does_not_fit_is_said_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    hf = load_file(sources["hf"] / "model.safetensors")
    with pytest.raises(UsageError, match=r"dialect='hff'.*Did you mean 'hf'.*torchtitan"):
        ckpt_dist.dcp.reader(sources["hf"], dialect="hff")
    bad = {"model.norm.weight": torch.zeros(65), "model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}
    with pytest.raises(CheckpointError) as error:
        ckpt_dist.dcp.reader(sources["hf"], like=zeros(hf) | bad)
    text = str(error.value)
    assert "1 of 22 names are missing and 1 have another shape" in text
    assert "model.layers.2.mlp.up_proj.weight: not in the checkpoint. Did you mean" in text
    assert "model.norm.weight: [64] in the checkpoint, [65] in the model" in text
    with pytest.raises(CheckpointException, match=r"(?s)Size mismatch.*64.*65.*model\.norm\.weight"):
        load({"model.norm.weight": torch.zeros(65)}, sources["hf"])
    with pytest.raises(CheckpointError, match="does not exist"):
        ckpt_dist.dcp.reader(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no key 'source\.stepp'"):
        ckpt_dist.dcp.reader(sources["hf"], **{"source.stepp": 3})
    hf.pop("model.layers.0.mlp.up_proj.weight")
    (tmp_path / "cut").mkdir()
    save_file(hf, tmp_path / "cut/model.safetensors")
    (tmp_path / "cut/config.json").write_bytes((sources["hf"] / "config.json").read_bytes())
    with pytest.raises(
        CheckpointException, match=r"(?s)Missing key in checkpoint state_dict: layers\.0\.feed_forward\.w3\.weight"
    ):
        load({"layers.0.feed_forward.w3.weight": torch.zeros(96, 64)}, tmp_path / "cut")


def test_without_a_config_the_stored_names_are_left_and_that_is_said(sources: dict[str, Path]) -> None:
    titan = {k: torch.zeros_like(v) for k, v in _stored(sources["titan"]).items()}
    with pytest.warns(UserWarning, match=r"the lengths of .* cannot be read.*config=PATH"):
        reader = ckpt_dist.dcp.reader(sources["titan"])
    dcp.load(titan, storage_reader=reader)
    same(titan, _stored(sources["titan"]))
    with pytest.raises(UsageError, match=r"Give its config\.json"):
        ckpt_dist.dcp.reader(sources["titan"], dialect="hf")


def _stored(folder: Path) -> Tensors:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, folder.parent / "whole.pt")
    return torch.load(folder.parent / "whole.pt", weights_only=True)  # type: ignore[no-any-return]


def test_a_name_that_means_two_layouts_is_refused_until_the_dialect_is_given(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_dist.families import llama

    other = {"layers.{l}.attention.wq.weight": "q: (g q c r) e", "layers.{l}.attention.wo.weight": "o: e (g q c r)"}
    monkeypatch.setitem(llama.dialects, "other", other)
    hf = load_file(sources["hf"] / "model.safetensors")
    name, agreed = "layers.1.attention.wq.weight", "layers.1.attention.wo.weight"
    with pytest.raises(CheckpointException, match="different layouts in the dialects meta and other"):
        load({name: torch.zeros(64, 64)}, sources["hf"])
    state = {agreed: torch.zeros(64, 64)}
    load(state, sources["hf"])
    same(state, {agreed: hf["model.layers.1.self_attn.o_proj.weight"]})
    state = {name: torch.zeros(64, 64)}
    load(state, sources["hf"], dialect="other")
    same(state, {name: hf["model.layers.1.self_attn.q_proj.weight"]})


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, ckpt_dist; assert 'torch' not in sys.modules; print(ckpt_dist.dcp.reader.__name__, 'dcp' in ckpt_dist.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.split() == ["reader", "True"], done.stderr
