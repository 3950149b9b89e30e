"""What the keys of a pickle cost: tuples are hashed item by item, each time, and a few bytes can hold one of a billion items.

    )2\\x862\\x862\\x86...   each a tuple of twice the one before: 60 of them in 121 bytes are hashed for ever

Nothing stops the C unpickler once it hashes. Where no tuple is used again, all keys together hold no more than the pickle is
long. Where one is, Python's own unpickler reads the pickle, and looks at keys before they are hashed.

Invariant: what is hashed is counted first; what is counted is not more than the room there is.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

_TUPLES = b"(01t\x85\x86\x87\x91"  # after which what is put into the memo may be a tuple (or a set), not an empty one
_PUT = [bytes([op]) for op in _TUPLES]
_OTHERS = rb"(?:[NQ)\]}\x88\x89Rabdelosu\x81\x8f\x90]|K.|M..|J....|G.{8}|c[^\n]*\n[^\n]*\n)(?:q.|r....)?"
_AGAIN = re.compile(  # tuples that are put into the memo, what is got from it, and whatever else may be either
    rb"(?:%s|[%s](?![qr])|\x80.){1,4000}|([%s](?:q.|r....)|h.|j....|.)"
    % (_OTHERS, re.escape(_TUPLES), re.escape(_TUPLES)),
    re.DOTALL,
)


def again(fixed: bytes) -> bool:
    """Whether a tuple may be used again. `fixed` are a pickle's opcodes, with an N in place of each text.

    Calls give back no tuples but short ones of numbers: `calls.py` sees to that.
    """
    found = {one[1] for one in _AGAIN.finditer(fixed)} - {None}
    used = [one for one in found if one[:1] not in _PUT or len(one) == 1]
    numbers = [int.from_bytes(one[1:], "little") for one in used if one[:1] in (b"h", b"j")]
    forms = [b"q%c" % n if n < 256 else b"" for n in numbers] + [b"r" + n.to_bytes(4, "little") for n in numbers]
    return len(numbers) < len(used) or any(op + form in found for form in forms if form for op in _PUT)


def weigh(values: Iterable[Any], take: Callable[[int], None]) -> None:
    """Say what will be looked at in order to hash values, one by one, to a function that refuses more than there is room for."""
    left = list(values)
    take(len(left))
    while left:
        held = left.pop()
        if isinstance(held, (tuple, frozenset)):
            take(len(held))
            left.extend(held)


class Unpickler(pickle._Unpickler):
    """Python's own, which weighs keys before they are hashed."""

    take: Callable[[int], None]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)


def _before(op: int, look: Callable[[Any], None]) -> Callable[[Any], None]:
    """What an opcode does, after a look at the unpickler."""
    load = pickle._Unpickler.dispatch[op]

    def looked(self: Any) -> None:
        look(self)
        load(self)

    return looked


def _is_call(self: Any) -> None:
    """Python would say what was to be called with something else than a tuple, in full."""
    if type(self.stack[-1]) is not tuple:
        raise pickle.UnpicklingError("a call with arguments that are no tuple")


for _op, _keys in (
    (pickle.SETITEM, slice(-2, -1)),
    (pickle.SETITEMS, slice(0, None, 2)),
    (pickle.DICT, slice(0, None, 2)),
    (pickle.ADDITEMS, slice(0, None)),
    (pickle.FROZENSET, slice(0, None)),
):
    Unpickler.dispatch[_op[0]] = _before(_op[0], lambda self, keys=_keys: weigh(self.stack[keys], self.take))  # type: ignore[misc]
for _op in (pickle.REDUCE, pickle.NEWOBJ):
    Unpickler.dispatch[_op[0]] = _before(_op[0], _is_call)
