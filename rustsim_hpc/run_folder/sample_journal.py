"""The journal of samples that are not in their HDF5 file yet: whole records with a checksum.

A record is a head (magic, sizes, CRC-32), a header (JSON: step, time, and name, dtype and shape of each
array) and the arrays' bytes. Reading stops at the first record that is torn or damaged.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rustsim_hpc.files import open_regular

_HEAD = struct.Struct("<4sIQI")  # magic, header bytes, payload bytes, CRC-32 of header and payload
_MAGIC = b"rsj1"

Array = npt.NDArray[Any]
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of each array of a sample, sorted by name."""

RESERVED = ("step", "time", "rows")
"""Names that an array cannot have."""


def checked_array(name: str, value: object) -> Array:
    """Return a value as an array that can be sampled: numbers or truth values, little-endian, contiguous.

    Raises:
        TypeError: it is of another kind.
        ValueError: the name cannot be a dataset's.
    """
    if not name or "/" in name or name in {".", *RESERVED}:
        raise ValueError(f'an array cannot be named "{name}"')
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(f'array "{name}" has dtype {array.dtype}, expected numbers or truth values')
    # ascontiguousarray makes a scalar one-dimensional.
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)


@dataclass(frozen=True)
class JournalRecord:
    """One sample of a journal; the payload holds the arrays one after the other, ``end`` is where it ends."""

    step: int
    time: float
    layout: Layout
    payload: bytes
    end: int

    def arrays(self) -> dict[str, Array]:
        """Return the sample's arrays by name."""
        found, start = {}, 0
        for name, dtype, shape in self.layout:
            array = np.zeros(shape, dtype)
            block = np.frombuffer(self.payload, np.uint8, array.nbytes, start)
            array.reshape(-1).view(np.uint8)[:] = block
            found[name] = array
            start += array.nbytes
        return found


def journal_path(path: Path) -> Path:
    """Return the journal of the HDF5 file ``path``."""
    return path.with_name(f".{path.name}.journal")


def layout_of(arrays: Mapping[str, Array]) -> Layout:
    """Return the layout of a sample's arrays."""
    return tuple((name, arrays[name].dtype.str, arrays[name].shape) for name in sorted(arrays))


def pack_record(step: int, time: float, arrays: Mapping[str, Array]) -> list[bytes | memoryview]:
    """Return the parts of one record; the arrays are little-endian and contiguous."""
    layout = layout_of(arrays)
    header = json.dumps({"step": int(step), "time": float(time), "arrays": layout}).encode()
    blocks = [arrays[name].reshape(-1).view(np.uint8).data for name, _, _ in layout]
    checksum = zlib.crc32(header)
    for block in blocks:
        checksum = zlib.crc32(block, checksum)
    size = sum(len(block) for block in blocks)
    return [_HEAD.pack(_MAGIC, len(header), size, checksum), header, *blocks]


def scan_journal(path: Path) -> Iterator[JournalRecord]:
    """Yield the journal's whole records up to the first torn or damaged one; no journal has none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        file = os.fdopen(open_regular(path), "rb")
    except FileNotFoundError:
        return
    with file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            magic, header_size, payload_size, expected = _HEAD.unpack(head)
            # Check the sizes first: a damaged one must not lead to a huge allocation.
            if magic != _MAGIC or header_size + payload_size > os.fstat(file.fileno()).st_size - file.tell():
                return
            header, payload = file.read(header_size), file.read(payload_size)
            if zlib.crc32(payload, zlib.crc32(header)) != expected:
                return
            record = json.loads(header)
            layout = tuple((name, dtype, tuple(shape)) for name, dtype, shape in record["arrays"])
            yield JournalRecord(record["step"], record["time"], layout, payload, file.tell())
