"""The ``columns`` argument of a column phase: a partition's columns by position and name, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from rustsim_hpc.errors import NoSuchName, nearest
from rustsim_hpc.state.schema import Schema

Array = np.ndarray[Any, Any]


class PhaseColumns(Sequence[Array]):
    """One partition's columns: 1-D arrays in column order, also indexed by name.

    ``columns["x"] += 1`` works in place, ``columns["x"] = array`` copies in place after a check of dtype and
    length. Columns that the phase did not declare as written are read-only; after the phase, `seal` makes all
    of them read-only.
    """

    __slots__ = ("_schema", "_views", "_writable")

    def __init__(self, schema: Schema, arrays: Sequence[Array], writable: Sequence[bool]) -> None:
        self._schema = schema
        self._writable = tuple(writable)
        pairs = zip(arrays, self._writable, strict=True)
        self._views = [array.view() if may else _read_only(array) for array, may in pairs]

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return self._schema.names

    def __len__(self) -> int:
        return len(self._views)

    def __iter__(self) -> Iterator[Array]:
        return iter(self._views)

    @overload
    def __getitem__(self, key: int | str) -> Array: ...
    @overload
    def __getitem__(self, key: slice) -> list[Array]: ...
    def __getitem__(self, key: int | str | slice) -> Array | list[Array]:
        if isinstance(key, slice):
            return self._views[key]
        return self._views[self._position(key)]

    def __setitem__(self, key: int | str, value: Any) -> None:
        position = self._position(key)
        view = self._views[position]
        if value is view:
            return
        name = self._schema.names[position]
        array = np.asarray(value)
        if array.dtype != view.dtype:
            raise TypeError(
                f'column "{name}" is {view.dtype}, cannot be replaced by {array.dtype}: '
                + (f"convert it with .astype(np.{view.dtype})" if array.ndim else _one_value(name))
            )
        if array.shape != view.shape:
            rows = len(view)
            raise ValueError(
                f'column "{name}" has {rows} rows, cannot be replaced by shape {array.shape}'
                + ("" if array.ndim else f": {_one_value(name)}")
            )
        if not self._writable[position]:
            raise ValueError(f'column "{name}" is not among the columns that this phase declares in writes=')
        np.copyto(view, array)

    def _position(self, key: int | str) -> int:
        if isinstance(key, str):
            if key not in self._schema.names:
                raise NoSuchName(f'no column "{key}"{nearest(key, self._schema.names)}')
            return self._schema.index(key)
        return range(len(self._views))[key]

    def verify_unchanged_shape(self, rows: int) -> None:
        """Raise ValueError if the phase changed the dtype or shape of a view."""
        for column, view in zip(self._schema.columns, self._views, strict=True):
            if view.dtype != np.dtype(column.dtype) or view.shape != (rows,):
                raise ValueError(
                    f'column "{column.name}" was {column.dtype} of {rows} rows, is now {view.dtype} of '
                    f"shape {view.shape}: a phase cannot change dtype or length"
                )

    def seal(self) -> None:
        """Make the views read-only, so that a phase cannot write through one that it kept."""
        for view in self._views:
            view.flags.writeable = False


def _one_value(name: str) -> str:
    return f'columns["{name}"][:] = ... sets all rows to one value'


def _read_only(array: Array) -> Array:
    """Return a read-only view whose ``writeable`` flag cannot be set again, to protect the state."""
    if not array.size:
        array = array.view()
        array.flags.writeable = False
        return array
    buffer: Any = array
    return np.frombuffer(memoryview(buffer).toreadonly(), array.dtype)
