"""What a column phase gets as ``columns``: a partition's columns by position and name, written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from rustsim_hpc.errors import nearest
from rustsim_hpc.state.schema import Schema

Array = np.ndarray[Any, Any]


class PhaseColumns(Sequence[Array]):
    """One partition's columns: 1-D arrays in column order, also indexed by name.

    ``columns["x"] += 1`` works in place, ``columns["x"] = array`` copies in place after a check of dtype and
    length; columns that the phase did not declare are read-only. Nothing here outlives the phase: `seal`.
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
            raise TypeError(f'column "{name}" is {view.dtype}, cannot be replaced by {array.dtype}')
        if array.shape != view.shape:
            rows = len(view)
            raise ValueError(f'column "{name}" has {rows} rows, cannot be replaced by shape {array.shape}')
        if not self._writable[position]:
            raise ValueError(f'column "{name}" is not among the columns that this phase writes')
        np.copyto(view, array)

    def _position(self, key: int | str) -> int:
        if isinstance(key, str):
            if key not in self._schema.names:
                raise KeyError(f'no column "{key}"{nearest(key, self._schema.names)}')
            return self._schema.index(key)
        return range(len(self._views))[key]

    def verify_unchanged_shape(self, rows: int) -> None:
        """Raise ValueError if the phase gave one of its views another dtype or shape."""
        for column, view in zip(self._schema.columns, self._views, strict=True):
            if view.dtype != np.dtype(column.dtype) or view.shape != (rows,):
                raise ValueError(
                    f'column "{column.name}" was {column.dtype} of {rows} rows, is now {view.dtype} of '
                    f"shape {view.shape}: a phase cannot change dtype or length"
                )

    def seal(self) -> None:
        """Make the views read-only: a phase that kept one cannot write with it when it is not its turn."""
        for view in self._views:
            view.flags.writeable = False


def _read_only(array: Array) -> Array:
    """Return a view that cannot be made writable again: it would be the state itself that is written."""
    if not array.size:
        array = array.view()
        array.flags.writeable = False
        return array
    buffer: Any = array
    return np.frombuffer(memoryview(buffer).toreadonly(), array.dtype)
