"""Contract: the documents say what the code does. Tables between `<!-- name -->` marks are made from the code, the
commands and functions of the README run, the examples of the guides are executed as they are printed, and every test,
file and link that a document names exists. `python tests/test_docs.py` writes the tables again.

Not checked here: prose.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import ckpt_dist
from ckpt_dist import cli, config, families, family, formats, keys
from ckpt_dist.errors import CheckpointError
from tests.test_real import equal_trees

ROOT = Path(__file__).resolve().parent.parent
README, NEW_FORMAT, NEW_FAMILY = (ROOT / p for p in ("README.md", "docs/new-format.md", "docs/new-family.md"))
DOCUMENTS = sorted([README, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


# ---- tables


def table(header: str, rows: list[list[str]]) -> str:
    head = header.split(" | ")
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *escaped))


def keys_table() -> str:
    """One row for each key and meaning; `verify` has the keys of `source` for each of its two sides."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for verb in config.VERBS:
        for key, (default, comment) in config.listing(verb).items():
            if verb != "verify" or not key.startswith(("a.", "b.")) or key == "b.path":
                rows.setdefault((key, default, comment), []).append(verb)
    groups = sorted(rows.items(), key=lambda item: _place(item[0][0]))
    return table("key | default | meaning | verbs", [_key_row(*key, verbs) for key, verbs in groups])


def _place(key: str) -> int:
    order = ("source.", "a.", "b.", "target.", "model.", "engine.")
    return next((i for i, start in enumerate(order) if key.startswith(start)), len(order))


def _key_row(key: str, default: str, comment: str, verbs: list[str]) -> list[str]:
    shown = "(needed)" if default == config.MISSING else "" if default == "null" else f"`{default}`"
    choices = keys.kind(verbs[0], key).choices
    more = f" ({', '.join(f'`{c}`' for c in choices)})" if len(choices) > 2 else ""
    all_that_could = len(verbs) == len(config.VERBS) or (key.startswith("source.") and len(verbs) == 4)
    plain = re.sub(r"([<*])", r"\\\1", comment)  # neither HTML nor emphasis
    return [f"`{key}`", shown, plain + more, "all" if all_that_could else ", ".join(verbs)]


def formats_table() -> str:
    rows = []
    for name in sorted(formats.FORMATS):
        module = formats.load(name)
        first = str(module.__doc__).split("\n\n")[0].replace("\n", " ")
        rows.append([f"`{name}`", first, "yes", "yes" if hasattr(module, "lay_out") else "no"])
    return table("format | what it is | read | written", rows)


def families_table() -> str:
    """Families x dialects x formats; `test_every_format_holds_every_family_that_has_its_dialect` runs each cell."""
    fixed = [f for f in sorted(formats.DIALECTS) if hasattr(formats.load(f), "lay_out")]
    rows = []
    for name in family.available():
        found = family.load(name)
        types, spoken = ", ".join(found.model_types), ", ".join(f"`{d}`" for d in found.dialects)
        fits = [
            next(
                (f"`{d}`" for d in formats.DIALECTS[f] if d in found.dialects and name in formats.ONLY.get(f, (name,))),
                "-",
            )
            for f in fixed
        ]
        rows.append([f"`{name}`", types, spoken, *fits, str(len(found.weights))])
    header = ["family", "`model_type`", "dialects", *(f"in `{f}`" for f in fixed), "weights"]
    return table(" | ".join(header), rows)


def lines_table() -> str:
    rows = []
    for folder in ("formats", "families"):
        for name in keys.modules(folder):
            file = ROOT / "ckpt_dist" / folder / f"{name}.py"
            functions = [f for f in ("claims", "scan", "lay_out", "locate") if f"\ndef {f}(" in file.read_text()]
            rows.append([f"`{folder}/{name}.py`", str(file.read_bytes().count(b"\n")), ", ".join(functions)])
    return table("file | lines | functions", rows)


TABLES: dict[tuple[Path, str], Callable[[], str]] = {
    (README, "keys"): keys_table,
    (README, "formats"): formats_table,
    (README, "families"): families_table,
    (NEW_FORMAT, "lines"): lines_table,
}


def block(text: str, name: str) -> str:
    """What stands between two marks: `block("<!-- a -->\\n1\\n<!-- /a -->", "a")` -> `1`"""
    return text.split(f"<!-- {name} -->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0].rstrip("\n")


def write_tables() -> None:
    for (path, name), make in TABLES.items():
        text = path.read_text()
        head, rest = text.split(f"<!-- {name} -->\n", 1)
        tail = rest.split(f"<!-- /{name} -->", 1)[1]
        path.write_text(f"{head}<!-- {name} -->\n{make()}\n<!-- /{name} -->{tail}")


@pytest.mark.parametrize(("path", "name"), TABLES, ids=lambda v: str(getattr(v, "stem", v)))
def test_tables_are_those_of_the_code(path: Path, name: str) -> None:
    assert block(path.read_text(), name) == TABLES[path, name](), "run: python tests/test_docs.py"


# ---- what documents name


def test_links_tests_and_files_exist() -> None:
    names = {m for p in (ROOT / "tests").glob("test_*.py") for m in re.findall(r"^def (test_\w+)", p.read_text(), re.M)}
    for path in DOCUMENTS:
        text = path.read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (path.parent / link).exists(), f"{path}: {link}"
        for test in re.findall(r"`(test_\w+)`", text):
            assert test in names, f"{path}: {test}"
        for file in re.findall(r"`((?:ckpt_dist|conf|jobs|launch|tests|benchmarks)/[\w./-]+\.\w+)`", text):
            assert (ROOT / file).exists(), f"{path}: {file}"


def test_no_line_is_too_long() -> None:
    for path in DOCUMENTS:
        fenced = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fenced ^= line.startswith("```")
            assert fenced or line.startswith("|") or len(line) <= 120, f"{path}:{number}"


# ---- the README's commands


CONFIG = dict(
    model_type="llama", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, vocab_size=32, tie_word_embeddings=False,
)  # fmt: skip


def llama(seed: int) -> dict[str, torch.Tensor]:
    """The weights of a small Llama, by name."""
    torch.manual_seed(seed)
    layer = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
    layer |= {
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (32, 16), "model.norm": (16,), "lm_head": (32, 16)}
    for k in range(2):
        shapes |= {f"model.layers.{k}.{n}": s for n, s in layer.items()}
        shapes |= {f"model.layers.{k}.{n}": (16,) for n in ("input_layernorm", "post_attention_layernorm")}
    return {f"{n}.weight": torch.randn(s) for n, s in shapes.items()}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run as the README has it: three steps, EMA weights beside the last."""
    for step in (10, 20, 30):
        dcp.save({"model": llama(step)}, checkpoint_id=tmp_path / f"run/step-{step}", no_dist=True)
    dcp.save(llama(31), checkpoint_id=tmp_path / "run/step-30/pytorch_ema_model_fsdp_0", no_dist=True)
    (tmp_path / "run/config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fenced(path: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def test_every_command_of_the_readme_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for text in fenced(README, "bash") for line in text.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("ckpt-dist ")]
    assert {words[1] for words in commands} == set(config.VERBS)
    for _, verb, *words in commands:
        assert cli.main(verb, [w for w in words if not w.startswith("nproc=")]) == 0, (words, capsys.readouterr().err)
    assert (run / "averages/demo-averaged/average.yaml").exists()


def test_every_function_of_the_readme_runs(run: Path) -> None:
    space: dict[str, object] = {}
    for text in fenced(README, "python"):
        exec(text, space)
    verbs = set(ckpt_dist.__all__) - {"dcp"}  # a module
    assert {n for n in verbs if f"ckpt_dist.{n}(" in README.read_text()} == verbs
    assert space["folder"] == Path("model-ema")


def test_one_rank_and_two_write_the_same_bytes(run: Path) -> None:
    for num_ranks in (1, 2):
        words = ["source.path=run/step-30", f"target.path=of-{num_ranks}", f"nproc={num_ranks}", "quiet=true"]
        assert cli.main("convert", words) == 0
    one, two = (run / f"of-{n}/model.safetensors" for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()


# ---- what the README promises and no other file shows


def test_old_tools_give_the_same(run: Path) -> None:
    from accelerate.utils import merge_fsdp_weights
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state, "train": {"step": 3, "loss": [0.5]}}, checkpoint_id="all", no_dist=True)
    everything = {"keep": ["weights", "optimizer", "state"]}
    dcp_to_torch_save("all", "theirs.pt")
    ckpt_dist.convert("all", "ours.pt", format="torch", **everything)
    theirs, ours = (torch.load(run / f"{who}.pt", weights_only=True) for who in ("theirs", "ours"))
    assert set(theirs) == {"model", "optim", "train"}
    assert equal_trees(theirs, ours)
    torch_save_to_dcp("theirs.pt", "theirs-dcp")
    ckpt_dist.convert("theirs.pt", "ours-dcp", format="dcp", **everything)
    for who in ("theirs", "ours"):
        dcp_to_torch_save(f"{who}-dcp", f"{who}-again.pt")
        assert equal_trees(torch.load(run / f"{who}-again.pt", weights_only=True), theirs)
    theirs = llama(30)
    dcp.save({"model": theirs}, checkpoint_id="ckpt/pytorch_model_fsdp_0", no_dist=True)  # accelerate's own nesting
    merge_fsdp_weights("ckpt/pytorch_model_fsdp_0", "theirs-hf")
    ckpt_dist.merge("ckpt/pytorch_model_fsdp_0", "ours-hf")
    assert ckpt_dist.verify("theirs-hf", "ours-hf")["bit_equal"]


def test_torchtitan_names_become_hugging_face_ones_with_a_config(run: Path) -> None:
    ckpt_dist.convert("run/step-30", "titan", format="dcp", dialect="torchtitan")
    assert "tok_embeddings.weight" in dcp.FileSystemReader("titan").read_metadata().state_dict_metadata
    with pytest.raises(CheckpointError, match=r"Give model\.config=PATH"):
        ckpt_dist.convert("titan", "hf")
    ckpt_dist.convert("titan", "hf", **{"model.config": "run"})
    assert ckpt_dist.verify("run/step-30", "hf")["bit_equal"]


def test_llamas_of_torchtitan_before_0_3_have_metas_names(run: Path) -> None:
    """The list is that of its v0.1.0 to v0.2.2; since 0.3.0 they are `attention.qkv_linear.wq` and `lm_head`."""
    layer = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
    layer += [f"feed_forward.w{k}" for k in (1, 2, 3)]
    names = {"tok_embeddings", "norm", "output"} | {f"layers.{i}.{n}" for i in range(2) for n in layer}
    ckpt_dist.convert(
        "run/step-30", "old/step-0", format="dcp", dialect="meta"
    )  # of {"model": ...}, which torchtitan has not
    held = dcp.FileSystemReader("old/step-0").read_metadata().state_dict_metadata
    assert set(held) == {f"{n}.weight" for n in names}
    assert ckpt_dist.inspect("old/step-0")["dialect"] == "meta"
    ckpt_dist.convert("old", "hf", **{"model.config": "run"})
    assert ckpt_dist.verify("run/step-30", "hf")["bit_equal"]


def test_a_failed_write_leaves_no_target(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, writes = sorted(run.rglob("*")), 0

    def full(fd: int, data: memoryview, offset: int, write: Callable[..., int] = os.pwrite) -> int:
        nonlocal writes
        writes += 1
        if writes > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left"):
        ckpt_dist.convert("run/step-30", "model.pt", format="torch")
    assert writes > 3 and sorted(run.rglob("*")) == before


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save({"weight": torch.ones(3), "more": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        ckpt_dist.convert(tmp_path / "bad.pt", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]


# ---- the guides' examples


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, object, str], None]:
    """Put a guide's example where it would lie, for one test."""

    def add(document: Path, package: object, name: str) -> None:
        code = re.sub(r"^```\w*\n?", "", block(document.read_text(), "example"), flags=re.M)
        (tmp_path / "added").mkdir()
        (tmp_path / "added" / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "added")])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", None)  # type: ignore[attr-defined]
        del sys.modules[f"{package.__name__}.{name}"]  # type: ignore[attr-defined]
        import_module(f"{package.__name__}.{name}")  # type: ignore[attr-defined]

    return add


def test_the_new_format_goes_there_and_back(
    run: Path, example: Callable[[Path, object, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    example(NEW_FORMAT, formats, "raw")
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, "raw"))
    monkeypatch.setitem(keys.KEYS, "target.format", keys.choice(*keys.WRITTEN, "raw"))
    ckpt_dist.convert("run/step-30", "raw", format="raw")
    assert ckpt_dist.inspect("raw")["format"] == "raw"
    assert len(list((run / "raw").glob("*.raw"))) == len(llama(30))
    ckpt_dist.convert("raw", "dcp", format="dcp")
    ckpt_dist.convert("dcp", "hf")
    back, first = load_file("hf/model.safetensors"), llama(30)
    assert sorted(back) == sorted(first) and all(torch.equal(back[n], first[n]) for n in first)
    assert ckpt_dist.verify("run/step-30", "raw")["bit_equal"]
    with open(run / "raw/lm_head.weight.raw", "ab") as file:
        file.truncate(5)
    with pytest.raises(CheckpointError, match="has 5 bytes, 2048 are needed"):
        ckpt_dist.convert("raw", "again")
    assert not (run / "again").exists()


def test_the_new_family_goes_there_and_back(
    tmp_path: Path, example: Callable[[Path, object, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    example(NEW_FAMILY, families, "toy")
    sizes = dict(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=4)
    shapes = {"q_proj": (24, 10), "k_proj": (12, 10), "v_proj": (12, 10), "o_proj": (10, 24)}
    names = {f"model.layers.{k}.{n}.weight": s for k in range(2) for n, s in shapes.items()} | {
        "model.embed.weight": (7, 10)
    }
    first = {n: torch.randn(s) for n, s in names.items()}
    (tmp_path / "model").mkdir()
    save_file(first, tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "toy", **sizes}))
    monkeypatch.chdir(tmp_path)

    ckpt_dist.convert("model", "toy.pt", format="torch", dialect="fused")
    fused = torch.load("toy.pt", weights_only=True)
    assert sorted(fused) == ["blocks.0.out", "blocks.0.qkv", "blocks.1.out", "blocks.1.qkv", "embedding"]
    q, k, v = (first[f"model.layers.1.{n}_proj.weight"].view(3, -1, 4, 10) for n in "qkv")
    assert torch.equal(fused["blocks.1.qkv"], torch.cat([q, k, v], 1).reshape(48, 10))

    ckpt_dist.convert("toy.pt", "back", **{"model.config": "model"})
    back = load_file("back/model.safetensors")
    assert sorted(back) == sorted(first) and all(torch.equal(back[n], first[n]) for n in first)
    prints = {ckpt_dist.fingerprint("model"), ckpt_dist.fingerprint("back")}
    assert len(prints) == 1


if __name__ == "__main__":
    write_tables()
