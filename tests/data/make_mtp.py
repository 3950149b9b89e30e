"""Makes `tests/data/megatron-core-0.16-mtp/`: a DeepSeek-V3 that predicts one more token, as megatron-core began it.

    PYTHONPATH=. python tests/data/make_mtp.py tests/data

Run once with megatron-core 0.16.1 on a CPU, four ranks: 2 tensor-parallel x 2 stages.
    torch_dist/ saved by `dist_checkpointing.save`
    legacy/     the state dict of each rank's modules, in the folders of Megatron-LM
    logits.pt   its logits of the next token, and of the one after it
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.conftest import torchrun
from tests.test_megatron import IDS

SETTINGS = dict(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=2, kv_channels=4,
    normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True, activation_func="silu", layernorm_epsilon=1e-6,
    multi_latent_attention=True, qk_layernorm=True, q_lora_rank=6, kv_lora_rank=8, qk_head_dim=4, qk_pos_emb_head_dim=4,
    v_head_dim=4, num_moe_experts=2, moe_layer_freq=[0, 1], moe_ffn_hidden_size=8, moe_shared_expert_intermediate_size=8,
    moe_router_topk=1, moe_router_pre_softmax=False, moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True, rope_type="rope", mtp_num_layers=1, init_method_std=0.3,
)  # fmt: skip
MODEL = dict(
    vocab_size=32, max_sequence_length=64, position_embedding_type="rope", share_embeddings_and_output_weights=False,
    rotary_base=10000,
)  # fmt: skip
ARGS = dict(
    swiglu=True, untie_embeddings_and_output_weights=True, padded_vocab_size=32, rotary_base=10000,
    position_embedding_type="rope", max_position_embeddings=64,
)  # fmt: skip


def main() -> None:
    top = Path(sys.argv[1]).absolute() / "megatron-core-0.16-mtp"
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    job = dict(name="mtp", settings=SETTINGS, model=MODEL, args=ARGS, layout=dict(tp=2, pp=2), ids=IDS)
    job |= dict(logits=str(top / "logits.pt"), save=str(top / "torch_dist/iter_0000007"), legacy=str(top / "legacy"))
    jobs = top / "jobs.json"
    jobs.write_text(json.dumps([job]))
    done = torchrun(4, "-m", "tests.real.megatron_core", jobs)
    assert done.returncode == 0, done.stderr[-20_000:]
    jobs.unlink()
    (top / "torch_dist/latest_checkpointed_iteration.txt").write_text("7")


if __name__ == "__main__":
    main()
