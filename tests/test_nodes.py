"""Contract: ranks on nodes of unlike size, or that see unlike files, end with the same target or with one message, soon.
Nodes are processes with folders of their own here; `test_local.py` has them in networks of their own.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckpt_dist
from tests.conftest import ROOT

TIMEOUT_S = 40  # engine.timeout: nobody is waited for so long


def nodes(
    folders: Sequence[Path], *words: str, sizes: Sequence[int] = (1, 1), first: str = ""
) -> list[tuple[int, str]]:
    """(exit code, what it said) of each rank of a job on nodes of so many ranks; `first` is run on the first node only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(sum(sizes)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for node, size in enumerate(sizes):
        for local in range(size):
            here = {
                "RANK": str(len(ranks)),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(size),
                "GROUP_RANK": str(node),
            }
            code = f"import sys\n{first if node == 0 else ''}\nfrom ckpt_dist.cli import main\nsys.exit(main(sys.argv[1], sys.argv[2:]))"
            command = [sys.executable, "-c", code, *words, f"engine.timeout={TIMEOUT_S}", "quiet=true"]
            env = {**os.environ, **shared, **here, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            ranks.append(
                subprocess.Popen(
                    command, cwd=folders[node], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
    said = [rank.communicate(timeout=3 * TIMEOUT_S)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder.mkdir()
    save_file({f"w{k}": torch.randn(64, 512) for k in range(8)}, folder / "model.safetensors")
    return folder


def test_nodes_may_have_unlike_numbers_of_ranks(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    words = ("convert", f"source.path={source}", f"target.path={tmp_path / 'out'}", "target.format=dcp")
    every = nodes([tmp_path, tmp_path], *words, sizes=(2, 1))
    assert [code for code, _ in every] == [0, 0, 0], every
    assert ckpt_dist.verify(tmp_path / "out", source)["equal"]
    plan = nodes([tmp_path, tmp_path], *words, "dry_run=true", "overwrite=true", "json=true", sizes=(2, 1))
    assert [code for code, _ in plan] == [0, 0, 0], plan


def test_two_saves_are_not_mixed_on_any_node(tmp_path: Path) -> None:
    """The file that is saved again lies where the first node does not see it."""
    source, here, there = model(tmp_path / "source"), tmp_path / "here", tmp_path / "there"
    ckpt_dist.convert(source, here / "src", format="dcp", max_shard_size="140KB", quiet=True)
    (there / "src").mkdir(parents=True)
    for path in sorted((here / "src").glob("*.distcp"))[1::2]:
        shutil.move(path, there / "src" / path.name)
    again = "import os, glob; from ckpt_dist import task; real = task.fill; other = glob.glob('../there/src/*')[0]"
    again += "; task.fill = task.exchange.fill = lambda *given: (real(*given), os.utime(other, (1, 1)))[0]"
    words = ("convert", "source.path=src", f"target.path={tmp_path / 'out'}")
    every = nodes([here, there], *words, first=again)
    assert all(code == 3 for code, _ in every), every
    assert "changed while it was read" in every[0][1] and not list(tmp_path.glob("*out*"))


def test_a_damaged_file_that_one_rank_reads_is_said_at_once(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    ckpt_dist.convert(source, tmp_path / "dcp", format="dcp", max_shard_size="140KB", quiet=True)
    last = max(glob.glob(f"{tmp_path}/dcp/*.distcp"), key=lambda p: int(p.rpartition("_")[2].partition(".")[0]))
    data = bytearray(Path(last).read_bytes())
    at = data.rfind(b"PK\x05\x06")
    data[at : at + 4] = b"XXXX"
    Path(last).write_bytes(data)
    every = nodes([tmp_path, tmp_path], "convert", "source.path=dcp", f"target.path={tmp_path / 'out'}")
    assert all(code == 3 for code, _ in every), every
    assert os.path.basename(last) in every[0][1] and "no sign of life" not in "".join(text for _, text in every)
    assert not list(tmp_path.glob("*out*"))


def test_what_the_system_refuses_one_rank_is_no_mistake_of_ours(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    deny = "import os; from ckpt_dist.files import safetensors\ndef deny(path): os.listdir('nowhere')"
    words = ("convert", f"source.path={source}", f"target.path={tmp_path / 'out'}")
    every = nodes([tmp_path, tmp_path], *words, first=f"{deny}\nsafetensors.read_header = deny")
    assert [code for code, _ in every] == [3, 3], every
    assert [text for _, text in every] == ["Error: 'nowhere': No such file or directory.\n", ""]


def test_a_device_that_one_node_has_not_is_said_at_once(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one"), model(tmp_path / "two", 1)
    fake = "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1"
    words = ("average", f"source.path=[{one},{two}]", f"target.path={tmp_path / 'out'}", "engine.device=cuda")
    every = nodes([tmp_path, tmp_path], *words, first=fake)
    assert all(code == 2 for code, _ in every), every
    assert "torch sees no GPU" in every[0][1]


@pytest.mark.parametrize("format", ["dcp", "torch"])
def test_what_is_no_tensor_may_be_on_any_node(tmp_path: Path, format: str) -> None:
    """A value's bytes are in a file that only one node has, and that is not the first."""
    state = {"model": {"w": torch.randn(64, 64)}, "train_state": {"note": "hello", "list": [1, 2]}}
    torch.save(state, tmp_path / "state.pt")
    here, there = tmp_path / "here", tmp_path / "there"
    every = ["weights", "state"]
    ckpt_dist.convert(tmp_path / "state.pt", there / "src", format="dcp", keep=every, max_shard_size="2KB", quiet=True)
    shutil.copytree(there / "src", here / "src")
    (there / "src/.metadata").unlink()
    (here / "src/__0_0.distcp").unlink()
    out = tmp_path / "out"
    keep = "keep=[weights,state]"
    done = nodes([here, there], "convert", "source.path=src", f"target.path={out}", f"target.format={format}", keep)
    assert [code for code, _ in done] == [0, 0], done
    if format == "torch":
        found = torch.load(next(out.iterdir()) if out.is_dir() else out, weights_only=False)
        assert found["train_state"] == state["train_state"]
        return
    found = {"model": {"w": torch.zeros(64, 64)}, "train_state": {"note": "", "list": [0, 0]}}
    dcp.load(found, checkpoint_id=out, no_dist=True)
    assert found["train_state"] == state["train_state"] and found["model"]["w"].equal(state["model"]["w"])


def test_a_tokenizer_that_one_node_has_is_the_same_for_all(tmp_path: Path) -> None:
    """Args say where the tokenizer is, and they are in every file, before its tensors."""
    source, here, there = (tmp_path / name for name in ("hf", "here", "there"))
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
    shapes |= {
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (96, 32),
        "mlp.up_proj": (96, 32),
        "mlp.down_proj": (32, 96),
    }
    shapes |= {"input_layernorm": (32,), "post_attention_layernorm": (32,)}
    torch.manual_seed(0)
    state = {f"model.layers.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"{name}.weight": torch.randn(64, 32) for name in ("model.embed_tokens", "lm_head")}
    source.mkdir()
    save_file({**state, "model.norm.weight": torch.randn(32)}, source / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    config |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 64, "tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    ckpt_dist.convert(source, here / "src", format="dcp", dialect="hf", max_shard_size="20KB", quiet=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, here / "src" / name)
    (there / "src").mkdir(parents=True)
    for path in sorted((here / "src").glob("*.distcp"))[1::2]:
        shutil.move(path, there / "src" / path.name)
    words = ("convert", "source.path=src", f"target.path={tmp_path / 'out'}", "target.format=megatron")
    every = nodes([here, there], *words)
    assert [code for code, _ in every] == [0, 0], every
    assert ckpt_dist.verify(tmp_path / "out", source)["equal"]
