"""The messages between a parent and its worker processes: control data, never columns.

An order is 24 bytes, followed by the results of reductions and derived values that are new since the last
one, as raw bytes. An answer is 8 bytes, the length of a pickled list of failures that follows, 0 for none.
Pickle is used only between a process and its own children, over unnamed pipes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rustsim_hpc.modeling.program import Program

Array = np.ndarray[Any, Any]

ORDER = struct.Struct("<h??IQQ")
"""Segment, whether digests are wanted, whether to discard earlier values, number of steps, step index, bytes
of new values."""

LENGTH = struct.Struct("<Q")
"""Number of bytes that follow: an answer, and the prefix of the messages at the start."""

_VALUE = struct.Struct("<HBB")
"""Index of a value's name, number of dimensions, length of the dtype string."""


def value_names(program: Program) -> tuple[str, ...]:
    """Return the names of all results of reductions and derived values that a program makes."""
    derived = [name for segment in program.segments for _, derive in segment.derives for name in derive.names]
    return (*(reduction.name for reduction in program.reductions), *derived)


def encode_values(values: Mapping[str, Any], names: Sequence[str]) -> bytes:
    """Return values (NumPy scalars or arrays) as bytes; ``names``: all possible names, in a fixed order."""
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
    """Return the values encoded by :func:`encode_values`; arrays are read-only copies."""
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
        array = np.empty(shape, dtype)  # not a view of data: compiled code needs aligned arrays
        if count:
            array.reshape(-1)[:] = np.frombuffer(data, dtype, count, start)
        start += count * dtype.itemsize
        array.flags.writeable = False
        values[names[place]] = array if dims else array[()]
    return values
