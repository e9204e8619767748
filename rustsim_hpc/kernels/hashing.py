"""Compiled bodies of the fingerprint: the FNV-1a chain and the digest's sums over rows.

The definitions are in docs/fingerprints.md, slow reference versions in tests/reference_hash.py. All functions
release the GIL, allocate nothing, and may be called from other compiled code, which inlines them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from rustsim_hpc.kernels.cached import INLINED, cached_njit

_U = np.uint64
_FNV_PRIME = _U(0x100000001B3)
_GOLDEN = _U(0x9E3779B97F4A7C15)
_MULTIPLIER_TAG = _U(0x6469676573743A4D)  # "digest:M", as in fingerprint.py
_LOW_WORD = _U(0xFFFFFFFF)
BLOCK_ROWS = _U(4096)
"""Rows of a block: they share a multiplier, and each has its own key."""


def _loader(bits: int, alignment: int) -> Callable[..., Any]:
    """Return a code generator that loads `bits` bits at an item of an array, zero-extended to 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        integer = ir.IntType(bits)
        place = builder.bitcast(cgutils.gep_inbounds(builder, view.data, arguments[1]), integer.as_pointer())
        value = builder.load(place, align=alignment)
        return value if bits == 64 else builder.zext(value, ir.IntType(64))

    return generate


def _bitwidth(dtype: Any) -> int:
    return 8 if isinstance(dtype, types.Boolean) else int(dtype.bitwidth)


@intrinsic
def item_bits(_context: Any, array: Any) -> Any:
    """Return the width of an array's items in bits, a compile-time constant unlike `itemsize`."""
    bits = _bitwidth(array.dtype)
    return types.uint64(array), lambda *_: ir.Constant(ir.IntType(64), bits)


@intrinsic
def load_item(_context: Any, array: Any, _index: Any) -> Any:
    """Load the raw bits of an item of a contiguous array, by its flat index, zero-extended to uint64."""
    bits = _bitwidth(array.dtype)
    return types.uint64(array, types.uint64), _loader(bits, bits // 8)


@intrinsic
def load_pair(_context: Any, array: Any, _index: Any) -> Any:
    """Load an item (in the low bits) and the next one as one uint64, or a single item of 8 bytes.

    Only item alignment is assumed, so a pair may start at any row.
    """
    bits = _bitwidth(array.dtype)
    return types.uint64(array, types.uint64), _loader(min(2 * bits, 64), bits // 8)


@intrinsic
def load_eight(_context: Any, array: Any, _index: Any) -> Any:
    """Load eight bytes of a contiguous uint8 array, the first in the low bits, without alignment."""
    return types.uint64(array, types.uint64), _loader(64, 1)


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """Return the raw bits of a value of a column's dtype, zero-extended to uint64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = arguments[0]
        if isinstance(value, types.Float):
            bits = builder.bitcast(bits, ir.IntType(value.bitwidth))
        return bits if bits.type.width == 64 else builder.zext(bits, ir.IntType(64))

    return types.uint64(value), generate


@cached_njit()
def fnv1a_chain(state, data):  # type: ignore[no-untyped-def]
    """Return the FNV-1a state after the bytes `data` (uint8, 1-D, contiguous), from `state` (uint64)."""
    for byte in data:
        state = (state ^ _U(byte)) * _FNV_PRIME
    return state


@njit(**INLINED)
def mix(z):  # type: ignore[no-untyped-def]
    """Return splitmix64's finaliser of z (uint64): a bijection in which every bit affects every other.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of
    Stafford's variant 13.
    """
    z = (z ^ (z >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U(27))) * _U(0x94D049BB133111EB)
    return z ^ (z >> _U(31))


@njit(**INLINED)
def block_multiplier(block, key_index, word):  # type: ignore[no-untyped-def]
    """Return M, the odd 64-bit multiplier of a block of 4096 rows for one word of one column (all uint64)."""
    seed = mix(_MULTIPLIER_TAG + (_U(2) * key_index + word + _U(1)) * _GOLDEN)
    return mix(seed + (block + _U(1)) * _GOLDEN) | _U(1)


@njit(**INLINED)
def add_pair(even, odd, value, key, bits):  # type: ignore[no-untyped-def]
    """Return a block's two sums after adding one word of values times one word of keys (all uint64).

    A word of values holds two of `bits` bits each, or the low and high half of one of 8 bytes (`bits` is 32);
    a word of keys holds two keys. Two values share a 64-bit lane, so that one load, one shift and two
    32 x 32 bit products handle both: half the time of widening each value separately.
    """
    low = (_U(1) << bits) - _U(1)
    return even + (value & low) * (key & _LOW_WORD), odd + (value >> bits) * (key >> _U(32))


@njit(**INLINED)
def block_sum(even, odd, wide, block, key_index):  # type: ignore[no-untyped-def]
    """Return a block's term of a column's digest, from its two sums; `wide`: items of 8 bytes."""
    first = block_multiplier(block, key_index, _U(0))
    if wide:
        return even * first + odd * block_multiplier(block, key_index, _U(1))
    return (even + odd) * first


@njit(**INLINED)
def _block_sums(values, index, count, keys, offset):  # type: ignore[no-untyped-def]
    """Sum value * key over `count` rows of one block: at even and odd rows, or low and high words of 8 bytes.

    index: first row in `values`; offset: its row in the block.
    """
    even = odd = _U(0)
    if item_bits(values) == 64:
        for row in range(count):
            key = load_pair(keys, _U(2) * (offset + row))
            even, odd = add_pair(even, odd, load_pair(values, index + row), key, _U(32))
        return even, odd
    bits = item_bits(values)
    for pair in range(count >> _U(1)):
        key = load_pair(keys, offset + _U(2) * pair)
        even, odd = add_pair(even, odd, load_pair(values, index + _U(2) * pair), key, bits)
    if count & _U(1):
        last = count - _U(1)
        even += load_item(values, index + last) * load_item(keys, offset + last)
    return even, odd


@njit(**INLINED)
def _four_block_sums(values, index, keys):  # type: ignore[no-untyped-def]
    """Return the sums of four whole blocks, the first starting at `values[index]`: four even, four odd.

    All four use the same keys, and four read streams keep more memory requests in flight.
    """
    wide = item_bits(values) == 64
    bits = _U(32) if wide else item_bits(values)
    step = _U(1) if wide else _U(2)  # rows of a word
    even0 = even1 = even2 = even3 = _U(0)
    odd0 = odd1 = odd2 = odd3 = _U(0)
    for word in range(BLOCK_ROWS // step):
        key = load_pair(keys, _U(2) * word)
        row = index + step * word
        even0, odd0 = add_pair(even0, odd0, load_pair(values, row), key, bits)
        even1, odd1 = add_pair(even1, odd1, load_pair(values, row + BLOCK_ROWS), key, bits)
        even2, odd2 = add_pair(even2, odd2, load_pair(values, row + _U(2) * BLOCK_ROWS), key, bits)
        even3, odd3 = add_pair(even3, odd3, load_pair(values, row + _U(3) * BLOCK_ROWS), key, bits)
    return (even0, even1, even2, even3), (odd0, odd1, odd2, odd3)


@njit(**INLINED)
def digest_range(values, first_row, keys, key_index):  # type: ignore[no-untyped-def]
    """Return the digest's sum over a range of rows of one column, mod 2^64.

    values: 1-D contiguous array of any column dtype, its raw bits count. first_row: global row of values[0].
    keys: (4096, words) uint32, C order, of `fingerprint.digest_keys`. key_index: 0 for the ids, i + 1 for
    column i.
    """
    total = index = _U(0)
    rows = _U(values.size)
    wide = item_bits(values) == 64
    while index < rows:
        row = _U(first_row) + index
        offset = row % BLOCK_ROWS
        block = row // BLOCK_ROWS
        if offset == _U(0) and rows - index >= _U(4) * BLOCK_ROWS:
            evens, odds = _four_block_sums(values, index, keys)
            for number in range(4):
                total += block_sum(evens[number], odds[number], wide, block + _U(number), _U(key_index))
            index += _U(4) * BLOCK_ROWS
        else:
            count = min(BLOCK_ROWS - offset, rows - index)
            even, odd = _block_sums(values, index, count, keys, offset)
            total += block_sum(even, odd, wide, block, _U(key_index))
            index += count
    return total


@cached_njit()
def digest_counting(start, stop, keys):  # type: ignore[no-untyped-def]
    """Return the digest's sum over the default ids (id i at row i) of rows [start, stop), without arrays."""
    total = _U(0)
    row = start
    while row < stop:
        offset = row % BLOCK_ROWS
        count = min(BLOCK_ROWS - offset, stop - row)
        even = odd = _U(0)
        for place in range(count):
            key = load_pair(keys, _U(2) * (offset + place))
            even, odd = add_pair(even, odd, row + place, key, _U(32))
        total += block_sum(even, odd, True, row // BLOCK_ROWS, _U(0))
        row += count
    return total
