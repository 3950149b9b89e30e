"""Records of a pickle side by side, as integer arrays: what the `.metadata` of torch.distributed.checkpoint is nearly all of.

A record is an object whose state is a dict of integers, sizes, short texts and references (memo numbers) to sizes and
texts that came before. Records begin with the same six bytes; the first token of all of them is read at once, then the
second, ...; those with the same tokens are of one `Shape`.

Invariant: what is not understood has no shape; nothing is cut out of the stream here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import Ints

Bytes: TypeAlias = "NDArray[np.uint8]"
Words: TypeAlias = "NDArray[np.uint64]"
HEAD = b")\x81\x94}\x94("  # EMPTY_TUPLE NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK: an object, and its state begins
BLOCK = 1 << 16  # records read side by side
LONGEST = 64  # tokens of a record
SHAPES = 1000  # of a stream; torch needs about twenty
PAD = 512  # zeros after the stream, more than a token can reach past its end
FRAME = 0x95


class Unknown(ValueError):
    """Not a stream that this file knows."""


def _table(kind: Any, entries: dict[str, int]) -> Any:
    table = np.zeros(256, kind)
    for op, value in entries.items():
        table[ord(op)] = value
    return table


# Tokens as letters: g reference, i integer, t text, m memoize, N None, 1 2 3 T tuples, R call, ( ) u b as in pickle.
LETTERS = ".gitmN123TR()ub"
OPS = {"h": "g", "j": "g", "K": "i", "M": "i", "J": "i", "\x8a": "i", "\x8c": "t", "\x94": "m"}
OPS |= {"N": "N", "\x85": "1", "\x86": "2", "\x87": "3", "t": "T", "R": "R"} | {c: c for c in "()ub"}
CODE = _table(np.uint8, {op: LETTERS.index(letter) for op, letter in OPS.items()})  # four bits; 0 is none of them
END, GET = LETTERS.index("b"), LETTERS.index("g")
ARGUMENT = {"h": 1, "j": 4, "K": 1, "M": 2, "J": 4, "\x8a": 1, "\x8c": 1}  # bytes after the opcode
LENGTH = _table(np.int64, dict.fromkeys(OPS, 1) | {op: 1 + n for op, n in ARGUMENT.items()})
MASK = _table(np.uint64, {op: (1 << 8 * n) - 1 for op, n in ARGUMENT.items()})
COUNTED = _table(np.bool_, {"\x8a": 1, "\x8c": 1})  # the argument says how many bytes follow

SIZE = re.compile(r"g(?:i1|ii2|iii3|\(i*T|\))m1mRm")  # torch.Size((...)); a tuple of fewer would leave the rest behind
PLAIN = re.compile(r"tm|i|N|g")


@dataclass(frozen=True)
class Field:
    """One field of a shape: what it is, and which of the values are its own; `memo` is its number in its record."""

    kind: str  # size, text, int, none or get
    key: int
    first: int
    last: int
    memo: int = -1


@dataclass
class Shape:
    """All records of the same tokens; `values[k]` is the k-th integer, text or reference of each, from token `steps[k]`."""

    fields: tuple[Field, ...]
    memos: int
    steps: tuple[int, ...]
    values: list[Any]
    lanes: list[Ints] = field(default_factory=list)


def parse(letters: str) -> Shape | None:
    """`giggi)m1mRmub`... as fields, or None if it is none of ours."""
    fields, at, memos, valued = [], 0, 2, 0  # the object and its state
    while letters[at : at + 1] == "g":
        size = SIZE.match(letters, at + 1)
        plain = size or PLAIN.match(letters, at + 1)
        if plain is None:
            return None
        token, key, first = plain.group(), valued, valued + 1
        kind = "size" if size else {"tm": "text", "i": "int", "N": "none", "g": "get"}[token]
        first += kind == "size"  # the class
        last = first + (token.count("i") if size else kind != "none")
        memo = memos + 2 if size and token[1] != ")" else memos + 1 if size else memos if kind == "text" else -1
        fields.append(Field(kind, key, first, last, memo))
        valued, memos, at = last, memos + token.count("m"), plain.end()
    steps = tuple(k for k, letter in enumerate(letters) if letter in "git")
    return Shape(tuple(fields), memos, steps, [[] for _ in steps]) if letters[at:] == "ub" and fields else None


def unframed(data: bytes) -> bytes:
    """The stream without its frames, which say nothing; zeros follow it."""
    view, at, parts = memoryview(data), 2, [memoryview(data)[:2]]
    if data[:1] != b"\x80" or data[1] not in (4, 5):
        raise Unknown
    while at < len(data) and data[at] == FRAME:
        length = int.from_bytes(data[at + 1 : at + 9], "little")
        parts.append(view[at + 9 : at + 9 + length])
        at += 9 + length
    if at != len(data):
        raise Unknown
    return b"".join([*parts, bytes(PAD)])


class Stream:
    """Bytes, and at each position the eight bytes from there on."""

    def __init__(self, data: bytes) -> None:
        self.data, self.last = data, len(data) - PAD
        self.words: Words = np.ndarray((len(data) - 8,), "<u8", data, strides=(1,))

    def heads(self) -> Ints:
        """Where a record's state may begin."""
        found = []
        for low in range(0, self.last, 1 << 22):
            part = np.frombuffer(self.data, np.uint8, min(1 << 22, self.last - low), low)
            at = np.flatnonzero(part == HEAD[0]) + low
            found.append(at[(self.words[at] & np.uint64((1 << 48) - 1)) == np.uint64(int.from_bytes(HEAD, "little"))])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def tokens(self, at: Ints) -> tuple[Bytes, Ints | None, Ints]:
        """(code, value, where the next token is) at each position; the value of a text is 256 x position + length.

        There are no values if no token has one.
        """
        word = self.words[at]
        op = np.ascontiguousarray(word.view(np.uint8)[::8])
        kind: Any = op[:1] if (op == op[:1]).all() else op  # nearly always they are all the same
        code, after = np.broadcast_to(CODE[kind], op.shape), at + LENGTH[kind]
        if not MASK[kind].any():
            return code, None, np.minimum(after, self.last)
        value = ((word >> np.uint64(8)) & MASK[kind]).view(np.int64)
        if (signed := kind == 0x4A).any():  # BININT
            value = np.where(signed, value.astype(np.int32), value)
        if COUNTED[kind].any():
            counted = np.flatnonzero(COUNTED[op])
            count, text = value[counted], op[counted] == 0x8C
            if (~text & (count > 8)).any():
                raise Unknown
            shift = np.where(text | (count < 1), 0, 64 - 8 * count)
            number = (self.words[np.minimum(at[counted] + 2, self.last)].view(np.int64) << shift) >> shift
            number[count < 1] = 0  # of no bytes
            value[counted] = np.where(text, (at[counted] + 2) * 256 + count, number)
            after[counted] += count
        return code, value, np.minimum(after, self.last)


@dataclass
class Records:
    """Records in the order of the stream. `shape` is -1 where one is not understood; `row` is its row in its shape.

    `kind` is the memo number of its class if it begins where the one before ends, else -1.
    """

    head: Ints
    end: Ints
    shape: Ints
    row: Ints
    kind: Ints
    shapes: list[Shape]


def records_of(stream: Stream) -> Records:
    """All records of a stream, in its order."""
    head = stream.heads()
    found = Records(head, np.zeros_like(head), np.full(len(head), -1), np.zeros_like(head), np.full(len(head), -1), [])
    known: dict[bytes, int] = {}
    for low in range(0, len(head), BLOCK):
        for odd in (0, 1):  # keys and values of a dict take turns
            _block(stream, np.arange(low + odd, min(low + BLOCK, len(head)), 2), found, known)
    for shape in found.shapes:
        order = np.argsort(np.concatenate(shape.lanes), kind="stable")
        shape.values = [np.concatenate(v)[order] for v in shape.values]
        found.row[np.concatenate(shape.lanes)[order]] = np.arange(len(order))
    if len(head):
        code, number, after = stream.tokens(found.end[:-1])
        follows = (found.shape[:-1] >= 0) & (code == GET) & (after == head[1:])
        if number is not None:
            found.kind[1:][follows] = number[follows]
    return found


def _block(stream: Stream, lanes: Ints, found: Records, known: dict[bytes, int]) -> None:
    """Read some records side by side: `spelt` packs the codes of each one's tokens, sixteen in a word."""
    rows, at = np.arange(len(lanes)), found.head[lanes] + len(HEAD)
    spelt: Words = np.zeros(len(rows), np.uint64)
    words: list[tuple[Ints, Words]] = []
    values: dict[int, tuple[Ints, Ints]] = {}
    for step in range(LONGEST):
        if not len(rows):
            return
        code, value, after = stream.tokens(at)
        spelt = (spelt << np.uint64(4)) | code
        if value is not None:
            values[step] = rows, value
        stops = code == END
        if stops.any():
            done = rows[stops]
            found.end[lanes[done]] = after[stops]
            spelling = np.stack([*(w[np.searchsorted(r, done)] for r, w in words), spelt[stops]], 1)
            _sort(done, spelling, lanes, values, found, known)
        if step % 16 == 15:
            words.append((rows, spelt))
            spelt = np.zeros_like(spelt)
        going = ~stops & (code > 0)
        if not going.all():
            rows, after, spelt = rows[going], after[going], spelt[going]
        at = after


def _sort(
    done: Ints,
    spelling: Words,
    lanes: Ints,
    values: Mapping[int, tuple[Ints, Ints]],
    found: Records,
    known: dict[bytes, int],
) -> None:
    """Records that end at the same token, by what their tokens are."""
    left = np.arange(len(done))
    while len(left):
        same = (spelling[left] == spelling[left[0]]).all(axis=1)
        mine, text = done[left[same]], spelling[left[0]].tobytes()
        left = left[~same]
        if text not in known:
            if len(known) == SHAPES:
                raise Unknown
            codes = "".join(f"{w:x}" for w in np.frombuffer(text, np.uint64).tolist())
            shape = parse("".join(LETTERS[int(c, 16)] for c in codes))
            known[text] = len(found.shapes) if shape else -1
            found.shapes += [shape] if shape else []
        if known[text] < 0:
            continue
        shape = found.shapes[known[text]]
        for column, step in zip(shape.values, shape.steps, strict=True):
            rows, value = values[step]
            column.append(value if len(rows) == len(mine) else value[np.searchsorted(rows, mine)])
        shape.lanes.append(lanes[mine])
        found.shape[lanes[mine]] = known[text]
