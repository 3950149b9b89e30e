"""Errors meant for a person: what is wrong (with both numbers), where (file, tensor, box), what to do.

An exit code travels with the class, so that every way out of the program agrees:
0 done; 2 the command is wrong; 3 a source is missing, damaged, unsafe or does not fit;
4 verify found a difference; 75 stopped by a signal, to be resumed; 1 anything else (our own mistake).
"""

from __future__ import annotations

import difflib
import re
import reprlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, unsafe or does not fit; the message is printed once, without traceback."""

    exit_code = 3


class Missing(CheckpointError):
    """Something of a checkpoint is not on this node; other nodes may know: the `size` of each of some paths, the `head`
    of each, the `names` in each (`files/elsewhere.py`)."""

    def __init__(self, message: str, paths: tuple[str, ...] = (), ask: str = "size") -> None:
        super().__init__(message)
        self.paths, self.ask = paths, ask

    @property
    def questions(self) -> list[tuple[str, str]]:
        return [(self.ask, path) for path in self.paths]

    def __reduce__(self) -> tuple[type[Missing], tuple[str, tuple[str, ...], str]]:
        return Missing, (str(self), self.paths, self.ask)


class Unfit(CheckpointError):
    """The names are those of a family, the shapes are not."""


class UsageError(CheckpointError, ValueError):
    """The command itself is wrong: an unknown key, a missing value, a target that exists."""

    exit_code = 2


class Taken(UsageError):
    """Somebody made something of the target's name while the job ran; the job goes on when that is settled."""


class Difference(CheckpointError):
    """`verify` found that two checkpoints differ."""

    exit_code = 4


class Stopped(CheckpointError):
    """A signal asked the job to end; the same command goes on from here."""

    exit_code = 75  # "temporary failure" in sysexits.h; torchrun's own codes are small or negative


STOPPED = "Stopped by a signal; nothing was published. Run the same command again to go on from here."
STOP = threading.Event()  # set by the signal handler of the command line; looked at between batches of tiles


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint for a misspelt word, or nothing: `nearest("formt", ["format"])` -> ` Did you mean 'format'?`"""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {found[0]!r}?" if found else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names: `listed(["a", "b", "c"], 2)` -> `a, b and 1 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def shown(value: object, most: int = 60) -> str:
    """The beginning of what a file says. The rest is not made: lists that hold one list twice, and so on, have no end."""
    return _SHORT.repr(value)[:most]


_ODD = re.compile(r"[^ -~\n]")


def visible(text: str) -> str:
    """A text as a terminal may get it: nothing that a file says moves its cursor, colours it or turns its writing around.

    `visible("layers.0\x1b[2J")` -> `layers.0\\x1b[2J`
    """
    return _ODD.sub(lambda odd: odd[0] if odd[0].isprintable() else repr(odd[0])[1:-1], text)


@contextmanager
def translating(where: object) -> Iterator[None]:
    """Settings whose kinds nobody has checked one by one: a word where a number should be is said of their file."""
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{where} has a value of another kind than it should be ({type(error).__name__}: {error!s:.100}). Give the right "
            "one with model.config=PATH."
        ) from error
