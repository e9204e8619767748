"""The bits of the first draws of `uniform` for a whole tile of rows, eight rows at a time.

Written in vectors of 512 bits, which LLVM splits to the width of the CPU; its own vectoriser uses 256 bits
even if the CPU has more. The two draws of a block are computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from rustsim_hpc import random as faces
from rustsim_hpc.kernels.cached import cached_njit
from rustsim_hpc.kernels.far_call import address_of
from rustsim_hpc.kernels.philox import half_block

_U = np.uint64
_WORD = ir.IntType(64)
_ROWS = 8
_VECTOR = ir.VectorType(_WORD, _ROWS)
_LOW = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK = faces.SLOT_UNIFORM << faces.SLOT_SHIFT
_EIGHT, _FIRST_BLOCK = _U(_ROWS), _U(_BLOCK)
_POINTER, _UINT = types.CPointer(types.uint64), types.uint64


def _all(value: int) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * _ROWS)


def _spread(builder: Any, value: Any) -> Any:
    """Return a vector with a value in all lanes."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _ROWS), [0] * _ROWS)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), lanes)


def _halves(builder: Any, key: Any, ids: Any, step: Any) -> tuple[Any, Any]:
    """Return both 64-bit halves of the blocks of eight rows, as ``philox.half_block`` does.

    Upper halves of words are cleared only for products.
    """
    low, shift = _all(_LOW), _all(32)

    def product(word: Any, multiplier: int) -> Any:
        return builder.mul(builder.and_(word, low), _all(multiplier))

    def round_keys(number: int) -> tuple[Any, Any]:
        parts = (key, builder.lshr(key, ir.Constant(_WORD, 32)))
        return tuple(
            _spread(builder, builder.add(part, ir.Constant(_WORD, number * weyl)))
            for part, weyl in zip(parts, _WEYL, strict=True)
        )

    c0, c1, c2, c3 = ids, builder.lshr(ids, shift), _spread(builder, step), _all(_BLOCK)
    for number in range(_ROUNDS - 1):
        k0, k1 = round_keys(number)
        p0, p1 = product(c0, _MULTIPLIERS[0]), product(c2, _MULTIPLIERS[1])
        c0 = builder.xor(builder.xor(builder.lshr(p1, shift), c1), k0)
        c2 = builder.xor(builder.xor(builder.lshr(p0, shift), c3), k1)
        c1, c3 = p1, p0
    k0, k1 = round_keys(_ROUNDS - 1)
    first = builder.xor(product(c2, _MULTIPLIERS[1]), builder.shl(builder.xor(c1, k0), shift))
    second = builder.xor(product(c0, _MULTIPLIERS[0]), builder.shl(builder.xor(c3, k1), shift))
    return first, second


def _writer(draws: int) -> Any:
    """Return an intrinsic that computes the first ``draws`` draws of rows, eight rows at a time."""

    @intrinsic
    def fill(
        _context: Any,
        _key: Any,
        _start: Any,
        _ids: Any,
        _given: Any,
        _step: Any,
        _zero: Any,
        _one: Any,
        _groups: Any,
    ) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            key, start, ids, given, step, *outs, groups = arguments
            lanes = ir.Constant(_VECTOR, list(range(_ROWS)))
            to = [builder.bitcast(out, _VECTOR.as_pointer()) for out in outs]
            source = builder.bitcast(ids, _VECTOR.as_pointer())
            by_place = builder.icmp_unsigned("==", given, ir.Constant(_WORD, 0))

            def rows(ids_of: Callable[[Any], Any]) -> None:
                with cgutils.for_range(builder, groups, intp=_WORD) as loop:
                    made = _halves(builder, key, ids_of(loop.index), step)
                    for half, place in zip(made[:draws], to, strict=False):
                        builder.store(half, builder.gep(place, [loop.index]), align=8)

            def numbered(index: Any) -> Any:
                first = builder.add(start, builder.mul(index, ir.Constant(_WORD, _ROWS)))
                return builder.add(_spread(builder, first), lanes)

            with builder.if_else(by_place) as (default, explicit):
                with default:
                    rows(numbered)
                with explicit:
                    rows(lambda index: builder.load(builder.gep(source, [index]), align=8))
            return ir.Constant(_WORD, 0)

        return _UINT(_UINT, _UINT, _POINTER, _UINT, _UINT, _POINTER, _POINTER, _UINT), generate

    return fill


_fill_one, _fill_two = _writer(1), _writer(2)


@cached_njit(no_cpython_wrapper=True)
def _bits_of_one(key, start, ids, given, step, zero, one, rows):  # type: ignore[no-untyped-def]
    groups = rows // _EIGHT
    _fill_one(key, start, ids, given, step, zero, one, groups)
    out, explicit = carray(zero, rows), carray(ids, rows)
    for i in range(groups * _EIGHT, rows):
        out[i] = half_block(key, explicit[i] if given else start + i, step, _FIRST_BLOCK, _U(0))
    return _U(0)


@cached_njit(no_cpython_wrapper=True)
def _bits_of_two(key, start, ids, given, step, zero, one, rows):  # type: ignore[no-untyped-def]
    groups = rows // _EIGHT
    _fill_two(key, start, ids, given, step, zero, one, groups)
    first, second, explicit = carray(zero, rows), carray(one, rows), carray(ids, rows)
    for i in range(groups * _EIGHT, rows):
        row_id = explicit[i] if given else start + i
        first[i] = half_block(key, row_id, step, _FIRST_BLOCK, _U(0))
        second[i] = half_block(key, row_id, step, _FIRST_BLOCK, _U(1))
    return _U(0)


@lru_cache(maxsize=2)
def fill_bits_address(draws: int) -> int:
    """Return the address of the function that computes the bits of draw 0, or draws 0 and 1, of `uniform`.

    It takes the key, the first row's id, the address and number of explicit ids (0: none, row i has the first
    row's id + i), the step, the addresses for the bits (uint64) of draw 0 and draw 1, and the number of rows;
    it returns 0.
    """
    function = _bits_of_one if draws == 1 else _bits_of_two
    return address_of(function, _UINT, _UINT, _POINTER, _UINT, _UINT, _POINTER, _POINTER, _UINT)
