"""What other nodes say of files that the one that scans does not see.

A scan runs on one rank. Where it lacks something it raises `Missing`, which says what to ask the other nodes; these
answer, each of its own disk, and the scan runs again with all answers (`part.scanned`).

    size    of a file, in bytes
    names   of what is in a folder
    head    of a `.pt` file: its pickle, and where its storages lie

Invariant: facts about files travel, never the bytes of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_dist.errors import Missing

Question = tuple[str, str]  # what is asked, of which path


@dataclass(frozen=True)
class Answers:
    """By question what the nodes have said, those that had something to say; a question that was asked is there."""

    said: Mapping[Question, tuple[Any, ...]] = field(default_factory=dict)

    def knows(self, error: Missing) -> bool:
        """Whether all that would help has been asked already."""
        return all(question in self.said for question in error.questions)

    @property
    def sizes(self) -> dict[str, int]:
        """Of the files that some other node has."""
        return {path: max(found) for (what, path), found in self.said.items() if what == "size" and found}

    def names(self, folder: Path) -> set[str]:
        return {name for found in self.said.get(("names", str(folder)), ()) for name in found}

    def head(self, path: Path) -> Any:
        """That of the first node that has the file; None where nobody was asked, or nobody has it."""
        return next(iter(self.said.get(("head", str(path)), ())), None)


NOBODY = Answers()


def answers(options: Mapping[str, Any]) -> Answers:
    """Those that came with the keys of a source."""
    found: Answers = options.get("elsewhere") or NOBODY
    return found
