"""Memory behind columns: private memory of this process, or shared memory that other processes can map."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from rustsim_hpc.errors import ColumnMemoryError

if TYPE_CHECKING:
    from rustsim_hpc.state.schema import Schema

Array = np.ndarray[Any, Any]
Kind = Literal["heap", "shared"]

_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25  # Linux constants that Python does not define
_PAGE = 4096
_HUGE = 2 * 1024 * 1024
_SMALL = 1024 * 1024
# Streams whose addresses agree modulo 4096 stall each other (4K aliasing: the CPU compares the low 12 bits of
# loads and stores); eight of them took 1.5 times as long. 832 is 13 cache lines, and 13 is odd: the first 64
# buffers all start at different lines of their page.
_STAGGER = 832


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class Buffers:
    """The sizes of all buffers: side s of column i is buffer s * columns + i, the ids come last."""

    def __init__(self, schema: Schema, rows: int, with_ids: bool) -> None:
        self.columns = len(schema)
        self.names = (*schema.names, *schema.names, "ids")
        self.dtypes = (*schema.dtypes, *schema.dtypes, np.dtype(np.uint64))
        self.sizes = [rows * dtype.itemsize for dtype in self.dtypes]
        self.with_ids = with_ids

    def side(self, number: int) -> int:
        """Return the side that a buffer belongs to (ids: side 0)."""
        return 1 if self.columns <= number < 2 * self.columns else 0

    def shortage(self, number: int, kind: Kind, error: Exception) -> ColumnMemoryError:
        """Return the error for a buffer that cannot be allocated."""
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        side = " (second buffer)" if self.side(number) else ""
        return ColumnMemoryError(
            f"cannot get {self.sizes[number]:,} bytes of {kind} memory for {self.names[number]}{side}: {why}",
            hint="take fewer agents, more ranks, or the torn guard, which needs no second buffers",
        )


class Backing(Protocol):
    """A source of buffers."""

    parity: Array

    def buffer(self, number: int) -> Array:
        """Return a buffer's bytes, allocated at the first call; the same memory at each call."""

    def close(self) -> None:
        """Release the memory."""


class Heap:
    """Private memory of this process, each buffer allocated separately."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._made: dict[int, Array] = {}
        self.parity: Array = np.zeros(buffers.columns, np.uint8)

    def buffer(self, number: int) -> Array:
        """Return a buffer's bytes, allocated at the first call."""
        if number not in self._made:
            try:
                self._made[number] = self._allocate(self._buffers.sizes[number], number)
            except (OSError, MemoryError, ValueError, OverflowError) as error:
                raise self._buffers.shortage(number, "heap", error) from error
        return self._made[number]

    @staticmethod
    def _allocate(size: int, number: int) -> Array:
        stagger = number * _STAGGER % _PAGE
        if size < _SMALL or not hasattr(mmap, "MAP_PRIVATE"):
            return staggered_empty(size, number)
        area = mmap.mmap(-1, size + _HUGE + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw = np.frombuffer(area, np.uint8)
        start = -raw.ctypes.data % _HUGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Only for the buffer: a huge page over the unused tail would waste memory.
            with contextlib.suppress(OSError):
                area.madvise(mmap.MADV_HUGEPAGE, start, _round_up(stagger + size, mmap.PAGESIZE))
        return raw[start + stagger : start + stagger + size]

    def close(self) -> None:
        """Release the memory."""
        self._made.clear()


class Shared:
    """One anonymous file per side, mapped whole; without names, no files can be left behind.

    Side 0 begins with a page that holds the parities and ends with the ids. A buffer's pages are reserved
    before its first use, so that a lack of memory is an error and not a SIGBUS.
    """

    def __init__(self, buffers: Buffers, fds: tuple[int, int] | None) -> None:
        self._buffers = buffers
        self._claimed: set[int] = set()
        self._heading = _round_up(max(buffers.columns, 1), mmap.PAGESIZE)
        self._offsets, self._totals = self._arrange()
        self.fds = self._create() if fds is None else fds
        # A store that is dropped without being closed must release its files, which are the memory itself.
        self._close_fds = weakref.finalize(self, _close_files, self.fds)
        self._maps: dict[int, mmap.mmap] = {}
        self._begins: dict[int, int] = {}
        self._bytes: dict[int, Array] = {}
        try:
            self.parity: Array = self._side(0)[: buffers.columns]
        except ColumnMemoryError:
            self._close_fds()
            raise

    def _side(self, side: int) -> Array:
        if side not in self._bytes:
            try:
                self._maps[side], self._begins[side] = self._map(side)
            except (OSError, ValueError, OverflowError) as error:
                raise self._shortage(side, error) from error
            begin = self._begins[side]
            self._bytes[side] = np.frombuffer(self._maps[side], np.uint8)[begin : begin + self._totals[side]]
        return self._bytes[side]

    def _map(self, side: int) -> tuple[mmap.mmap, int]:
        """Map a side; return the map, and the offset in it where the file begins.

        The file is mapped at a multiple of the huge page size: only then can its huge pages be used.
        """
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        fd, total = self.fds[side], self._totals[side]
        if total < _HUGE or sys.platform != "linux":
            return mmap.mmap(fd, total, mmap.MAP_SHARED, protection), 0
        # Reserve address space, then map the file over a part of it (MAP_FIXED): Python's mmap takes no
        # address. Unmapping the reservation unmaps the file as well.
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        room = mmap.mmap(-1, total + _HUGE, kind, protection)
        address = np.frombuffer(room, np.uint8).ctypes.data
        first = -address % _HUGE
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * (ctypes.c_int,), ctypes.c_long)
        placed = library.mmap(address + first, total, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
        if placed != address + first:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return room, first

    def _make_huge(self, side: int, offset: int, size: int) -> None:
        """Collapse the pages of a buffer into huge pages, where the kernel can.

        For shared memory it does not do so by itself; with small pages, steps took 1.15 times as long.
        """
        start, stop = _round_up(offset, _HUGE), (offset + size) // _HUGE * _HUGE
        if start < stop and sys.platform == "linux":
            self._side(side)
            with contextlib.suppress(OSError):  # a kernel before 6.1, or no huge page is free
                self._maps[side].madvise(_MADV_COLLAPSE, self._begins[side] + start, stop - start)

    def _shortage(self, side: int, error: Exception) -> ColumnMemoryError:
        return ColumnMemoryError(f"cannot map {self._totals[side]:,} bytes of shared memory: {error}")

    def _arrange(self) -> tuple[list[int], tuple[int, int]]:
        offsets: list[int] = []
        ends = [self._heading, mmap.PAGESIZE]
        for number, size in enumerate(self._buffers.sizes):
            side = self._buffers.side(number)
            unit = mmap.PAGESIZE if size < _SMALL else max(_HUGE, mmap.PAGESIZE)
            offsets.append(_round_up(ends[side], unit) + number * _STAGGER % _PAGE)
            if number < 2 * self._buffers.columns or self._buffers.with_ids:
                ends[side] = _round_up(offsets[-1] + size, mmap.PAGESIZE)
        return offsets, (ends[0], ends[1])

    def _create(self) -> tuple[int, int]:
        fds: list[int] = []
        try:
            for total in self._totals:
                fds.append(anonymous_file())
                os.ftruncate(fds[-1], total)
            claim(fds[0], 0, self._heading)
        except (OSError, OverflowError) as error:
            for fd in fds:
                os.close(fd)
            raise self._shortage(max(len(fds) - 1, 0), error) from error
        return fds[0], fds[1]

    def buffer(self, number: int) -> Array:
        """Return a buffer's bytes, mapped and reserved at the first call."""
        offset, size = self._offsets[number], self._buffers.sizes[number]
        side = self._buffers.side(number)
        if number not in self._claimed and size:
            try:
                claim(self.fds[side], offset, size)
            except OSError as error:
                raise self._buffers.shortage(number, "shared", error) from error
            self._claimed.add(number)
            self._make_huge(side, offset, size)
        return self._side(side)[offset : offset + size]

    def close(self) -> None:
        """Release the memory, and the files unless another process has them open."""
        self._bytes.clear()
        self.parity = np.zeros(0, np.uint8)
        for area in self._maps.values():
            # Fails while views exist; the mapping is then released with the last view.
            with contextlib.suppress(BufferError):
                area.close()
        self._close_fds()


def staggered_empty(size: int, number: int) -> Array:
    """Return `size` bytes of private memory, uint8, with the same offset in a page as buffer `number`."""
    raw = np.empty(size + _PAGE, np.uint8)
    start = (number * _STAGGER - raw.ctypes.data) % _PAGE
    return raw[start : start + size]


def _close_files(fds: tuple[int, ...]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def anonymous_file() -> int:
    """Return a descriptor of a new, empty, unnamed file in memory."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            return os.memfd_create("rustsim-columns")
    import tempfile

    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def claim(fd: int, offset: int, size: int) -> None:
    """Reserve memory for a range of an anonymous file; raises OSError if there is not enough."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, offset, size)
