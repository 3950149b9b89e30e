"""The mean of several sources in one pass over memory, by machine code that llvmlite makes for this CPU.

torch adds one source after the other, and each time the sum goes through memory; here it stays in registers, which is
several times as fast. Without the package (extra `fast`), and on a GPU, torch does it.

Invariant: sources are widened to fp32, multiplied and added in the order given with one rounding for both, scaled, and
rounded once to the nearest, ties to even. These are the bits of torch too, on every CPU that multiplies and adds with
one rounding (FMA); only which NaN a NaN is may differ.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from numpy.typing import NDArray

from ckpt_dist.files.dtypes import itemsize
from ckpt_dist.plan import HELD

WIDTH = 64  # elements at a time; what is left over goes one by one, through the same code
LLVM = {"bfloat16": "i16", "float16": "half", "float32": "float"}

# One file of LLVM's language: V elements of type IN from each of `count` sources are multiplied, added to the sum,
# and either rounded to OUT or kept in `total` for the next sources. `first` and `last` say whether these are the first
# sources, and the last. Lines of CONSTANT are there where OUT is fp32: an element that is equal in all sources stays
# as it is, which fp32 sums do not find again by themselves; `equal` and `out` keep these, as `total` keeps the sum.
CODE = """
declare <$V x float> @llvm.fma.v${V}f32(<$V x float>, <$V x float>, <$V x float>)

define void @mean$V(ptr %sources, ptr %factors, i64 %count, i64 %first, i64 %last, float %scale,
                    i64 %begin, i64 %end, ptr %total, ptr %equal, ptr %out) {
  %fresh = icmp ne i64 %first, 0
  %final = icmp ne i64 %last, 0
  %scale.one = insertelement <$V x float> poison, float %scale, i64 0
  %scale.all = shufflevector <$V x float> %scale.one, <$V x float> poison, <$V x i32> zeroinitializer
  br label %block
block:
  %i = phi i64 [ %begin, %0 ], [ %i.next, %done ]
  %total.at = getelementptr float, ptr %total, i64 %i
  %equal.at = getelementptr i8, ptr %equal, i64 %i
  %out.at = getelementptr $OUT, ptr %out, i64 %i
  %more = icmp ult i64 %i, %end
  br i1 %more, label %start, label %leave
start:
  br i1 %fresh, label %new, label %old
new:
$SOURCE_0
  %sum.new = fmul <$V x float> %value.0, %factor.0
  br label %each
old:
  %sum.old = load <$V x float>, ptr %total.at, align 4
$CONSTANT  %held.old = load <$V x float>, ptr %out.at, align 4
$CONSTANT  %same.bytes = load <$V x i8>, ptr %equal.at, align 1
$CONSTANT  %same.old = trunc <$V x i8> %same.bytes to <$V x i1>
  br label %each
each:
  %j = phi i64 [ 1, %new ], [ 0, %old ], [ %j.next, %add ]
  %sum = phi <$V x float> [ %sum.new, %new ], [ %sum.old, %old ], [ %sum.next, %add ]
$CONSTANT  %held = phi <$V x float> [ %value.0, %new ], [ %held.old, %old ], [ %held, %add ]
$CONSTANT  %same = phi <$V x i1> [ splat (i1 true), %new ], [ %same.old, %old ], [ %same.next, %add ]
  %left = icmp ult i64 %j, %count
  br i1 %left, label %add, label %summed
add:
$SOURCE_j
  %sum.next = call <$V x float> @llvm.fma.v${V}f32(<$V x float> %value.j, <$V x float> %factor.j, <$V x float> %sum)
$CONSTANT  %equals = fcmp oeq <$V x float> %held, %value.j
$CONSTANT  %same.next = and <$V x i1> %same, %equals
  %j.next = add i64 %j, 1
  br label %each
summed:
  br i1 %final, label %round, label %keep
keep:
  store <$V x float> %sum, ptr %total.at, align 4
$CONSTANT  store <$V x float> %held, ptr %out.at, align 4
$CONSTANT  %same.kept = zext <$V x i1> %same to <$V x i8>
$CONSTANT  store <$V x i8> %same.kept, ptr %equal.at, align 1
  br label %done
round:
  %mean = $SCALED <$V x float> %sum, %scale.all
$ROUNDED
  br label %done
done:
  %i.next = add i64 %i, $V
  br label %block
leave:
  ret void
}
"""
SOURCE = """
  %slot.$J = getelementptr ptr, ptr %sources, i64 $NUMBER
  %source.$J = load ptr, ptr %slot.$J, align 8
  %at.$J = getelementptr $IN, ptr %source.$J, i64 %i
  %factor.at.$J = getelementptr float, ptr %factors, i64 $NUMBER
  %factor.one.$J = load float, ptr %factor.at.$J, align 4
  %factor.first.$J = insertelement <$V x float> poison, float %factor.one.$J, i64 0
  %factor.$J = shufflevector <$V x float> %factor.first.$J, <$V x float> poison, <$V x i32> zeroinitializer
"""
WIDENED = {
    "float32": """
  %value.$J = load <$V x float>, ptr %at.$J, align 4
""",
    "float16": """
  %half.$J = load <$V x half>, ptr %at.$J, align 2
  %value.$J = fpext <$V x half> %half.$J to <$V x float>
""",
    "bfloat16": """
  %bits.$J = load <$V x i16>, ptr %at.$J, align 2
  %wide.$J = zext <$V x i16> %bits.$J to <$V x i32>
  %high.$J = shl <$V x i32> %wide.$J, splat (i32 16)
  %value.$J = bitcast <$V x i32> %high.$J to <$V x float>
""",
}
ROUNDED = {
    "float32": """
  %result = select <$V x i1> %same, <$V x float> %held, <$V x float> %mean
  store <$V x float> %result, ptr %out.at, align 4
""",
    "float16": """
  %result = fptrunc <$V x float> %mean to <$V x half>
  store <$V x half> %result, ptr %out.at, align 2
""",
    # half of the last place is added, a bit less where the result is even already; a NaN has no place to round to
    "bfloat16": """
  %bits = bitcast <$V x float> %mean to <$V x i32>
  %above = lshr <$V x i32> %bits, splat (i32 16)
  %odd = and <$V x i32> %above, splat (i32 1)
  %half = add <$V x i32> %odd, splat (i32 32767)
  %up = add <$V x i32> %bits, %half
  %near = lshr <$V x i32> %up, splat (i32 16)
  %number = fcmp ord <$V x float> %mean, %mean
  %chosen = select <$V x i1> %number, <$V x i32> %near, <$V x i32> splat (i32 32704)
  %result = trunc <$V x i32> %chosen to <$V x i16>
  store <$V x i16> %result, ptr %out.at, align 2
""",
}


@dataclass(frozen=True)
class Pass:
    """Machine code for one dtype of sources and one of the result."""

    itemsize: int  # of a source
    functions: Sequence[Callable[..., None]]  # for WIDTH elements at a time, and for one
    engine: Any  # holds the machine code

    def __call__(
        self,
        values: Iterator[NDArray[Any]],
        factors: Sequence[float],
        scale: float,
        numel: int,
        total: int,
        equal: int,
        out: int,
    ) -> None:
        """The mean of as many values as there are factors, of `numel` elements each, to the address `out`. `total`, of
        fp32, and `equal`, of bytes, are written where there are more than HELD values, and may be 0 where there are not.
        """
        done, whole = 0, numel // WIDTH * WIDTH
        while done < len(factors):
            count = min(HELD, len(factors) - done)
            group = list(itertools.islice(values, count))
            # machine code reads what is at an address, whatever that is
            if len(group) != count or not all(self.fits(v, numel) for v in group):
                raise ValueError(f"a mean of {len(factors)} tiles of {numel} elements got {[v.shape for v in group]}")
            of = (ctypes.c_void_p * HELD)(*(v.__array_interface__["data"][0] for v in group))
            by = (ctypes.c_float * HELD)(*factors[done : done + count])
            first, done = done == 0, done + count
            for function, begin, end in zip(self.functions, (0, whole), (whole, numel), strict=True):
                if begin < end:
                    function(of, by, count, first, done == len(factors), scale, begin, end, total, equal, out)

    def fits(self, value: NDArray[Any], numel: int) -> bool:
        return value.size == numel and value.itemsize == self.itemsize and value.flags.c_contiguous


LOCK = threading.Lock()
MADE: dict[tuple[str, str, str], Pass | None] = {}


def one_pass(dtype: str, want: str, divide: bool) -> Pass | None:
    """Machine code for sources of `dtype` and a result of `want`, made once; the sum is multiplied by the scale, or divided.

    None if a dtype is none of LLVM, the package is not installed or too old, or it does not know this CPU.
    """
    key = dtype, want, "fdiv" if divide else "fmul"
    if key not in MADE:
        with LOCK:
            if key not in MADE:
                MADE[key] = _compiled(*key) if dtype in LLVM and want in LLVM else None
    return MADE[key]


def _compiled(dtype: str, want: str, scaled: str) -> Pass | None:
    try:
        import llvmlite.binding as llvm

        features = llvm.get_host_cpu_features()
        old = llvm.llvm_version_info[0] < 20  # CODE is in the language of this one
        if old or not _capable(platform.machine(), features):
            return None
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly("\n".join(_code(dtype, want, scaled, width) for width in (WIDTH, 1)))
        module.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
        )
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
    except (ImportError, OSError, RuntimeError):  # not installed, its library does not load, or LLVM refuses
        return None
    p, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    kind = ctypes.CFUNCTYPE(None, p, p, i, i, i, f, i, i, p, p, p)  # lets go of the interpreter while it runs
    return Pass(itemsize(dtype), [kind(engine.get_function_address(f"mean{width}")) for width in (WIDTH, 1)], engine)


def _capable(machine: str, features: Mapping[str, bool]) -> bool:
    """Whether the CPU multiplies and adds with one rounding, and widens fp16; elsewhere LLVM would call a library."""
    if machine in ("x86_64", "AMD64"):
        return bool(features.get("fma") and features.get("f16c"))
    return machine in ("aarch64", "arm64")


def _code(dtype: str, want: str, scaled: str, width: int) -> str:
    """CODE for these dtypes and so many elements at a time."""
    kinds = {"V": str(width), "IN": LLVM[dtype], "OUT": LLVM[want], "SCALED": scaled}
    sources = {
        f"SOURCE_{name}": Template(SOURCE + WIDENED[dtype]).substitute(kinds, J=name, NUMBER=number)
        for name, number in (("0", "0"), ("j", "%j"))
    }
    rounded = Template(ROUNDED[want]).substitute(kinds)
    constant = "" if want == "float32" else ";"  # begins a comment
    return Template(CODE).substitute(kinds, **sources, ROUNDED=rounded, CONSTANT=constant)
