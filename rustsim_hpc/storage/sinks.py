"""File-like objects that HDF5 writes to, whose writes never fail.

HDF5 does not handle a full disk well: after a failed write, closing its file fails too, and its buffers are
written, or crash, when the interpreter ends. So it writes to a sink, which keeps the bytes in memory, or
passes them on to a file and records the first failure instead of raising it.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
from collections.abc import Callable
from typing import Any

_PAGE = 4096
_SYNC_FILE_RANGE_WRITE = 2
_WRITEBACK_BYTES = 8 << 20


class Abandoned(Exception):
    """The checkpoint being written was given up, because another rank has failed."""


class MemorySink(io.RawIOBase):
    """A sparse file in memory: holes take no room and read as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the size; the bytes beyond are gone."""
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        """Write bytes at the position."""
        view = memoryview(data).cast("B")
        self.store(self._position, view)
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position on."""
        view = memoryview(buffer).cast("B")
        view[:] = self.read_at(self._position, len(view))
        self._position += len(view)
        return len(view)

    def store(self, offset: int, view: memoryview) -> None:
        """Store bytes at an offset."""
        while view:
            page, start = divmod(offset, _PAGE)
            count = min(len(view), _PAGE - start)
            self._pages.setdefault(page, bytearray(_PAGE))[start : start + count] = view[:count]
            offset, view = offset + count, view[count:]

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on; zeros where nothing was written."""
        first, last = offset // _PAGE, -(-(offset + length) // _PAGE)
        pages = b"".join(self._pages.get(page, b"\0" * _PAGE) for page in range(first, last))
        start = offset - first * _PAGE
        return pages[start : start + length]


class FileSink(MemorySink):
    """A sink that passes everything on to an open file. `failure`: its first error, or None."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self._descriptor = descriptor

    def truncate(self, size: int | None = None) -> int:
        """Set the size, of the file too."""
        super().truncate(size)
        self._try(lambda: os.ftruncate(self._descriptor, self.size))
        return self.size

    def store(self, offset: int, view: memoryview) -> None:
        """Write bytes at an offset of the file."""
        self._try(lambda: write_at(self._descriptor, view, offset))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, zeros beyond its end."""
        return os.pread(self._descriptor, length, offset).ljust(length, b"\0")

    def _try(self, action: Any) -> None:
        if self.failure is None:
            try:
                action()
            except OSError as error:
                self.failure = error


def write_at(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all bytes of `view` at an offset of a file.

    Raises:
        OSError: the disk is full, or fails.
    """
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def start_writeback(descriptor: int, start: int, end: int) -> int:
    """Start writing bytes [start, end) of a file to disk in the background; return the next `start`.

    Called regularly, this leaves the final fsync little to wait for. Short ranges are left for the next call.
    Without `sync_file_range` the fsync does it all.
    """
    if end - start < _WRITEBACK_BYTES:
        return start
    sync = _sync_file_range()
    if sync is not None:
        # Only a hint: the fsync reports its failures.
        sync(descriptor, start, end - start, _SYNC_FILE_RANGE_WRITE)
    return end


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        call: Any = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found: Callable[[int, int, int, int], int] = call
    return found
