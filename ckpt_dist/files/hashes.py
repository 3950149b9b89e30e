"""What the keys of a pickle cost: tuples are hashed item by item, each time, and a few bytes can hold one of a billion items.

    )2\\x862\\x862\\x86...   each a tuple of twice the one before: 60 of them in 121 bytes are hashed for ever

Nothing stops the C unpickler once it hashes. So where tuples are used again, its stack is followed first, with how many things
a tuple holds in place of the tuple.

Invariant: counts are never too small; a pickle without tuples that are used again is only looked over.
"""

from __future__ import annotations

import re
from pickle import UnpicklingError

MOST = 1 << 20  # things that are hashed, and some for each byte
_CALLS = b"(01Rabdelostu\x81\x85\x86\x87\x8f\x90\x91"  # after which what is put down may be a tuple
_PUT = [bytes([op]) for op in _CALLS]
_AGAIN = re.compile(  # what is put down so, what is used again, and whatever else may be either
    rb"(?:[NQ)\]}\x88\x89](?:q.|r....)?|[KM](?:(?<=K).|..)(?![qr])|J....(?![qr])|c[^\n]*\n[^\n]*\n(?:q.|r....)?|[%s](?![qr])|\x80.)*"
    rb"([%s](?:q.|r....)|h.|j....|.|\Z)" % (re.escape(_CALLS), re.escape(_CALLS)),
    re.DOTALL,
)
_PUSHED = {
    **dict.fromkeys(b"N])}\x88\x89\x8f", 1),
    **dict(zip(b"KMJG\x82\x83\x84", (2, 3, 5, 9, 2, 3, 5), strict=True)),
}
_LINES = {**dict.fromkeys(b"FILSV", 1), ord("c"): 2}
_COUNTED = {0x8C: 1, 0x58: 4, 0x8D: 8, 0x43: 1, 0x42: 4, 0x8E: 8, 0x8A: 1, 0x54: 4, 0x55: 1, 0x96: 8}
_SKIPPED = {0x80: 2, 0x95: 9, 0x97: 1, 0x98: 1}


def check(data: bytes, fixed: bytes) -> None:
    """Refuse a pickle whose keys hold too much. `fixed` are its opcodes, with an N in place of each text."""
    found = set(_AGAIN.findall(fixed))
    found.discard(b"")
    again = [one for one in found if one[:1] not in _PUT or len(one) == 1]
    numbers = [int.from_bytes(one[1:], "little") for one in again if one[:1] in (b"h", b"j")]
    forms = [b"q%c" % n if n < 256 else b"" for n in numbers] + [b"r" + n.to_bytes(4, "little") for n in numbers]
    if len(numbers) < len(again) or any(op + form in found for form in forms if form for op in _PUT):
        try:
            _follow(data, MOST + 16 * len(data))
        except (LookupError, ValueError):
            raise UnpicklingError("opcodes that do not fit together") from None


def _follow(data: bytes, room: int) -> None:
    """The stack of the unpickler, with counts in place of values."""
    stack, marks, memo, at = list[int](), list[int](), dict[int, int](), 0

    def taken(count: int) -> list[int]:
        nonlocal stack
        if not 0 <= count <= len(stack):
            raise LookupError
        last = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return last

    def marked() -> list[int]:
        return taken(len(stack) - marks.pop())

    while data[at] != 0x2E:
        op, begin = data[at], at + 1
        hashed = 0
        at += 1
        if op in _PUSHED:
            stack.append(1)
            at += _PUSHED[op] - 1
        elif op in _COUNTED:
            at += _COUNTED[op]
            at += int.from_bytes(data[begin:at], "little")
            stack.append(at - begin if op == 0x8A else 1)
        elif op in _LINES:
            for _ in range(_LINES[op]):
                at = data.index(b"\n", at) + 1
            stack.append(1)
        elif op in _SKIPPED:
            at += _SKIPPED[op] - 1
        elif op == 0x28:
            marks.append(len(stack))
        elif op in b"hj":
            at += 1 if op == 0x68 else 4
            stack.append(memo[int.from_bytes(data[begin:at], "little")])
        elif op in b"qr":
            at += 1 if op == 0x71 else 4
            memo[int.from_bytes(data[begin:at], "little")] = stack[-1]
        elif op == 0x94:
            memo[len(memo)] = stack[-1]
        elif op in b"pg":
            at = data.index(b"\n", at) + 1
            number = int(data[begin : at - 1])
            if op == 0x70:
                memo[number] = stack[-1]
            else:
                stack.append(memo[number])
        elif op == 0x32:
            stack.append(stack[-1])
        elif op == 0x30:
            if marks and marks[-1] == len(stack):
                marks.pop()
            else:
                taken(1)
        elif op == 0x31:
            marked()
        elif op in b"to":  # a call may give back what it was given
            stack.append(1 + sum(marked()))
        elif op in b"\x85\x86\x87":
            stack.append(1 + sum(taken(op - 0x84)))
        elif op == 0x52:
            stack.append(taken(2)[1])
        elif op in b"\x81\x93":
            taken(2)
            stack.append(1)
        elif op == 0x51:
            taken(1)
            stack.append(1)
        elif op in b"ab":
            taken(1)
        elif op == 0x73:
            hashed = taken(2)[0]
        elif op == 0x65:
            marked()
        elif op == 0x6C:
            marked()
            stack.append(1)
        else:
            items = {0x75: 2, 0x64: 2, 0x90: 1, 0x91: 1}[op]  # keys and values, or all
            hashed = sum(marked()[::items])
            if op in b"d\x91":
                stack.append(1)
        room -= hashed
        if room < 0:
            raise UnpicklingError("keys that hold more than it is long")
