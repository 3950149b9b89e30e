"""How the stages of a pipeline share a model's layers, in the words of Megatron's args: `Et*3|t*4||t*3mL`.

E embedding, t layer, m layer that predicts further tokens, L loss; a bar ends a stage, commas say nothing, `t*3` is ttt
and `(tt|)*2` is tt|tt|. Stages of the first virtual chunk come first. A list of lists of words says the same.

Invariant: pure; what is spelled is read as the same stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ckpt_dist.errors import CheckpointError

KEY = "pipeline_model_parallel_layout"
GROUP, LETTER = re.compile(r"\(([^()]+)\)\*(\d{1,6})"), re.compile(r"(.)\*(\d{1,6})")
MOST = 1 << 16  # letters: more than any model has layers


def spelled(stages: Sequence[int], further: int = 0) -> str:
    """`spelled([3, 4, 0, 3], 1)` -> `Et*3|t*4||t*3mL`"""
    inside = ["" if n == 0 else "t" if n == 1 else f"t*{n}" for n in stages]
    return "E" + "|".join(inside) + "m" * further + "L"


def read(layout: Any) -> list[int]:
    """Layers of each stage: `read("Et,(tt|)*2tL")` -> `[3, 2, 1]`"""
    if isinstance(layout, str):
        rows: list[Any] = [["decoder"] * row.count("t") for row in _unrolled(layout).split("|")]
    elif isinstance(layout, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in layout):
        rows = list(layout)
    else:
        raise CheckpointError(f"args are damaged: {KEY} is {layout!r:.60}, neither a text nor a list of lists.")
    return [sum(str(word).strip().lower() == "decoder" for word in row) for row in rows]


def _unrolled(text: str) -> str:
    text = text.replace(",", "")
    for pattern in (GROUP, LETTER):
        if len(text) + sum(len(hit[1]) * int(hit[2]) for hit in pattern.finditer(text)) > MOST:
            raise CheckpointError(f"args are damaged: {KEY} is {text!r:.60}, longer than any pipeline.")
        text = pattern.sub(lambda hit: hit[1] * int(hit[2]), text)
    if odd := set(text) - set("EtmL|"):
        raise CheckpointError(f"args are damaged: {KEY} has {min(odd)!r}, which is none of E, t, m, L: {text!r:.60}.")
    return text


def args(stages: Sequence[int], vpp: int, asked: bool, further: int = 0) -> dict[str, Any]:
    """What Megatron's args say of stages that do not all have as many layers: of the first and the last, or of each."""
    if not asked or len(stages) < 2:
        return {}
    if vpp == 1 and all(stages) and len(set(stages[1:-1])) < 2:
        return dict(decoder_first_pipeline_num_layers=stages[0], decoder_last_pipeline_num_layers=stages[-1])
    return {KEY: spelled(stages, further)} if len(set(stages)) > 1 else {}
