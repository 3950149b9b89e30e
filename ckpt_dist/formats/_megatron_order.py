"""The order of Megatron's parameters on each of its model-parallel ranks, where a checkpoint does not say it.

Facts: megatron-core 0.16.1, its GPTModel of its own layers (compared with what it saved) and of Transformer Engine's
(from its source). A distributed checkpoint has whole tensors, `ranks.holds` says what a rank has of them; here is the
order in which its modules, and so the flat buffers of a distributed optimizer, have that.

Invariant: a module whose place is not known is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_dist import megatron, ranks
from ckpt_dist import stages as pipeline
from ckpt_dist.catalog import Entry
from ckpt_dist.errors import UsageError
from ckpt_dist.formats._megatron_optimizer import BUFFER, EXPERT, Unread
from ckpt_dist.ranks import Piecewise, Rank

SPECS = ("te", "local")  # whose norms are parts of the linear layers after them, and whose are not
ORDER = (  # of the modules of a layer
    r"input_layernorm\.", r"self_attention\.core_attention\.", r"self_attention\.linear_proj\.",
    r"self_attention\.linear_q(kv|_proj|_down_proj)\.", r"self_attention\.linear_q_up_proj\.",
    r"self_attention\.linear_kv_down_proj\.", r"self_attention\.linear_kv_up_proj\.", r"self_attention\.q_layernorm\.",
    r"self_attention\.kv?_layernorm\.", r"pre_mlp_layernorm\.", r"mlp\.router\.", r"mlp\.(experts\..*)?linear_fc1\.",
    r"mlp\.(experts\..*)?linear_fc2\.", r"mlp\.shared_experts\.linear_fc1\.", r"mlp\.shared_experts\.linear_fc2\.",
    r"mlp\.shared_experts\.gate",
)  # fmt: skip
LAST = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
ENDS = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight", "", "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias", "output_layer.weight")  # fmt: skip


def layers(entries: Sequence[Entry]) -> tuple[list[Entry], list[tuple[int, int | None]]]:
    """Each layer's tensors as entries of their own, and which entry (and which layer in it) each is."""
    each: list[Entry] = []
    origin: list[tuple[int, int | None]] = []
    for k, entry in enumerate(entries):
        if entry.role != "weight" or BUFFER.search(entry.name):
            continue
        if re.match(r"decoder\.layers\.\D", entry.name):
            for n in range(entry.shape[0]):
                name = entry.name.replace("decoder.layers.", f"decoder.layers.{n}.", 1)
                each.append(replace(entry, name=name, shape=entry.shape[1:]))
                origin.append((k, n))
        else:
            each.append(entry)
            origin.append((k, None))
    return each, origin


def _key(spec: str, name: str) -> tuple[int, int, int, int, int]:
    """The place of a parameter in the order of its model's modules."""
    layer = ranks.LAYER.fullmatch(name)
    if layer is None:
        if name not in ENDS:
            raise Unread(f"{name!r} is of a module whose place in the order of Megatron's modules is not known.")
        return ENDS.index(name), 0, 0, 0, 0
    place = next((k for k, rule in enumerate(ORDER) if re.match(rule, layer[3])), None)
    end = layer[3].rpartition(".")[2]
    expert = re.search(r"local_experts\.(\d+)\.|\.(?:weight|bias)(\d+)$", layer[3])
    number = int(expert[1] or expert[2]) if expert else 0
    if place is None:
        raise Unread(f"{name!r} is of a module whose place in the order of Megatron's modules is not known.")
    one_by_one = spec == "local" and expert is not None  # both matrices of an expert before those of the next
    kind = LAST.index(re.sub(r"\d+$", "", end)) if re.sub(r"\d+$", "", end) in LAST else 0
    first = next(k for k, rule in enumerate(ORDER) if rule.startswith(r"mlp\.(experts"))
    return 2, int(layer[2]), first if one_by_one else place, number, place * len(LAST) + kind


def _params(each: Sequence[Entry], rank: Rank, stages: Sequence[int], spec: str) -> list[list[Piecewise]]:
    """Each virtual chunk's parameters in the order of its modules."""
    chunks: dict[str, list[Piecewise]] = {}
    for one in ranks.holds(each, rank, stages, spec):
        chunks.setdefault(one.path[0], []).append(one)
    order = sorted(chunks, key=lambda k: (len(k), k))
    return [sorted(chunks[k], key=lambda one: _key(spec, one.path[1])) for k in order]


def _stages(layers: int, args: Mapping[str, Any]) -> list[int]:
    """Layers of each stage, virtual chunk by chunk."""
    pp, vpp = (max(megatron.count(args, f"{k}pipeline_model_parallel_size"), 1) for k in ("", "virtual_"))
    keys = [f"decoder_{k}_pipeline_num_layers" for k in ("first", "last")]
    ends = [None if args.get(key) is None else megatron.count(args, key) for key in keys]
    odd = [k for k in ("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
           if args.get(k)]  # fmt: skip
    rest = layers - sum(n or 0 for n in ends)
    middle = pp - sum(n is not None for n in ends)
    if odd or pp * vpp > pipeline.MOST or (any(ends) and (vpp > 1 or middle < 1)) or rest % max(middle * vpp, 1):
        raise Unread(
            f"{layers} layers in {pp} stages of {vpp} chunks, {', '.join(odd) or ends}: such stages are not known."
        )
    each = [rest // (middle * vpp)] * middle
    each = [*([ends[0]] if ends[0] is not None else []), *each, *([ends[1]] if ends[1] is not None else [])]
    return each * vpp


def holders(
    args: Mapping[str, Any], count: int, each: Sequence[Entry], spec: str
) -> Iterator[tuple[Rank, int, list[list[Piecewise]]]]:
    """Each model-parallel rank of each of `count` optimizers with its parameters, virtual chunk by chunk; the second
    optimizer is that of experts, whose ranks are others."""
    tp, ep = (max(megatron.count(args, f"{k}_model_parallel_size"), 1) for k in ("tensor", "expert"))
    etp = megatron.count(args, "expert_tensor_parallel_size") or tp  # as its training code has it
    num_layers = 1 + max((int(m[2]) for e in each if (m := ranks.LAYER.fullmatch(e.name))), default=-1)
    stages = _stages(num_layers, args)
    pp = len(stages) // max(megatron.count(args, "virtual_pipeline_model_parallel_size"), 1)
    if count > 2 or (count == 1 and ep > 1):
        raise Unread(f"they are of {count} optimizers of {ep} expert-parallel ranks")
    for optimizer, (t, e) in enumerate([(tp, 1), (etp, ep)][:count]):
        for rank in (Rank(a, p, b, t, pp, e) for p in range(pp) for b in range(e) for a in range(t)):
            try:
                params = _params(each, rank, stages, spec)
            except UsageError:  # which speaks of a target
                raise Unread(
                    f"by args {t} tensor- and {e} expert-parallel ranks share its tensors, which they cannot evenly"
                ) from None
            if count > 1:
                params = [[o for o in c if bool(EXPERT.search(o.path[1])) == (optimizer == 1)] for c in params]
            yield rank, optimizer, [c for c in params if c]
