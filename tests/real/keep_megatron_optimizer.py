"""What made tests/data/megatron-core-0.16.1-optimizer.tar.xz: `python -m tests.real.keep_megatron_optimizer FILE`.

One state of a run, saved by megatron-core in each of its ways; of the way in which tensors have names, their digests.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from tests.conftest import torchrun

LLAMA: dict[str, Any] = dict(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=2, kv_channels=8,
    normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True, activation_func="silu", layernorm_epsilon=1e-6,
)  # fmt: skip
MODEL = dict(
    vocab_size=32, max_sequence_length=64, position_embedding_type="rope", share_embeddings_and_output_weights=False,
    rotary_base=10000,
)  # fmt: skip
ARGS = dict(
    swiglu=True, untie_embeddings_and_output_weights=True, padded_vocab_size=32, rotary_base=10000,
    position_embedding_type="rope", max_position_embeddings=64,
)  # fmt: skip
EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_router_pre_softmax=False, moe_ffn_hidden_size=8)
SAVED = {  # what is kept -> the same with names
    "bf16-tp2pp2": "bf16", "sharded-tp2": "sharded", "sharded-buckets": "sharded", "experts-buckets": "experts",
}  # fmt: skip
KINDS = ("bf16", "sharded", "experts")
ITER = "iter_0000007"


def job(name: str, optimizer: str, layout: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict(name=name, settings=LLAMA, model=MODEL, args=ARGS, optimizer=optimizer, layout=layout, **more)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a distributed checkpoint, as torch reads them."""
    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {k: torch.empty(d.size, dtype=d.properties.dtype) for k, d in described.items() if hasattr(d, "size")}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        jobs = []
        for kind in ("bf16", "sharded"):
            named, flat = f"{top}/{kind}-named/{ITER}", f"{top}/{kind}-buckets/{ITER}"
            ways = {named: "parameters", flat: "dp_reshardable"} if kind == "sharded" else {named: None}
            jobs.append(job(kind, kind, dict(tp=2), steps=3, buckets=1000, dist=ways, legacy=f"{top}/{kind}-tp2"))
        jobs.append(job("pp", "bf16", dict(tp=2, pp=2), load=f"{top}/bf16-named/{ITER}", legacy=f"{top}/bf16-tp2pp2"))
        named, flat = f"{top}/experts-named/{ITER}", f"{top}/experts-buckets/{ITER}"
        ways, layout = {named: "parameters", flat: "dp_reshardable"}, dict(tp=2, ep=2)
        jobs.append(job("experts", "sharded", layout, shaken=True, buckets=1000, dist=ways))
        jobs[-1] |= dict(settings=LLAMA | EXPERTS, args=ARGS | dict(num_experts=4, expert_tensor_parallel_size=1))
        (top / "jobs.json").write_text(json.dumps(jobs))
        done = torchrun(4, "-m", "tests.real.megatron_optimizer", top / "jobs.json")
        assert done.returncode == 0, done.stderr[-5000:]
        digests = {k: {n: digest(t) for n, t in tensors(top / f"{k}-named/{ITER}").items()} for k in KINDS}
        (top / "digests.json").write_text(json.dumps(digests, indent=0))
        with tarfile.open(out, "w:xz") as archive:
            for name in ("digests.json", *SAVED):
                archive.add(top / name, name, filter=anonymous)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
