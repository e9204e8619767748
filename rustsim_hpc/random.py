"""Counter-based random numbers, a function of seed, stream, step, row id and draw only: Philox4x32-10.

Every number is a function of a key (a hash of seed and stream name), the row's id, the step and the number of
the draw. There is no internal state, so the numbers do not depend on the order in which rows are visited, nor
on the number of partitions, threads or ranks. docs/random.md defines which words of which block a draw uses,
with a worked example.

The functions here are the Python versions; in a row kernel the same names, ``rs.random.normal(rng, 0)``,
are compiled code with the same bits (kernels/philox.py). The only function of the host's math library in use
is the square root, which IEEE 754 defines exactly: `normal` and `exponential` also agree on every machine.

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11,
doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from operator import index
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

Rng = Sequence[SupportsIndex]
"""A row's stream in a phase and step: (key, id, step). Kernels get it as their argument ``rng``."""

MAX_STEP = 2**32 - 1
"""The largest step that fits into the counter."""

# The block number, 32 bits: the function's slot in the top 4 bits, the rest from the draw.
SLOT_UNIFORM, SLOT_UNIFORM32, SLOT_NORMAL, SLOT_EXPONENTIAL, SLOT_INTEGERS = range(5)
SLOT_SHIFT = 28

DRAWS = {"uniform": 2**29, "uniform32": 2**30, "normal": 2**29, "exponential": 2**29, "integers": 2**20}
"""Number of draws per row and step of each function: 0 <= draw < DRAWS[function]."""

ATTEMPTS_SHIFT = 8
"""`integers` reserves 2**8 blocks for a draw: 512 attempts of 64 bits each."""
ATTEMPTS = 2 << ATTEMPTS_SHIFT

_MASK32 = 2**32 - 1
_MASK64 = 2**64 - 1
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# Wichura, "Algorithm AS 241: The percentage points of the normal distribution", Applied Statistics 37 (1988),
# 477-484, routine PPND16, relative accuracy about 1e-16. Numerator and denominator, highest power first.
CENTRAL_LIMIT, CENTRAL_SQUARE = 0.425, 0.180625
TAIL_SHIFT, TAIL_LIMIT = 1.6, 5.0
CENTRAL_NUMERATOR = (
    2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4,
    4.5921953931549871457e4, 1.3731693765509461125e4, 1.9715909503065514427e3,
    1.3314166789178437745e2, 3.3871328727963666080e0,
)  # fmt: skip
CENTRAL_DENOMINATOR = (
    5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4,
    2.1213794301586595867e4, 5.3941960214247511077e3, 6.8718700749205790830e2,
    4.2313330701600911252e1, 1.0,
)  # fmt: skip
TAIL_NUMERATOR = (
    7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
    1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0,
    4.63033784615654529590e0, 1.42343711074968357734e0,
)  # fmt: skip
TAIL_DENOMINATOR = (
    1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
    1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0,
    2.05319162663775882187e0, 1.0,
)  # fmt: skip
FAR_NUMERATOR = (
    2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3,
    2.65321895265761230930e-2, 2.96560571828504891230e-1, 1.78482653991729133580e0,
    5.46378491116411436990e0, 6.65790464350110377720e0,
)  # fmt: skip
FAR_DENOMINATOR = (
    2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5,
    7.86869131145613259100e-4, 1.48753612908506148525e-2, 1.36929880922735805310e-1,
    5.99832206555887937690e-1, 1.0,
)  # fmt: skip

# The natural logarithm of fdlibm (e_log.c, Sun Microsystems 1993), error below one unit in the last place:
# ln 2 in two parts, and the coefficients of its minimax polynomial in powers of s**2.
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LOG_EVEN = (1.531383769920937332e-01, 2.222219843214978396e-01, 3.999999999940941908e-01)
LOG_ODD = (
    1.479819860511658591e-01, 1.818357216161805012e-01, 2.857142874366239149e-01, 6.666666666666735130e-01,
)  # fmt: skip
# High words of 1 and of sqrt(1/2) as doubles: an argument is brought to [sqrt(1/2), sqrt(2)).
_ONE_BITS, _ROOT_HALF_BITS = 0x3FF00000 << 32, 0x3FE6A09E << 32
_FRACTION_MASK = 2**52 - 1


def philox4x32_10(
    counter: Sequence[SupportsIndex], key: Sequence[SupportsIndex]
) -> tuple[int, int, int, int]:
    """Return the four words of one Philox4x32-10 block.

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.

    Raises:
        ValueError: another number of words, or a word outside [0, 2**32).
    """
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(
            f"philox4x32_10: 4 counter and 2 key words needed, not {len(counter)} and {len(key)}"
        )
    words = [index(word) for word in (*counter, *key)]
    if not all(0 <= word <= _MASK32 for word in words):
        raise ValueError(f"philox4x32_10: a word is outside [0, 2**32): {words}")
    c0, c1, c2, c3, k0, k1 = words
    for _ in range(_ROUNDS):
        product_0, product_1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1 = (product_1 >> 32) ^ c1 ^ k0, product_1 & _MASK32
        c2, c3 = (product_0 >> 32) ^ c3 ^ k1, product_0 & _MASK32
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def key_of(seed: SupportsIndex, stream: str) -> int:
    """Return the 64-bit key of a stream: BLAKE2b with 8 bytes of digest over the seed and the stream's name.

    The bytes are the seed mod 2**64 as 8 little-endian bytes, then the name in UTF-8; the digest is read as a
    little-endian number.

    Raises:
        ValueError: the seed is outside [-2**63, 2**64).
    """
    number = index(seed)
    if not -(2**63) <= number <= _MASK64:
        raise ValueError(f"seed {number} does not fit in 64 bits")
    data = (number & _MASK64).to_bytes(8, "little") + stream.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def uniform(rng: Rng, draw: SupportsIndex) -> np.float64:
    """Return a number in [0, 1), a multiple of 2**-53.

    Args:
        rng: (key, id, step).
        draw: which of the row's draws of this function in this phase and step, 0 <= draw < 2**29.

    Raises:
        ValueError: draw, key, id or step is out of range.
    """
    number = check_draw("uniform", draw)
    return np.float64((_bits(rng, SLOT_UNIFORM, number >> 1, number & 1) >> 11) * 2.0**-53)


def uniform32(rng: Rng, draw: SupportsIndex) -> np.float32:
    """Return a float32 in [0, 1), a multiple of 2**-24; four draws share a block.

    Args:
        rng: (key, id, step).
        draw: which of the row's draws of this function in this phase and step, 0 <= draw < 2**30.

    Raises:
        ValueError: draw, key, id or step is out of range.
    """
    number = check_draw("uniform32", draw)
    return np.float32((_block(rng, SLOT_UNIFORM32, number >> 2)[number & 3] >> 8) * 2.0**-24)


def normal(rng: Rng, draw: SupportsIndex) -> np.float64:
    """Return a standard normal number, by inversion (AS 241) of one number of 52 bits.

    The distribution is symmetric, and limited to [-8.21, 8.21].

    Args:
        rng: (key, id, step).
        draw: which of the row's draws of this function in this phase and step, 0 <= draw < 2**29.

    Raises:
        ValueError: draw, key, id or step is out of range.
    """
    number = check_draw("normal", draw)
    return np.float64(_normal_quantile(_open_unit(_bits(rng, SLOT_NORMAL, number >> 1, number & 1))))


def exponential(rng: Rng, draw: SupportsIndex) -> np.float64:
    """Return an exponentially distributed number of mean 1, positive and below 36.8.

    Args:
        rng: (key, id, step).
        draw: which of the row's draws of this function in this phase and step, 0 <= draw < 2**29.

    Raises:
        ValueError: draw, key, id or step is out of range.
    """
    number = check_draw("exponential", draw)
    return np.float64(-_log(_open_unit(_bits(rng, SLOT_EXPONENTIAL, number >> 1, number & 1))))


def integers(rng: Rng, draw: SupportsIndex, n: SupportsIndex) -> np.int64:
    """Return a uniformly distributed integer in [0, n).

    Lemire, "Fast random integer generation in an interval", ACM TOMACS 29 (2019), doi:10.1145/3230636: the
    upper half of a 64-bit number times n, unless the lower half says that the number must be drawn again.

    Args:
        rng: (key, id, step).
        draw: which of the row's draws of this function in this phase and step, 0 <= draw < 2**20.
        n: how many values there are, 1 <= n <= 2**63.

    Raises:
        ValueError: n, draw, key, id or step is out of range.
    """
    number, count = check_draw("integers", draw), check_count(n)
    reject_below = 2**64 % count
    product = 0
    for attempt in range(ATTEMPTS):  # one attempt in three is rejected at worst: the last is never reached
        product = _bits(rng, SLOT_INTEGERS, number << ATTEMPTS_SHIFT | attempt >> 1, attempt & 1) * count
        if product & _MASK64 >= reject_below:
            break
    return np.int64(product >> 64)


class RowRandom:
    """Random numbers of many rows at once, for column phases, with the same bits as in row kernels.

    Attributes:
        key: 64-bit key of the stream (`key_of`).
        ids: the rows' ids, uint64 (rows,), or the id of the first row if they are consecutive.
        rows: number of rows.
        step: the step.
    """

    __slots__ = ("_ids", "_start", "ids", "key", "rows", "step")

    def __init__(self, key: int, ids: NDArray[np.uint64] | int, rows: int, step: int) -> None:
        """Check and store the arguments; nothing is computed yet.

        Raises:
            ValueError: key, ids or step do not fit the counter, or the ids are not uint64 (rows,).
        """
        self.key, self.ids, self.rows, self.step = key, ids, rows, step
        if isinstance(ids, np.ndarray):
            if ids.dtype != np.uint64 or ids.shape != (rows,):
                raise ValueError(f"ids must be uint64 ({rows},), not {ids.dtype} {ids.shape}")
            self._start, self._ids = np.uint64(0), np.ascontiguousarray(ids)
            _check_rng((key, 0, step))
        else:
            _check_rng((key, ids, step))
            if rows < 0 or index(ids) + rows > 2**64:
                raise ValueError(f"{rows} ids from {ids} on do not fit in 64 bits")
            self._start, self._ids = np.uint64(ids), np.empty(0, np.uint64)

    def uniform(self, draw: SupportsIndex) -> NDArray[np.float64]:
        """Return each row's `uniform(rng, draw)`: float64 (rows,)."""
        return self._fill("uniform", draw, np.empty(self.rows, np.float64))

    def uniform32(self, draw: SupportsIndex) -> NDArray[np.float32]:
        """Return each row's `uniform32(rng, draw)`: float32 (rows,)."""
        return self._fill("uniform32", draw, np.empty(self.rows, np.float32))

    def normal(self, draw: SupportsIndex) -> NDArray[np.float64]:
        """Return each row's `normal(rng, draw)`: float64 (rows,)."""
        return self._fill("normal", draw, np.empty(self.rows, np.float64))

    def exponential(self, draw: SupportsIndex) -> NDArray[np.float64]:
        """Return each row's `exponential(rng, draw)`: float64 (rows,)."""
        return self._fill("exponential", draw, np.empty(self.rows, np.float64))

    def integers(self, draw: SupportsIndex, n: SupportsIndex) -> NDArray[np.int64]:
        """Return each row's `integers(rng, draw, n)`: int64 (rows,)."""
        return self._fill("integers", draw, np.empty(self.rows, np.int64), np.uint64(check_count(n)))

    def _fill(self, kind: str, draw: SupportsIndex, out: NDArray[Any], *more: Any) -> NDArray[Any]:
        number = np.uint64(check_draw(kind, draw))
        from rustsim_hpc.kernels import philox

        fill = getattr(philox, f"fill_{kind}")
        fill(np.uint64(self.key), self._start, self._ids, np.uint64(self.step), number, *more, out)
        return out


def check_draw(function: str, draw: SupportsIndex) -> int:
    """Return draw as an int.

    Raises:
        ValueError: draw is outside [0, DRAWS[function]).
    """
    number = index(draw)
    if not 0 <= number < DRAWS[function]:
        raise ValueError(f"rs.random.{function}: draw {number} is outside [0, {DRAWS[function]})")
    return number


def check_count(n: SupportsIndex) -> int:
    """Return n, the number of values of `integers`, as an int.

    Raises:
        ValueError: n is outside [1, 2**63].
    """
    count = index(n)
    if not 1 <= count <= 2**63:
        raise ValueError(f"rs.random.integers: n = {count} is outside [1, 2**63]")
    return count


def _check_rng(rng: Rng) -> tuple[int, int, int]:
    if len(rng) != 3:
        raise ValueError(f"rng must be (key, id, step), not {len(rng)} numbers")
    key, row_id, step = index(rng[0]), index(rng[1]), index(rng[2])
    if not (0 <= key <= _MASK64 and 0 <= row_id <= _MASK64):
        raise ValueError(f"rng: key {key} and id {row_id} must be in [0, 2**64)")
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"rng: step {step} is outside [0, 2**32): the counter has no room for it")
    return key, row_id, step


def _block(rng: Rng, slot: int, number: int) -> tuple[int, int, int, int]:
    """Return the four words of a block of a function's slot."""
    key, row_id, step = _check_rng(rng)
    counter = (row_id & _MASK32, row_id >> 32, step, slot << SLOT_SHIFT | number)
    return philox4x32_10(counter, (key & _MASK32, key >> 32))


def _bits(rng: Rng, slot: int, number: int, half: int) -> int:
    """Return 64 bits of a block: its words 0 and 1 (half 0), or 2 and 3 (half 1), the first one the upper."""
    words = _block(rng, slot, number)
    return words[2 * half] << 32 | words[2 * half + 1]


def _open_unit(bits: int) -> float:
    """Return the centre of the k-th of 2**52 equal parts of (0, 1), exactly; k is the upper 52 bits."""
    return ((bits >> 12) + 0.5) * 2.0**-52


def _horner(x: float, coefficients: tuple[float, ...]) -> float:
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _log(x: float) -> float:
    """Return the natural logarithm of a positive, normal x: x = 2**k (1 + f), s = f / (2 + f)."""
    bits: int = struct.unpack("<Q", struct.pack("<d", x))[0] + (_ONE_BITS - _ROOT_HALF_BITS)
    k = (bits >> 52) - 1023.0
    reduced: float = struct.unpack("<d", struct.pack("<Q", (bits & _FRACTION_MASK) + _ROOT_HALF_BITS))[0]
    f = reduced - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    series = z * _horner(w, LOG_ODD) + w * _horner(w, LOG_EVEN)
    half_square = 0.5 * f * f
    return s * (half_square + series) + k * LN2_LOW - half_square + f + k * LN2_HIGH


def _normal_quantile(u: float) -> float:
    """Return the quantile u of the standard normal distribution, 0 < u < 1."""
    q = u - 0.5
    if abs(q) <= CENTRAL_LIMIT:
        r = CENTRAL_SQUARE - q * q
        return q * _horner(r, CENTRAL_NUMERATOR) / _horner(r, CENTRAL_DENOMINATOR)
    r = math.sqrt(-_log(u if q < 0.0 else 1.0 - u))
    if r <= TAIL_LIMIT:
        x = _horner(r - TAIL_SHIFT, TAIL_NUMERATOR) / _horner(r - TAIL_SHIFT, TAIL_DENOMINATOR)
    else:
        x = _horner(r - TAIL_LIMIT, FAR_NUMERATOR) / _horner(r - TAIL_LIMIT, FAR_DENOMINATOR)
    return -x if q < 0.0 else x
