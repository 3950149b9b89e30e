"""The command line as a public name: keys, values, exit codes, and none of Hydra's traps.

Not checked here: what the verbs do. The process tests use `inspect` and `verify` on tiny files only as something
that ends with a known code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import ckpt_dist
from ckpt_dist import cli, config, formats, keys
from ckpt_dist.errors import UsageError
from tests.conftest import torchrun

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {
    "convert": ["source.path=run", "target.path=model"],
    "average": ["source.path=run"],
    "merge": ["source.path=run"],
    "inspect": ["source.path=run"],
    "verify": ["a.path=run"],
    "seed": ["model.config=config.json", "target.path=model"],
}
ODD = [
    "step=100/x",
    "a,b",
    "a b",
    "$HOME/${oc.env:HOME}/${x",
    "it's",
    'say "so"',
    "[x]",
    "{y}",
    "模型",
    "~/x",
    "a\\b\\",
    "???x",
    "x#y",
]
FROZEN = (
    "source.path source.format source.dialect source.weights source.replicas target.path target.format target.dialect "
    "target.dtype target.key target.max_shard_size target.safetensors target.vocab_size target.tp target.pp "
    "target.vpp target.ep target.partition target.partition_method target.release target.spec target.embedding "
    "target.universal target.shared "
    "target.placement model.family model.config engine.memory "
    "engine.transport engine.timeout engine.device engine.workers unmatched overwrite resume dry_run "
    "engine.verify engine.fsync engine.ranks engine.nodes engine.calibrate engine.bandwidth.read "
    "engine.bandwidth.exchange engine.bandwidth.write json quiet nproc source.step recipe keep"
)


def job(*words: str, verb: str = "inspect", **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / f"{verb}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=100)


def refused(verb: str, *words: str) -> str:
    with pytest.raises(UsageError) as error:
        config.load(verb, [*NEEDED[verb], *words])
    return str(error.value)


# ---- conf/ and the readers


@pytest.mark.parametrize("verb", config.VERBS)
def test_every_key_has_a_reader_a_comment_and_a_default_that_it_accepts(verb: str) -> None:
    listed = config.listing(verb)
    assert set(listed) == set(config._flat(verb, config.defaults(verb)))
    for key, (default, comment) in listed.items():
        assert key in keys.KEYS and comment
        assert yaml.safe_load(default) == config._flat(verb, config.defaults(verb))[key]
    cfg = config.load(verb, NEEDED[verb])
    assert config.fill(verb, cfg) == cfg  # reading twice changes nothing


def test_the_keys_of_convert_are_frozen() -> None:
    assert list(config.listing("convert")) == FROZEN.split()


def test_no_reader_without_a_key() -> None:
    assert set(keys.KEYS) == {key for verb in config.VERBS for key in config.listing(verb)}


def test_format_choices_are_the_formats() -> None:
    assert set(keys.FORMATS) == set(formats.FORMATS)


# ---- values


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("exists", [False, True])
def test_a_path_is_taken_as_it_is(odd: str, exists: bool, tmp_path: Path) -> None:
    path = tmp_path / odd
    if exists:
        path.mkdir(parents=True)
    assert config.load("inspect", [f"source.path={path}"])["source"]["path"] == str(path)
    assert config.fill("inspect", {"source": {"path": path}})["source"]["path"] == str(path)
    if exists:
        assert config.load("average", [f"source.path={path}"])["source"]["path"] == str(path)


def test_quotes_meant_for_hydra_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load("inspect", ['source.path="/p/step=1"'])["source"]["path"] == "/p/step=1"
    quoted = tmp_path / '"x"'
    quoted.mkdir()
    monkeypatch.chdir(tmp_path)
    assert config.load("inspect", ['source.path="x"'])["source"]["path"] == '"x"'  # it exists


@pytest.mark.parametrize("text", ["1000,2000", "[1000,2000]", "[1000, 2000]", "1000, 2000", "['1000','2000']"])
def test_lists(text: str) -> None:
    assert config.load("average", ["source.path=r", f"steps={text}"])["steps"] == [1000, 2000]
    assert config.fill("average", {"source.path": "r", "steps": text})["steps"] == [1000, 2000]


def test_more_lists() -> None:
    cfg = config.load("average", ["source.path=a,b=1,[c]", "weights=.5,0.25,1e-1"])
    assert cfg["source"]["path"] == ["a", "b=1", "[c]"] and cfg["weights"] == [0.5, 0.25, 0.1]
    assert config.load("average", ["source.path=['a,b','c']"])["source"]["path"] == ["a,b", "c"]
    assert config.load("average", ["source.path=r", "steps=5"])["steps"] == [5]
    assert config.load("inspect", ["source.path=a,b"])["source"]["path"] == "a,b"
    both = config.load("convert", [*NEEDED["convert"], "keep=weights,optimizer"])
    assert both["keep"] == ["weights", "optimizer"]


def test_scalars_and_short_forms() -> None:
    words = [
        *NEEDED["convert"],
        "engine.memory=1.5GiB",
        "model=llama",
        "dry_run=True",
        "+overwrite=true",
        "++json=true",
    ]
    cfg = config.load("convert", words)
    assert cfg["engine"]["memory"] == 3 << 29 and cfg["model"]["family"] == "llama"
    assert cfg["dry_run"] is cfg["overwrite"] is cfg["json"] is True
    assert config.load("average", ["source.path=r", "name=2024", "last=null"])["name"] == "2024"


@pytest.mark.parametrize("given", ["{default: bf16, '*norm*': fp32}", {"default": "bf16", "*norm*": "fp32"}])
def test_dtype_rules_keep_their_order(given: object) -> None:
    cfg = config.fill("convert", {"source.path": "a", "target": {"path": "b", "dtype": given}})
    assert list(cfg["target"]["dtype"].items()) == [("default", "bfloat16"), ("*norm*", "float32")]


def test_a_program_gives_a_dtype_of_torch_itself() -> None:
    import torch

    for given, read in ((torch.bfloat16, "bfloat16"), ({"*norm*": torch.half}, {"*norm*": "float16"})):
        cfg = config.fill("convert", {"source.path": "a", "target": {"path": "b", "dtype": given}})
        assert cfg["target"]["dtype"] == read
    assert "bfloat16" in refused("convert", "target.dtype=torch.int8")


# ---- refusals


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("target.fromat=hf", "Did you mean 'target.format'?"),
        ("fromat=hf", "Did you mean 'format'?"),
        ("+target.fromat=hf", "Did you mean 'target.format'?"),
        ("++target.fromat=hf", "Did you mean 'target.format'?"),
        ("~target.fromat", "Did you mean 'target.format'?"),
        ("~target.format", "Leave it out"),
        ("format=hf", "'source.format' or 'target.format'"),
        ("source=run", "group of keys"),
        ("hydra.run.dir=x", "no log files"),
        ("steps=1,2", "Other verbs have it"),
        ("run/step-10", "source.path=run/step-10"),
        ("dry_run=maybe", "true or false"),
        ("dry_run", "not of the form key=value. Write dry_run=true."),
        ("source.path", "not of the form key=value. Write source.path=run/step-1000."),
        ("a.path=run", "'source.path' or 'target.path'"),
        ("target.path=s3://bucket/model", "object stores"),
        ("source.path='hf://org/model'", "object stores"),
        ("target.path=null", "target.path is 'null'. Give a path"),
        ("target.path=~nobody-of-that-name/model", "Give a path"),
        ("target.format=safetensors", "Here it is called 'hf'"),
        ("target.format=megatron-core", "Here it is called 'torch_dist'"),
        ("keep=[weights,optim]", "Did you mean 'optimizer'?"),
        ("target.format=hff", "Did you mean 'hf'?"),
        ("target.dtype=float33", "bfloat16"),
        ("target.dtype={a: float33}", "bfloat16"),
        ("engine.memory=lots", "2GiB"),
        ("engine.memory=0", "2GiB"),
        ("engine.workers=0", "1 or more"),
        ("engine.workers=2.5", "whole number"),
        ("source.step=newest", "latest"),
        ("keep=weight", "optimizer"),
        ("target.path=", "empty variable"),
        ("overwrite=null", "true or false"),
    ],
)
def test_refused_with_advice(word: str, says: str) -> None:
    assert says in refused("convert", word)


@pytest.mark.parametrize(
    "word", ["last=x", "last=0", "last=true", "steps=[]", "steps=1,,2", "weights=a,b", "weights=nan", "steps=-1"]
)
def test_wrong_values_of_average(word: str) -> None:
    assert word.partition("=")[0] in refused("average", word)


def test_the_last_word_of_a_key_wins_as_with_hydra() -> None:
    assert config.load("inspect", ["source.path=a", "source.path=b"])["source"]["path"] == "b"
    with pytest.raises(UsageError, match="twice"):
        config.fill("inspect", {"source.path": "a", "source": {"path": "b"}})


# ---- recipes


def flat(*words: str, verb: str = "convert") -> dict[str, object]:
    return config._flat(verb, config.load(verb, [*NEEDED[verb], *words]))


def test_recipe_choices_are_the_recipes() -> None:
    assert tuple(config.recipes("convert")) == keys.RECIPES == keys.KEYS["recipe"].choices
    assert all(t for verb in ("convert", "average") for t in config.recipes(verb).values())
    named = [*keys.RECIPES, *config.recipes("average")]
    assert sorted(named) == sorted(f.stem for f in (ROOT / "conf/recipe").glob("*.yaml")) and not config.recipes(
        "merge"
    )


@pytest.mark.parametrize(("verb", "name"), [*(("convert", n) for n in keys.RECIPES), ("average", "nemo_average")])
def test_a_recipe_is_only_defaults_of_keys_and_what_is_given_wins(verb: str, name: str) -> None:
    plain, usual = flat(verb=verb), flat(f"recipe={name}", verb=verb)
    said = config._flat(verb, yaml.safe_load((ROOT / f"conf/recipe/{name}.yaml").read_text()))
    assert {k: usual[k] for k in said} == said
    assert {k for k in usual if usual[k] != plain[k]} <= {*said, "recipe"} and usual.keys() == plain.keys()
    for key in said:
        other = {"keep": "[weights]", "model.family": "llama", "target.dialect": "hf", "naming": "plain"}.get(
            key, "fsdp"
        )
        other = "hf" if key == "target.format" and usual[key] != "hf" else "dcp" if key == "target.format" else other
        changed = flat(f"{key}={other}", f"recipe={name}", verb=verb)
        assert {k for k in usual if changed[k] != usual[k]} == {key}
    assert config.preview(verb, [f"recipe={name}"])["source"]["path"] == config.MISSING


def test_a_wrong_recipe_is_refused_and_help_lists_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'hf_to_torchtitan'" in refused("convert", "recipe=hf_to_torchtitn")
    assert "dcp_to_torch" in refused("convert", "recipe=+x=1")
    assert "no key 'recipe'" in refused("merge", "recipe=dcp_to_torch")
    assert "Give one of nemo_average" in refused("average", "recipe=dcp_to_torch")
    assert flat("recipe=null") == flat()
    assert cli.main("convert", ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and text in shown for name, text in config.recipes("convert").items())


def test_steps_and_last_exclude_each_other() -> None:
    assert "exclude" in refused("average", "steps=1,2", "last=2")


def test_what_is_missing_is_named_with_an_example() -> None:
    with pytest.raises(
        UsageError, match=r"source\.path and target\.path are missing.*source\.path=run/.* target\.path=model"
    ):
        config.load("convert", [])


def test_python_values_are_checked_like_words() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'target\.format'"):
        config.fill("convert", {"target": {"fromat": "hf"}})
    with pytest.raises(UsageError, match="whole number"):
        config.fill("average", {"source.path": "r", "last": True})
    with pytest.raises(UsageError, match="true or false"):
        config.fill("inspect", {"source.path": "r", "json": 1})


@pytest.mark.parametrize("of", [tuple, np.array, torch.tensor])
def test_python_values_may_be_arrays_and_dtypes_of_torch(of: Callable[[list[float]], object]) -> None:
    cfg = config.fill(
        "average",
        {"source.path": "r", "steps": of([10, 20]), "weights": of([0.25, 0.75]), "target.dtype": torch.bfloat16},
    )
    assert (cfg["steps"], cfg["weights"], cfg["target"]["dtype"]) == ([10, 20], [0.25, 0.75], "bfloat16")
    with pytest.raises(UsageError, match="Give a path"):
        config.fill("average", {"source.path": of([1, 2])})
    with pytest.raises(UsageError, match="only the command starts processes"):
        ckpt_dist.average("r", nproc=2)


def test_threads_read_their_first_configurations_at_once() -> None:
    config._composed.cache_clear()
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(lambda _: config.fill("inspect", {"source.path": "r"}), range(8)))) == 8
    finally:
        sys.setswitchinterval(usual)


def test_a_program_that_uses_hydra_itself_is_left_alone(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import getbase

    (tmp_path / "mine.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        before, base = GlobalHydra.instance(), getbase()
        config._composed.cache_clear()
        config.fill("inspect", {"source.path": "r"})
        assert GlobalHydra.instance() is before and getbase() == base and compose("mine").x == 1
    assert not GlobalHydra.instance().is_initialized()


# ---- flags


def test_sweep(tmp_path: Path) -> None:
    comma = tmp_path / "a,b"
    comma.mkdir()
    sets = config.sweep("average", [f"source.path={comma}", "last=2,4", "weights=[1,2],[3,4]"])
    assert len(sets) == 4 and sets[1] == [f"source.path={comma}", "last=2", "weights=[3,4]"]


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in config.VERBS:
        assert cli.main(verb, ["--help"]) == 0
        out = capsys.readouterr().out
        assert all(f"  {key} " in out for key in config.listing(verb))
        assert f"ckpt-dist {verb} " in out


def test_cfg_shows_what_would_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("convert", ["--cfg", "job", "source.path=a=b", "target.dtype=bf16"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["source"]["path"] == "a=b" and shown["target"]["path"] == "???"
    assert cli.main("average", ["-m", "-c", "job", "last=2,4"]) == 0
    assert [d["last"] for d in yaml.safe_load_all(capsys.readouterr().out)] == ["2", "4"]


@pytest.mark.parametrize(
    ("verb", "argv", "says"),
    [
        ("convret", [], "Did you mean 'convert'?"),
        ("convert", ["--hlep"], "Did you mean '--help'?"),
        ("convert", ["--cfg", "all"], "--cfg job"),
        ("convert", ["--source.path=run"], "Keys have no dashes: source.path=run."),
        ("convert", ["--dry-run"], "Keys have no dashes: dry_run=true."),
        ("verify", ["--a", "run"], "Keys have no dashes: a.path=run/step-1000."),
        ("verify", ["source.path=run"], "'a.path' or 'b.path'"),
    ],
)
def test_wrong_commands(verb: str, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(verb, argv) == 2
    assert says in capsys.readouterr().err


# ---- processes


def model(folder: Path, fill: float) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"x": torch.full((4, 4), fill)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_exit_codes_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = model(tmp_path / "one", 1), model(tmp_path / "two", 2)
    before = sorted(tmp_path.rglob("*"))
    good = job(f"source.path={one}", "json=true")
    assert good.returncode == 0 and json.loads(good.stdout)["format"] == "hf"
    wrong = job("sorce.path=x")
    assert wrong.returncode == 2 and "Did you mean 'source.path'?" in wrong.stderr
    missing = job("source.path=nowhere")
    assert missing.returncode == 3 and missing.stderr.count("\n") == 1
    differs = job(f"a.path={one}", f"b.path={two}", "quiet=true", verb="verify")
    assert differs.returncode == 4 and "Traceback" not in differs.stderr
    swept = job("-m", f"source.path={one},{two}")
    assert swept.returncode == 0 and str(one) in swept.stdout and str(two) in swept.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("shut", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "2> >(exit)"])
def test_what_nobody_can_hear_ends_no_job(tmp_path: Path, shut: str) -> None:
    source, words = model(tmp_path / "one", 1), f"convert source.path={tmp_path}/one target.path={tmp_path}/two nproc=1"
    more = "" if ">&-" in shut else "json=true"  # a report on stderr, a result on stdout
    command = f"sleep 0.2; {sys.executable} -c 'from ckpt_dist import cli; exit(cli.console())' {words} {more} {shut}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "two/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not more or json.loads(done.stdout)["verb"] == "convert"


def test_a_result_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    command = f"{sys.executable} jobs/inspect.py source.path={model(tmp_path / 'one', 1)} json=true >/dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "Error: 'standard output': No space left on device.\n"


def test_names_that_a_terminal_does_not_know(tmp_path: Path) -> None:
    name = tmp_path / "\xfc\udcff"
    model(name, 1)
    for encoding in ("ascii", "utf-8"):
        done = job(f"source.path={name}", "json=true", PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and json.loads(done.stdout)["path"] == str(name), done.stderr
        assert job(f"source.path={name}", PYTHONIOENCODING=encoding).returncode == 0


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in job("source.path=nowhere", CKPT_DIST_DEBUG="1").stderr


def test_our_own_mistakes_have_a_traceback_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_main", lambda verb, argv: 1 // 0)
    assert cli.main("convert", []) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "report it" in err


def test_other_ranks_leave_the_word_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "3")
    assert cli.main("inspect", []) == 2
    assert waits == [30 * cli.HEAD_START_S] and "rank 3: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [(["source.path=nowhere"], 3), (["sorce.path=x"], 2)])
def test_nproc_gives_our_code_and_one_message(words: list[str], code: int, tmp_path: Path) -> None:
    result = job(*words, "nproc=2")
    assert result.returncode == code and result.stderr.count("Error:") == 1 and "Traceback" not in result.stderr


@pytest.mark.slow
def test_nproc_runs_ranks_and_prints_once(tmp_path: Path) -> None:
    result = job(f"source.path={model(tmp_path / 'one', 1)}", "json=true", "nproc=2")
    assert result.returncode == 0 and json.loads(result.stdout)["format"] == "hf"


def test_nothing_heavy_before_the_command_is_right() -> None:
    code = "import sys; from ckpt_dist import cli; assert cli.main('convert', ['x=1']) == 2; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "hydra", "rich", "safetensors"} & set(out)


def test_a_rank_that_is_done_is_not_ended_by_what_torch_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of gloo do it once in hundreds of jobs; here what is held aborts whenever an interpreter is taken apart."""
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "sitecustomize.py").write_text(
        """import atexit, os, pathlib, sys, types
if "RANK" in os.environ:
    class Held:
        def __del__(self, abort=os.abort):
            abort()
    sys.modules["held"] = types.ModuleType("held")
    sys.modules["held"].held = Held()
    atexit.register(pathlib.Path(__file__).with_name("left" + os.environ["RANK"]).touch)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = [f"source.path={tmp_path / 'model.safetensors'}", f"target.path={tmp_path / 'out'}", "target.format=dcp"]
    done = torchrun(2, ROOT / "jobs/convert.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "left0").exists() and (tmp_path / "left1").exists() and (tmp_path / "out").exists()
