"""Contract: Meta's Llama folders of 1 to 8 shards become what transformers computes with, and the way back gives the
shards that the rules of Meta's code give; config.json and params.json say the same. The reference is plain torch code
written here from those rules, and transformers itself. Not checked: weights that Meta released, which nobody may pass on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckpt_dist
from ckpt_dist import configs
from ckpt_dist.errors import CheckpointError, UsageError
from tests.test_real import same

Tensors = dict[str, torch.Tensor]
HEADS, GROUPS, DIM, FFN, VOCAB = 16, 8, 64, 256, 96
PARAMS = dict(
    dim=DIM,
    n_layers=2,
    n_heads=HEADS,
    n_kv_heads=GROUPS,
    vocab_size=VOCAB,
    multiple_of=256,
    norm_eps=1e-5,
    rope_theta=500000.0,
)
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


# ---- the reference: Meta's rules in plain torch


def hf_model(seed: int = 3, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()
    for name, value in model.named_parameters():
        if "norm" in name:  # all ones would prove nothing
            value.data.uniform_(0.5, 1.5)
    return model


def adjacent(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves of each head as adjacent pairs."""
    return w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape).contiguous()


def to_meta(state: Tensors) -> Tensors:
    out = {}
    for name, value in state.items():
        heads = HEADS if "q_proj" in name else GROUPS if "k_proj" in name else 0
        for theirs, metas in NAMES.items():
            name = name.replace(theirs, metas)
        out[name] = adjacent(value, heads) if heads else value.clone()
    return out


def split(whole: Tensors, count: int, embedding: int = 0) -> list[Tensors]:
    rows, columns = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")
    shards: list[Tensors] = [{} for _ in range(count)]
    for name, value in whole.items():
        kind = name.split(".")[-2]
        dim = embedding if kind == "tok_embeddings" else 0 if kind in rows else 1 if kind in columns else None
        parts = [value] * count if dim is None else value.chunk(count, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.contiguous().clone()
    return shards


def save(folder: Path, shards: list[Tensors], params: dict[str, Any] | None = PARAMS) -> Path:
    folder.mkdir()
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_text("a tokenizer")
    return folder


def shards_of(folder: Path) -> list[Tensors]:
    files = sorted(folder.glob("consolidated.*.pth"))
    return [torch.load(f, weights_only=True, mmap=True) for f in files]


def meta_forward(w: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """The model as Meta's code computes it: pairs of neighbours are complex numbers that are turned."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w[name]

    def heads(x: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return (x @ w[name].T).view(*ids.shape, count, -1).transpose(1, 2)

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    size = DIM // HEADS
    angles = torch.outer(torch.arange(ids.shape[1]), 500000.0 ** -(torch.arange(0, size, 2) / size))
    turns, x = torch.polar(torch.ones_like(angles), angles), w["tok_embeddings.weight"][ids]
    for layer in range(2):
        at = f"layers.{layer}."
        h = norm(x, at + "attention_norm.weight")
        q, k, v = (
            heads(h, f"{at}attention.w{c}.weight", n) for c, n in zip("qkv", (HEADS, GROUPS, GROUPS), strict=True)
        )
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (turned(k), v))
        out = torch.nn.functional.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
        x = x + out.transpose(1, 2).flatten(2) @ w[at + "attention.wo.weight"].T
        h = norm(x, at + "ffn_norm.weight")
        one, two, three = (w[f"{at}feed_forward.w{n}.weight"].T for n in (1, 2, 3))
        x = x + (torch.nn.functional.silu(h @ one) * (h @ three)) @ two
    return norm(x, "norm.weight") @ w["output.weight"].T


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) * 3 % VOCAB).logits


# ---- from Meta


@pytest.mark.parametrize("embedding", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_transformers_loads_what_any_number_of_shards_becomes(tmp_path: Path, count: int, embedding: int) -> None:
    from transformers import LlamaForCausalLM

    model = hf_model()
    whole = to_meta(model.state_dict())
    source = save(tmp_path / "meta", split(whole, count, embedding))
    one = save(tmp_path / "one", [whole])
    done = ckpt_dist.convert(source, tmp_path / "hf", **{"engine.verify": True})
    same(load_file(tmp_path / "hf/model.safetensors"), dict(model.state_dict()))
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.float32
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert (tmp_path / "hf/tokenizer.model").read_text() == "a tokenizer"
    assert any("max_position_embeddings 8192" in g for g in done["guesses"])
    facts = ckpt_dist.inspect(source / "consolidated.00.pth")  # one shard stands for all
    assert (facts["format"], facts["dialect"], facts["num_files"]) == ("meta", "meta", count)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    prints = {ckpt_dist.fingerprint(p) for p in (source, one, tmp_path / "hf")}
    assert prints == {done["fingerprint"]}
    assert ckpt_dist.verify(source, one)["bit_equal"]


@pytest.mark.parametrize("stored", ["shared storage", "wrapped params", "no params", "half precision"])
def test_what_such_folders_look_like(tmp_path: Path, stored: str) -> None:
    whole = to_meta(hf_model().state_dict())
    if stored == "half precision":
        whole = {k: v.bfloat16() for k, v in whole.items()}
    shards = split(whole, 2)
    for shard in shards:
        shard["rope.freqs"] = torch.ones(2)
    if stored == "shared storage":  # parts are views of the whole tensors, as Meta's own splitting leaves them
        shards = [{k: v.chunk(2, _dim(k))[r] if _dim(k) is not None else v for k, v in whole.items()} for r in (0, 1)]
    params: dict[str, Any] | None = {"model": PARAMS} if stored == "wrapped params" else PARAMS
    source = save(tmp_path / "meta", shards, None if stored == "no params" else params)
    more: dict[str, Any] = {}
    if stored == "no params":
        (tmp_path / "config").mkdir()
        (tmp_path / "config/params.json").write_text(json.dumps(PARAMS))
        more = {"model.config": str(tmp_path / "config")}
    done = ckpt_dist.convert(source, tmp_path / "hf", **more)
    dtype = torch.bfloat16 if stored == "half precision" else torch.float32
    same(load_file(tmp_path / "hf/model.safetensors"), {k: v.to(dtype) for k, v in hf_model().state_dict().items()})
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert stored == "shared storage" or any("rope.freqs" in n for n in done["notes"])


def _dim(name: str) -> int | None:
    kind = name.split(".")[-2]
    return None if "norm" in kind else 1 if kind in ("wo", "w2") else 0


def test_an_embedding_that_is_the_head_is_found_by_its_values(tmp_path: Path) -> None:
    """Llama 3.2 1B and 3B store both, and params.json cannot say that they are one."""
    from transformers import LlamaForCausalLM

    model = hf_model(tie_word_embeddings=True)
    whole = to_meta(model.state_dict())
    assert torch.equal(whole["output.weight"], whole["tok_embeddings.weight"])
    source = save(tmp_path / "meta", split(whole, 2))
    ckpt_dist.convert(source, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()), logits(model))
    model.save_pretrained(tmp_path / "theirs")
    assert ckpt_dist.fingerprint(source) == ckpt_dist.fingerprint(tmp_path / "theirs")
    ckpt_dist.convert(source, tmp_path / "four", format="meta", tp=4)
    ckpt_dist.convert(tmp_path / "theirs", tmp_path / "again", format="meta", tp=4)
    for ours, again, wanted in zip(
        shards_of(tmp_path / "four"), shards_of(tmp_path / "again"), split(whole, 4), strict=True
    ):
        same(ours, wanted)
        same(again, wanted)


# ---- to Meta


def test_what_is_written_computes_the_same_in_metas_way(tmp_path: Path) -> None:
    model = hf_model()
    model.save_pretrained(tmp_path / "hf")
    done = ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta")
    (shard,) = shards_of(tmp_path / "meta")
    ids = torch.arange(24).view(2, 12) * 3 % VOCAB
    torch.testing.assert_close(meta_forward(shard, ids), logits(model), rtol=1e-4, atol=1e-5)
    swapped = {k: v.roll(1, 0) if "wk" in k else v for k, v in shard.items()}
    assert (meta_forward(swapped, ids) - logits(model)).abs().max() > 1e-3  # the comparison can fail
    assert not any("embedding" in g for g in done["guesses"])
    done = ckpt_dist.convert(tmp_path / "hf", tmp_path / "two", format="meta", tp=2)
    assert any("target.embedding=hidden" in g for g in done["guesses"])


@pytest.mark.parametrize("embedding", ["auto", "hidden"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_shards_are_those_of_metas_rules_tensor_for_tensor(tmp_path: Path, count: int, embedding: str) -> None:
    model = hf_model()
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").write_text("a tokenizer")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta", tp=count, **{"target.embedding": embedding})
    shards = shards_of(tmp_path / "meta")
    for ours, wanted in zip(shards, split(to_meta(model.state_dict()), count, int(embedding == "hidden")), strict=True):
        same(ours, wanted)
        assert all(v.is_contiguous() for v in ours.values())
    assert json.loads((tmp_path / "meta/params.json").read_text()) == PARAMS
    names = {p.name for p in (tmp_path / "meta").iterdir()}
    assert names - {p.name for p in (tmp_path / "meta").glob("*.pth")} == {
        "params.json", "tokenizer.model", "ckpt_dist.json",
    }  # fmt: skip
    ckpt_dist.convert(tmp_path / "meta", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


@pytest.mark.parametrize("embedding", [0, 1])
def test_shards_become_more_or_fewer_and_the_embedding_stays_as_it_was(tmp_path: Path, embedding: int) -> None:
    whole = to_meta(hf_model().state_dict())
    source = save(tmp_path / "two", split(whole, 2, embedding), {**PARAMS, "vocab_size": -1})
    for count in (1, 4, 8):
        ckpt_dist.convert(source, tmp_path / str(count), format="meta", tp=count)
        for ours, wanted in zip(shards_of(tmp_path / str(count)), split(whole, count, embedding), strict=True):
            same(ours, wanted)
    assert json.loads((tmp_path / "4/params.json").read_text()) == {**PARAMS, "vocab_size": -1}
    ckpt_dist.convert(tmp_path / "8", tmp_path / "back", format="meta", tp=2, dtype="bfloat16")
    for ours, wanted in zip(shards_of(tmp_path / "back"), split(whole, 2, embedding), strict=True):
        same(ours, {k: v.bfloat16() for k, v in wanted.items()})


def test_other_formats_go_to_meta_and_back(tmp_path: Path) -> None:
    whole = to_meta(hf_model().state_dict())
    source = save(tmp_path / "meta", split(whole, 4))
    config = {"model.config": str(source)}
    ckpt_dist.convert(source, tmp_path / "dcp", format="dcp")
    ckpt_dist.convert(source, tmp_path / "whole.pt", format="torch")
    same(torch.load(tmp_path / "whole.pt", weights_only=True), whole)
    ckpt_dist.convert(tmp_path / "dcp", tmp_path / "again", format="meta", tp=4, **config)
    for ours, wanted in zip(shards_of(tmp_path / "again"), split(whole, 4), strict=True):
        same(ours, wanted)
    ckpt_dist.average([source, tmp_path / "again"], tmp_path / "mean", format="meta", tp=2)
    for ours, wanted in zip(shards_of(tmp_path / "mean"), split(whole, 2), strict=True):
        same(ours, wanted)


# ---- what is refused


def _bad(tmp_path: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """A source with one thing wrong, and the keys to convert it with."""
    whole = to_meta(hf_model().state_dict())
    shards, params, drop, keys = split(whole, 4), dict(PARAMS), [], {}
    if kind == "a gap":
        drop = [2]
    elif kind == "the last one missing":
        drop = [3]
    elif kind == "the last ones missing, Llama 2":
        shards, drop = split(whole, 4, 1), [2, 3]
    elif kind == "other shapes":
        shards[1] = split(to_meta(hf_model(intermediate_size=512).state_dict()), 4)[1]
    elif kind == "another dtype":
        shards[3]["norm.weight"] = shards[3]["norm.weight"].bfloat16()
    elif kind == "a name too few":
        del shards[2]["norm.weight"]
    elif kind == "an unknown name":
        for shard in shards:
            shard["layers.0.attention.wqkv.weight"] = torch.ones(2, 2)
    elif kind == "a layer too few":
        for shard in shards:
            for name in [n for n in shard if n.startswith("layers.1")]:
                del shard[name]
    elif kind == "repeated key-value heads":
        for shard in shards:
            for name in [n for n in shard if "wk" in n or "wv" in n]:
                shard[name] = shard[name].repeat(2, 1)
    elif kind == "quantised":
        params["quantization_args"] = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32}
    elif kind.startswith("params "):
        key, _, value = kind.removeprefix("params ").partition("=")
        params[key] = json.loads(value)
    source = save(tmp_path / "meta", shards, params)
    for rank in drop:
        (source / f"consolidated.{rank:02d}.pth").unlink()
    return source, keys


REFUSED = {
    "a gap": ["consolidated.02.pth is missing", "3 shards"],
    "the last one missing": ["72 along dim 0", "says 96", "4 shards would fit"],
    "the last ones missing, Llama 2": ["[96, 16] in each of 2 files", "dim is 64"],
    "other shapes": ["consolidated.01.pth", "[128, 64]", "[64, 64]"],
    "another dtype": ["consolidated.03.pth", "bfloat16[64]", "float32[64]"],
    "a name too few": ["consolidated.02.pth lacks 'norm.weight'"],
    "an unknown name": ["wqkv", "4 ranks"],
    "a layer too few": ["1 layers", "n_layers=2"],
    "repeated key-value heads": ["[64, 64]", "says 32"],
    "quantised": ["quantization_args"],
    "params dim=32": ["[24, 64] in each of 4 files", "dim is 32"],
    "params n_heads=8": ["'layers.0.attention.wk.weight'", "32 along dim 0", "says 64"],
    "params n_kv_heads=4": ["32 along dim 0", "says 16"],
    "params n_layers=3": ["2 layers", "n_layers=3"],
    "params vocab_size=128": ["96 along dim 0", "says 128"],
    "params multiple_of=1024": ["size of 1024", "have 256"],
    'params n_layers="2"': ["n_layers", "whole number"],
    "params n_heads=0": ["n_heads", "whole number"],
    'params multiple_of="many"': ["params.json has a value of another kind", "TypeError"],
    "params ffn_dim_multiplier=[1]": ["params.json has a value of another kind", "TypeError"],
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_folder_that_does_not_fit_is_refused_with_what_is_wrong(tmp_path: Path, kind: str) -> None:
    source, keys = _bad(tmp_path, kind)
    with pytest.raises(CheckpointError) as error:
        ckpt_dist.convert(source, tmp_path / "hf", **keys)
    assert error.value.exit_code == 3 and not (tmp_path / "hf").exists()
    for words in REFUSED[kind]:
        assert words in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(format="meta", tp=16), ["target.tp=16", "has 8"]),
        (dict(format="meta", tp=3), ["target.tp=3", "cannot share"]),
        (dict(format="meta", dialect="hf"), ["is no tensor of Meta's Llama", "target.dialect"]),
        (dict(format="hf", tp=2), ["target.tp=2", "hf"]),
        (dict(format="meta", tp=0), ["target.tp", "whole number"]),
        (dict(format="meta", keep=["weights", "optimizer"]), ["weights only"]),
    ],
    ids=str,
)
def test_a_division_that_cannot_be_is_a_wrong_command(tmp_path: Path, keys: dict[str, Any], words: list[str]) -> None:
    hf_model().save_pretrained(tmp_path / "hf")
    with pytest.raises(UsageError) as error:
        ckpt_dist.convert(tmp_path / "hf", tmp_path / "out", **keys)
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()
    for word in words:
        assert word in str(error.value), str(error.value)


# ---- configs

LLAMAS: dict[str, tuple[dict[str, Any], int]] = {  # as published: params.json, and the feed-forward size in config.json
    "2 7B": (dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, multiple_of=256, norm_eps=1e-5, rope_theta=1e4), 11008),
    "2 13B": (dict(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, multiple_of=256, norm_eps=1e-5, rope_theta=1e4), 13824),
    "2 70B": (
        dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=1e4),
        28672,
    ),
    "3 8B": (
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=5e5),
        14336,
    ),
    "3.1 405B": (
        dict(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.2, norm_eps=1e-5,
             rope_theta=5e5, use_scaled_rope=True),
        53248,
    ),
    "3.2 1B": (
        dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=256, ffn_dim_multiplier=1.5, norm_eps=1e-5, rope_theta=5e5,
             use_scaled_rope=True),
        8192,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LLAMAS))
def test_params_to_config_to_params_is_the_identity(name: str) -> None:
    params, ffn = LLAMAS[name]
    words = 32000 if name.startswith("2") else 128256
    params = {**params, "vocab_size": words}
    found = configs.to_hf(params, {"v": words, "f": ffn}, tied=False)
    assert found.config["intermediate_size"] == ffn and not found.lost
    back = configs.to_meta(found.config, {"v": words, "f": ffn})
    assert back.config == params and not back.lost


@pytest.mark.parametrize("dim", [48, 64, 100, 768, 896, 3072])
@pytest.mark.parametrize("ffn", [1, 64, 172, 257, 1000, 4864, 8192, 11007])
def test_any_feed_forward_size_can_be_said(dim: int, ffn: int) -> None:
    params = {**PARAMS, "dim": dim, "n_heads": 4, "n_kv_heads": 2, "multiple_of": None}
    config = configs.to_hf(params, {"v": 96, "f": ffn}, tied=False).config
    said = configs.to_meta(config, {"v": 96, "f": ffn}).config
    h = int(2 * (4 * dim) / 3)
    h = int(said["ffn_dim_multiplier"] * h) if "ffn_dim_multiplier" in said else h
    assert said["multiple_of"] * ((h + said["multiple_of"] - 1) // said["multiple_of"]) == ffn


def test_scaled_rope_computes_the_same_in_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    scaling = dict(configs.SCALED)
    model = hf_model(rope_scaling=scaling, max_position_embeddings=131072)
    model.save_pretrained(tmp_path / "hf")
    done = ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta", tp=2)
    assert json.loads((tmp_path / "meta/params.json").read_text()) == {**PARAMS, "use_scaled_rope": True}
    assert not [w for w in done["warnings"] if "not translated" in w]
    done = ckpt_dist.convert(tmp_path / "meta", tmp_path / "back")
    assert any("factor 8" in g for g in done["guesses"])
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(hf_model()), logits(model))


@pytest.mark.parametrize("target", [{"format": "torch_dist"}, {"format": "meta"}])
def test_a_config_with_a_word_for_a_number_is_named(tmp_path: Path, target: dict[str, Any]) -> None:
    hf_model().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"rope_parameters": None}
    config |= {"rope_scaling": {"rope_type": "llama3", "factor": "eight", "low_freq_factor": "one"}}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"hf/config\.json has a value of another kind than it should be \(ValueError"
    ):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / "out", **target)


def test_what_has_no_words_on_the_other_side_is_listed(tmp_path: Path) -> None:
    hf_model(max_position_embeddings=1234, bos_token_id=7).save_pretrained(tmp_path / "hf")
    done = ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta")
    (line,) = [w for w in done["warnings"] if "not translated" in w]
    assert "bos_token_id, max_position_embeddings" in line
    hf_model(rope_scaling={**configs.SCALED, "factor": 32.0}, max_position_embeddings=131072).save_pretrained(
        tmp_path / "3.2"
    )
    done = ckpt_dist.convert(tmp_path / "3.2", tmp_path / "meta-3.2", format="meta")
    assert any("not translated: rope factor 32, where Meta's code has 8" in w for w in done["warnings"])
    params = {**PARAMS, "sliding_window": 4096, "moe": {"num_experts": 8}}
    (tmp_path / "meta/params.json").write_text(json.dumps(params))
    done = ckpt_dist.convert(tmp_path / "meta", tmp_path / "back")
    assert [w for w in done["warnings"] if w.endswith("not translated: moe, sliding_window")]
    ckpt_dist.convert(
        tmp_path / "meta", tmp_path / "again", format="meta", tp=2
    )  # nothing is lost between the same files
    assert json.loads((tmp_path / "again/params.json").read_text()) == params


@pytest.mark.parametrize(
    "odd",
    [dict(hidden_act="gelu"), dict(head_dim=8), dict(rope_scaling={"rope_type": "linear", "factor": 2.0})],
    ids=str,
)
def test_a_model_that_meta_code_would_compute_otherwise_is_refused(tmp_path: Path, odd: dict[str, Any]) -> None:
    hf_model(**odd).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"params\.json cannot say it"):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta")
    assert not (tmp_path / "meta").exists()
