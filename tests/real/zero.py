"""Tiny models trained under DeepSpeed: `torchrun -m tests.real.zero FOLDER CASE...`, and checkpoints given back to it.

FOLDER/<case>/<tag>         what save_checkpoint writes (latest, global_step3/...)
FOLDER/<case>/fp32.pt       what DeepSpeed's own zero_to_fp32 makes of it
FOLDER/<case>/together.pt   of a mixture of experts and of pipelines: what all ranks have, as the program has it
FOLDER/<case>/masters.pt    of these: fp32 weights and moments, as DeepSpeed's own calls gather them from the running engine
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
import re
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
    "fp16": dict(stage=2, bf16=False, fp16=True, groups=2, universal=True),
    "fp16_three": dict(stage=3, bf16=False, fp16=True, universal=True),
    "pipeline": dict(stage=1, bf16=False, model="pipeline"),  # last: what it sets up for all is of no use to others
    "tied": dict(stage=1, bf16=False, model="pipeline", universal=True),
}
MEGATRON = "megatron"  # a case by itself: of 8 ranks
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


def staged(tied: bool, **more: Any) -> Any:
    """An engine of two stages; some items of its list of layers are functions, which have no file.

    `tied`: both stages have the embedding, the second as the head.
    """
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    torch.manual_seed(5)
    back = lambda module, x: x @ module.weight.t()  # noqa: E731
    layers = (
        [
            lambda ids: ids.remainder(11),
            TiedLayerSpec("embed", nn.Embedding, 11, 6),
            LayerSpec(nn.Linear, 6, 7),
            torch.relu,
            LayerSpec(nn.LayerNorm, 7),
            LayerSpec(nn.Linear, 7, 6),
            TiedLayerSpec("embed", nn.Embedding, 11, 6, forward_fn=back),
        ]
        if tied
        else [
            lambda ids: ids.remainder(11),
            LayerSpec(nn.Embedding, 11, 6),
            LayerSpec(nn.Linear, 6, 7),
            torch.relu,
            LayerSpec(nn.LayerNorm, 7),
            LayerSpec(nn.Linear, 7, 11),
        ]
    )
    loss = lambda out, ids: nn.functional.cross_entropy(out.float().flatten(0, 1), ids.flatten())  # noqa: E731
    module = PipelineModule(layers=layers, num_stages=2, loss_fn=loss, partition_method="uniform")
    config = dict(
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
        optimizer=dict(type="Adam", params=dict(lr=0.01, torch_adam=True)),
        zero_optimization=dict(stage=1),
    )
    return deepspeed.initialize(model=module, model_parameters=[*module.parameters()], config=config | more)[0]


WIDTH, WORDS = 4, 8


class Shard(nn.Module):
    """What one of two tensor-parallel ranks has of a layer of Megatron's, under its names; what it computes is no language model."""

    def __init__(self, t: int, embedding: bool) -> None:
        super().__init__()
        if embedding:
            self.word_embeddings, self.position_embeddings = nn.Embedding(WORDS // 2, WIDTH), nn.Embedding(8, WIDTH)
        else:
            self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.self_attention, self.mlp = nn.Module(), nn.Module()
            self.self_attention.query_key_value = nn.Linear(WIDTH, 3 * WIDTH // 2)
            self.self_attention.dense = nn.Linear(WIDTH // 2, WIDTH)
            self.mlp.dense_h_to_4h = nn.Linear(WIDTH, 2 * WIDTH)
            self.mlp.dense_4h_to_h = nn.Linear(2 * WIDTH, WIDTH)
        for name, p in self.named_parameters():
            nn.init.normal_(p)
            if not re.search(r"layernorm|position|dense.bias|4h_to_h.bias", name):  # those are alike on both ranks
                p.data += 10 * t

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "word_embeddings"):
            return self.word_embeddings(x) + self.position_embeddings(torch.arange(8))
        attention, mlp = self.self_attention, self.mlp
        x = x + attention.dense(attention.query_key_value(self.input_layernorm(x))[..., : WIDTH // 2])
        return x + mlp.dense_4h_to_h(torch.relu(mlp.dense_h_to_4h(self.post_attention_layernorm(x))))


def megatron(folder: Path, rank: int) -> None:
    """Two stages of two tensor-parallel ranks each, twice: files as Megatron-DeepSpeed has them, of steps of length 0."""
    import argparse

    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    t = topology.get_coord(rank).model
    torch.manual_seed(5)
    head = lambda module, x: x @ module.word_embeddings.weight.t()  # noqa: E731
    shared = dict(tied_weight_attr="word_embeddings.weight")
    layers = [
        lambda ids: ids.remainder(WORDS // 2),
        TiedLayerSpec("embed", Shard, t, True, **shared),
        lambda x: x,
        *(LayerSpec(Shard, t, False) for _ in range(2)),
        lambda x: x,
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embed", Shard, t, True, forward_fn=head, **shared),
    ]
    loss = lambda out, ids: nn.functional.cross_entropy(out.flatten(0, 1), ids.remainder(WORDS // 2).flatten())  # noqa: E731
    module = PipelineModule(layers=layers, topology=topology, loss_fn=loss, partition_method="uniform")
    config = dict(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2, zero_optimization=dict(stage=1))
    adam = dict(type="Adam", params=dict(lr=0.0, torch_adam=True))
    engine = deepspeed.initialize(
        model=module, model_parameters=[*module.parameters()], config=config | dict(optimizer=adam)
    )[0]
    engine.train_batch(data_iter=iter([(IDS, IDS)] * 2))
    args = argparse.Namespace(
        num_layers=2, hidden_size=WIDTH, num_attention_heads=2, ffn_hidden_size=4 * WIDTH, padded_vocab_size=WORDS,
        max_position_embeddings=8, layernorm_epsilon=1e-5, tensor_model_parallel_size=2,
    )  # fmt: skip
    engine.save_checkpoint(str(folder / "megatron"), client_state=dict(args=args, checkpoint_version=3.0, iteration=1))


def batches(engine: Any, first: int) -> list[float]:
    """The losses of two steps of a pipeline."""
    each = [(IDS + k).remainder(11) for k in (first, first + 1)]
    return [float(engine.train_batch(data_iter=iter([(ids, ids)] * 2))) for ids in each]


def pipeline(folder: Path, name: str, rank: int) -> None:
    engine = staged(name == "tied")
    first = batches(engine, 0)
    info: dict[str, Any] = {
        "universal_checkpoint_version": 0.4,
        "pipeline_replicated_parameter_patterns": [r"tied_modules\..*"],
    }
    engine.save_checkpoint(str(folder / name), client_state={"universal_checkpoint_info": info})
    keep(engine, folder / name, rank)
    after = batches(engine, 2)
    if rank == 0:
        (folder / name / "losses.json").write_text(json.dumps([first, after]))
        if CASES[name].get("universal"):
            universal(folder / name)
    torch.distributed.barrier()


def keep(engine: Any, folder: Path, rank: int) -> None:
    """What the ranks have together, and the engine's own fp32."""
    whole, fp32 = together(engine.module.state_dict()), together(masters(engine))
    if rank == 0:
        torch.save(whole, folder / "together.pt")
        torch.save(fp32, folder / "masters.pt")
    torch.distributed.barrier()


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """Fp32 weights and moments of what this rank trains, gathered from those that share them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine.optimizer._hp_optimizer_states_linked = (
        False  # where an expert got nothing to do in the first step, they are not
    )
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            found[name] = safe_get_full_fp32_param(p)
            found |= {f"{name}/{key}": safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
    return {name: value.clone() for name, value in found.items()}


def together(mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of all ranks, experts under their numbers in the whole model: two ranks have the same four between them."""
    found: dict[str, torch.Tensor] = {}
    each: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(each, {n: t.cpu() for n, t in mine.items()})
    for rank, state in enumerate(each):
        for name, value in state.items():
            head, mark, tail = name.partition("deepspeed_experts.")
            local, dot, rest = tail.partition(".")
            found[head + mark + str(rank % 2 * 2 + int(local)) + dot + rest if mark else name] = value
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
    if case.get("fp16"):
        config["fp16"] = dict(enabled=True, initial_scale_power=8, loss_scale_window=2)
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
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    case = CASES[name]
    if case.get("model") == "pipeline":
        return pipeline(folder, name, rank)
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
        return keep(engine, folder / name, rank)
    after = train(engine, 2)
    if rank == 0:
        (folder / name / "losses.json").write_text(json.dumps([first, after]))
        torch.save(model_of(case.get("model", "toy")).state_dict(), folder / name / "start.pt")
        if case["stage"]:
            torch.save(get_fp32_state_dict_from_zero_checkpoint(str(folder / name)), folder / name / "fp32.pt")
        if case.get("universal"):
            universal(folder / name)
    torch.distributed.barrier()


def universal(folder: Path) -> None:
    from types import SimpleNamespace

    from deepspeed.checkpoint.ds_to_universal import main as to_universal

    made = dict(input_folder=str(folder / (folder / "latest").read_text()), output_folder=str(folder / "universal"))
    how = dict(
        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False
    )
    to_universal(SimpleNamespace(**made, **how))


def resume(name: str, folder: Path, stage: int, rank: int) -> None:
    more = dict(checkpoint={"load_universal": True})
    piped = CASES[name].get("model") == "pipeline"
    engine = staged(name == "tied", **more) if piped else engine_of(CASES[name], stage, blank=True, **more)
    if piped:  # other weights than those that the checkpoint was begun with
        engine.module.load_state_dict({n: t + 1 for n, t in engine.module.state_dict().items()})
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    scaler = scaler_of(getattr(engine.optimizer, "loss_scaler", None))
    losses = batches(engine, 2) if piped else train(engine, 2)
    if rank == 0:
        print("SCALER", json.dumps(scaler), flush=True)
        print("LOSSES", json.dumps(losses), flush=True)


def scaler_of(scaler: Any) -> dict[str, Any]:
    state = vars(scaler) if scaler is not None else {}
    return {key: value if isinstance(value, (int, float)) else str(value) for key, value in state.items()}


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
        if name == MEGATRON:
            continue
        kinds = [k for k in ("fp32", "together", "masters") if (made / f"{k}.pt").is_file()]
        theirs = torch.load(made / f"{kinds[0]}.pt")
        row: dict[str, Any] = {k: {n: digest(t) for n, t in torch.load(made / f"{k}.pt").items()} for k in kinds}
        if CASES[name].get("universal"):
            row["universal"] = {n: digest(t.flatten()) for n, t in values(made / "universal").items()}
            if name in ("two", "three"):
                shutil.copytree(made / "universal", kept / "universal")
        if CASES[name].get("fp16"):
            state = torch.load(made / "universal/zero/optimizer_state.pt", weights_only=False)
            row["scaler"] = scaler_of(state["loss_scaler"])
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
    kind = type(deepspeed.accelerator.get_accelerator())
    kind.is_fp16_supported = lambda self: True  # slow on a CPU without instructions for it, but there
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    folder, names = Path(argv[0]), argv[1:]
    if "--resume" in argv:
        at = argv.index("--resume")
        resume(argv[1], Path(argv[at + 1]), int(argv[at + 2]), rank)
    else:
        for name in names:
            megatron(folder, rank) if name == MEGATRON else make(folder, name, rank)


if __name__ == "__main__":
    main(sys.argv[1:])
