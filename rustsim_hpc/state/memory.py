"""The memory of columns: heap or shared, two buffers per column, and their swap.

Under the rollback guard a step writes a column's other buffer and swaps on commit, so a column has two sides.
Side 1 is allocated at its first use: a run under the torn guard never allocates it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np

from rustsim_hpc.errors import ColumnMemoryError
from rustsim_hpc.state.backing import Backing, Buffers, Heap, Kind, Shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rustsim_hpc.state.schema import Schema

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MemoryLayout:
    """What another process needs to map a shared `ColumnMemory`; picklable.

    fds: file descriptors of the two sides, for `subprocess.Popen(pass_fds=layout.fds)`.
    """

    schema: Schema
    rows: int
    with_ids: bool
    fds: tuple[int, int]


@runtime_checkable
class Keeper(Protocol):
    """Holds a memory's current values while they are elsewhere, for example on workers of other machines."""

    def refresh(self) -> None:
        """Write the current values into the memory's current sides; the keeper retains them as well."""

    def fnv1a(self, state: int, column: int, *, other: bool) -> int:
        """Continue an FNV-1a chain over a column where it is held: its current side, or the other one."""


@runtime_checkable
class CopyingKeeper(Keeper, Protocol):
    """A keeper that can copy the current values while steps continue."""

    def copy_aside(self, out: Sequence[Array]) -> Callable[[], None]:
        """See :meth:`ColumnMemory.copy_aside`."""


def _nothing() -> None:
    """Do nothing: the copy is complete."""


def _closed() -> ColumnMemoryError:
    return ColumnMemoryError("column memory is closed")


class ColumnMemory:
    """The buffers of a population's columns, and which side of each is the current one.

    All arrays are 1-D of `rows` items, 64-byte aligned, and keep their address until `close`. The content of
    a side is undefined before it is first written. Views that outlive `close` keep their memory alive, but no
    longer show a state. While there is a `keeper`, it holds the current values: they are fetched when they
    are read here, and cannot be written.

    Args:
        schema: the columns.
        rows: rows of this rank.
        kind: "heap" (private) or "shared" (other processes of the node can map it).
        with_ids: whether ids are stored (uint64); default ids need no memory.

    Raises:
        ColumnMemoryError: the memory cannot be allocated; the message gives the bytes requested.
    """

    def __init__(
        self,
        schema: Schema,
        rows: int,
        kind: Kind = "heap",
        *,
        with_ids: bool = False,
        _mapped: tuple[int, int] | None = None,
    ) -> None:
        self.schema = schema
        self.rows = rows
        self.kind: Kind = kind
        self.with_ids = with_ids
        self.keeper: Keeper | None = None
        self._arrays: dict[int, Array] = {}
        self._lock = threading.Lock()
        self._buffers = Buffers(schema, rows, with_ids)
        self._backing: Backing | None = (
            Heap(self._buffers) if kind == "heap" else Shared(self._buffers, _mapped)
        )
        # A memoryview: access by item is several times as fast as with the array.
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

        The descriptors then belong to the memory, which closes them in `close`.
        """
        return cls(layout.schema, layout.rows, "shared", with_ids=layout.with_ids, _mapped=layout.fds)

    def handles(self) -> MemoryLayout:
        """Return what another process needs to map this memory.

        Raises:
            ColumnMemoryError: the memory is private, or closed.
        """
        backing = self._open()
        if not isinstance(backing, Shared):
            raise ColumnMemoryError("heap memory cannot be mapped by another process")
        return MemoryLayout(self.schema, self.rows, self.with_ids, backing.fds)

    def _open(self) -> Backing:
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
        """Which side of each column is current: uint8 (columns,), shared by all processes that map it."""
        return self._open().parity

    def sides(self) -> bytes:
        """Return which side of each column is current, as a cache key."""
        return b"" if self._parity is None else self._parity.tobytes()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffers that this process has allocated or mapped so far."""
        return sum(array.nbytes for array in self._arrays.values())

    def array(self, column: int, side: int) -> Array:
        """Return one side of a column, allocated at the first call.

        Raises:
            ColumnMemoryError: the memory cannot be allocated.
        """
        columns = len(self.schema)
        if not (0 <= column < columns and side in (0, 1)):
            raise IndexError(f"no side {side} of column {column} among {columns} columns")
        return self._array(side * columns + column)

    def current(self, column: int) -> Array:
        """Return the side of a column that holds the state; a read-only view while there is a keeper."""
        if self.keeper is not None:
            self.keeper.refresh()
            view = self.array(column, int(self.parity[column])).view()
            view.flags.writeable = False
            return view
        return self.array(column, int(self.parity[column]))

    def other(self, column: int) -> Array:
        """Return the side of a column that the next step may write."""
        return self.array(column, 1 - int(self.parity[column]))

    def places(self) -> tuple[Array, ...]:
        """Return the current side of every column, without fetching values from a keeper."""
        return tuple(self.array(column, int(side)) for column, side in enumerate(self.parity))

    def refresh(self) -> None:
        """Fetch the current values from the keeper, if any, into the current sides."""
        if self.keeper is not None:
            self.keeper.refresh()

    def copy_aside(self, out: Sequence[Array]) -> Callable[[], None]:
        """Copy the current values of all columns; steps may change them as soon as this returns.

        Args:
            out: for each column an array of its dtype, all rows.

        Returns:
            A function that waits until the copy is in ``out``, callable from any thread. Without a keeper the
            copy is complete already.
        """
        keeper = self.keeper
        if isinstance(keeper, CopyingKeeper):
            return keeper.copy_aside(out)
        for column, values in enumerate(out):
            np.copyto(values, self.current(column))
        return _nothing

    def take_back(self, user: object = None) -> None:
        """Fetch the state from the keeper and remove the keeper, unless it is ``user``."""
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
        """Release the memory; a second call does nothing."""
        backing, self._backing = self._backing, None
        self._parity = None
        self._arrays.clear()
        if backing is not None:
            backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
