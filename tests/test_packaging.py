"""The wheel holds everything and nothing beside `ckpt_dist`; a checkout never uses an installed wheel's files."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("ckpt_dist", "jobs", "conf", "setup.cfg", "pyproject.toml", "LICENSE", "README.md")


def python(*words: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).exists():
            shutil.copy(ROOT / part, copy)
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy), cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path with the wheel unpacked, as pip does for a pure wheel."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_every_package_is_listed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {p.parent for p in (ROOT / "ckpt_dist").rglob("*.py")}
    names = {".".join(f.relative_to(ROOT).parts) for f in folders if "__pycache__" not in f.parts}
    names |= {
        "ckpt_dist." + ".".join(f.relative_to(ROOT).parts)
        for top in ("jobs", "conf")
        for f in {p.parent for p in (ROOT / top).rglob("*") if p.suffix in (".py", ".yaml")}
    }
    assert sorted(listed) == sorted(names)


def test_wheel_holds_every_file_and_no_other_top(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"ckpt_dist"}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ckpt_dist").rglob("*") if p.suffix in (".py", ".typed")}
    wanted |= {
        f"ckpt_dist/{p.relative_to(ROOT).as_posix()}"
        for top in ("jobs", "conf")
        for p in (ROOT / top).rglob("*")
        if p.suffix in (".py", ".yaml")
    }
    assert wanted <= names
    assert any(n.endswith("LICENSE") for n in names)


def test_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    shown = python("-m", "ckpt_dist.jobs.convert", "--cfg", "job", cwd=tmp_path, path=installed)
    assert shown.returncode == 0 and "max_shard_size" in shown.stdout, shown.stderr
    script = python(str(installed / "ckpt_dist/jobs/inspect.py"), "--help", cwd=tmp_path, path=installed)
    assert script.returncode == 0, script.stderr
    console = python("-c", "from ckpt_dist.cli import console; console()", cwd=tmp_path, path=installed)
    assert "convert" in console.stdout and "average" in console.stdout
    assert list(tmp_path.iterdir()) == []


def test_checkout_uses_its_own_code_and_conf(installed: Path, tmp_path: Path) -> None:
    for part in ("ckpt_dist", "jobs", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    conf = tmp_path / "conf" / "shared" / "engine.yaml"
    conf.write_text(conf.read_text().replace("2GiB ", "77MiB"))
    job = tmp_path / "jobs" / "convert.py"
    for cwd in (tmp_path, tmp_path / "jobs", Path("/")):
        assert "77MiB" in python(str(job), "--cfg", "job", cwd=cwd, path=installed).stdout


def test_a_foreign_package_named_conf_is_not_taken(installed: Path, tmp_path: Path) -> None:
    (installed / "conf").mkdir()
    (installed / "conf" / "convert.yaml").write_text("wrong: true\n")
    try:
        assert (
            "wrong" not in python("-m", "ckpt_dist.jobs.convert", "--cfg", "job", cwd=tmp_path, path=installed).stdout
        )
    finally:
        shutil.rmtree(installed / "conf")


def test_an_environment_keeps_the_torch_that_is_there_by_the_version_that_pip_knows(tmp_path: Path) -> None:
    """PyPI's build for CUDA is the package 2.12.0, and says 2.12.0+cu128 of itself."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    package, record = tmp_path / "site/torch/__init__.py", tmp_path / "site/torch-2.12.0.dist-info/METADATA"
    for path, text in (
        (package, '__version__ = "2.12.0+cu128"'),
        (record, "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\nPYTHONPATH='{tmp_path / 'site'}' exec '{sys.executable}' \"$@\"\n")
    interpreter.chmod(0o755)
    env = {**os.environ, "PYTHON": str(interpreter), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    env.pop("PIP_FIND_LINKS", None)
    done = subprocess.run(["bash", "launch/env.sh"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert "Using the torch of" in done.stdout and done.returncode  # there is nothing to install from
    lines = (tmp_path / ".venv/constraints.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("torch")] == ["torch==2.12.0"]
    record.write_text("Name: torch\n")
    done = subprocess.run(["bash", "launch/env.sh"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert "pip does not know the torch" in done.stderr and "Traceback" not in done.stderr and done.returncode


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_has_one_version_of_each_package_for_the_tests(version: str) -> None:
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "launch/constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    names = [r.name for r in map(Requirement, lines) if not r.marker or r.marker.evaluate({"python_version": version})]
    assert sorted(names) == ["accelerate", "megatron-core", "torch", "transformers", "zarr"]
