"""Sizes, the report and the progress bar. Not checked: how rich draws."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading

import pytest

from ckpt_dist import report
from ckpt_dist.errors import UsageError
from ckpt_dist.report import Progress, Report, parse_size, peak_memory, show_result, size, table
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("1.5 gib", 3 << 29),
        ("10", 10),
        (10, 10),
        ("7kb", 7000),
        ("1B", 1),
    ],
)
def test_parse_size(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "5G B", "5XB", "-1GB", "0", "1e3", "1.2.3GB", True, None, 1.5, "nan"])
def test_parse_size_refuses(text: object) -> None:
    with pytest.raises(UsageError, match="2GiB"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (1 << 51, "2.0 PiB")]
)
def test_size(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def filled() -> Report:
    done = Report("convert", target="model", bytes_read=2 << 30, bytes_written=1 << 30, peak_memory=[1 << 30, 3 << 29])
    done.phases |= {"scan": 0.5, "copy": 1.5}
    done.warnings.append("[bold]kept")
    done.guesses.append("source.format=dcp")
    return done


def test_report_is_plain_data() -> None:
    assert json.loads(filled().to_json())["seconds"] == 2.0
    assert json.loads(filled().to_json())["peak_memory"] == [1 << 30, 3 << 29]


def test_report_lines_hold_every_fact() -> None:
    text = "\n".join(filled().lines())
    for part in (
        "scan",
        "0.50 s",
        "2.0 GiB (1.07 GB/s)",
        "1.5 GiB in the largest of 2 ranks",
        "warning: [bold]kept",
        "guessed: source.format=dcp",
    ):
        assert part in text


def test_phases_add_up() -> None:
    done = Report("x")
    for _ in range(2):
        with done.phase("copy"):
            pass
    with pytest.raises(ZeroDivisionError), done.phase("copy"):
        _ = 1 / 0
    assert list(done.phases) == ["copy"] and 0 < done.phases["copy"] < 1


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    filled().show()
    show_result({"text": ["a"]}, as_json=False)
    with Progress("copy", 10) as progress:
        progress.advance(10)
    assert capsys.readouterr() == ("", "")


def test_results(capsys: pytest.CaptureFixture[str]) -> None:
    show_result({"a": 1, "text": ["one", "two"]}, as_json=False)
    assert capsys.readouterr().out == "one\ntwo\n"
    show_result({"a": 1, "text": ["one", "two"]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert table(["name", "n"], [["long name", 1], ["b", 22]]) == ["name       n", "long name  1", "b          22"]


def test_plain_lines_when_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "EVERY_S", 0.0)
    out = io.StringIO()
    with Progress("copy", 4 << 20, out=out) as progress:
        progress.advance(1 << 20)
    assert out.getvalue().startswith("copy: 1.0 MiB of 4.0 MiB (25%), ") and out.getvalue().endswith("s left\n")


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "EVERY_S", 0.0)
    out = io.StringIO()
    with Progress("copy", 4, quiet=True, out=out) as progress:
        progress.advance(4)
    assert out.getvalue() == "" and progress.done == 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress("copying", 1 << 20, out=out) as progress:
        progress.advance(1 << 20)
    assert "copying" in out.getvalue()


def test_advance_from_many_threads() -> None:
    with Progress("copy", 8000, quiet=True) as progress:
        threads = [threading.Thread(target=lambda: [progress.advance(1) for _ in range(1000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert progress.done == 8000


def test_peak_memory_is_in_bytes() -> None:
    assert 5 << 20 < peak_memory() < 1 << 42


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells them apart")
def test_peak_memory_is_the_processs_own() -> None:
    """Not that of the program which starts it, whose pages a child has until it begins its own."""
    held = b"1" * (300 << 20)
    command = [
        sys.executable,
        "-c",
        "from ckpt_dist.report import peak_memory as p; print(p()); b'1' * (100 << 20); print(p())",
    ]
    first, then = map(int, subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())
    assert len(held) < peak_memory() and first < 100 << 20 <= then - first + (8 << 20)
