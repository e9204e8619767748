"""Functions that generated CUDA stages call: integer accumulators with atomic operations, digest of one row.

A state lies in an int64 array from index `at` on, in the layout of :mod:`rustsim_hpc.kernels.reduce`. All
atomic operations are on 64-bit integers, so the order of threads does not affect the bits. They are compiled
with a stage; their CPU counterparts are in :mod:`rustsim_hpc.kernels.reduce` and `hashing`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, njit

from rustsim_hpc.kernels import cuda_builtins
from rustsim_hpc.kernels.cached import INLINED
from rustsim_hpc.kernels.convert import fits, stored
from rustsim_hpc.kernels.exact_sum import INF_SEEN, MINUS_INF_SEEN, NAN_SEEN
from rustsim_hpc.kernels.hashing import block_multiplier, load_item
from rustsim_hpc.kernels.reduce import _sort_key as sort_key

_U, _I = np.uint64, np.int64
_0, _1, _5, _31, _32, _52, _63 = (_U(n) for n in (0, 1, 5, 31, 32, 52, 63))
_12, _LOW, _ROWS = _U(12), _U(2**32 - 1), _U(4095)
_SIGNED_32 = _I(32)
_FRACTION, _HIDDEN_BIT, _EXPONENT = _U(2**52 - 1), _U(2**52), _U(0x7FF)
_NAN, _INF, _MINUS_INF = _I(NAN_SEEN), _I(INF_SEEN), _I(MINUS_INF_SEEN)


def add_word(words, at, value):  # type: ignore[no-untyped-def]
    """Add to an integer, atomically."""
    cuda.atomic.add(words, at, value)


def least_word(words, at, value):  # type: ignore[no-untyped-def]
    """Keep the smaller integer, atomically."""
    cuda.atomic.min(words, at, value)


def most_word(words, at, value):  # type: ignore[no-untyped-def]
    """Keep the larger integer, atomically."""
    cuda.atomic.max(words, at, value)


def sum_float(state, at, value):  # type: ignore[no-untyped-def]
    """Add a float to an exact sum, as `exact_sum.add`."""
    bits = np.float64(value).view(np.uint64)
    exponent, magnitude, sign = (bits >> _52) & _EXPONENT, bits & _FRACTION, _0 - (bits >> _63)
    if exponent == _EXPONENT:
        seen = _NAN if magnitude else (_MINUS_INF if sign else _INF)
        cuda.atomic.add(state, at + seen, _I(1))
        return
    position = _0
    if exponent:
        magnitude |= _HIDDEN_BIT
        position = exponent - _1
    if magnitude == _0:
        return
    limb, shift = at + _I(position >> _5), position & _31
    upper = magnitude >> (_32 - shift)
    cuda.atomic.add(state, limb, _I((((magnitude << shift) & _LOW) ^ sign) - sign))
    cuda.atomic.add(state, limb + _I(1), _I(((upper & _LOW) ^ sign) - sign))
    cuda.atomic.add(state, limb + _I(2), _I(((upper >> _32) ^ sign) - sign))


def sum_integer(state, at, value):  # type: ignore[no-untyped-def]
    """Add an integer or bool to a sum of integers, as `reduce._add_integer`."""
    bits = _U(value)
    cuda.atomic.add(state, at, _I(bits & _LOW))
    cuda.atomic.add(state, at + _I(1), _I(bits >> _32) - (_I(value < 0) << _SIGNED_32))


@njit(**INLINED)
def digest_item(bits, row, keys, key_index, wide):  # type: ignore[no-untyped-def]
    """Return one item's term of a column's digest; `wide`: the item has 8 bytes."""
    place, block = row & _ROWS, row >> _12
    if wide:
        low = (bits & _LOW) * _U(keys[_U(2) * place]) * block_multiplier(block, key_index, _0)
        return low + (bits >> _32) * _U(keys[_U(2) * place + _1]) * block_multiplier(block, key_index, _1)
    return bits * _U(keys[place]) * block_multiplier(block, key_index, _0)


def cuda_names() -> dict[str, Any]:
    """Return the globals of a generated stage that is compiled for CUDA."""
    cuda_builtins.register()
    atomics = (add_word, least_word, most_word, sum_float, sum_integer)
    names: dict[str, Any] = {body.__name__: cuda.jit(body, device=True) for body in atomics}
    names |= {"digest_item": digest_item, "load_item": load_item, "stored": stored, "fits": fits}
    return names | {"sort_key": sort_key, "cuda": cuda, "np": np}
