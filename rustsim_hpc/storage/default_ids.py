"""The default ids in a file: chunks built in compressed form, a million ids in some 20 KB and almost no time.

If row i has id i, /ids follows from the number of the first row. It is there for other tools, and must not
cost as much as a column: 8 bytes a row are more than the whole state of some models.

HDF5's shuffle filter splits a chunk into eight planes, the k-th bytes of all its ids. The planes of
consecutive ids are runs of one byte, except the two lowest, which repeat after 2^16 ids and so are the same
in every chunk. A deflate stream can be assembled from pieces that were compressed separately, each flushed
to a whole byte and to an empty window (RFC 1951); so can its Adler-32 (RFC 1950).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

_PERIOD = 1 << 16
CHUNK_ROWS = 16 * _PERIOD
"""Rows of a chunk; a multiple of 2^16, so that the two lowest planes are the same in all chunks of a file."""

_LEVEL = 9
_HEAD, _TAIL = b"\x78\xda", b"\x03\x00"  # of a zlib stream; and an empty last block
_ADLER = 65521


class _Piece(NamedTuple):
    deflated: bytes
    adler: int
    size: int


def write_default_ids(file: Any, first: int, rows: int) -> Any:
    """Create /ids of rows [first, first + rows), at least one, in an open HDF5 file; return the dataset."""
    chunk = min(rows, CHUNK_ROWS)
    dataset = file.create_dataset(
        "ids", (rows,), "<u8", chunks=(chunk,), shuffle=True, compression="gzip", compression_opts=_LEVEL
    )
    for start in range(0, rows, chunk):
        dataset.id.write_direct_chunk((start,), chunk_of_ids(first + start, chunk))
    return dataset


def chunk_of_ids(first: int, rows: int) -> bytes:
    """Return the ids [first, first + rows), shuffled and then deflated as HDF5's filters do it."""
    parts, adler = [_HEAD], 1
    for piece in _pieces(first, rows):
        parts.append(piece.deflated)
        adler = _joined(adler, piece)
    return b"".join((*parts, _TAIL, adler.to_bytes(4, "big")))


def _pieces(first: int, rows: int) -> Iterator[_Piece]:
    yield _low_planes(first % _PERIOD, rows)
    for shift in range(16, 64, 8):
        at = first
        while at < first + rows:
            value = at >> shift
            end = min((value + 1) << shift, first + rows)
            yield _run(value & 255, end - at)
            at = end


@lru_cache(maxsize=16)
def _low_planes(first: int, rows: int) -> _Piece:
    again = np.roll(np.arange(_PERIOD, dtype="<u2"), -first).view(np.uint8).reshape(_PERIOD, 2)
    return _compressed(part for plane in again.T for part in _repeated(plane.tobytes(), rows))


@lru_cache(maxsize=2048)
def _run(value: int, count: int) -> _Piece:
    return _compressed(_repeated(bytes([value]) * _PERIOD, count))


def _repeated(data: bytes, size: int) -> Iterator[bytes]:
    """Yield ``size`` bytes of ``data`` repeated, without holding a whole chunk in memory."""
    for start in range(0, size, len(data)):
        yield data[: size - start]


def _compressed(parts: Iterable[bytes]) -> _Piece:
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    made, adler, size = [], 1, 0
    for part in parts:
        made.append(deflate.compress(part))
        adler, size = zlib.adler32(part, adler), size + len(part)
    return _Piece(b"".join((*made, deflate.flush(zlib.Z_FULL_FLUSH))), adler, size)


def _joined(adler: int, piece: _Piece) -> int:
    """Return the Adler-32 of bytes, given as theirs, followed by a piece."""
    low = (adler & 0xFFFF) + (piece.adler & 0xFFFF) - 1
    high = (adler >> 16) + (piece.adler >> 16) + piece.size * ((adler & 0xFFFF) - 1)
    return high % _ADLER << 16 | low % _ADLER
