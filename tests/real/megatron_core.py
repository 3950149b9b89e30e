"""Real megatron-core on CPUs, under torchrun: build a GPTModel under a parallel layout, load, run, save.

    torchrun --nproc-per-node 4 -m tests.real.megatron_core JOBS.json

JOBS.json is a list of jobs, each with `settings` (TransformerConfig), `model` (GPTModel), `layout` (tp, pp, vpp, ep,
first, stages), `states` (norms that have one, as Transformer Engine's) and what to do: `load` a torch_dist checkpoint with
each of `strict` (none: its own first values), `logits` to save, `save` a torch_dist checkpoint, `legacy` to write every
rank's own state dict as Megatron-LM's training code lays it out.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.real import leave


def on_cpu() -> None:
    """What megatron-core takes for granted of CUDA, without it."""
    from megatron.core.tensor_parallel import random as mrandom

    torch.cuda.synchronize = lambda *a, **k: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[assignment,method-assign]

    class Stream:
        def __init__(self, *a: Any, **k: Any) -> None: ...
        def wait_stream(self, *a: Any) -> None: ...
        def wait_event(self, *a: Any) -> None: ...
        def synchronize(self) -> None: ...

        def record_event(self, *a: Any) -> Any:
            return self

    torch.cuda.Stream = Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *a, **k: Stream()  # type: ignore[assignment,return-value]
    from megatron.core.transformer.moe import moe_utils

    exchange = dist.all_to_all_single

    def exchanged(*args: Any, **more: Any) -> Any:
        """On CPUs the sizes stay tensors."""
        return exchange(
            *args, **{k: v.tolist() if isinstance(v, torch.Tensor) and "sizes" in k else v for k, v in more.items()}
        )

    dist.all_to_all_single = exchanged  # type: ignore[assignment]

    from megatron.core.fusions import fused_softmax

    window, ones = fused_softmax.get_sliding_window_causal_mask, torch.ones

    def windowed(*args: Any) -> Any:
        """Its mask is made on CUDA whatever the rest is on."""
        torch.ones = lambda *a, device=None, **k: ones(*a, **k)
        try:
            return window(*args)
        finally:
            torch.ones = ones

    fused_softmax.get_sliding_window_causal_mask = windowed

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    from megatron.core.transformer import multi_latent_attention as mla
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    attention = DotProductAttention.__init__
    DotProductAttention.__init__ = lambda self, *a, k_channels=None, v_channels=None, **k: attention(self, *a, **k)  # type: ignore[method-assign]
    for name in ("TELinear", "TEColumnParallelLinear"):
        if not isinstance(getattr(mla, name, None), type):
            setattr(mla, name, type(name, (), {}))
    mrandom.CudaRNGStatesTracker.fork = lambda *a, **k: contextlib.nullcontext()  # type: ignore[method-assign,assignment]


def build(job: dict[str, Any]) -> list[Any]:
    """The model chunks of this rank."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    layout = {"tp": 1, "pp": 1, "vpp": None, "ep": 1, "first": None, "stages": None, **job["layout"]}
    ps.destroy_model_parallel()
    ps.initialize_model_parallel(
        layout["tp"],
        layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=1 if layout["ep"] > 1 else None,
    )
    settings = dict(job["settings"])
    if settings.get("activation_func") == "silu":
        settings["activation_func"] = torch.nn.functional.silu
    if settings.get("activation_func") == "quick_gelu":
        settings["activation_func"] = lambda x: x * torch.sigmoid(1.702 * x)
    if settings.get("activation_func") == "gelu_tanh":
        settings["activation_func"] = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    mla = settings.get("multi_latent_attention", False)
    config = (MLATransformerConfig if mla else TransformerConfig)(
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"],
        num_layers_in_first_pipeline_stage=layout["first"],
        pipeline_model_parallel_layout=layout["stages"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=1 if layout["ep"] > 1 else None,
        moe_token_dispatcher_type="alltoall",
        **settings,
    )
    spec = one = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        multi_latent_attention=mla,
    )
    if config.num_moe_experts and isinstance(config.moe_layer_freq, list):
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    if job.get("states"):
        spec = with_states(spec, config)
    model = job["model"]
    chunks = []
    for chunk in range(layout["vpp"] or 1):
        stage = {"vp_stage": chunk} if layout["vpp"] else {}
        layers = spec if getattr(spec, "layer_specs", True) else one  # a stage may have no other layer
        further = get_gpt_mtp_block_spec(config, layers, False, **stage) if config.mtp_num_layers else None
        torch.manual_seed(1)
        chunks.append(
            GPTModel(
                config,
                spec,
                pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, **stage),
                post_process=ps.is_pipeline_last_stage(ignore_virtual=False, **stage),
                parallel_output=False,
                mtp_block_spec=further,
                **model,
                **stage,
            ).eval()
        )
    return chunks


def with_states(spec: Any, config: Any) -> Any:
    """The same modules, but for norms of queries, of keys and behind the last layer, which have an extra state."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    class Norm(torch.nn.RMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float, **more: Any) -> None:
            super().__init__(hidden_size, eps)

        def get_extra_state(self) -> None:
            """Nothing, as Transformer Engine's has where there is no fp8."""

        def set_extra_state(self, state: Any) -> None:
            assert state is None

    inside = spec.submodules.self_attention.submodules
    inside.q_layernorm = inside.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=Norm)


def begun(chunks: list[Any]) -> None:
    """Other first values of norms and biases than ones and zeros, the same on all tensor-parallel ranks."""
    torch.manual_seed(2)
    for chunk in chunks:
        for weight in chunk.parameters():
            if weight.dim() == 1:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        for name, buffer in chunk.named_buffers():
            if "expert_bias" in name:
                torch.nn.init.uniform_(buffer, -0.1, 0.1)


def sharded(chunks: list[Any]) -> dict[str, Any]:
    from megatron.core import parallel_state as ps

    meta = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=meta)}
    return {f"model{k}": c.sharded_state_dict(metadata=meta) for k, c in enumerate(chunks)}


def load(chunks: list[Any], folder: str, strict: str) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(sharded(chunks), folder, strict=strict)
    if strict.startswith("return"):
        loaded, *wrong = loaded
        assert not any(wrong), wrong
    for k, chunk in enumerate(chunks):
        state = loaded.get("model" if len(chunks) == 1 else f"model{k}", {})  # a stage may be empty
        lost, more = chunk.load_state_dict(state, strict=False)
        assert not [n for n in lost if "_extra_state" not in n] and not more, (lost, more)


@torch.no_grad()
def logits(chunks: list[Any], ids: torch.Tensor) -> torch.Tensor | None:
    """Stage by stage, on the last stage of the pipeline."""
    from megatron.core import parallel_state as ps

    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
    size, rank = ps.get_pipeline_model_parallel_world_size(), ps.get_pipeline_model_parallel_rank()
    ranks = dist.get_process_group_ranks(ps.get_pipeline_model_parallel_group())
    out = None
    width = chunks[0].config.hidden_size
    for step in range(size * len(chunks)):
        stage, chunk = step % size, step // size
        if stage != rank:
            continue
        model = chunks[chunk]
        if step:
            hidden = torch.empty(ids.shape[1], ids.shape[0], width)
            if size > 1:
                dist.recv(hidden, ranks[(rank - 1) % size])
            else:
                hidden = out  # type: ignore[assignment]
            model.set_input_tensor(hidden)
        out = _computed(model, ids, positions, mask)
        if step < size * len(chunks) - 1 and size > 1:
            dist.send(out.contiguous(), ranks[(rank + 1) % size])
            out = None
    return out


def _computed(model: Any, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a stage makes; of one that also predicts further tokens the logits of each: with labels, it tells losses only,
    and makes them in the same memory."""
    if not (model.config.mtp_num_layers and model.post_process):
        return model(ids, positions, mask)  # type: ignore[no-any-return]
    made: list[torch.Tensor] = []
    heard = model.output_layer.register_forward_hook(
        lambda layer, given, out: made.append(out[0].transpose(0, 1).clone())
    )
    model(ids, positions, mask, labels=ids)
    heard.remove()
    return torch.stack([made[-1], *made[:-1]])


def legacy(chunks: list[Any], job: dict[str, Any]) -> None:
    """Each rank's state dict, in the folder and under the keys of Megatron-LM's training code."""
    from megatron.core import parallel_state as ps

    layout = job["layout"]
    tp, pp, ep = layout.get("tp", 1), layout.get("pp", 1), layout.get("ep", 1)
    name = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    name += f"_{ps.get_pipeline_model_parallel_rank():03d}" if pp > 1 else ""
    name += f"_{ps.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
    writes = ps.get_expert_data_parallel_rank() == 0 if ep > 1 else ps.get_data_parallel_rank() == 0
    if not writes:
        return
    folder = Path(job["legacy"]) / "iter_0000007" / name
    folder.mkdir(parents=True, exist_ok=True)
    states = [c.state_dict_for_save_checkpoint() for c in chunks]
    model = {"model": states[0]} if len(states) == 1 else {f"model{k}": s for k, s in enumerate(states)}
    args = {k: v for k, v in job["settings"].items() if k != "activation_func"}
    args |= {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": layout.get("vpp"),
        "decoder_first_pipeline_num_layers": layout.get("first"),
        "pipeline_model_parallel_layout": layout.get("stages"),
        "expert_model_parallel_size": ep,
        **job.get("args", {}),
    }
    torch.save(
        {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 7, **model}, folder / "model_optim_rng.pt"
    )
    (Path(job["legacy"]) / "latest_checkpointed_iteration.txt").write_text("7")


def meet(place: str) -> None:
    """The ranks meet anew: megatron-core makes dozens of groups for a layout and ends none, and gloo's threads never sleep."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)


def run(job: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    chunks = build(job)
    if "load" not in job:
        begun(chunks)
    for strict in job.get("strict", ()):
        load(chunks, job["load"], strict)
    if job.get("logits"):
        out = logits(chunks, torch.tensor(job["ids"]))
        first = ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank() == 0
        if out is not None and ps.is_pipeline_last_stage(ignore_virtual=True) and first:
            torch.save(out.float(), job["logits"])
    if job.get("save"):
        Path(job["save"]).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        layout = job["layout"]
        args = {k: v for k, v in job["settings"].items() if k != "activation_func"}
        args |= {"tensor_model_parallel_size": layout.get("tp", 1), "pipeline_model_parallel_size": layout.get("pp", 1)}
        common = {"args": Namespace(**args, **job.get("args", {})), "iteration": 7, "checkpoint_version": 3.0}
        dist_checkpointing.save({**sharded(chunks), **common}, job["save"])
    if job.get("legacy"):
        legacy(chunks, job)
    dist.barrier()


def main(path: str) -> None:
    on_cpu()
    for number, job in enumerate(json.loads(Path(path).read_text())):
        meet(f"{path}.{number}")
        run(job)
        if dist.get_rank() == 0:
            print("done", job.get("name"), flush=True)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
