"""Contract: a checkpoint in fp8 with block scales, or in mxfp4, is to every verb the floating one that transformers makes of
it, bit for bit, for any ranks and transport, within the memory of others; any other quantised one is refused by name.

The judges are transformers' own dequantisation and, where the last blocks are partial, which transformers refuses,
torch's reader of quantised checkpoints. Not checked: the bits of a NaN, in which libraries differ with the processor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ckpt_dist
from ckpt_dist.cli import main
from ckpt_dist.files.safetensors import lay_out
from tests.conftest import ROOT, torchrun
from tests.test_bad_input import contents, refused  # noqa: F401
from tests.test_local import _isolated, nets, on_nodes  # noqa: F401
from tests.test_memory import MEMORY, peak

Tensors = dict[str, torch.Tensor]
DTYPES = ["bfloat16", "float16", "float32"]
judged_fp8 = Fp8Dequantize(None)._dequantize_one
SMALL = dict(num_hidden_layers=2, num_attention_heads=4, vocab_size=64, max_position_embeddings=64, pad_token_id=0)
DEEPSEEK = dict(
    hidden_size=32, intermediate_size=48, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16,
    qk_nope_head_dim=8, v_head_dim=8, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
    n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
)  # fmt: skip
GPT_OSS = dict(
    hidden_size=64, intermediate_size=96, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2
)


def fp8(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Each matrix but the embeddings, the router and the head in e4m3, a scale for 16 x 16 values."""
    found: Tensors = {}
    for name, value in tensors.items():
        if value.ndim < 2 or "embed" in name or "lm_head" in name or name.endswith("mlp.gate.weight"):
            found[name] = value.bfloat16()
            continue
        found[name] = value.to(torch.float8_e4m3fn)
        found[name + "_scale_inv"] = torch.rand(value.shape[0] // 16, value.shape[1] // 16) + 0.5
    return found, {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


def mxfp4(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """The experts as random fp4 values with random scales."""
    found: Tensors = {}
    for name, value in tensors.items():
        if not name.endswith("_proj"):
            found[name] = value.bfloat16()
            continue
        experts, rows, columns = value.shape
        found[name + "_blocks"] = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
        found[name + "_scales"] = torch.randint(110, 130, (experts, columns, rows // 32), dtype=torch.uint8)
    return found, {"quant_method": "mxfp4"}


def in_two_files(tensors: Tensors, folder: Path) -> None:
    """Every scale in another file than what it scales."""
    scales = {n: v for n, v in tensors.items() if n.endswith(("_scale_inv", "_scales"))}
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({n: v for n, v in tensors.items() if n not in scales}, folder / names[0])
    save_file(scales, folder / names[1])
    weight_map = {n: names[n in scales] for n in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A quantised model of transformers."""
    known: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in known:
            torch.manual_seed(7)
            folder = known[kind] = tmp_path_factory.mktemp(kind)
            config: Any = (
                transformers.DeepseekV3Config(**SMALL, **DEEPSEEK)
                if kind == "fp8"
                else transformers.GptOssConfig(**SMALL, **GPT_OSS)
            )
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tensors, settings = (fp8 if kind == "fp8" else mxfp4)(load_file(folder / "model.safetensors"))
            (folder / "model.safetensors").unlink()
            in_two_files(tensors, folder)
            written = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**written, "quantization_config": settings}))
        return known[kind]

    return of


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal bits, but for those of NaNs."""
    bits = {2: torch.int16, 4: torch.int32}[one.itemsize]
    nan = one.isnan() & two.isnan()
    return one.dtype == two.dtype and one.shape == two.shape and bool(((one.view(bits) == two.view(bits)) | nan).all())


def converted(tensors: Tensors, folder: Path, settings: object = None, **options: Any) -> Tensors:
    source = folder / "source"
    source.mkdir()
    save_file({n: v.clone() for n, v in tensors.items()}, source / "model.safetensors")
    if settings is not None:
        config = {"architectures": ["X"], "quantization_config": settings}
        (source / "config.json").write_text(json.dumps(config))
    ckpt_dist.convert(source, folder / "target", **options)
    return load_file(folder / "target/model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_transformers_loads_the_same_model(
    kind: str, dtype: str, made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"source.path={made(kind)}", f"target.path={tmp_path / 'out'}"]
    assert main("convert", words + ([f"target.dtype={dtype}"] if dtype != "bfloat16" else [])) == 0
    said = capsys.readouterr().err
    assert "quantization_config is left out of config.json" in said and f"are read as {dtype}" in said
    assert ("guessed: quantised weights become bfloat16" in said) == (dtype == "bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours, info = load(tmp_path / "out", dtype=getattr(torch, dtype), output_loading_info=True)
    theirs = load(made(kind), dtype=getattr(torch, dtype)).state_dict()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = ours.state_dict()
    assert state.keys() == theirs.keys()
    quantised = [
        n for n in state if n.endswith(("_proj", "proj.weight", "_a_proj_with_mqa.weight")) and "norm" not in n
    ]
    assert kind == "mxfp4" or all(theirs[n].dtype == getattr(torch, dtype) for n in quantised)
    different = [n for n in state if not same(state[n], theirs[n].to(state[n].dtype))]  # the others stay bfloat16 there
    assert not different


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp4_value_with_every_scale(dtype: str, tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[None, :, None].repeat(2, 1, 16)
    out = converted({"experts.up_proj_blocks": blocks, "experts.up_proj_scales": scales}, tmp_path, dtype=dtype)
    assert same(out["experts.up_proj"], convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp8_value_with_odd_scales(scale: str, dtype: str, tmp_path: Path) -> None:
    """Each of the 256 values, in both kinds of fp8, in matrices of experts, with scales that no quantiser would give."""
    values = torch.arange(256, dtype=torch.uint8).repeat(3 * 120).reshape(3, 32, 960)
    odd = torch.tensor(
        [0.0, -0.0, 1.0, -1.5, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"), 1e-38, 1 / 3, 448]
    )
    byte = torch.tensor([0, 1, 2, 10, 100, 126, 127, 128, 200, 253, 254, 255], dtype=torch.uint8)
    row = odd.to(getattr(torch, scale)) if scale in ("float32", "bfloat16") else byte.view(getattr(torch, scale))
    scales = row.repeat(15)[: 3 * 2 * 30].reshape(3, 2, 30)
    tensors = {f"{k}_scale_inv": scales for k in ("a", "b")}
    tensors |= {"a": values.view(torch.float8_e4m3fn), "b": values.view(torch.float8_e5m2)}
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    out = converted(tensors, tmp_path, settings, dtype=dtype)
    for name in ("a", "b"):
        assert same(out[name], judged_fp8(tensors[name], scales, getattr(torch, dtype)))


def test_one_scale_for_each_tensor(tmp_path: Path) -> None:
    weight, scale = torch.randn(40, 24).to(torch.float8_e4m3fn), torch.tensor(0.37)
    tensors = {"w.weight": weight, "w.weight_scale_inv": scale, "w.activation_scale": torch.tensor(2.0)}
    out = converted(tensors, tmp_path, {"quant_method": "fp8", "weight_block_size": None}, dtype="float32")
    assert list(out) == ["w.weight"] and same(out["w.weight"], judged_fp8(weight, scale, torch.float32))


@pytest.mark.parametrize("shape", [(200, 300), (128, 129), (5, 7), (576, 256)])
def test_partial_last_blocks(shape: tuple[int, int], tmp_path: Path) -> None:
    grid = [-(-n // 128) for n in shape]
    tensors = {"w.weight": torch.randn(shape).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.rand(grid) + 0.1}
    out = converted(tensors, tmp_path, dtype="float32")
    in_two_files(tensors, tmp_path / "source")
    (tmp_path / "source/model.safetensors").unlink()
    judged = {"w.weight": torch.zeros(shape)}
    dcp.load(judged, storage_reader=QuantizedHuggingFaceStorageReader(str(tmp_path / "source")), no_dist=True)
    assert same(out["w.weight"], judged["w.weight"])


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_every_verb_sees_the_same_model(kind: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """In other formats and dialects, averaged, compared, fingerprinted: as its conversion to bfloat16."""
    source, plain = made(kind), tmp_path / "plain"
    report = ckpt_dist.convert(source, plain, **{"engine.verify": True})
    prints = {report["fingerprint"], ckpt_dist.fingerprint(source), ckpt_dist.fingerprint(plain)}
    assert len(prints) == 1
    assert ckpt_dist.verify(source, plain)["bit_equal"]
    dialect = "hf_stacked" if kind == "fp8" else "hf"
    ckpt_dist.convert(source, tmp_path / "dcp", format="dcp", dialect=dialect)
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "back", format="hf", **{"model.config": str(plain)})
    assert ckpt_dist.fingerprint(tmp_path / "back") in prints
    ckpt_dist.average([source, source], tmp_path / "twice")
    ckpt_dist.average([plain, source], tmp_path / "mixed", weights=[0.5, 0.5])
    assert {ckpt_dist.fingerprint(tmp_path / n) for n in ("twice", "mixed")} == prints
    ckpt_dist.convert(source, tmp_path / "larger", vocab_size=70)
    larger, smaller = (load_file(tmp_path / n / "model.safetensors") for n in ("larger", "plain"))
    embed = "model.embed_tokens.weight"
    assert torch.equal(larger[embed][:64], smaller[embed]) and all(
        torch.equal(larger[n], smaller[n]) for n in smaller if n not in (embed, "lm_head.weight")
    )


def test_inspect_shows_what_is_stored(made: Callable[[str], Path]) -> None:
    facts = ckpt_dist.inspect(made("fp8"))
    assert facts["family"] == "deepseek_v3" and facts["dtypes"]["float8_e4m3fn"] > 20 and not facts["unmatched"]
    assert facts["notes"] == [f"{facts['dtypes']['float8_e4m3fn']} weights of fp8 (a scale for 16 x 16 values) are read as bfloat16"]  # fmt: skip
    stored = [load_file(p) for p in sorted(made("fp8").glob("*.safetensors"))]
    assert facts["bytes"]["weight"] == sum(t.nbytes for part in stored for t in part.values())
    assert facts["num_files"] == 2
    rows = {r["name"]: r for r in ckpt_dist.inspect(made("mxfp4"))["tensors"]}
    row = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert (row["dtype"], row["shape"], row["scales"]) == ("mxfp4", [4, 64, 192], "uint8[4, 192, 2]")
    assert rows["model.norm.weight"]["scales"] == ""


@pytest.mark.parametrize("transport", ["direct", "collective"])
def test_two_ranks_write_the_same_bytes(transport: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    torch.manual_seed(3)  # more than one tile of each kind, cut in the middle of rows
    big: Tensors = {"w": torch.randn(1000, 900).to(torch.float8_e4m3fn), "w_scale_inv": torch.rand(8, 8)}
    big["e_blocks"] = torch.randint(0, 256, (2, 700, 30, 16), dtype=torch.uint8)
    big["e_scales"] = torch.randint(100, 256, (2, 700, 30), dtype=torch.uint8)  # 255 makes infinities
    (tmp_path / "source").mkdir()
    in_two_files(big, tmp_path / "source")
    ckpt_dist.convert(tmp_path / "source", tmp_path / "one")
    words = [f"source.path={tmp_path / 'source'}", f"target.path={tmp_path / 'two'}", f"engine.transport={transport}"]
    done = torchrun(2, ROOT / "tests/real/apart.py", "convert", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (contents(tmp_path / n) for n in ("one", "two"))
    assert one["model.safetensors"] == two["model.safetensors"]
    out = load_file(tmp_path / "one/model.safetensors")
    assert same(out["e"], convert_moe_packed_tensors(big["e_blocks"], big["e_scales"]))


@pytest.mark.skipif(not _isolated(), reason="namespaces need root, ip (iproute2) and unshare")
def test_scales_on_another_node_than_their_weights(
    made: Callable[[str], Path],
    nets: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The first node has all files, the second none of the scales: what it needs is computed by the first."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        shutil.copytree(made("fp8"), node)
    (nodes[1] / "model-00002-of-00002.safetensors").unlink()
    place, out = tmp_path / "local", tmp_path / "out"
    ended = on_nodes(nets, place, nodes, 1, "convert", f"source.path={place}", f"target.path={out}")
    assert [code for code, _ in ended] == [0, 0], ended
    assert "transport collective: not every node sees all files" in ended[0][1]
    ckpt_dist.convert(made("fp8"), tmp_path / "whole")
    assert contents(out)["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]


@pytest.mark.parametrize(("kind", "transport"), [("fp8", "direct"), ("mxfp4", "collective")])
def test_memory_does_not_grow_with_a_weight(kind: str, transport: str, tmp_path: Path) -> None:
    """One weight of half a gigabyte, as it is read; sparse on disk. (`before` has this process's imports in it too.)"""
    tensors: dict[str, list[Any]] = {
        "fp8": [("w", "float8_e4m3fn", (16384, 16384)), ("w_scale_inv", "float32", (128, 128))],
        "mxfp4": [("w_blocks", "uint8", (16, 5760, 90, 16)), ("w_scales", "uint8", (16, 5760, 90))],
    }
    header, _ = lay_out(tensors[kind], {"format": "pt"})
    item = {"float32": 4}
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(item.get(d, 1) * prod(s) for _, d, s in tensors[kind]))
    before, after = peak("convert", source, tmp_path / "target", **{"engine.transport": transport})
    print(f"{kind}, {transport}: {before >> 20} MiB after imports, {after >> 20} MiB at the peak")
    assert after - before < MEMORY


FP8 = torch.zeros(256, 130).to(torch.float8_e4m3fn)
BLOCKS, SCALES = torch.zeros(2, 8, 3, 16, dtype=torch.uint8), torch.zeros(2, 8, 3, dtype=torch.uint8)
ONE = {"a.weight": FP8, "a.weight_scale_inv": torch.ones(2, 2)}
DAMAGED: dict[str, tuple[Tensors, object, list[str]]] = {
    "a scale is missing": ({**ONE, "b.weight": FP8}, None, ["'b.weight' is float8_e4m3fn", "b.weight_scale_inv"]),
    "all are missing": ({"b.weight": FP8}, {"quant_method": "fp8"}, ["'b.weight_scale_inv' are missing"]),
    "a scale too many": ({**ONE, "b.weight_scale_inv": torch.ones(1)}, None, ["nothing to scale: 'b.weight'"]),
    "too few scales": ({**ONE, "a.weight_scale_inv": torch.ones(2, 1)}, None, ["float32[2, 1]", "has [2, 2] scales"]),
    "transposed": ({"a": FP8[:, :1].t(), "a_scale_inv": torch.ones(2, 1)}, None, ["[2, 1]", "has [1, 2] scales"]),
    "other blocks": (ONE, {"quant_method": "fp8", "weight_block_size": [64, 64]}, ["64 x 64 has [4, 3] scales"]),
    "blocks of words": (ONE, {"quant_method": "fp8", "weight_block_size": "all"}, ["weight_block_size is 'all'"]),
    "integer scales": ({**ONE, "a.weight_scale_inv": torch.ones(2, 2).int()}, None, ["is int32[2, 2]"]),
    "a scaled float": ({**ONE, "a.weight": FP8.float()}, None, ["which is float32[256, 130], no float8 matrix"]),
    "mxfp4 without scales": ({"a_blocks": BLOCKS}, None, ["'a_scales' are missing"]),
    "mxfp4 without values": ({"a_scales": SCALES}, None, ["nothing to scale: 'a_blocks'"]),
    "mxfp4 scales": ({"a_blocks": BLOCKS, "a_scales": SCALES[1:]}, None, ["uint8[1, 8, 3]", "uint8[2, 8, 3]"]),
    "mxfp4 blocks": ({"a_blocks": BLOCKS[0], "a_scales": SCALES[0]}, None, ["uint8[8, 3, 16]", "[experts, columns"]),
    "twice": ({"a_blocks": BLOCKS, "a_scales": SCALES, "a": torch.ones(1)}, None, ["both are the weight 'a'"]),
    "gptq": ({"a.qweight": BLOCKS[0, 0].int()}, {"quant_method": "gptq", "bits": 4}, ["the method 'gptq'"]),
    "awq": ({"a.qweight": BLOCKS[0, 0].int()}, {"quant_method": "awq", "bits": 4}, ["the method 'awq'"]),
    "bitsandbytes": ({"a.weight": BLOCKS}, {"quant_method": "bitsandbytes"}, ["the method 'bitsandbytes'"]),
    "compressed": ({"a.weight_packed": BLOCKS}, {"quant_method": "compressed-tensors"}, ["'compressed-tensors'"]),
    "nvfp4": ({"a.weight": BLOCKS}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["'modelopt' (NVFP4)"]),
    "a config of text": ({"a.weight": BLOCKS}, "int4", ["the method \"'int4'\""]),
    "gptq, no config": ({"a.qweight": BLOCKS[0, 0].int()}, None, ["'a.qweight'", "gptq or awq"]),
    "bitsandbytes, no config": ({"a.weight.absmax": torch.ones(3)}, None, ["bitsandbytes"]),
    "scale of a tensor": ({"a.weight": FP8, "a.weight_scale": torch.ones(1)}, None, ["'a.weight_scale'", "fbgemm"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_is_refused_by_name(name: str, refused: Any, tmp_path: Path) -> None:  # noqa: F811
    tensors, settings, words = DAMAGED[name]
    source = tmp_path / "source"
    source.mkdir()
    save_file({n: v.clone() for n, v in tensors.items()}, source / "model.safetensors")
    if settings is not None:
        config = {"architectures": ["X"], "quantization_config": settings}
        (source / "config.json").write_text(json.dumps(config))
    message = refused(source)
    assert all(word in message for word in words), message


def test_plain_fp8_is_only_passed_on(tmp_path: Path) -> None:
    """Without scales and without a word in a config, 8-bit floats are values like any others."""
    out = converted({"a.weight": FP8, "b_blocks": torch.ones(3)}, tmp_path)
    assert out["a.weight"].dtype == FP8.dtype and out["b_blocks"].dtype == torch.float32
