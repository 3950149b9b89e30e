"""Tiny models trained under DeepSpeed: `torchrun -m tests.real.zero FOLDER CASE...`, and checkpoints given back to it.

FOLDER/<case>/<tag>         what save_checkpoint writes (latest, global_step3/...)
FOLDER/<case>/fp32.pt       what DeepSpeed's own zero_to_fp32 makes of it
FOLDER/<case>/together.pt   of a mixture of experts: what all ranks have, as the program has it
FOLDER/<case>/universal     what its own ds_to_universal makes of it, where the case asks for it
FOLDER/<case>/losses.json   the losses of the steps before and after the save
FOLDER/<case>/start.pt      the weights before the first step

`python -m tests.real.zero --record DATA FOLDER WORLD CASE...` keeps native checkpoints of some cases, and digests of what
DeepSpeed made of them. `... FOLDER CASE --resume DIR STAGE`: an engine of that stage, at this world size, loads the universal checkpoint in DIR
and says the losses of its next steps. All ranks see one batch, so that losses do not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

CASES: dict[str, dict[str, Any]] = {
    "plain": dict(stage=0, bf16=True),
    "one": dict(stage=1, bf16=False, universal=True),
    "one_bf16": dict(stage=1, bf16=True, groups=2),
    "two": dict(stage=2, bf16=True, groups=2, universal=True),
    "two_fp32": dict(stage=2, bf16=False),
    "three": dict(stage=3, bf16=True, universal=True),
    "three_cut": dict(stage=3, bf16=False, groups=2, zero=dict(sub_group_size=50)),
    "robin": dict(stage=2, bf16=True, groups=2, universal=True, zero=dict(round_robin_gradients=True)),
    "aligned": dict(stage=1, bf16=True, groups=2, universal=True, zero=dict(parameter_alignment=True)),
    "elastic": dict(stage=1, bf16=True, groups=2, zero=dict(elastic_checkpoint=True)),
    "experts": dict(stage=1, bf16=True, model="experts"),
    "llama": dict(stage=1, bf16=True, model="llama"),
    "llama_three": dict(stage=3, bf16=True, model="llama"),
    "pipeline": dict(stage=1, bf16=False, model="pipeline"),  # last: what it sets up for all is of no use to others
}
LLAMA = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    vocab_size=40, max_position_embeddings=32, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False,
)  # fmt: skip
IDS = torch.arange(16).reshape(2, 8) * 3 % 11


class Toy(nn.Module):
    """Sizes that no number of ranks divides; a tied head, a frozen layer, buffers of floats and of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 5)
        self.last = nn.Linear(5, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5, 1.5, 2.5]))
        self.register_buffer("count", torch.tensor([3, 4]))
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.first(self.embed(ids))))
        return nn.functional.cross_entropy(self.head(self.last(self.frozen(x))).float().flatten(0, 1), ids.flatten())


class Experts(nn.Module):
    """Two layers of four experts, two on each rank."""

    def __init__(self) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(MoE(6, nn.Linear(6, 6), num_experts=4, ep_size=2) for _ in range(2))
        self.head = nn.Linear(6, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), ids.flatten())


def pipeline(folder: Path, rank: int) -> None:
    """A stage for each of two ranks; some items of its list of layers are functions, which have no file."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    torch.manual_seed(5)
    layers = [
        lambda ids: ids.remainder(11),
        LayerSpec(nn.Embedding, 11, 6),
        LayerSpec(nn.Linear, 6, 7),
        torch.relu,
        LayerSpec(nn.LayerNorm, 7),
        LayerSpec(nn.Linear, 7, 11),
    ]
    loss = lambda out, ids: nn.functional.cross_entropy(out.float().flatten(0, 1), ids.flatten())  # noqa: E731
    module = PipelineModule(layers=layers, num_stages=2, loss_fn=loss, partition_method="uniform")
    config = dict(
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
        optimizer=dict(type="Adam", params=dict(lr=0.01, torch_adam=True)),
        zero_optimization=dict(stage=1),
    )
    engine = deepspeed.initialize(model=module, model_parameters=[*module.parameters()], config=config)[0]
    for k in range(2):
        ids = (IDS + k).remainder(11)
        engine.train_batch(data_iter=iter([(ids, ids)] * 2))
    engine.save_checkpoint(str(folder / "pipeline"))
    each: list[Any] = [None, None]
    torch.distributed.all_gather_object(each, {n: t.cpu() for n, t in engine.module.state_dict().items()})
    if rank == 0:
        torch.save(each[0] | each[1], folder / "pipeline/together.pt")
    torch.distributed.barrier()


def together(engine: Any) -> dict[str, torch.Tensor]:
    """The weights of all ranks, experts under their numbers in the whole model."""
    found: dict[str, torch.Tensor] = {}
    each: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(each, engine.module.state_dict())
    for rank, state in enumerate(each):
        for name, value in state.items():
            head, mark, tail = name.partition("deepspeed_experts.")
            local, dot, rest = tail.partition(".")
            found[head + mark + str(rank * 2 + int(local)) + dot + rest if mark else name] = value
    return found


def model_of(kind: str, blank: bool = False) -> nn.Module:
    torch.manual_seed(5)
    if kind == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        made: nn.Module = LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager"))
    else:
        made = Experts() if kind == "experts" else Toy()
    for p in made.parameters():
        if blank and p.requires_grad:
            p.data.zero_()
    return made


def engine_of(case: dict[str, Any], stage: int, blank: bool = False, **more: Any) -> Any:
    import deepspeed

    made = model_of(case.get("model", "toy"), blank)
    trained = [p for p in made.parameters() if p.requires_grad]
    if "experts" in case.get("model", ""):
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        groups: Any = split({"params": [*made.parameters()], "name": "all"})
    else:
        groups = [{"params": trained[:2], "lr": 0.02}, {"params": trained[2:]}] if case.get("groups") == 2 else trained
    zero = dict(stage=stage, stage3_param_persistence_threshold=0, **case.get("zero", {}))
    config = dict(
        train_micro_batch_size_per_gpu=2,
        optimizer=dict(type="Adam", params=dict(lr=0.01, torch_adam=True)),
        bf16=dict(enabled=case["bf16"]),
        zero_optimization=zero,
        **more,
    )
    return deepspeed.initialize(model=made, model_parameters=groups, config=config)[0]


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for k in range(steps):
        ids = (IDS + k).remainder(11)
        llama = "Llama" in type(engine.module).__name__
        loss = engine(input_ids=ids, labels=ids).loss if llama else engine(ids)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def make(folder: Path, name: str, rank: int) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    case = CASES[name]
    if name == "pipeline":
        return pipeline(folder, rank)
    engine = engine_of(case, case["stage"])
    first = train(engine, 3)
    info: dict[str, Any] = {
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "note": {"seen": [1, 2]},
    }
    if name == "experts":
        info.pop("universal_checkpoint_info")  # refused there
    engine.save_checkpoint(str(folder / name), client_state=info)
    if name == "experts":
        whole = together(engine)
        if rank == 0:
            torch.save(whole, folder / name / "together.pt")
        return
    after = train(engine, 2)
    if rank == 0:
        (folder / name / "losses.json").write_text(json.dumps([first, after]))
        torch.save(model_of(case.get("model", "toy")).state_dict(), folder / name / "start.pt")
        if case["stage"]:
            torch.save(get_fp32_state_dict_from_zero_checkpoint(str(folder / name)), folder / name / "fp32.pt")
        if case.get("universal"):
            tag = (folder / name / "latest").read_text()
            from types import SimpleNamespace

            to_universal(
                SimpleNamespace(
                    input_folder=str(folder / name / tag),
                    output_folder=str(folder / name / "universal"),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=False,
                )
            )
    torch.distributed.barrier()


def resume(name: str, folder: Path, stage: int, rank: int) -> None:
    engine = engine_of(CASES[name], stage, blank=True, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    losses = train(engine, 2)
    if rank == 0:
        print("LOSSES", json.dumps(losses), flush=True)


def digest(tensor: torch.Tensor) -> str:
    text = str(list(tensor.shape)).encode() + tensor.detach().float().contiguous().numpy().tobytes()
    return hashlib.sha256(text).hexdigest()[:16]


def values(folder: Path) -> dict[str, torch.Tensor]:
    """All that a universal checkpoint of DeepSpeed's own holds: `NAME/exp_avg`, ... (flat ones as they are)."""
    found = {}
    for path in sorted(folder.glob("zero/*/*.pt")):
        tree = torch.load(path, weights_only=False)
        found[f"{path.parent.name}/{path.stem}"] = tree["param"] if isinstance(tree, dict) else torch.as_tensor(tree)
    return found


def record(data: Path, folder: Path, world: str, names: list[str]) -> None:
    table = json.loads((data / "digests.json").read_text()) if (data / "digests.json").is_file() else {}
    for name in names:
        made, kept = folder / name, data / f"{name}-{world}"
        shutil.rmtree(kept, ignore_errors=True)
        tag = (made / "latest").read_text()
        shutil.copytree(made / tag, kept / tag)
        shutil.copy(made / "latest", kept / "latest")
        kind = "together" if name in ("experts", "pipeline") else "fp32"
        theirs = torch.load(made / f"{kind}.pt")
        row: dict[str, Any] = {kind: {n: digest(t) for n, t in theirs.items()}}
        if CASES[name].get("universal"):
            row["universal"] = {n: digest(t.flatten()) for n, t in values(made / "universal").items()}
            shutil.copytree(made / "universal", kept / "universal")
        if CASES[name].get("model") == "llama":
            from transformers import LlamaConfig, LlamaForCausalLM

            model = LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager"))
            model.load_state_dict(theirs)
            with torch.no_grad():
                row["logits"] = model.eval()(IDS).logits[0, -1].tolist()
        table[f"{name}-{world}"] = row
    (data / "digests.json").write_text(json.dumps(table, indent=0) + "\n")


def main(argv: list[str]) -> None:
    if argv[0] == "--record":
        return record(Path(argv[1]), Path(argv[2]), argv[3], argv[4:])
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MAX_JOBS": "1"}
    try:
        import deepspeed
    except ImportError as error:
        print("SKIP", error, flush=True)
        return
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    folder, names = Path(argv[0]), argv[1:]
    if "--resume" in argv:
        at = argv.index("--resume")
        resume(argv[1], Path(argv[at + 1]), int(argv[at + 2]), rank)
    else:
        for name in names:
            make(folder, name, rank)


if __name__ == "__main__":
    main(sys.argv[1:])
