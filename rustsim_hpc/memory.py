"""Where columns live: heap or shared memory, two buffers a column, and their swap.

A step that can be undone writes a column's other buffer and swaps on commit, so a column has two sides.
Side 1 is allocated when it is first asked for: a run under the torn guard never pays for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np

from rustsim_hpc.errors import ColumnMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rustsim_hpc.schema import Schema

Array = np.ndarray[Any, Any]
Kind = Literal["heap", "shared"]

_PAGE = 4096
_HUGE = 2 * 1024 * 1024
_SMALL = 1024 * 1024
# Streams whose addresses agree modulo 4096 wait for each other (the CPU compares the low 12 bits of loads and
# stores); eight such streams took 1.5 times as long. 832 is 13 cache lines, and 13 is odd: the first 64
# buffers all start at different lines of their page.
_STAGGER = 832


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class MemoryLayout:
    """What another process needs to map a shared `ColumnMemory`; picklable.

    fds: file descriptors of the two sides in process `pid`, for `subprocess.Popen(pass_fds=layout.fds)`.
    """

    schema: Schema
    rows: int
    with_ids: bool
    fds: tuple[int, int]
    pid: int


class _Buffers:
    """The sizes of all buffers: column i on side s is number s * columns + i, the ids come last."""

    def __init__(self, schema: Schema, rows: int, with_ids: bool) -> None:
        self.columns = len(schema)
        self.names = (*schema.names, *schema.names, "ids")
        self.dtypes = (*schema.dtypes, *schema.dtypes, np.dtype(np.uint64))
        self.sizes = [rows * dtype.itemsize for dtype in self.dtypes]
        self.with_ids = with_ids

    def side(self, number: int) -> int:
        """Return the side on which a buffer lies (ids: side 0)."""
        return 1 if self.columns <= number < 2 * self.columns else 0

    def shortage(self, number: int, kind: Kind, error: Exception) -> ColumnMemoryError:
        """Return the error for a buffer that cannot be had."""
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        side = " (second buffer)" if self.side(number) else ""
        return ColumnMemoryError(
            f"cannot get {self.sizes[number]:,} bytes of {kind} memory for {self.names[number]}{side}: {why}",
            hint="take fewer agents, more ranks, or the torn guard, which needs no second buffers",
        )


class Keeper(Protocol):
    """Who holds a memory's current values while they are elsewhere: workers on other machines, say."""

    def refresh(self) -> None:
        """Write the current values into the memory's current sides; they stay with the keeper as well."""

    def fnv1a(self, state: int, column: int, *, other: bool) -> int:
        """Carry a FNV-1a chain on over a column where it is: its current side, or the other one."""


class _Backing(Protocol):
    """Where the bytes come from."""

    parity: Array

    def buffer(self, number: int) -> Array:
        """Return a buffer's bytes, allocated now; the same ones at each call."""

    def close(self) -> None:
        """Let go of the memory."""


class _Heap:
    """Private memory of this process, each buffer allocated by itself."""

    def __init__(self, buffers: _Buffers) -> None:
        self._buffers = buffers
        self._made: dict[int, Array] = {}
        self.parity: Array = np.zeros(buffers.columns, np.uint8)

    def buffer(self, number: int) -> Array:
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
            # Only where the buffer lies: a huge page over the spare tail would be memory for nothing.
            with contextlib.suppress(OSError):
                area.madvise(mmap.MADV_HUGEPAGE, start, _round_up(stagger + size, mmap.PAGESIZE))
        return raw[start + stagger : start + stagger + size]

    def close(self) -> None:
        self._made.clear()


class _Shared:
    """One anonymous file a side, mapped whole; nothing has a name, so nothing can be left behind.

    Side 0 begins with a page that holds the parities and ends with the ids. A buffer's pages are claimed
    before it is first touched: a machine that is out of memory then answers with an error, not with SIGBUS.
    """

    def __init__(self, buffers: _Buffers, fds: tuple[int, int] | None, writable: bool) -> None:
        self._buffers = buffers
        self._writable = writable
        self._claimed: set[int] = set()
        self._heading = _round_up(max(buffers.columns, 1), mmap.PAGESIZE)
        self._offsets, self._totals = self._arrange()
        self.fds = self._create() if fds is None else fds
        # A store that is dropped without being closed must not keep its files, which are the memory itself.
        self._close_fds = weakref.finalize(self, _close_files, self.fds)
        self._maps: dict[int, mmap.mmap] = {}
        self._bytes: dict[int, Array] = {}
        try:
            self.parity: Array = self._side(0)[: buffers.columns]
        except ColumnMemoryError:
            self._close_fds()
            raise

    def _side(self, side: int) -> Array:
        if side not in self._bytes:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if self._writable else 0)
            try:
                self._maps[side] = mmap.mmap(self.fds[side], self._totals[side], mmap.MAP_SHARED, protection)
            except (OSError, ValueError, OverflowError) as error:
                raise self._shortage(side, error) from error
            self._bytes[side] = np.frombuffer(self._maps[side], np.uint8)
        return self._bytes[side]

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
        offset, size = self._offsets[number], self._buffers.sizes[number]
        side = self._buffers.side(number)
        if number not in self._claimed and self._writable and size:
            try:
                claim(self.fds[side], offset, size)
            except OSError as error:
                raise self._buffers.shortage(number, "shared", error) from error
            self._claimed.add(number)
        return self._side(side)[offset : offset + size]

    def close(self) -> None:
        self._bytes.clear()
        self.parity = np.zeros(0, np.uint8)
        for area in self._maps.values():
            # Refused while views live; the mapping then goes when the last of them does.
            with contextlib.suppress(BufferError):
                area.close()
        self._close_fds()


def staggered_empty(size: int, number: int) -> Array:
    """Return `size` bytes of private memory, uint8, placed in its page as the buffer of that number is."""
    raw = np.empty(size + _PAGE, np.uint8)
    start = (number * _STAGGER - raw.ctypes.data) % _PAGE
    return raw[start : start + size]


def _close_files(fds: tuple[int, ...]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def anonymous_file() -> int:
    """Return a descriptor of a new, empty file in memory that has no name."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            return os.memfd_create("rustsim-columns")
    import tempfile

    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def claim(fd: int, offset: int, size: int) -> None:
    """Make sure that there is memory behind a range of an anonymous file; raises OSError if there is not."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, offset, size)


def _closed() -> ColumnMemoryError:
    return ColumnMemoryError("column memory is closed")


class ColumnMemory:
    """The buffers of a population's columns, and which side of each is the current one.

    All arrays are 1-D of `rows` items, 64-byte aligned, and keep their address until `close`. What a side
    holds before it is first written is undefined. Views that outlive `close` keep their part of the memory
    alive but are no longer anybody's state. While there is a `keeper`, the current values are with it: they
    are fetched when they are read here, and cannot be written.

    Args:
        schema: the columns.
        rows: rows of this rank.
        kind: "heap" (private) or "shared" (other processes of the node can map it).
        with_ids: whether ids are stored (uint64); default ids need no memory.

    Raises:
        ColumnMemoryError: the memory cannot be had; says how many bytes were asked for.
    """

    def __init__(
        self,
        schema: Schema,
        rows: int,
        kind: Kind = "heap",
        *,
        with_ids: bool = False,
        _mapped: tuple[int, int] | None = None,
        _writable: bool = True,
    ) -> None:
        self.schema = schema
        self.rows = rows
        self.kind: Kind = kind
        self.with_ids = with_ids
        self.keeper: Keeper | None = None
        self._arrays: dict[int, Array] = {}
        self._lock = threading.Lock()
        self._buffers = _Buffers(schema, rows, with_ids)
        self._backing: _Backing | None = (
            _Heap(self._buffers) if kind == "heap" else _Shared(self._buffers, _mapped, writable=_writable)
        )
        # Item by item several times as fast as the array.
        self._parity: memoryview | None = self._backing.parity.data
        try:
            for number in (*range(len(schema)), *([2 * len(schema)] if with_ids else [])):
                self._array(number)
        except ColumnMemoryError:
            self.close()
            raise

    @classmethod
    def attach(cls, layout: MemoryLayout) -> ColumnMemory:
        """Map the memory of a parent process that passed `layout.fds` on, for reading and writing.

        The memory takes the descriptors over and closes them with itself.
        """
        return cls(layout.schema, layout.rows, "shared", with_ids=layout.with_ids, _mapped=layout.fds)

    @classmethod
    def attach_path(cls, layout: MemoryLayout) -> ColumnMemory:
        """Map the memory of another process of this node and user, read-only.

        Raises:
            ColumnMemoryError: the process is gone, or may not be looked into.
        """
        fds: list[int] = []
        try:
            fds.extend(os.open(f"/proc/{layout.pid}/fd/{fd}", os.O_RDONLY) for fd in layout.fds)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise ColumnMemoryError(f"cannot open the memory of process {layout.pid}: {error}") from error
        return cls(
            layout.schema,
            layout.rows,
            "shared",
            with_ids=layout.with_ids,
            _mapped=(fds[0], fds[1]),
            _writable=False,
        )

    def handles(self) -> MemoryLayout:
        """Return what another process needs to map this memory.

        Raises:
            ColumnMemoryError: the memory is private, or closed.
        """
        backing = self._open()
        if not isinstance(backing, _Shared):
            raise ColumnMemoryError("heap memory cannot be mapped by another process")
        return MemoryLayout(self.schema, self.rows, self.with_ids, backing.fds, os.getpid())

    def _open(self) -> _Backing:
        if self._backing is None:
            raise _closed()
        return self._backing

    def _array(self, number: int) -> Array:
        found = self._arrays.get(number)
        if found is None:
            with self._lock:
                raw = self._open().buffer(number)
                found = self._arrays.setdefault(number, raw.view(self._buffers.dtypes[number]))
        return found

    @property
    def ids(self) -> Array | None:
        """The stored ids, uint64 (rows,), or None for default ids."""
        return self._array(2 * len(self.schema)) if self.with_ids else None

    @property
    def parity(self) -> Array:
        """Which side of each column is current: uint8 (columns,), shared by all who mapped the memory."""
        return self._open().parity

    def sides(self) -> bytes:
        """Return which side of each column is current, as a key of what depends on it."""
        return b"" if self._parity is None else self._parity.tobytes()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffers that this process has asked for so far."""
        return sum(array.nbytes for array in self._arrays.values())

    def array(self, column: int, side: int) -> Array:
        """Return one side of a column, allocated now if it is asked for the first time.

        Raises:
            ColumnMemoryError: the memory cannot be had.
        """
        columns = len(self.schema)
        if not (0 <= column < columns and side in (0, 1)):
            raise IndexError(f"no side {side} of column {column} among {columns} columns")
        return self._array(side * columns + column)

    def current(self, column: int) -> Array:
        """Return the side of a column that holds the state; read-only while that is with a keeper."""
        if self.keeper is not None:
            self.keeper.refresh()
            view = self.array(column, int(self.parity[column])).view()
            view.flags.writeable = False
            return view
        return self.array(column, int(self.parity[column]))

    def other(self, column: int) -> Array:
        """Return the side of a column that the next step may write."""
        return self.array(column, 1 - int(self.parity[column]))

    def take_back(self, user: object = None) -> None:
        """Make the state this memory's own again, unless ``user`` is who keeps it."""
        if self.keeper is not None and self.keeper is not user:
            self.keeper.refresh()
            self.keeper = None

    def swap(self, columns: Iterable[int]) -> None:
        """Make the other side of these columns the current one."""
        parity = self._parity
        if parity is None:
            raise _closed()
        for column in columns:
            parity[column] ^= 1

    def close(self) -> None:
        """Let go of the memory; a second call does nothing."""
        backing, self._backing = self._backing, None
        self._parity = None
        self._arrays.clear()
        if backing is not None:
            backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
