"""The `.metadata` of torch.distributed.checkpoint as integer arrays, without an object for each chunk.

Nearly all of such a pickle is records of a few shapes, millions of them, which `streams.py` finds and reads side by side.

    Reduced    they are cut out of the stream; a `Run` stands for what was cut, a `Ref` for a reference into it
    load       what is left, a few objects for each tensor, is unpickled by the allow-list like any other pickle
    Lanes      gives a field of many records as an array; references are looked up where they lead

Invariant: a record is cut only if it begins exactly where the one before ends, and the first one of a row is kept, so
the unpickler itself arrives at each row. Whatever is not as expected is `Unknown`: then the general path reads all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_dist.box import Ints, distinct, expand, ints
from ckpt_dist.errors import shown
from ckpt_dist.files import allowed, inert, pickles
from ckpt_dist.files.streams import PAD, Field, Records, Shape, Stream, Unknown, records_of, unframed


class Run(inert.Fact):
    """Stands for the cut records first..last."""

    __slots__ = ("first", "last")

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last


class Ref(inert.Fact):
    """Stands for what a cut record has put under a memo number; `used` once it was a field's value, which it must be."""

    __slots__ = ("number", "used")

    def __init__(self, number: int) -> None:
        self.number, self.used = number, False


FIXED = [0] * 256  # length of each opcode that a kept part may have; 0 is none of them
for _op, _length in {**{c: 1 for c in "()0NORabdelostu]}.\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"}}.items():
    FIXED[ord(_op)] = _length
for _op, _length in {"K": 2, "M": 3, "J": 5, "G": 9, "h": 2, "j": 5}.items():
    FIXED[ord(_op)] = _length
PREFIXED = {0x8C: 1, 0x58: 4, 0x8D: 8, 0x43: 1, 0x42: 4, 0x8E: 8, 0x8A: 1, 0x8B: 4}  # bytes of the length that follows
PERSISTENT = b"\x8a\x08%sQ"  # LONG1 of eight bytes, BINPERSID


class Reduced:
    """The stream without its cut records; memo numbers are those of what is left."""

    def __init__(self, stream: Stream, records: Records) -> None:
        self.data, self.out, self.refs = stream.data, list[bytes](), list[Ref]()
        self.memos = 0  # of the whole stream, so far
        self.bases: list[int] = []  # of each run
        self.cut = [0]  # memo numbers that the runs before have taken
        gone = np.flatnonzero((records.kind >= 0) & (records.shape >= 0))
        breaks = np.flatnonzero(np.diff(gone) != 1) + 1 if len(gone) else gone
        self.first = gone[np.append(0, breaks)] if len(gone) else gone
        self.last = gone[np.append(breaks - 1, len(gone) - 1)] + 1 if len(gone) else gone
        counts = np.array([s.memos for s in records.shapes] or [0], np.int64)
        before = np.append(0, np.cumsum(np.where(records.shape >= 0, counts[records.shape], 0)))
        at = 0
        begins, ends = records.end[self.first - 1].tolist(), records.end[self.last - 1].tolist()
        taken = (before[self.last] - before[self.first]).tolist()
        for number, (begin, end, memos) in enumerate(zip(begins, ends, taken, strict=True)):
            self._keep(at, begin)
            self._run(number, int(self.last[number] - self.first[number]), memos)
            at = end
        self._keep(at, stream.last)

    def _run(self, number: int, count: int, memos: int) -> None:
        self.out.append(PERSISTENT % (-1 - number).to_bytes(8, "little", signed=True))
        if count % 2 == 0:
            self.out.append(b"N")  # so that keys and values of a dict keep their places
        self.bases.append(self.memos)
        self.memos += memos
        self.cut.append(self.cut[-1] + memos)

    def _keep(self, at: int, end: int) -> None:
        """Pass on a part; references get the numbers of what is left."""
        data, kept = self.data, at
        while at < end:
            op = data[at]
            if op == 0x94:
                self.memos += 1
                at += 1
            elif op == 0x68 or op == 0x6A:
                after = at + FIXED[op]
                self.out += [data[kept:at], self.get(int.from_bytes(data[at + 1 : after], "little"))]
                if data[after] == 0x94:  # nobody memoizes what is memoized, and a Ref must stay the only one
                    raise Unknown
                at = kept = after
            elif FIXED[op]:
                at += FIXED[op]
            elif op in PREFIXED:
                width = 1 + PREFIXED[op]
                at += width + int.from_bytes(data[at + 1 : at + width], "little")
            elif op == 0x80 and at == 0:
                at += 2
            else:
                raise Unknown
        if at != end:
            raise Unknown
        self.out.append(data[kept:end])

    def get(self, number: int) -> bytes:
        """The opcodes that put on the stack what the whole stream has under a memo number."""
        run = bisect_right(self.bases, number) - 1
        if run >= 0 and number < self.bases[run] + self.cut[run + 1] - self.cut[run]:
            return PERSISTENT % number.to_bytes(8, "little")
        return b"j" + (number - self.cut[run + 1]).to_bytes(4, "little")

    def load(self, asked: Sequence[int], where: str) -> tuple[Any, list[Any]]:
        """The pickle's object, and what lies under the memo numbers `asked`."""
        runs = list(zip(self.first.tolist(), self.last.tolist(), strict=True))
        whole = b"".join(self.out)
        if whole[-1:] != b".":
            raise Unknown
        more = b"".join([b"(", *map(self.get, asked), b"t\x86."])

        def stand_in(number: int) -> Run | Ref:
            if number < 0:
                return Run(*runs[-1 - number])
            self.refs.append(Ref(number))
            return self.refs[-1]

        return pickles.loads(whole[:-1] + more, where, stand_in)  # type: ignore[no-any-return]


# --- fields of records as arrays -----------------------------------------------------------------------------------


class Lanes:
    """The cut records of a stream, by fields."""

    def __init__(self, stream: Stream, records: Records, reduced: Reduced) -> None:
        self.stream, self.records, self.refs = stream, records, reduced.refs
        shapes = records.shapes
        counts = np.array([s.memos for s in shapes] or [0], np.int64)
        self.lanes = expand(reduced.first, reduced.last - reduced.first)[1]
        memos = counts[records.shape[self.lanes]]
        lengths = reduced.last - reduced.first
        before = np.cumsum(memos) - memos
        base = (
            np.repeat(ints(reduced.bases) - before[np.cumsum(lengths) - lengths], lengths) if len(lengths) else before
        )
        self.base = before + base  # memo number of each cut record's object
        self.memos = memos
        used = distinct(records.shape[self.lanes])
        self.text_ids: dict[str, int] = {}
        self.kept: dict[int, Any] = {}
        gets = [distinct(records.kind[self.lanes])]
        for s in used.tolist():
            for f in shapes[s].fields:
                gets.append(distinct(shapes[s].values[f.key]))
                if f.kind == "get":
                    gets.append(distinct(shapes[s].values[f.first]))
                if f.kind == "size":
                    gets.append(distinct(shapes[s].values[f.first - 1]))
        numbers = distinct(np.concatenate(gets)) if len(self.lanes) else np.zeros(0, np.int64)
        self.asked = numbers[self._lane(numbers) < 0].tolist()

    def _lane(self, numbers: Ints) -> Ints:
        """Which cut record has given out a memo number (its place in `lanes`), or -1."""
        if not len(self.base):
            return np.full(len(numbers), -1)
        lane = np.searchsorted(self.base, numbers, side="right") - 1
        inside = (lane >= 0) & (numbers < self.base[lane] + self.memos[lane])
        return np.where(inside, lane, -1)

    def learn(self, objects: Sequence[Any]) -> None:
        """What lies under the memo numbers `asked`; now fields have names."""
        self.kept = dict(zip(self.asked, objects, strict=True))
        for number in distinct(self.records.kind[self.lanes]).tolist():
            if not (isinstance(kind := self.kept.get(number), type) and issubclass(kind, inert.Record)):
                raise Unknown(f"an object of {kind!r:.60}")

    def settle(self, unread: Iterable[Any] = ()) -> None:
        """All that was asked for has been: a reference that was no field's value is somewhere it must not be, or in what
        nobody reads, such as the plans that megatron-core keeps."""
        left = {id(ref) for ref in self.refs if not ref.used}
        rest, seen = list(unread), set[int]()
        while left and rest:
            value = rest.pop()
            if type(value) is Ref:
                left.discard(id(value))
            elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                rest += (*value, *value.values()) if isinstance(value, dict) else value
        if left:
            raise Unknown("a reference to a part of a record")

    def column(self, lanes: Ints, name: str, kind: str, width: int, fill: int) -> tuple[Ints, NDArray[np.bool_]]:
        """(values, whether there is one) of a field: an `int`, the id of a `text`, or the row of a `size`."""
        out = np.full((len(lanes), width), fill, np.int64)
        there = np.zeros(len(lanes), bool)
        kinds = self.records.shape[lanes]
        for s in distinct(kinds).tolist():
            mine = np.flatnonzero(kinds == s)
            shape, rows = self.records.shapes[s], self.records.row[lanes[mine]]
            found = self._field(shape, rows, name)
            if found is None or found.kind == "none":
                continue
            there[mine] = True
            if found.kind == "get":
                self._follow(shape.values[found.first][rows], kind, out, mine, there)
            else:
                self._plain(shape, found, kind, rows, out, mine)
        return out, there

    def _field(self, shape: Shape, rows: Ints, name: str) -> Field | None:
        """The field of that name; all these records agree which it is."""
        for f in shape.fields:
            keys = shape.values[f.key][rows]
            if (keys != keys[0]).any():
                raise Unknown
            if self.kept[int(keys[0])] == name:
                return f
        return None

    def _plain(self, shape: Shape, f: Field, kind: str, rows: Ints, out: Ints, into: Ints) -> None:
        if f.kind != kind:
            raise Unknown(f"a {f.kind} where a {kind} should be")
        if f.kind == "text":
            out[into, 0] = self._text(shape.values[f.first][rows])
            return
        if f.kind == "size" and any(
            self.kept.get(int(k)) is not allowed.SIZE for k in distinct(shape.values[f.first - 1][rows])
        ):
            raise Unknown
        if f.last - f.first > out.shape[1]:
            raise Unknown
        for k in range(f.first, f.last):
            out[into, k - f.first] = shape.values[k][rows]

    def _follow(self, numbers: Ints, kind: str, out: Ints, into: Ints, there: NDArray[np.bool_]) -> None:
        """References: to another record's size or text, or to something that was kept."""
        lane = self._lane(numbers)
        for number in distinct(numbers[lane < 0]).tolist():
            rows = into[numbers == number]
            value = self.kept[number]
            if value is None:
                there[rows] = False
            else:
                self.put(value, kind, out, rows)
        inner = np.flatnonzero(lane >= 0)
        of = self.lanes[lane[inner]]
        local = numbers[inner] - self.base[lane[inner]]
        what = self.records.shape[of] * 256 + local
        for one in distinct(what).tolist():
            mine = np.flatnonzero(what == one)
            shape = self.records.shapes[one // 256]
            fields = [f for f in shape.fields if f.memo == one % 256]
            if not fields:
                raise Unknown
            self._plain(shape, fields[0], kind, self.records.row[of[mine]], out, into[inner[mine]])

    def put(self, value: Any, kind: str, out: Ints, rows: Any) -> None:
        """One value of a kept record into some rows."""
        if type(value) is Ref:
            value.used = True
            some = np.zeros((1, out.shape[1]), np.int64)
            self._follow(ints([value.number]), kind, some, np.zeros(1, np.int64), np.ones(1, bool))
            out[rows] = some
            return
        if kind == "text" and type(value) is str:
            value = (self.text_ids.setdefault(value, len(self.text_ids)),)
        elif kind == "int" and type(value) is int:
            value = (value,)
        elif kind != "size" or type(value) is not tuple or any(type(v) is not int for v in value):
            raise Unknown(f"{shown(value)} where a {kind} should be")
        if len(value) > out.shape[1]:
            raise Unknown(f"{shown(value)} has more than {out.shape[1]} dims")
        for k, v in enumerate(value):
            out[rows, k] = v

    def _text(self, spans: Ints) -> Ints:
        """Ids of texts; equal texts have equal ids."""
        at, length = spans // 256, spans % 256
        words = np.zeros((len(at), int(length.max(initial=0)) // 8 + 1), np.uint64)
        mixed = length.astype(np.uint64)
        for k in range(words.shape[1]):
            rows = np.flatnonzero(length > 8 * k)
            bits = 8 * np.minimum(length[rows] - 8 * k, 8).astype(np.uint64)
            keep = np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - bits)
            words[rows, k] = self.stream.words[at[rows] + 8 * k] & keep
            mixed = (mixed ^ words[:, k]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        _, first, member = np.unique(mixed, return_index=True, return_inverse=True)
        if (words != words[first[member]]).any() or (length != length[first[member]]).any():
            raise Unknown
        data = self.stream.data
        texts = [str(data[a : a + n], "utf-8") for a, n in zip(at[first].tolist(), length[first].tolist(), strict=True)]
        return ints([self.text_ids.setdefault(t, len(self.text_ids)) for t in texts])[member]


class Rows:
    """Records in order, cut ones and kept ones: what the items of a list, or the keys and values of a dict, stand for."""

    def __init__(self, items: Sequence[Any], lanes: Lanes) -> None:
        self.lanes = lanes
        flat = [i for i in items if i is not None]  # a None keeps a place in a dict, no more
        counts = ints([i.last - i.first if type(i) is Run else 1 for i in flat])
        if counts.sum() > len(lanes.lanes) + len(flat):
            raise Unknown
        ends = np.cumsum(counts)
        self.lane: Ints = np.full(int(ends[-1]) if len(flat) else 0, -1)
        self.kept: dict[int, Any] = {}
        for item, low, high in zip(flat, (ends - counts).tolist(), ends.tolist(), strict=True):
            if type(item) is Run:
                self.lane[low:high] = np.arange(item.first, item.last)
            else:
                self.kept[low] = item[0]

    def __len__(self) -> int:
        return len(self.lane)

    def every(self, first: int, step: int) -> Rows:
        """Each `step`-th of them."""
        part = Rows((), self.lanes)
        part.lane = self.lane[first::step]
        part.kept = {k // step: v for k, v in self.kept.items() if k % step == first}
        return part

    def column(self, name: str, kind: str, width: int = 1, fill: int = 0) -> tuple[Ints, NDArray[np.bool_]]:
        """(values, whether there is one) of a field: an `int`, the id of a `text`, or the row of a `size`."""
        out, there = np.full((len(self.lane), width), fill, np.int64), np.zeros(len(self.lane), bool)
        cut = np.flatnonzero(self.lane >= 0)
        if len(cut):
            out[cut], there[cut] = self.lanes.column(self.lane[cut], name, kind, width, fill)
        for row, fields in self.kept.items():
            value = fields.get(name)
            if value is not None:
                self.lanes.put(value, kind, out, [row])
                there[row] = True
        return out, there

    def all(self, name: str, kind: str, width: int = 1, fill: int = 0) -> Ints:
        """The values of a field that none of them lacks."""
        values, there = self.column(name, kind, width, fill)
        if not there.all():
            raise Unknown(f"{len(there) - there.sum()} of {len(there)} records have no {name}")
        return values if kind == "size" else values[:, 0]


def whole(data: bytes, where: str) -> tuple[Any, Lanes]:
    """The unpickled `.metadata`, nothing cut out."""
    return pickles.loads(data, where), _opened(bytes(PAD))[1]


def short(data: bytes, where: str) -> tuple[Any, Lanes]:
    """The unpickled `.metadata` with Runs and Refs in it, and the records they stand for. May raise Unknown."""
    reduced, lanes = _opened(unframed(data))
    found, objects = reduced.load(lanes.asked, where)
    lanes.learn(objects)
    return found, lanes


def _opened(data: bytes) -> tuple[Reduced, Lanes]:
    stream = Stream(data)
    records = records_of(stream)
    reduced = Reduced(stream, records)
    return reduced, Lanes(stream, records, reduced)
