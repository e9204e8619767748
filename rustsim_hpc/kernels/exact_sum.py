"""Exact sums of any number of floats, in integers: the same bits for any order and any partition of the rows.

A state is an int64 array of 70 words. Words 0 to 66 are limbs: limb j is in units of 2**(32 j - 1074), so
that together they are a fixed-point number that covers every float64 and the sums of 2**64 of them. Words 67
to 69 count NaN, +inf and -inf. A value is added to three adjacent limbs, 32 bits each: 2**31 values can be
added before a `carry` is needed, and states are merged by adding them element by element.

This is the "small superaccumulator" of Neal, "Fast exact summation using small and large superaccumulators",
arXiv:1505.05571 (2015). `fold` first gathers a block of values in two integers, exactly, by adding and
subtracting large powers of two, as in Demmel, Nguyen, "Parallel reproducible summation", IEEE Transactions on
Computers 64 (2015), doi:10.1109/TC.2014.2345391.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rustsim_hpc.kernels.cached import CALLED, ENTERED, INLINED, cached_njit

WORDS = 70
LIMBS = 67
NAN_SEEN, INF_SEEN, MINUS_INF_SEEN = 67, 68, 69

_U, _I = np.uint64, np.int64
_0, _1, _2, _5, _31, _32, _52, _53, _63 = (_U(n) for n in (0, 1, 2, 5, 31, 32, 52, 53, 63))
_LOW, _SIGNED_LOW, _SIGNED_32 = _U(2**32 - 1), _I(2**32 - 1), _I(32)
_FRACTION, _HIDDEN_BIT, _EXPONENT = _U(2**52 - 1), _U(2**52), _U(0x7FF)
_INFINITE, _MAGNITUDE = _U(0x7FF << 52), _I(2**63 - 1)

_BLOCK = 1024  # values; at most 2**12, so that the sum of as many numbers below 2**50 fits
_HALF = _U(2**51)  # the fraction of 1.5
# Exponents (as in the bits) of a block's largest value for which both anchors are ordinary numbers.
_LEAST, _LARGEST = _U(64), _U(2040)


# -- One value ---------------------------------------------------------------------------------------------


@njit(**INLINED)
def _add_at(state, magnitude, sign, position):  # type: ignore[no-untyped-def]
    """Add magnitude (below 2**63; sign: 0, or 2**64 - 1 to subtract it) times 2**(position - 1074)."""
    limb, shift = position >> _5, position & _31
    upper = magnitude >> (_32 - shift)
    state[limb] += _I((((magnitude << shift) & _LOW) ^ sign) - sign)
    state[limb + _1] += _I(((upper & _LOW) ^ sign) - sign)
    state[limb + _2] += _I(((upper >> _32) ^ sign) - sign)


@njit(forceinline=True, **ENTERED)
def add(state, value):  # type: ignore[no-untyped-def]
    """Add one float."""
    bits = np.float64(value).view(np.uint64)
    exponent, fraction, sign = (bits >> _52) & _EXPONENT, bits & _FRACTION, _0 - (bits >> _63)
    if exponent == _EXPONENT:
        state[NAN_SEEN if fraction else (MINUS_INF_SEEN if sign else INF_SEEN)] += 1
    elif exponent:
        _add_at(state, fraction | _HIDDEN_BIT, sign, exponent - _1)
    else:
        _add_at(state, fraction, sign, _0)


# -- Many values -------------------------------------------------------------------------------------------


@njit(**CALLED)
def _fold_slowly(state, values):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        add(state, values[i])


@njit(**INLINED)
def _largest_magnitude(values):  # type: ignore[no-untyped-def]
    """Return the bits of the largest absolute value; a NaN's or infinity's are larger than any number's."""
    largest = _I(0)
    for i in range(values.size):
        largest = max(largest, np.float64(values[i]).view(np.int64) & _MAGNITUDE)
    return _U(largest)


@njit(**INLINED)
def _add_units(state, units, exponent):  # type: ignore[no-untyped-def]
    """Add a signed integer (as uint64, mod 2**64) in units of the last place of floats with this exponent."""
    sign = _0 - (units >> _63)
    _add_at(state, (units ^ sign) - sign, sign, exponent - _1)


@njit(**CALLED)
def _fold_block(state, values):  # type: ignore[no-untyped-def]
    """Add up to 2**12 floats, vectorised if their exponents lie within 48 of each other.

    With an anchor C = 1.5 * 2**p and |v| <= 2**(p - 2), t = v + C lies in [2**p, 2**(p + 1)). So the bits of
    t minus those of C, as integers, are v rounded to a multiple of g = 2**(p - 52), in units of g, and
    v - (t - C) is the exact remainder, at most g / 2. The remainders are added with a second anchor, whose
    unit is 2**-51 of the first one's. If a remainder is left then, the block is added value by value.
    """
    largest = _largest_magnitude(values)
    if largest == _0:
        return
    exponent = largest >> _52
    if exponent < _LEAST or exponent > _LARGEST:
        _fold_slowly(state, values)
        return
    # With the bias of 1023, all |v| < 2**(exponent - 1022): p is exponent - 1020, and p - 51 the second one.
    first_exponent, second_exponent = exponent + _U(3), exponent - _U(48)
    first_bits, second_bits = (first_exponent << _52) | _HALF, (second_exponent << _52) | _HALF
    first, second = _U(first_bits).view(np.float64), _U(second_bits).view(np.float64)
    first_units, second_units, left = _0, _0, _0
    for i in range(values.size):
        value = np.float64(values[i])
        near = value + first
        first_units += np.float64(near).view(np.uint64) - first_bits
        rest = value - (near - first)
        near = rest + second
        second_units += np.float64(near).view(np.uint64) - second_bits
        left |= np.float64(rest - (near - second)).view(np.uint64)
    if left << _1:
        _fold_slowly(state, values)
        return
    _add_units(state, first_units, first_exponent)
    _add_units(state, second_units, second_exponent)


@cached_njit()
def fold(state, values):  # type: ignore[no-untyped-def]
    """Add an array of floats (1-D, contiguous): as `add` of each, several times as fast."""
    for start in range(0, values.size, _BLOCK):
        _fold_block(state, values[start : start + _BLOCK])


# -- Carrying and rounding ---------------------------------------------------------------------------------


@njit(**INLINED)
def carry(state):  # type: ignore[no-untyped-def]
    """Bring all limbs but the last into [0, 2**32), the last one having the sign; the sum stays the same."""
    for j in range(LIMBS - 1):
        state[j + 1] += state[j] >> _SIGNED_32
        state[j] &= _SIGNED_LOW


@njit(**CALLED)
def _leading_bits(state, top):  # type: ignore[no-untyped-def]
    """Return the 64 bits from the highest one set, whether any lower bit is set, and the bit length."""
    first, second, third = _U(state[top]), _0, _0
    if top >= 1:
        second = _U(state[top - 1])
    if top >= 2:
        third = _U(state[top - 2])
    length = (np.float64(first).view(np.uint64) >> _52) - _U(1022)
    leading = (((first << _32) | second) << (_32 - length)) | (third >> length)
    more = (third & ((_1 << length) - _1)) != _0
    for j in range(top - 2):
        more |= state[j] != 0
    return leading, more, _32 * _U(top) + length


@njit(**CALLED)
def _nearest(state):  # type: ignore[no-untyped-def]
    """Return the float64 nearest to the limbs' sum, ties to even; modifies the limbs."""
    carry(state)
    sign = _0
    if state[LIMBS - 1] < 0:
        sign = _1 << _63
        for j in range(LIMBS):
            state[j] = -state[j]
        carry(state)
    top = LIMBS - 1
    while top >= 0 and state[top] == 0:
        top -= 1
    if top < 0:
        return 0.0
    if top == LIMBS - 1:
        return _U(_INFINITE | sign).view(np.float64)
    leading, more, length = _leading_bits(state, top)
    if length <= _53:  # so many times 2**-1074 is its own bit pattern
        return _U((leading >> (_U(64) - length)) | sign).view(np.float64)
    mantissa, rest, half = leading >> _U(11), leading & _U(0x7FF), _U(0x400)
    if rest > half or (rest == half and (more or (mantissa & _1) != _0)):
        mantissa += _1
    # The mantissa's leading bit adds one to the exponent, as does a carry from rounding.
    return _U(min(((length - _53) << _52) + mantissa, _INFINITE) | sign).view(np.float64)


@cached_njit()
def carry_all(states):  # type: ignore[no-untyped-def]
    """Carry in each of many states, (n, 70)."""
    for i in range(states.shape[0]):
        carry(states[i])


@cached_njit()
def round_all(states, out):  # type: ignore[no-untyped-def]
    """Set out[i] (float64) to the correctly rounded sum of states[i], (n, 70); modifies the states."""
    for i in range(out.size):
        state = states[i]
        if state[NAN_SEEN] > 0 or (state[INF_SEEN] > 0 and state[MINUS_INF_SEEN] > 0):
            out[i] = np.nan
        elif state[INF_SEEN] > 0:
            out[i] = np.inf
        elif state[MINUS_INF_SEEN] > 0:
            out[i] = -np.inf
        else:
            out[i] = _nearest(state)
