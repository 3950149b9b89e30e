"""Which files a DeepSpeed checkpoint has, by their names: of the model, its layers and experts, and the optimizer's shards.

    mp_rank_00_model_states.pt                            stages 0 to 2; mp_rank_KK of stage KK of a pipeline
    zero_pp_rank_R_mp_rank_00_model_states.pt             stage 3: one for each data-parallel rank R
    [bf16_]zero_pp_rank_R_mp_rank_KK_optim_states.pt      the optimizer's
    layer_NN-model_states.pt                              of a pipeline: one for each item of its list of layers
    [layer_L_]expert_E_mp_rank_00_model_states.pt         one for each expert

Invariant: a rank's number is compared, never counted up to: what is missing is listed, and nodes are asked for it first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice

from ckpt_dist.errors import CheckpointError
from ckpt_dist.formats._table import File, Folder

MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
LAYER = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_\d+_model_states\.pt")
SHOWN = 5


Named = tuple[int, str]  # the number of a data-parallel rank, its file


@dataclass(frozen=True)
class Files:
    """Names of files; of the optimizer with their ranks, which only who reads them has to have all of."""

    models: list[str]
    optims: list[Named]
    experts: list[str]

    @property
    def third(self) -> bool:
        """Of stage 3, where each rank has a file of the model."""
        return self.models[0].startswith("zero_pp_rank")


def files(folder: Folder) -> Files:
    """Those of a run without model-parallel ranks; what is not read is refused by name."""
    names = folder.names
    _refuse(folder, names)
    models = [(int(m[1] or -1), m[0]) for n in names if (m := MODEL.fullmatch(n))]
    optims = [(int(m[1]), m[0]) for n in names if (m := OPTIM.fullmatch(n))]
    if not models:
        raise folder.lacks(
            f"{folder.path} holds {min(optims)[1]} and no file of the model (mp_rank_00_model_states.pt). Fetch it."
        )
    if len({rank < 0 for rank, _ in models}) > 1:
        raise CheckpointError(
            f"{folder.path} mixes {min(models)[1]} and {max(models)[1]}: files of ZeRO stage 3 and of another stage. Move those "
            "of one away."
        )
    whole = [models[0][1]] if models[0][0] < 0 else of_ranks(folder, models)
    return Files(whole, optims, [n for n in names if EXPERT.fullmatch(n)])


def of_ranks(folder: Folder, found: Iterable[Named], least: int = 0) -> list[str]:
    """The files of ranks 0, 1, ... in order, as many as the last one says, and at least so many."""
    each: dict[int, str] = {}
    for rank, name in sorted(found):
        if rank in each:
            raise CheckpointError(
                f"{folder.path} holds two files of one rank: {each[rank]} and {name}. Move one run's away."
            )
        each[rank] = name
    many = max(least, 1 + max(each, default=-1)) - len(each)
    if many > 0 and each:
        lost = list(islice((r for r in count() if r not in each), min(many, SHOWN)))
        like = next(iter(each.values()))
        wanted = ", ".join(re.sub(r"pp_rank_\d+", f"pp_rank_{r}", like) for r in lost)
        more = f" and {many - len(lost)} more" if many > len(lost) else ""
        which = f"shards of ranks {', '.join(map(str, lost))}{more} are" if many > 1 else f"shard of rank {lost[0]} is"
        again = "Fetch them again." if many > 1 else "Fetch it again."
        raise folder.lacks(f"{folder.path}: the {which} missing ({wanted}). {again}")
    return list(each.values())


def all_of(folder: Folder, main: File, optims: Sequence[Named]) -> list[str]:
    """The optimizer's files, as many as the model's file says that there were ranks."""
    said = main.tree.get("dp_world_size")
    return of_ranks(folder, optims, said if type(said) is int else 0)


def models(folder: Folder) -> list[str]:
    """The files of the model in a universal checkpoint: one that says all, or those of all ranks of stage 3."""
    found = sorted((int(m[1] or -1), m[0]) for n in folder.names if (m := MODEL.fullmatch(n)))
    if not found:
        raise CheckpointError(f"{folder.path} holds no file of the model (mp_rank_00_model_states.pt). Fetch it.")
    return [n for rank, n in found if rank >= 0] if found[0][0] >= 0 else [found[0][1]]


def layers(folder: Folder) -> dict[int, str]:
    """The files of a pipeline's layers, by their place in its list of layers, if it is one."""
    found = sorted((int(m[1]), int(m[2] or 0), m[0]) for n in folder.names if (m := LAYER.fullmatch(n)))
    if more := [name for _, t, name in found if t]:
        raise CheckpointError(
            f"{folder.path} is of several tensor-parallel ranks ({more[0]}), and the files do not say along which dims tensors "
            "are divided. Those of Megatron-DeepSpeed are read with source.format=megatron_deepspeed."
        )
    return {number: name for number, _, name in found}


def stages(folder: Folder) -> tuple[list[str], list[list[Named]]]:
    """Of each stage of a pipeline the file of the model (without weights) and those of the optimizer, by rank."""
    names = folder.names
    mains = {int(m[2]): m[0] for n in names if (m := MODEL.fullmatch(n))}
    held: dict[int, list[Named]] = {}
    for hit in filter(None, map(OPTIM.fullmatch, names)):
        held.setdefault(int(hit[2]), []).append((int(hit[1]), hit[0]))
    wanted = 1 + max([*mains, *held, 0])
    if len(mains) < wanted:
        lost = next(k for k in count() if k not in mains)
        raise folder.lacks(
            f"{folder.path} is a pipeline's checkpoint and lacks mp_rank_{lost:02d}_model_states.pt: {len(mains)} of {wanted} such "
            "files are there. Fetch it again."
        )
    if held and len(held) < wanted:
        lost = next(k for k in count() if k not in held)
        raise folder.lacks(
            f"{folder.path} lacks the optimizer's files of stage {lost} (*_mp_rank_{lost:02d}_optim_states.pt)."
        )
    return [mains[k] for k in range(wanted)], [held[k] for k in range(wanted)] if held else []


def all_experts(folder: Folder, main: File, names: Collection[str]) -> None:
    """The experts of each layer are there, as many as the model's file says, or without a gap."""
    found: dict[str | None, set[int]] = {}
    for name in names:
        layer, expert = EXPERT.fullmatch(name).groups()  # type: ignore[union-attr]
        found.setdefault(layer, set()).add(int(expert))
    said = main.tree.get("num_experts")
    counts = said if isinstance(said, (list, tuple)) and len(said) == len(found) else [0] * len(found)
    for (layer, there), many in zip(sorted(found.items(), key=lambda row: int(row[0] or 0)), counts, strict=True):
        lost = next(n for n in count() if n not in there)
        if lost < max(there) or (type(many) is int and lost < many):
            raise folder.lacks(f"{folder.path}: expert {lost} of layer {layer or 0} is missing. Fetch its file.")


def _refuse(folder: Folder, names: Sequence[str]) -> None:
    """Checkpoints of which the names of files say already that they are not read."""
    found = sorted({m[2] for n in names if (m := MODEL.fullmatch(n) or OPTIM.fullmatch(n))})
    if len(found) > 1:
        raise folder.lacks(
            f"{folder.path} is of {len(found)} model-parallel ranks (mp_rank_{found[0]} to {found[-1]}); the files do not say along "
            "which dims tensors are divided. Make it universal with DeepSpeed's ds_to_universal, which is read."
        )
