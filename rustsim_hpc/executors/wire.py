"""What a parent and its worker processes say to each other: bytes of control, never columns.

An order is 24 bytes, and behind them the results of reductions and derived values that are new since the last
one, as raw bytes. An answer is 8 bytes: how long a pickled list of failures follows, 0 when all is well.
Pickle is between a process and its own children only, over pipes that have no name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rustsim_hpc.modeling.program import Program

Array = np.ndarray[Any, Any]

ORDER = struct.Struct("<h??IQQ")
"""Segment, whether digests are wanted, whether earlier values are void, steps to make, step index, bytes of
new values."""

LENGTH = struct.Struct("<Q")
"""Bytes that follow: an answer, and what goes before a message at the start."""

_VALUE = struct.Struct("<HBB")
"""Place of a value's name, dimensions, letters of the dtype."""


def value_names(program: Program) -> tuple[str, ...]:
    """Return the names of all results of reductions and derived values that a program makes."""
    derived = [name for segment in program.segments for _, derive in segment.derives for name in derive.names]
    return (*(reduction.name for reduction in program.reductions), *derived)


def encode_values(values: Mapping[str, Any], names: Sequence[str]) -> bytes:
    """Return values (NumPy scalars or arrays) as bytes; ``names`` are all there may be, in a fixed order."""
    parts = []
    for name, value in values.items():
        array = np.asarray(value)
        letters = array.dtype.str.encode()
        parts.append(_VALUE.pack(names.index(name), array.ndim, len(letters)))
        parts.append(letters)
        parts.append(struct.pack(f"<{array.ndim}Q", *array.shape))
        parts.append(array.tobytes())
    return b"".join(parts)


def decode_values(data: bytes | bytearray, names: Sequence[str]) -> dict[str, Any]:
    """Return what :func:`encode_values` was given; arrays are read-only copies."""
    values: dict[str, Any] = {}
    start = 0
    while start < len(data):
        place, dims, letters = _VALUE.unpack_from(data, start)
        start += _VALUE.size
        dtype = np.dtype(bytes(data[start : start + letters]).decode())
        start += letters
        shape = struct.unpack_from(f"<{dims}Q", data, start)
        start += 8 * dims
        count = int(np.prod(shape, dtype=np.int64))
        array = np.empty(shape, dtype)  # and not a view: compiled code takes aligned arrays
        if count:
            array.reshape(-1)[:] = np.frombuffer(data, dtype, count, start)
        start += count * dtype.itemsize
        array.flags.writeable = False
        values[names[place]] = array if dims else array[()]
    return values
