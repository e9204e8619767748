"""Compiled bodies of `rustsim_hpc.random`: the bits of its plain Python functions, inlined in row kernels.

Words of 32 bits are kept in uint64, and their upper halves are cleared only where a product needs it: LLVM
then uses one 32 x 32 -> 64 bit multiplication for each, computes a block once for the draws that share it,
and vectorises over rows. Nothing here may raise: a draw or count that is out of range gives a value that the
function never returns otherwise, NaN or -1; if it is a literal, the kernel does not compile.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import overload

from rustsim_hpc import random as faces
from rustsim_hpc.kernels.cached import INLINED, cached_njit

_U = np.uint64
_0, _1, _2, _3 = _U(0), _U(1), _U(2), _U(3)
_8, _11, _12, _32, _52 = _U(8), _U(11), _U(12), _U(32), _U(52)
_LOW = _U(2**32 - 1)
_MULTIPLIER_0, _MULTIPLIER_1 = _U(0xD2511F53), _U(0xCD9E8D57)
_WEYL_0, _WEYL_1 = _U(0x9E3779B9), _U(0xBB67AE85)

_UNIFORM = _U(faces.SLOT_UNIFORM << faces.SLOT_SHIFT)
_UNIFORM32 = _U(faces.SLOT_UNIFORM32 << faces.SLOT_SHIFT)
_NORMAL = _U(faces.SLOT_NORMAL << faces.SLOT_SHIFT)
_EXPONENTIAL = _U(faces.SLOT_EXPONENTIAL << faces.SLOT_SHIFT)
_INTEGERS = _U(faces.SLOT_INTEGERS << faces.SLOT_SHIFT)
_UNIFORM_DRAWS, _UNIFORM32_DRAWS = _U(faces.DRAWS["uniform"]), _U(faces.DRAWS["uniform32"])
_NORMAL_DRAWS, _EXPONENTIAL_DRAWS = _U(faces.DRAWS["normal"]), _U(faces.DRAWS["exponential"])
_INTEGERS_DRAWS = _U(faces.DRAWS["integers"])
_ATTEMPTS, _ATTEMPTS_SHIFT = _U(faces.ATTEMPTS), _U(faces.ATTEMPTS_SHIFT)

_UNIT_53, _UNIT_52, _UNIT_24 = 2.0**-53, 2.0**-52, np.float32(2.0**-24)
_NAN32 = np.float32(np.nan)

_CENTRAL_NUMERATOR, _CENTRAL_DENOMINATOR = faces.CENTRAL_NUMERATOR, faces.CENTRAL_DENOMINATOR
_TAIL_NUMERATOR, _TAIL_DENOMINATOR = faces.TAIL_NUMERATOR, faces.TAIL_DENOMINATOR
_FAR_NUMERATOR, _FAR_DENOMINATOR = faces.FAR_NUMERATOR, faces.FAR_DENOMINATOR
_CENTRAL_LIMIT, _CENTRAL_SQUARE = faces.CENTRAL_LIMIT, faces.CENTRAL_SQUARE
_TAIL_LIMIT, _TAIL_SHIFT = faces.TAIL_LIMIT, faces.TAIL_SHIFT
_LN2_HIGH, _LN2_LOW = faces.LN2_HIGH, faces.LN2_LOW
_LOG_ODD, _LOG_EVEN = faces.LOG_ODD, faces.LOG_EVEN
_ROOT_HALF, _ONE_TO_ROOT_HALF = _U(0x3FE6A09E << 32), _U((0x3FF00000 - 0x3FE6A09E) << 32)
_FRACTION = _U(2**52 - 1)


# -- Philox4x32-10 ---------------------------------------------------------------------------------------


@njit(**INLINED)
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Return the counter after one round; upper halves of words are not cleared."""
    product_0, product_1 = (c0 & _LOW) * _MULTIPLIER_0, (c2 & _LOW) * _MULTIPLIER_1
    return (product_1 >> _32) ^ c1 ^ k0, product_1, (product_0 >> _32) ^ c3 ^ k1, product_0


@njit(**INLINED)
def _nine_rounds(key, row_id, step, block):  # type: ignore[no-untyped-def]
    """Return counter and key before the last round; upper halves of words are not cleared."""
    c0, c1, c2, c3 = row_id, row_id >> _32, step, block
    k0, k1 = key, key >> _32
    for _ in range(9):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = k0 + _WEYL_0, k1 + _WEYL_1
    return c0, c1, c2, c3, k0, k1


@njit(**INLINED)
def half_block(key, row_id, step, block, half):  # type: ignore[no-untyped-def]
    """Return words 0 and 1 of a block (half 0), or 2 and 3 (half 1), as 64 bits, the first word upper.

    A product of the last round already holds the two words, except for what is XORed into the upper one.
    """
    c0, c1, c2, c3, k0, k1 = _nine_rounds(key, row_id, step, block)
    first = ((c2 & _LOW) * _MULTIPLIER_1) ^ ((c1 ^ k0) << _32)
    second = ((c0 & _LOW) * _MULTIPLIER_0) ^ ((c3 ^ k1) << _32)
    return second if half else first


@njit(**INLINED)
def _word(key, row_id, step, block, place):  # type: ignore[no-untyped-def]
    """Return word 0 to 3 of a block."""
    c0, c1, c2, c3, k0, k1 = _nine_rounds(key, row_id, step, block)
    w0, w1, w2, w3 = _round(c0, c1, c2, c3, k0, k1)
    low_pair = w1 if place & _1 else w0
    high_pair = w3 if place & _1 else w2
    return (high_pair if place & _2 else low_pair) & _LOW


# -- Arithmetic, operation for operation as in the plain functions ---------------------------------------


@njit(**INLINED)
def _open_unit(bits):  # type: ignore[no-untyped-def]
    return (np.float64(bits >> _12) + 0.5) * _UNIT_52


@njit(**INLINED)
def _horner(x, coefficients):  # type: ignore[no-untyped-def]
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


@njit(**INLINED)
def _log(x):  # type: ignore[no-untyped-def]
    bits = np.float64(x).view(np.uint64) + _ONE_TO_ROOT_HALF
    k = np.float64(bits >> _52) - 1023.0
    f = np.uint64((bits & _FRACTION) + _ROOT_HALF).view(np.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    series = z * _horner(w, _LOG_ODD) + w * _horner(w, _LOG_EVEN)
    half_square = 0.5 * f * f
    return s * (half_square + series) + k * _LN2_LOW - half_square + f + k * _LN2_HIGH


@njit(**INLINED)
def _normal_quantile(u):  # type: ignore[no-untyped-def]
    q = u - 0.5
    if abs(q) <= _CENTRAL_LIMIT:
        r = _CENTRAL_SQUARE - q * q
        return q * _horner(r, _CENTRAL_NUMERATOR) / _horner(r, _CENTRAL_DENOMINATOR)
    r = math.sqrt(-_log(u if q < 0.0 else 1.0 - u))
    if r <= _TAIL_LIMIT:
        x = _horner(r - _TAIL_SHIFT, _TAIL_NUMERATOR) / _horner(r - _TAIL_SHIFT, _TAIL_DENOMINATOR)
    else:
        x = _horner(r - _TAIL_LIMIT, _FAR_NUMERATOR) / _horner(r - _TAIL_LIMIT, _FAR_DENOMINATOR)
    return -x if q < 0.0 else x


@njit(**INLINED)
def _upper_product(a, b):  # type: ignore[no-untyped-def]
    """Return the upper 64 bits of the 128-bit product."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _32, b & _LOW, b >> _32
    cross_1, cross_2 = a_low * b_high, a_high * b_low
    middle = ((a_low * b_low) >> _32) + (cross_1 & _LOW) + (cross_2 & _LOW)
    return a_high * b_high + (cross_1 >> _32) + (cross_2 >> _32) + (middle >> _32)


# -- The functions, all arguments uint64 -----------------------------------------------------------------


@njit(**INLINED)
def _uniform(key, row_id, step, draw):  # type: ignore[no-untyped-def]
    value = np.float64(half_block(key, row_id, step, _UNIFORM | (draw >> _1), draw & _1) >> _11) * _UNIT_53
    return value if draw < _UNIFORM_DRAWS else np.nan


@njit(**INLINED)
def _uniform32(key, row_id, step, draw):  # type: ignore[no-untyped-def]
    word = _word(key, row_id, step, _UNIFORM32 | (draw >> _2), draw & _3)
    value = np.float32(np.int32(word >> _8)) * _UNIT_24
    return value if draw < _UNIFORM32_DRAWS else _NAN32


@njit(**INLINED)
def _normal(key, row_id, step, draw):  # type: ignore[no-untyped-def]
    value = _normal_quantile(_open_unit(half_block(key, row_id, step, _NORMAL | (draw >> _1), draw & _1)))
    return value if draw < _NORMAL_DRAWS else np.nan


@njit(**INLINED)
def _exponential(key, row_id, step, draw):  # type: ignore[no-untyped-def]
    value = -_log(_open_unit(half_block(key, row_id, step, _EXPONENTIAL | (draw >> _1), draw & _1)))
    return value if draw < _EXPONENTIAL_DRAWS else np.nan


@njit(error_model="numpy", nogil=True)
def _draw_again(key, row_id, step, first_block, n):  # type: ignore[no-untyped-def]
    """Return `integers` if the first attempt's lower half was below n; seldom called, so not inlined."""
    reject_below = (_0 - n) % n
    upper = _0
    for attempt in range(_ATTEMPTS):
        bits = half_block(key, row_id, step, first_block | (_U(attempt) >> _1), _U(attempt) & _1)
        upper = _upper_product(bits, n)
        if bits * n >= reject_below:
            break
    return upper


@njit(**INLINED)
def _integers(key, row_id, step, draw, n):  # type: ignore[no-untyped-def]
    first_block = _INTEGERS | (draw << _ATTEMPTS_SHIFT)
    bits = half_block(key, row_id, step, first_block, _0)
    upper = _upper_product(bits, n)
    if bits * n < n:
        upper = _draw_again(key, row_id, step, first_block, n)
    return np.int64(upper) if draw < _INTEGERS_DRAWS else np.int64(-1)


# -- Whole columns ---------------------------------------------------------------------------------------
# Row i has the id ids[i], or start + i where ids is empty; all numbers are uint64.


@cached_njit()
def fill_uniform(key, start, ids, step, draw, out):  # type: ignore[no-untyped-def]
    """Set out[i] (float64) to each row's `uniform`."""
    for i in range(out.size):
        out[i] = _uniform(key, ids[i] if ids.size else start + _U(i), step, draw)


@cached_njit()
def fill_uniform32(key, start, ids, step, draw, out):  # type: ignore[no-untyped-def]
    """Set out[i] (float32) to each row's `uniform32`."""
    for i in range(out.size):
        out[i] = _uniform32(key, ids[i] if ids.size else start + _U(i), step, draw)


@cached_njit()
def fill_normal(key, start, ids, step, draw, out):  # type: ignore[no-untyped-def]
    """Set out[i] (float64) to each row's `normal`."""
    for i in range(out.size):
        out[i] = _normal(key, ids[i] if ids.size else start + _U(i), step, draw)


@cached_njit()
def fill_exponential(key, start, ids, step, draw, out):  # type: ignore[no-untyped-def]
    """Set out[i] (float64) to each row's `exponential`."""
    for i in range(out.size):
        out[i] = _exponential(key, ids[i] if ids.size else start + _U(i), step, draw)


@cached_njit()
def fill_integers(key, start, ids, step, draw, n, out):  # type: ignore[no-untyped-def]
    """Set out[i] (int64) to each row's `integers`."""
    for i in range(out.size):
        out[i] = _integers(key, ids[i] if ids.size else start + _U(i), step, draw, n)


# -- Overloads for row kernels ---------------------------------------------------------------------------

MAX_READY = 2
"""Maximum number of first draws of `uniform`, computed for a whole tile, after key, id and step in a rng."""

_PLAIN = 3
_registering = threading.Lock()
_registered: list[bool] = []


def register() -> None:
    """Make the functions of `rustsim_hpc.random` callable in compiled code; a second call does nothing."""
    with _registering:
        if _registered:
            return
        for name, body in _BODIES.items():
            _register_draw(name, getattr(faces, name), body)
        _register_integers()
        _registered.append(True)


_BODIES: dict[str, Any] = {
    "uniform": _uniform,
    "uniform32": _uniform32,
    "normal": _normal,
    "exponential": _exponential,
}


def _register_draw(name: str, face: Callable[..., Any], body: Any) -> None:
    @overload(face, jit_options=INLINED, prefer_literal=True)
    def typed(rng, draw):  # type: ignore[no-untyped-def]
        _check_types(name, rng, draw)
        if (
            name == "uniform"
            and isinstance(draw, types.IntegerLiteral)
            and draw.literal_value < len(rng) - _PLAIN
        ):
            place = _PLAIN + draw.literal_value

            def ready(rng, draw):  # type: ignore[no-untyped-def]  # noqa: ARG001
                return np.float64(rng[place] >> _11) * _UNIT_53

            return ready

        def compiled(rng, draw):  # type: ignore[no-untyped-def]
            return body(_U(rng[0]), _U(rng[1]), _U(rng[2]), _U(draw))

        return compiled


def _register_integers() -> None:
    @overload(faces.integers, jit_options=INLINED, prefer_literal=True)
    def typed(rng, draw, n):  # type: ignore[no-untyped-def]
        _check_types("integers", rng, draw)
        if not isinstance(n, types.Integer):
            raise TypingError(f"rs.random.integers: n must be an integer, not {n}")
        if isinstance(n, types.IntegerLiteral):
            faces.check_count(n.literal_value)
        # The largest count, 2**63, is a uint64; a negative signed count must not pass as a large one.
        largest = 2**63 if not n.signed else 2**63 - 1

        def compiled(rng, draw, n):  # type: ignore[no-untyped-def]
            if n < 1 or n > largest:
                return np.int64(-1)
            return _integers(_U(rng[0]), _U(rng[1]), _U(rng[2]), _U(draw), _U(n))

        return compiled


def _check_types(name: str, rng: Any, draw: Any) -> None:
    """Check the types of a call's arguments in a kernel.

    Raises:
        TypingError: rng is not a kernel's rng, or draw is not an integer.
        ValueError: draw is a literal that is out of range.
    """
    lengths = range(_PLAIN, _PLAIN + MAX_READY + 1)
    if not (isinstance(rng, types.BaseTuple) and len(rng) in lengths and all(map(_is_integer, rng))):
        raise TypingError(f"rs.random.{name}: the first argument must be the kernel's rng, not {rng}")
    if not _is_integer(draw):
        raise TypingError(f"rs.random.{name}: draw must be an integer, not {draw}")
    if isinstance(draw, types.IntegerLiteral):
        faces.check_draw(name, draw.literal_value)


def _is_integer(kind: Any) -> bool:
    return isinstance(kind, types.Integer)
