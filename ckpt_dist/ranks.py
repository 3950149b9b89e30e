"""What each of Megatron's model-parallel ranks holds: its tensors as boxes of whole ones, and back.

    held     a rank's tensors -> parts of whole tensors, under the names of distributed checkpoints
    holds    whole tensors -> what a rank's modules call their parts, and where these lie

Layers are counted over all stages, experts of a layer are one tensor, and all gates lie before all that they gate.

Invariant: how a rank's tensor lies in the whole is said once (`Cut`, `DIVIDED`); integers and names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_dist import megatron
from ckpt_dist.catalog import Entry
from ckpt_dist.errors import CheckpointError, UsageError
from ckpt_dist.files.inert import TensorRef, strides_of

EXPERTS = "mlp.experts.experts."
DIVIDED = (  # the dim that tensor-parallel ranks divide, by the end of a name
    (r"word_embeddings\.weight", 0),
    (r"output_layer\.(weight|bias)", 0),
    (r"linear_qkv\.(weight|bias)", 0),
    (r"linear_(q|q_up|kv_up|q_down|kv_down)_proj\.weight", 0),
    (r"cross_attention\.linear_(q|kv)\.(weight|bias)", 0),
    (r"core_attention\.softmax_offset", 0),
    (r"linear_fc1\.(weight|bias)", 0),
    (r"eh_proj\.weight", 0),
    (r"(linear_proj|linear_fc2)\.weight", 1),
)
ALIKE = re.compile(  # what each of them has whole; of other names nothing is known but what the ranks hold
    r"(.+\.)?((\w+_)?layernorm\.|layer_norm_|final_norm\.|[eh]norm\.|word_embeddings\.norm\.)(weight|bias)"
    r"|embedding\.(position|tokentype)_embeddings\.weight|(.+\.)?(linear_proj|linear_fc2)\.bias"
    r"|(.+\.)?mlp\.(router\.(weight|bias|expert_bias)|shared_experts\.gate_weight)"
)
LAYER = re.compile(r"(decoder\.layers\.(\d{1,9})\.)(.*)")
FURTHEST = re.compile(r"(mtp\.layers\.(\d{1,9})\.)(.*)")
FURTHER = "mtp."  # of layers that predict further tokens, which are behind all others: ranks number them alike
INSIDE = re.compile(r"((?:encoder|decoder|mtp)\.layers\.(\d{1,9})\.(?:transformer_layer\.)?)(.*)")
LOCAL = re.compile(r"mlp\.experts\.local_experts\.(\d{1,9})\.(linear_fc[12])\.(weight|bias)")
TOGETHER = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d{1,9})")
MATRIX = re.compile(r"(^|\.)(linear_\w+|word_embeddings|output_layer)\.weight\d*$|mlp\.experts\.weight[12]$")
GROUPED = re.compile(r"mlp\.experts\.weight([12])")

Piece = tuple[
    list[int], list[int], int, Sequence[int]
]  # a box of the whole; where it begins in the rank's tensor, strides


@dataclass(frozen=True)
class Rank:
    """One of `tp` x `pp` x `ep` ranks: `t`, `p` and `e` count from 0. What all have alike is read from the one of number
    `replica`, of `tp` x `ep`."""

    t: int
    p: int
    e: int
    tp: int
    pp: int
    ep: int
    replica: int = 0

    @property
    def chosen(self) -> bool:
        """Whether what all have alike is read from this one."""
        return self.t + self.tp * self.e == self.replica


def unshared(parts: int, dim: int, name: str, shape: Sequence[int]) -> str:
    """What to say of a tensor that so many ranks cannot share: only a vocabulary can be made longer."""
    more = ", or a longer vocabulary with target.vocab_size" if re.search("embedding|output", name) else ""
    return (
        f"target.tp={parts}: dim {dim} of {name!r} has length {shape[dim]}, which {parts} ranks cannot share evenly. Choose "
        f"another target.tp{more}."
    )


@dataclass(frozen=True)
class Cut:
    """How a rank's tensor lies in the whole: `dim` is divided by `parts`; of `fused` tensors in one each for itself."""

    dim: int | None = None
    parts: int = 1
    fused: int = 1

    def checked(self, name: str, ref: TensorRef) -> Cut:
        """Itself, for a tensor of a rank that can be a part of this kind."""
        if self.dim is not None and (self.dim >= len(ref.shape) or ref.shape[self.dim] % self.fused):
            parts = f"{self.fused} parts along " if self.fused > 1 else ""
            raise CheckpointError(
                f"{name!r} has the shape {list(ref.shape)}; a tensor of this name has {parts}dim {self.dim}, which ranks divide. "
                "It is damaged, or of another model."
            )
        return self

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(n * self.parts if d == self.dim else n for d, n in enumerate(shape))

    def part(self, shape: Sequence[int], name: str) -> tuple[int, ...]:
        if self.dim is not None and shape[self.dim] % (self.parts * self.fused):
            raise UsageError(unshared(self.parts, self.dim, name, shape))
        return tuple(n // self.parts if d == self.dim else n for d, n in enumerate(shape))

    def pieces(self, shape: Sequence[int], strides: Sequence[int], rank: int) -> Iterator[Piece]:
        """The boxes of the whole that a rank's tensor of this shape holds."""
        for k in range(self.fused):
            start, stop, at = [0] * len(shape), list(shape), 0
            if self.dim is not None:
                length = shape[self.dim] // self.fused
                start[self.dim] = k * length * self.parts + rank * length
                stop[self.dim] = start[self.dim] + length
                at = k * length * strides[self.dim]
            yield start, stop, at, list(strides)


def of_expert(x: int, pieces: Iterator[Piece]) -> list[Piece]:
    """The same boxes in the tensor of all experts."""
    return [([x, *lo], [x + 1, *hi], at, [0, *strides]) for lo, hi, at, strides in pieces]


def known(name: str) -> bool:
    """Whether a name says how ranks hold the tensor: of `mixer.in_proj.weight` nobody knows."""
    return divided(name) is not None or ALIKE.fullmatch(name) is not None


def divided(inner: str) -> int | None:
    """The dim that ranks divide: of `self_attention.linear_proj.weight` 1."""
    if "layer_norm" in inner:
        return None
    return next((d for end, d in DIVIDED if re.search(rf"(^|\.){end}$", inner)), None)


# ---- from ranks to the whole


@dataclass(frozen=True)
class Part:
    """A tensor of one rank: which whole one it is part of, the dtype and shape of that, and the boxes of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece]
    ref: TensorRef
    alike: bool = False  # each rank has all of it


def held(
    tensors: Mapping[str, TensorRef], rank: Rank, first: int, args: Mapping[str, Any], version: float
) -> Iterator[Part]:
    """What a rank's tensors are. Those that all ranks have alike are taken from the first."""
    for name, ref in tensors.items():
        need = 2 if MATRIX.search(name) else 1 if divided(name) is not None else 0
        if len(ref.shape) < need:
            raise CheckpointError(
                f"{name} has shape {list(ref.shape)}; it should have {need} dims. Is it of another tool?"
            )
    for name, ref in tensors.items():
        layer = INSIDE.fullmatch(name)
        own, inner = (layer[1], layer[3]) if layer else ("", name)
        whole = f"decoder.layers.{first + int(layer[2])}." if layer and own.startswith("decoder.") else own
        if LOCAL.fullmatch(inner) or TOGETHER.fullmatch(inner):
            yield from _expert(whole, own, inner, ref, tensors, rank)
        elif GROUPED.fullmatch(inner):
            yield _grouped(whole, own, inner, ref, tensors, rank, args)
        else:
            cut = _cut(inner, ref, _next(tensors, name), rank, _latent(tensors, name, args)).checked(name, ref)
            if rank.e if cut.dim is not None else not rank.chosen:
                continue
            pieces = list(cut.pieces(ref.shape, ref.stride, rank.t))
            if "linear_qkv." in inner and version < 2 and cut.dim is not None:
                pieces = list(_old_qkv(ref, args, version, rank))
            yield Part(
                whole + _stored(own, inner, tensors), ref.dtype, cut.whole(ref.shape), pieces, ref, cut.dim is None
            )


def _stored(own: str, inner: str, tensors: Mapping[str, TensorRef]) -> str:
    """A name inside a layer as distributed checkpoints have it: norms belong to the linear layer after them."""
    if own + "self_attention.linear_kv_up_proj.weight" in tensors:
        return inner
    inner = re.sub(r"^input_layernorm\.", "self_attention.linear_qkv.layer_norm_", inner)
    if own + "mlp.linear_fc2.weight" in tensors:
        inner = re.sub(r"^pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", inner)
    return inner


def _next(tensors: Mapping[str, TensorRef], name: str) -> TensorRef | None:
    """The weight that comes after a feed-forward's first."""
    return tensors.get(name.replace("linear_fc1", "linear_fc2").replace("bias", "weight"))


def _latent(tensors: Mapping[str, TensorRef], name: str, args: Mapping[str, Any]) -> int:
    """The width of the latent that a down projection makes, by the up projection after it or by args."""
    up = tensors.get(name.replace("_down_proj", "_up_proj"))
    return (
        up.shape[1]
        if up is not None and up is not tensors[name]
        else megatron.count(args, "q_lora_rank" if "_q_" in name else "kv_lora_rank")
    )


def _cut(inner: str, ref: TensorRef, fc2: TensorRef | None, rank: Rank, latent: int = 0) -> Cut:
    """How ranks divide a tensor; a feed-forward with a gate has twice as many rows as what follows has columns."""
    dim = divided(inner)
    if "_down_proj" in inner and ref.shape[0] >= latent:  # Transformer Engine gives each rank all of it
        dim = None
    gated = "linear_fc1" in inner and fc2 is not None and ref.shape[0] == 2 * fc2.shape[1]
    return Cut(dim, rank.tp, 2 if gated else 1) if dim is not None else Cut()


def _expert(
    whole: str, own: str, inner: str, ref: TensorRef, tensors: Mapping[str, TensorRef], rank: Rank
) -> Iterator[Part]:
    """One expert's tensor is a slice of that of all experts."""
    if hit := LOCAL.fullmatch(inner):
        number, linear, kind = hit.groups()
    else:
        linear, kind, number = TOGETHER.fullmatch(inner).groups()  # type: ignore[union-attr]
    found = (m[1] if (m := LOCAL.fullmatch(n)) else m[3] if (m := TOGETHER.fullmatch(n)) else None
             for n in (n[len(own) :] for n in tensors if n.startswith(own)))  # fmt: skip
    local = 1 + max(int(k) for k in found if k is not None)
    name = f"{EXPERTS}{linear}.{kind}"
    cut = _cut(name, ref, _next(tensors, own + inner), rank)
    if cut.dim is not None or rank.t == rank.replica % rank.tp:
        pieces = of_expert(rank.e * local + int(number), cut.pieces(ref.shape, ref.stride, rank.t))
        shape = (local * rank.ep, *cut.whole(ref.shape))
        yield Part(whole + name, ref.dtype, shape, pieces, ref, cut.dim is None)


def _grouped(
    whole: str,
    own: str,
    inner: str,
    ref: TensorRef,
    tensors: Mapping[str, TensorRef],
    rank: Rank,
    args: Mapping[str, Any],
) -> Part:
    """Experts in one tensor: each one's slice of `weight1` and `weight2`, read row by row, is its matrix with columns first."""
    experts = megatron.count(args, "num_experts") or megatron.count(args, "num_moe_experts")
    one, two = (tensors.get(own + f"mlp.experts.weight{k}") for k in "12")
    if not experts or one is None or two is None:
        raise CheckpointError(
            f"{own}{inner} holds several experts; how many is in args (num_experts), which do not say it."
        )
    local, width = experts // rank.ep, one.shape[0]
    if experts % rank.ep or two.shape[0] % local:
        raise CheckpointError(
            f"{own}{inner} holds {two.shape[0]} rows for {experts} experts on {rank.ep} ranks, which do not divide evenly. "
            "Are the args of another model?"
        )
    inside = two.shape[0] // local
    gated = inner.endswith("1") and one.shape[1] == 2 * inside * local
    rows = (2 if gated else 1) * inside
    cut = Cut(0 if inner.endswith("1") else 1, rank.tp, 2 if gated else 1)
    matrix, strides = ((rows, width), (1, rows)) if inner.endswith("1") else ((width, inside), (1, width))
    pieces = []
    for k in range(local):
        for lo, hi, at, steps in of_expert(rank.e * local + k, cut.pieces(matrix, strides, rank.t)):
            pieces.append((lo, hi, at + k * matrix[0] * matrix[1], steps))
    return Part(f"{whole}{EXPERTS}linear_fc{inner[-1]}.weight", ref.dtype, (experts, *cut.whole(matrix)), pieces, ref)


def _old_qkv(ref: TensorRef, args: Mapping[str, Any], version: float, rank: Rank) -> Iterator[Piece]:
    """Rows of the fused QKV before version 2: q, k, v of all heads (0), or element by element (1)."""
    count, groups, width = megatron.heads(args) if megatron.is_args(args) else (0, 0, 0)
    if not count or count != groups or ref.shape[0] * rank.tp != 3 * count * width:
        raise CheckpointError(
            f"The fused QKV of checkpoint version {version:g} has {ref.shape[0]} rows in each of {rank.tp} ranks; args say "
            f"{count} heads of {width} in {groups} groups, which do not fit. Is args that of another model?"
        )
    heads, (row, *more) = count // rank.tp, ref.stride
    zeros, rest = [0] * len(more), list(ref.shape[1:])
    for head in range(heads):
        for k in range(3):
            lo = ((rank.t * heads + head) * 3 + k) * width
            at = (k * heads + head) * width if version < 1 else head * width * 3 + k
            yield [lo, *zeros], [lo + width, *rest], at * row, [row if version < 1 else 3 * row, *more]


# ---- from the whole to ranks


@dataclass(frozen=True)
class Piecewise:
    """A tensor of one rank that is to be made: the path in its dict, of which entry it is a part, and where that lies."""

    path: tuple[str, ...]
    entry: int
    shape: tuple[int, ...]
    pieces: list[Piece]


def holds(entries: Sequence[Entry], rank: Rank, stages: Sequence[int], spec: str) -> Iterator[Piecewise]:
    """All tensors of one rank. `stages`: layers of each stage, virtual chunk by chunk; `spec`: te or local modules."""
    chunks = len(stages) // rank.pp
    shapes = {x.name: x.shape for x in entries}
    further, last = any(n.startswith(FURTHER) for n in shapes), len(stages) - 1
    normed = max((k for k, count in enumerate(stages) if count), default=last) if further else last
    for chunk in range(chunks):
        key = "model" if chunks == 1 else f"model{chunk}"
        stage = chunk * rank.pp + rank.p
        lo = sum(stages[:stage])
        for number, entry in enumerate(entries):
            layer = INSIDE.fullmatch(entry.name)
            behind = entry.name.startswith(FURTHER)
            if layer and (stage == last if behind else lo <= int(layer[2]) < lo + stages[stage]):
                cut = _target_cut(layer[3], entry, shapes, rank, spec)
                prefix = layer[1] if behind else f"decoder.layers.{int(layer[2]) - lo}."
                if layer[3].startswith(EXPERTS):
                    yield from _experts(key, prefix, layer[3], number, entry, cut, rank, spec)
                else:
                    yield _one((key, prefix + _in_module(layer[3], spec)), number, entry, cut, rank)
            elif not layer:
                end = normed if entry.name.startswith("decoder.") else last
                for name in _ends(entry.name, stage == 0, stage == end, "output_layer.weight" not in shapes, further):
                    yield _one((key, name), number, entry, _target_cut(name, entry, shapes, rank, spec), rank)


def _ends(name: str, first: bool, last: bool, tied: bool, further: bool) -> list[str]:
    """What the first and the last stage call a tensor that is of no layer; tied, the embedding is on both.

    A layer that predicts further tokens embeds them too, on the last stage.
    """
    if name.startswith("embedding."):
        copy = tied and last and name.endswith("word_embeddings.weight")
        return [name] if first or (last and further) else ["output_layer.weight"] if copy else []
    return [name] if last else []


def _target_cut(inner: str, entry: Entry, shapes: Mapping[str, tuple[int, ...]], rank: Rank, spec: str) -> Cut:
    dim = None if "_down_proj" in inner and spec == "te" else divided(inner)
    fc2 = shapes.get(entry.name.replace("linear_fc1", "linear_fc2").replace(".bias", ".weight"))
    rows = entry.shape[-1 if inner.endswith("bias") else -2] if len(entry.shape) > 1 else entry.shape[0]
    gated = "linear_fc1" in inner and fc2 is not None and rows == 2 * fc2[-1]
    return Cut(dim, rank.tp, 2 if gated else 1) if dim is not None else Cut()


def _in_module(inner: str, spec: str) -> str:
    """A name inside a layer as the modules call it; Megatron's own layers have norms of their own."""
    if spec == "local":
        inner = inner.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        inner = inner.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        inner = re.sub(r"linear_(q|kv)_up_proj\.layer_norm_", r"\1_layernorm.", inner)
    return inner


def _one(path: tuple[str, str], number: int, entry: Entry, cut: Cut, rank: Rank) -> Piecewise:
    shape = cut.part(entry.shape, entry.name)
    return Piecewise(path, number, shape, list(cut.pieces(shape, strides_of(shape), rank.t)))


def _experts(
    key: str, layer: str, inner: str, number: int, entry: Entry, cut: Cut, rank: Rank, spec: str
) -> Iterator[Piecewise]:
    """Each expert of this rank as a tensor of its own."""
    local, odd = divmod(entry.shape[0], rank.ep)
    if odd:
        raise UsageError(
            f"target.ep={rank.ep}: {entry.shape[0]} experts cannot be divided evenly. Choose another target.ep."
        )
    linear, kind = inner[len(EXPERTS) :].split(".")
    shape = cut.part(entry.shape[1:], entry.name)
    for k in range(local):
        name = f"local_experts.{k}.{linear}.{kind}" if spec == "local" else f"{linear}.{kind}{k}"
        pieces = of_expert(rank.e * local + k, cut.pieces(shape, strides_of(shape), rank.t))
        yield Piecewise((key, f"{layer}mlp.experts.{name}"), number, shape, pieces)
