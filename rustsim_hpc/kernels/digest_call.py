"""The digest's sum over a range of rows as a function with an address, one for each item size."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from numba import carray, types

from rustsim_hpc.kernels.cached import cached_njit
from rustsim_hpc.kernels.far_call import address_of
from rustsim_hpc.kernels.hashing import digest_range

_ITEMS = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}
_C_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64
)


@cached_njit(no_cpython_wrapper=True)
def _digest_at(values, rows, first_row, keys, key_index):  # type: ignore[no-untyped-def]
    # Keys are read by computed index, so the length of their array does not matter.
    return digest_range(carray(values, rows), first_row, carray(keys, 1), key_index)


@lru_cache(maxsize=8)
def digest_address(itemsize: int) -> int:
    """Return the address of the compiled digest function for items of 1, 2, 4 or 8 bytes.

    The function takes the address of the first item, the number of rows, the global row of the first, the
    address of the keys (see :func:`rustsim_hpc.proof.fingerprint.digest_keys`) and the key index, and returns
    the sum mod 2^64.
    """
    items, keys, word = types.CPointer(_ITEMS[itemsize]), types.CPointer(types.uint32), types.uint64
    return address_of(_digest_at, items, word, word, keys, word)


def digest_function(itemsize: int) -> Callable[[int, int, int, int, int], int]:
    """Return the function at :func:`digest_address`, callable from Python; it releases the GIL."""
    return _C_FUNCTION(digest_address(itemsize))
