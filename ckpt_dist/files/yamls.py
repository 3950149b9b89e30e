"""YAML that lies beside a checkpoint: tables and lists of words and numbers.

What YAML has beyond that is refused or left as a word: merge keys and numbers to the base of sixty, for which a few bytes are
worked on for ever, or dates.

Invariant: what is read is no larger than its text, and no code of the text's choice makes it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ckpt_dist.errors import CheckpointError
from ckpt_dist.files.pickles import unfolded

MOST = 1 << 19  # bytes; a second is 50 thousand of them
DIGITS = 100
TAG = "tag:yaml.org,2002:"


def table(text: bytes, where: str) -> dict[str, Any]:
    """The table that a text says; an empty one if it says something else."""
    import yaml

    if len(text) > MOST:
        raise CheckpointError(f"{where} has {len(text)} bytes, {MOST} are the most of such a file.")
    try:
        found = yaml.load(text, _loader())
        unfolded(found, len(text), {})
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{where} is no readable YAML: {error!s:.200}") from None
    return found if isinstance(found, dict) else {}


@cache
def _loader() -> Any:
    import yaml

    class Plain(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            """Merge keys stay as they are, and have no constructor."""

        def construct_yaml_int(self, node: Any) -> Any:
            return self._number(node, super().construct_yaml_int)

        def construct_yaml_float(self, node: Any) -> Any:
            return self._number(node, super().construct_yaml_float)

        def _number(self, node: Any, made: Any) -> Any:
            text = self.construct_scalar(node)
            return text if ":" in text or len(text) > DIGITS else made(node)

    Plain.yaml_constructors = {
        **{TAG + kind: getattr(Plain, f"construct_yaml_{kind}") for kind in ("null", "bool", "int", "float", "str", "seq", "map")},
        TAG + "timestamp": Plain.construct_yaml_str,
        None: Plain.construct_undefined,
    }  # fmt: skip
    return Plain
