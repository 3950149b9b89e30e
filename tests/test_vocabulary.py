"""Contract: `target.vocab_size` gives embedding and head so many rows, zeros at the end or the end left out, in every format,
and changes nothing else. Compared with torch's own padding and slicing. Not checked: weights that are not of the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import ckpt_dist
from ckpt_dist.cli import main
from ckpt_dist.errors import UsageError
from tests.conftest import ROOT, torchrun
from tests.test_meta import VOCAB, Tensors, hf_model, logits, save, shards_of, split, to_meta
from tests.test_real import same

OF_WORDS = ("model.embed_tokens.weight", "lm_head.weight")


def with_rows(state: Tensors, rows: int) -> Tensors:
    more = max(rows - VOCAB, 0)
    return {k: torch.nn.functional.pad(v, (0, 0, 0, more))[:rows] if k in OF_WORDS else v for k, v in state.items()}


def store(model: Any, kind: str, path: Path) -> dict[str, Any]:
    """The model in a format; the keys to read it with."""
    model.save_pretrained(path.parent / "config")
    state = dict(model.state_dict())
    if kind == "hf":
        model.save_pretrained(path)
    elif kind == "dcp":
        dcp.save({"model": state}, checkpoint_id=path, no_dist=True)
    elif kind == "torch":
        path.mkdir()
        torch.save(state, path / "model.pt")
    else:
        save(path, split(to_meta(state), 2, int(kind == "meta, Llama 2")))
    return {} if kind in ("hf", "meta") else {"model.config": str(path.parent / "config")}


@pytest.mark.parametrize("rows", [VOCAB + 32, VOCAB - 13, VOCAB])
@pytest.mark.parametrize("kind", ["hf", "dcp", "torch", "meta", "meta, Llama 2"])
def test_rows_are_added_or_left_out(tmp_path: Path, kind: str, rows: int) -> None:
    model = hf_model()
    keys = store(model, kind, tmp_path / "source")
    done = ckpt_dist.convert(tmp_path / "source", tmp_path / "hf", vocab_size=rows, **keys, **{"engine.verify": True})
    same(load_file(tmp_path / "hf/model.safetensors"), with_rows(dict(model.state_dict()), rows))
    assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == rows
    assert any(f"vocabulary of {rows} instead of {VOCAB}" in n for n in done["notes"]) == (rows != VOCAB)
    assert done["fingerprint"] == ckpt_dist.fingerprint(tmp_path / "hf")


def test_transformers_computes_the_same_for_the_words_that_were_there(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = hf_model()
    model.save_pretrained(tmp_path / "hf")
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "wide", vocab_size=128)
    wide = logits(LlamaForCausalLM.from_pretrained(tmp_path / "wide").eval())
    assert wide.shape[-1] == 128 and not wide[..., VOCAB:].any()
    torch.testing.assert_close(wide[..., :VOCAB], logits(model))
    ckpt_dist.convert(tmp_path / "wide", tmp_path / "back", vocab_size=VOCAB)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_a_vocabulary_that_ranks_cannot_share_is_made_longer(tmp_path: Path) -> None:
    model = hf_model(vocab_size=97)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(UsageError, match=r"97, which 8 ranks cannot share evenly.*target\.vocab_size"):
        ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta", tp=8)
    hf_model(vocab_size=96, intermediate_size=100).save_pretrained(tmp_path / "odd")
    with pytest.raises(UsageError, match=r"100, which 8 ranks cannot share evenly\. Choose another target\.tp\.$"):
        ckpt_dist.convert(tmp_path / "odd", tmp_path / "meta", format="meta", tp=8)
    ckpt_dist.convert(tmp_path / "hf", tmp_path / "meta", format="meta", tp=8, vocab_size=104)
    whole = to_meta(dict(model.state_dict()))
    for name in ("tok_embeddings.weight", "output.weight"):
        whole[name] = torch.nn.functional.pad(whole[name], (0, 0, 0, 7))
    for ours, wanted in zip(shards_of(tmp_path / "meta"), split(whole, 8), strict=True):
        same(ours, wanted)
    assert json.loads((tmp_path / "meta/params.json").read_text())["vocab_size"] == 104


@pytest.mark.parametrize("transport", ["direct", "collective"])
def test_two_ranks_make_the_same_bytes(tmp_path: Path, transport: str) -> None:
    store(hf_model(), "dcp", tmp_path / "source")
    keys = {"model.config": str(tmp_path / "config")}
    ckpt_dist.convert(tmp_path / "source", tmp_path / "one", vocab_size=128, **keys)
    words = [f"source.path={tmp_path / 'source'}", f"target.path={tmp_path / 'two'}", "target.vocab_size=128"]
    words += [f"model.config={tmp_path / 'config'}", f"engine.transport={transport}", "quiet=true"]
    done = torchrun(2, ROOT / "tests/real/apart.py", "convert", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_an_unknown_model_has_no_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(4, 4)}, tmp_path / "w.pt")
    words = [f"source.path={tmp_path / 'w.pt'}", f"target.path={tmp_path / 'out'}", "target.vocab_size=8"]
    assert main("convert", words) == 2 and "vocabulary is not known" in capsys.readouterr().err
