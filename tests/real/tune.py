"""torchtune's own checkpointer and model: `FILE.pt TYPE CONFIG.json OUT` writes the logits of what it loads to OUT."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.real.titan import TOKENS


def main(file: str, kind: str, config: str, out: str) -> None:
    try:
        from torchtune.models import llama3, llama3_2
        from torchtune.training import FullModelMetaCheckpointer
    except (ImportError, RuntimeError) as error:  # torchao refuses some versions of torch with a RuntimeError
        sys.exit(f"SKIP {error}")
    c = json.loads(Path(config).read_text())
    build = llama3.llama3 if kind == "LLAMA3" else llama3_2.llama3_2
    model = build(
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        embed_dim=c["hidden_size"],
        max_seq_len=c["max_position_embeddings"],
        intermediate_dim=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        rope_base=c["rope_parameters"]["rope_theta"],
        **({} if kind == "LLAMA3" else {"scale_factor": 1}),
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        path = Path(file)
        held = FullModelMetaCheckpointer(str(path.parent), [path.name], kind, elsewhere).load_checkpoint()["model"]
    model.load_state_dict(held)
    with torch.no_grad():
        torch.save(model.eval()(TOKENS), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
