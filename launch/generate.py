"""Load a Hugging Face model and continue a text: `python launch/generate.py quickstart/tiny-averaged "a check"`"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def main(folder: str, text: str) -> None:
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=24, do_sample=False)
    print(f"{text!r} -> {tokenizer.decode(out[0, ids.shape[1] :])!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
