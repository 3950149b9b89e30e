"""Merak itself (HPDL-Group/Merak), where it can be had: what it writes is kept in tests/data.

    python -m tests.real.merak convert TOOLS tests/data/merak-1.1.0      TOOLS: `tools` of Merak 1.1.0 (commit d72efe5)
    python -m tests.real.merak deepspeed TOOLS tests/data/merak-1.1.0/deepspeed      the same from Megatron-DeepSpeed's files
    torchrun --nproc-per-node N -m tests.real.merak train LOAD SAVE TP PP [embedding=whole] [zero] [trained]

Run with torch 2.13 on CPUs; the converter with transformers 5, the trainer (2.2.2, commit 1593043) with 4.46.3. It
trains at a learning rate of 0, so that it saves what it loaded; `trained` begins with weights of its own and changes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LAYERS, WIDTH, HEADS, POSITIONS = 2, 8, 4, 8
CASES = {  # folder: vocabulary, arguments of the converter
    "t1p1": (20, ()),
    "t2p1": (20, ("--merak_tp", "2")),
    "t2p2": (20, ("--merak_tp", "2", "--merak_pp", "2")),
    "padded": (11, ("--merak_tp", "2", "--merak_pp", "2")),
    "t2p3": (
        20,
        ("--merak_tp", "2", "--merak_pp", "3", "--partition_method", "custom", "--custom_partition", "0,3,4,5"),
    ),
    "floor": (20, ("--merak_pp", "2", "--partition_method", "uniform_floor")),
}


def settings(vocabulary: int) -> dict[str, Any]:
    return dict(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=POSITIONS, vocab_size=vocabulary, n_inner=4 * WIDTH,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def convert(tools: Path, out: Path) -> None:
    """A small GPT-2 of random values, and what the converter makes of it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    for vocabulary in (11, 20):
        torch.manual_seed(vocabulary)
        model = GPT2LMHeadModel(GPT2Config(**settings(vocabulary)))
        for p in model.parameters():
            torch.nn.init.normal_(p)
        folder = out / f"hf-{vocabulary}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(model.state_dict()), folder / "pytorch_model.bin")
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **settings(vocabulary)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, (vocabulary, words) in CASES.items():
        source = out / f"hf-{vocabulary}"
        given = ["--load_path", source / "pytorch_model.bin", "--json_path", source / "config.json"]
        command = [
            sys.executable,
            tools / "convert_merak_gpt2_checkpoint.py",
            "--convert_type",
            "transformers_to_merak",
        ]
        command += [*given, "--save_path", out / name, *words]
        subprocess.run([str(w) for w in command], check=True, stdout=subprocess.DEVNULL)


def deepspeed(tools: Path, out: Path) -> None:
    """The model of `hf-20` as Megatron-DeepSpeed's files (of 2 x 2 ranks), and what the converter makes of them."""
    import tempfile

    import torch

    from tests import test_megatron_deepspeed as mds

    mds.HEADS, mds.WIDTH, mds.LAYERS, mds.VOCABULARY, mds.POSITIONS = HEADS, WIDTH, LAYERS, 20, POSITIONS
    with tempfile.TemporaryDirectory() as top:
        mds.write(Path(top) / "mds", "gpt2", torch.load(out.parent / "hf-20/pytorch_model.bin"), enums=False)
        words = [
            "--input_folder",
            Path(top) / "mds/global_step5",
            "--output_folder",
            out,
            "--merak_tp",
            2,
            "--merak_pp",
            2,
        ]
        command = [sys.executable, tools / "deepspeed_to_transformers.py", *words]
        env = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        subprocess.run([str(w) for w in command], check=True, stdout=subprocess.DEVNULL, env=env)


def train(load: Path, save: Path, tp: int, pp: int, *more: str) -> None:
    """Load a checkpoint, do one step of length 0, save."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    shown = torch.__config__.show
    torch.__config__.show = lambda: shown() + ", USE_NCCL=1, "  # it wants to see NCCL before it begins
    sys.argv = ["train", *_arguments(load, save, tp, pp, more)]
    import Merak
    from Merak import MerakArguments, MerakTrainer
    from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser

    world = int(os.environ["WORLD_SIZE"])
    Merak.init(pp, tp, world // (tp * pp))
    (args,) = HfArgumentParser(MerakArguments).parse_args_into_dataclasses()
    config = GPT2Config(**settings(20), return_dict=False, use_cache=False, attn_implementation="eager")
    MerakTrainer(model=GPT2LMHeadModel(config), args=args, train_dataset=_Texts()).train()


def _arguments(load: Path, save: Path, tp: int, pp: int, more: tuple[str, ...]) -> list[str]:
    given: dict[str, object] = dict(
        output_dir=save, use_cpu=True, input_names="input_ids", split_method="layer_split", save=True, save_steps=1,
        max_steps=2, seq_length=POSITIONS, report_to="none", learning_rate=0.0, weight_decay=0.0,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, resume_from_checkpoint=load,
    )  # fmt: skip
    if pp > 1:
        given |= dict(partition_method="custom", custom_partition="0,2,4")
    if tp > 1 and "embedding=whole" not in more:
        given |= dict(parallel_vocab=True)
    if "trained" in more:  # from weights of its own, with steps of some length
        given |= dict(learning_rate=0.01)
        del given["resume_from_checkpoint"]
    if "zero" in more:
        given |= dict(zero_stage=1, zero_allow_untested_optimizer=True)
    return [str(w) for k, v in given.items() for w in (f"--{k}", v)]


class _Texts:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, k: int) -> dict[str, Any]:
        import torch

        ids = torch.arange(POSITIONS) % 20
        return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1] == "deepspeed":
        deepspeed(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        train(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:])
