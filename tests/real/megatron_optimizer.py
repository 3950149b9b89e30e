"""Real megatron-core on CPUs with its real optimizers, under torchrun: train, save and load with all of their state.

    torchrun --nproc-per-node 2 -m tests.real.megatron_optimizer JOBS.json

JOBS.json is a list of jobs as of tests/real/megatron_core.py, with `optimizer` (fp32, bf16, sharded), what to `load`,
how many `steps` to train, where to write the `losses`, and what to save: `dist` (folder: sharding type) and `legacy`,
the files of each rank as Megatron-LM's training code lays them out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tests.real import leave
from tests.real.megatron_core import build, meet, on_cpu, sharded

STEP = 7
LEARNS = 0.01


class OnCpu(TorchFunctionMode):
    """Tensors that are made on CUDA are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def named_as_cuda() -> None:
    """Optimizers tell parameters apart by the names of CUDA's tensor types."""
    kind = torch.Tensor.type
    torch.Tensor.type = (  # type: ignore[method-assign]
        lambda self, *a, **k: kind(self, *a, **k) if a or k else "torch.cuda." + kind(self).rpartition(".")[2]
    )
    torch.cuda.empty_cache = lambda: None  # type: ignore[assignment]


def wrapped(job: dict[str, Any]) -> tuple[list[Any], list[Any], Any, Any]:
    """The model's chunks, the same as they are trained, the optimizer and its scheduler."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module

    kind = job["optimizer"]
    half, divided = kind != "fp32", kind == "sharded"
    more = dict(bf16=True, params_dtype=torch.bfloat16) if half else {}
    settings = {**job["settings"], **more}
    if job["layout"].get("pp", 1) > 1 and half:
        settings["autocast_dtype"] = torch.bfloat16
    chunks = build({**job, "settings": settings})
    for chunk in chunks:  # the loss is taken of each rank's part of the vocabulary
        if chunk.post_process:
            chunk.output_layer.gather_output = False
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=divided,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bool(job.get("buckets")),
        bucket_size=job.get("buckets"),
    )
    inner = [Float16Module(config, c) if half else c for c in chunks]
    trained = [DistributedDataParallel(config, ddp, m) for m in inner]
    asked = OptimizerConfig(
        optimizer="adam",
        lr=LEARNS,
        min_lr=LEARNS / 10,
        weight_decay=0.1,
        clip_grad=1.0,
        use_distributed_optimizer=divided,
        **more,
    )
    optimizer = get_megatron_optimizer(asked, trained)
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=LEARNS, min_lr=LEARNS / 10, lr_warmup_steps=2, lr_decay_steps=20,
        lr_decay_style="cosine", start_wd=0.1, end_wd=0.1, wd_incr_steps=0, wd_incr_style="constant",
    )  # fmt: skip
    return chunks, trained, optimizer, scheduler


def train(trained: list[Any], optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    """Some steps on the same words; the losses before each."""
    (model,) = trained
    model.train()
    losses = []
    for _ in range(steps):
        words = torch.arange(1, 17).reshape(2, 8) * 3 % 32
        positions = torch.arange(8)[None].expand_as(words)
        mask = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(words, positions, mask, labels=words.roll(-1, 1)).float().mean()
        loss.backward()
        model.finish_grad_sync()
        done, *_ = optimizer.step()
        assert done
        scheduler.step(increment=1)
        losses.append(loss.item())
    return losses


def shaken(optimizer: Any) -> None:
    """Moments of a model whose stages cannot be trained here: any values, the same in all that ranks have alike."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in one.optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, 0.1)
        one.step_with_ready_grads()
        for state in one.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(torch.rand_like(state[key]))


def metadata(kind: str | None) -> dict[str, Any]:
    from megatron.core import parallel_state as ps

    found = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True), "chained_optim_avoid_prefix": True}
    return {**found, **({"distrib_optim_sharding_type": kind} if kind else {})}


def save(job: dict[str, Any], chunks: list[Any], optimizer: Any, scheduler: Any, folder: str, kind: str | None) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    model, meta = sharded(chunks), metadata(kind)
    if kind == "parameters":
        dist_checkpointing.save({**model, "optimizer": by_parameter(model, optimizer)}, folder)
        return
    state = {**model, "optimizer": optimizer.sharded_state_dict(model, metadata=meta), **beside(job, scheduler)}
    del meta["dp_cp_group"]
    dist_checkpointing.save(state, folder, content_metadata=meta)
    dist.barrier()


def by_parameter(model: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A distributed optimizer's values as what they are of: its fully_reshardable is wrong where buckets are padded."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    tensors, _ = extract_sharded_tensors_and_factories(model)
    found = {}
    for tensor in nested_values(tensors):
        param, mine = tensor.data, None
        one = next(o for o in optimizer.chained_optimizers if any(param in b.param_index_map for b in o.buffers))
        group = one.data_parallel_group
        if param in one.model_param_gbuf_map:
            held, part = one._get_main_param_and_optimizer_states(param), one._get_model_param_range_map(param)["param"]
            mine = (part.start, part.end, {k: v.detach().clone() for k, v in held.items() if k != "step"})
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, mine, group)
        whole = {k: torch.zeros(param.numel()) for k in ("param", "exp_avg", "exp_avg_sq")}
        for start, end, values in (p for p in parts if p is not None):
            for k, value in values.items():
                whole[k][start:end] = value
        for k, value in whole.items():
            prefix = f"optimizer.state.{k}"
            found[f"{k} {tensor.key} {id(param)}"] = make_sharded_optimizer_tensor(
                tensor, value.reshape(param.shape), prefix
            )
    return found


def beside(job: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    layout = job["layout"]
    args = {k: v for k, v in job["settings"].items() if k != "activation_func"}
    args |= {
        f"{long}_model_parallel_size": layout.get(k, 1)
        for k, long in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"))
    }
    args |= {
        "virtual_pipeline_model_parallel_size": layout.get("vpp"),
        "decoder_first_pipeline_num_layers": layout.get("first"),
        "use_distributed_optimizer": job["optimizer"] == "sharded",
    }
    common = {"args": Namespace(**args, **job.get("args", {})), "iteration": STEP, "checkpoint_version": 3.0}
    return {**common, "opt_param_scheduler": scheduler.state_dict(), "num_floating_point_operations_so_far": 9}


def legacy(job: dict[str, Any], chunks: list[Any], optimizer: Any, scheduler: Any) -> None:
    from megatron.core import parallel_state as ps

    layout = job["layout"]
    name = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    name += f"_{ps.get_pipeline_model_parallel_rank():03d}" if layout.get("pp", 1) > 1 else ""
    name += f"_{ps.get_expert_model_parallel_rank():03d}" if layout.get("ep", 1) > 1 else ""
    folder = Path(job["legacy"]) / f"iter_{STEP:07d}" / name
    folder.mkdir(parents=True, exist_ok=True)
    if job["optimizer"] == "sharded":
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    if ps.get_data_parallel_rank() == 0 or (layout.get("ep", 1) > 1 and ps.get_expert_data_parallel_rank() == 0):
        states = [c.state_dict_for_save_checkpoint() for c in chunks]
        model = {"model": states[0]} if len(states) == 1 else {f"model{k}": s for k, s in enumerate(states)}
        state = {**model, "optimizer": optimizer.state_dict(), **beside(job, scheduler)}
        torch.save(state, folder / "model_optim_rng.pt")
    dist.barrier()


def load(job: dict[str, Any], chunks: list[Any], optimizer: Any, scheduler: Any) -> None:
    """All of a run, as its training code loads it: with the optimizer, unless args say that there is none."""
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(job["load"])
    assert not getattr(common["args"], "no_save_optim", False), "a run would not ask for the optimizer"
    said = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    meta = metadata((said or {}).get("distrib_optim_sharding_type"))
    model = sharded(chunks)
    asked = {**model, "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=meta)}
    loaded = dist_checkpointing.load(asked, job["load"])
    for k, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{k}"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    for one in optimizer.chained_optimizers:
        for state in one.optimizer.state.values():  # all have one tensor as their step, to which each would add
            state["step"] = state["step"].clone()
    scheduler.load_state_dict(loaded["opt_param_scheduler"])


def stepped(optimizer: Any) -> None:
    """With torch's Adam a distributed optimizer has moments after a step only, and copies a step that it does not store."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        one._init_optimizer_states_with_dummy_values()
        own = one._set_main_param_and_optimizer_states
        one._set_main_param_and_optimizer_states = lambda p, t, one=one, own=own: own(
            p, {**one._get_main_param_and_optimizer_states(p), **t}
        )


def run(job: dict[str, Any]) -> None:
    if job.get("convert"):
        if dist.get_rank() == 0:
            converted(job["convert"])
        dist.barrier()
    chunks, trained, optimizer, scheduler = wrapped(job)
    if job.get("load"):
        if job["optimizer"] == "sharded":
            stepped(optimizer)
        load(job, chunks, optimizer, scheduler)
    if job.get("shaken"):
        shaken(optimizer)
    if job.get("steps"):
        train(trained, optimizer, scheduler, job["steps"])
    for folder, kind in job.get("dist", {}).items():
        save(job, chunks, optimizer, scheduler, folder, kind)
    if job.get("legacy"):
        legacy(job, chunks, optimizer, scheduler)
    if job.get("losses"):
        losses = train(trained, optimizer, scheduler, 2)
        if dist.get_rank() == 0:
            Path(job["losses"]).write_text(json.dumps(losses))
    dist.barrier()


def converted(jobs: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Our part, in a process of its own: this one is a rank among others."""
    program = "import json, sys, ckpt_dist\nfor a, b, keys in json.loads(sys.argv[1]): ckpt_dist.convert(a, b, **keys)"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", program, json.dumps(jobs)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def main(path: str) -> None:
    on_cpu()
    named_as_cuda()
    with OnCpu():
        for number, job in enumerate(json.loads(Path(path).read_text())):
            meet(f"{path}.{number}")
            run(job)
            if dist.get_rank() == 0:
                print("done", job.get("name"), flush=True)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
