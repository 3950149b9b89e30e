"""Tiny models in torchtitan itself: `python -m tests.real.titan FOLDER`, or `--record FILE` for what its names are.

FOLDER/<family>/titan       its state_dict, saved by dcp
FOLDER/<family>/trained     the same after two steps of AdamW, with its container of optimizers
FOLDER/<family>/theirs      the same in Hugging Face's names, by its own adapter; and the logits of TOKENS
FILE                        family -> name -> [shape, digest]: what its adapter makes of `filled` Hugging Face tensors;
                            digest null where the adapter of torchtitan 0.3.0 has no rule that its own model fits
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
TOKENS = torch.arange(32).reshape(2, 16) * 7 % 50
EPS = 1e-6
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=64,
    rms_norm_eps=EPS,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)
LATENT = dict(kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=14, num_key_value_heads=4)
DEEPSEEK = {**SIZES, **EXPERTS, **LATENT, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
DEEPSEEK |= {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
CONFIGS: dict[str, dict[str, Any]] = {  # what transformers calls the models that are built below
    "llama": {**SIZES, "model_type": "llama", "head_dim": 8},
    "qwen3": {**SIZES, "model_type": "qwen3", "head_dim": 12},
    "qwen3_moe": {**SIZES, **EXPERTS, "model_type": "qwen3_moe", "head_dim": 12, "num_experts": 8, "norm_topk_prob": True},
    "deepseek_v3": {**DEEPSEEK, "model_type": "deepseek_v3", "q_lora_rank": 20},
    "deepseek_v3_lite": {**DEEPSEEK, "model_type": "deepseek_v3", "q_lora_rank": None},
    "gpt_oss": {
        **{**SIZES, "num_attention_heads": 64, "num_key_value_heads": 8},  # which are fixed in torchtitan
        "model_type": "gpt_oss",
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_dropout": 0.0,
    },
}  # fmt: skip


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that differ within a tensor and between tensors, exact in fp32."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + zlib.crc32(name.encode()) % 65521) % 65521).float().reshape(shape)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def config_of(family: str, layers: list[Any], package: Any, model: Any) -> Any:
    from torchtitan.models.common import Embedding, Linear
    from torchtitan.models.common.nn_modules import RMSNorm

    dim, vocab = SIZES["hidden_size"], SIZES["vocab_size"]
    return model.Config(
        dim=dim,
        vocab_size=vocab,
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim, param_init=package._EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=package._NORM_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=package._EMBEDDING_INIT),
        layers=layers,
    )


def build(family: str) -> tuple[Any, Any]:
    """(model, adapter) of torchtitan, with layers from its own builders."""
    from torchtitan.models import deepseek_v3, gpt_oss, llama3, qwen3
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE

    c = CONFIGS[family]
    common: dict[str, Any] = dict(n_layers=2, dim=32, attn_backend="flex")
    moe: dict[str, Any] = dict(moe_comm_backend="standard")
    rope: Callable[..., Any] = lambda kind, dim: kind.Config(dim=dim, max_seq_len=64, theta=10000.0)  # noqa: E731
    if family == "llama":
        layers = llama3._build_llama3_layers(
            **common, n_heads=4, n_kv_heads=2, hidden_dim=48, rope=rope(ComplexRoPE, 8)
        )
        config = config_of(family, layers, llama3, llama3.Llama3Model)
        adapter = llama3.Llama3StateDictAdapter
    elif family == "qwen3":
        layers = qwen3._build_qwen3_layers(
            **common, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=48, rope=rope(CosSinRoPE, 12)
        )
        config, adapter = config_of(family, layers, qwen3, qwen3.Qwen3Model), qwen3.Qwen3StateDictAdapter
    elif family == "qwen3_moe":
        sizes = dict(n_heads=4, n_kv_heads=2, head_dim=12, moe_hidden_dim=24, num_experts=8, top_k=2)
        layers = qwen3._build_qwen3_moe_layers(**common, **moe, **sizes, rope=rope(CosSinRoPE, 12))
        config, adapter = config_of(family, layers, qwen3, qwen3.Qwen3Model), qwen3.Qwen3StateDictAdapter
    elif family == "gpt_oss":
        sizes = dict(hidden_dim=48, num_experts=4, top_k=2, load_balance_coeff=1e-3)
        layers = gpt_oss._build_gptoss_layers(**common, **moe, **sizes, rope=rope(CosSinRoPE, 64))
        config, adapter = config_of(family, layers, gpt_oss, gpt_oss.GptOssModel), gpt_oss.GptOssStateDictAdapter
    else:
        layers = deepseek_v3._build_dsv3_layers(
            **common,
            **moe,
            **{k: c[k] for k in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
            n_dense_layers=1,
            n_heads=4,
            q_lora_rank=c["q_lora_rank"] or 0,
            mscale=1.0,
            dense_hidden_dim=48,
            moe_hidden_dim=24,
            num_experts=8,
            num_shared_experts=2,
            router_top_k=2,
            router_score_func="sigmoid",
            router_num_expert_groups=2,
            router_num_limited_groups=1,
            router_route_scale=2.5,
            router_route_norm=True,
            non_blocking_capacity_factor=None,
            rope=rope(ComplexRoPE, 8),
        )
        config = config_of(family, layers, deepseek_v3, deepseek_v3.DeepSeekV3Model)
        adapter = deepseek_v3.DeepSeekV3StateDictAdapter
    model = config.build()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.eps = EPS
    return model.eval(), adapter(config, None)


def on_this_processor() -> None:
    """torchtitan's own modules, with experts in fp32 and attention not compiled: it has no CPU of its own."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torchtitan.models.common import decoder
    from torchtitan.models.common.attention import FlexAttention

    def attend(*args: Any, kernel_options: Any = None, **options: Any) -> Any:
        return flex_attention(*args, **options)

    def grouped(A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        ends = offs.tolist()
        out = [A[lo:hi] @ B_t[e] for e, (lo, hi) in enumerate(zip([0, *ends], ends))]
        return torch.cat([*out, A.new_zeros(len(A) - ends[-1], B_t.shape[-1])])

    FlexAttention._compiled_flex_attn = staticmethod(attend)
    decoder.create_attention_mask = create_block_mask
    torch._grouped_mm = grouped
    torch.Tensor.bfloat16 = lambda self: self  # type: ignore[method-assign,assignment]


def random(model: Any, family: str) -> Tensors:
    state: Tensors = model.state_dict()
    torch.manual_seed(1)
    for name, value in state.items():
        value.copy_(torch.randn_like(value) * 0.2 + ("norm" in name))
        if name.endswith("expert_bias_E") and not family.startswith("deepseek"):
            value.zero_()  # Hugging Face has no word for it
    model.load_state_dict(state)
    return state


def make(folder: Path, family: str) -> None:
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    model, adapter = build(family)
    with torch.no_grad():
        state = random(model, family)
        masks = model.get_attention_masks(torch.arange(16).expand(2, 16))
        logits = model(TOKENS, attention_masks=masks)
        dcp.save(state, checkpoint_id=folder / family / "titan", no_dist=True)
        theirs = {k: v.contiguous() for k, v in adapter.to_hf(model.state_dict()).items()}
    save_file({**theirs, "logits": logits}, folder / family / "theirs.safetensors")
    if family in ("llama", "qwen3_moe"):
        state = with_optimizer(model)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            state["optimizer"].step()
        dcp.save({**model.state_dict(), **state}, checkpoint_id=folder / family / "trained", no_dist=True)


def with_optimizer(model: Any) -> dict[str, Any]:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    every = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=dict(lr=0.01))
    config = OptimizersContainer.Config(param_groups=[every], implementation="for-loop")
    return {"optimizer": OptimizersContainer(config, model_parts=[model])}


def same(family: str, *folders: str) -> int:
    """How many values it has of both folders alike, weights and optimizer."""
    import torch.distributed.checkpoint as dcp

    found = []
    for folder in folders:
        model, _ = build(family)
        state = with_optimizer(model)
        weights = model.state_dict()
        dcp.load({**weights, **state}, checkpoint_id=folder, no_dist=True)
        found.append({**weights, **state["optimizer"].state_dict()})
    one, two = found
    assert one.keys() == two.keys()
    assert any(torch.as_tensor(t).abs().sum() for n, t in one.items() if n.endswith("exp_avg"))
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name
    return len(one)


def recorded(family: str) -> dict[str, tuple[list[int], str | None]]:
    model, adapter = build(family)
    state = model.state_dict()
    made = adapter.from_hf({n: filled(n, tuple(t.shape)) for n, t in adapter.to_hf(state).items()})
    return {n: (list(t.shape), digest(made[n]) if n in made else None) for n, t in state.items()}


def main() -> None:
    try:
        import torchtitan.models.common  # noqa: F401
    except ImportError as error:
        sys.exit(f"SKIP {error}")
    if sys.argv[1] == "--record":
        names = {family: recorded(family) for family in CONFIGS}
        text = json.dumps(names).replace('"], "', '"],\n"').replace('null], "', 'null],\n"')
        Path(sys.argv[2]).write_text(text + "\n")
        return
    if sys.argv[1] == "--same":
        print(same(*sys.argv[2:]))
        return
    on_this_processor()
    for family in CONFIGS:
        make(Path(sys.argv[1]), family)


if __name__ == "__main__":
    main()
