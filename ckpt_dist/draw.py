"""Random numbers by address: the n-th normal number of a key is computed alone, from (key, n) and nothing else.

Raw bits are numpy's Philox, whose n-th block is a function of key and n, and whose stream numpy promises to keep. The
transform is Box and Muller's, in fp64, with only operations that IEEE 754 rounds correctly, because the libraries'
own log and cos differ in the last bit between processors.

Invariant: the same number on every machine, for any cut of a tensor into pieces and any order of making them.
"""

from __future__ import annotations

import hashlib
from math import factorial, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK = 4  # numbers of one Philox counter
PIECE = 1 << 16  # numbers made at a time, so that the scratch of a step stays in a cache
LN_2, SQRT_HALF = 0.6931471805599453, 0.7071067811865476
LOG = [1 / (2 * k + 1) for k in range(9)]  # of artanh(s)/s in s^2 < 0.03; the rest is below 1e-15
SIN = [(-1) ** k / factorial(2 * k + 1) for k in range(10)]  # of sin(x)/x and cos(x) in x^2 < 2.5: below 1e-14
COS = [(-1) ** k / factorial(2 * k) for k in range(11)]


def key(seed: int, name: str) -> int:
    """128 bits for one tensor of one seed: `key(7, "model.norm.weight")`."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest(), "little")


def normal(key: int, first: int, std: float, out: NDArray[np.float32]) -> None:
    """Numbers first, first + 1, ... of a key, with mean 0 and this deviation, rounded once to fp32."""
    for at in range(0, len(out), PIECE):
        piece = out[at : at + PIECE]
        begin = first + at
        skip = begin % BLOCK
        z = _standard(key, begin // BLOCK, -(-(skip + len(piece)) // BLOCK))
        np.multiply(z[skip : skip + len(piece)], std, out=piece, casting="same_kind")


def _standard(key: int, block: int, count: int) -> Floats:
    """The standard normal numbers of some blocks; each two words of 64 bits give two of them."""
    bits = np.random.Philox(key=key, counter=block).random_raw(count * BLOCK)
    one, two = bits[0::2], bits[1::2]
    radius = np.sqrt(-2.0 * _log(((one >> np.uint64(11)) + np.uint64(1)) * 2.0**-53))
    angle = ((two >> np.uint64(11)) * 2.0**-53 - 0.5) * pi  # half a circle; the lowest bit chooses which half
    square = angle * angle
    z = np.empty(len(bits))
    z[0::2] = radius * _series(COS, square) * (1.0 - 2.0 * (two & np.uint64(1)))
    z[1::2] = radius * _series(SIN, square) * angle
    return z


def _log(u: NDArray[Any]) -> Floats:
    """Natural logarithm of numbers in (0, 1]."""
    part, exponent = np.frexp(u)
    low = part < SQRT_HALF
    part += part * low  # from sqrt(1/2) to sqrt(2), where the series is short
    s = (part - 1.0) / (part + 1.0)
    result: Floats = (exponent - low) * LN_2 + 2.0 * s * _series(LOG, s * s)
    return result


def _series(coefficients: list[float], x: Floats) -> Floats:
    """c[0] + c[1] x + c[2] x^2 + ..."""
    total = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total *= x
        total += c
    return total
