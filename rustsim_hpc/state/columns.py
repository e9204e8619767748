"""The state: the store of a rank's current columns, and the copy of it that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rustsim_hpc.errors import (
    DeviceSoaRestoreError,
    InvalidConfig,
    NoSuchName,
    PartitionCheckpointError,
    nearest,
)
from rustsim_hpc.state.backing import Kind
from rustsim_hpc.state.given_arrays import as_array, as_ids, misfit
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.schema import DTYPES, Schema

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Array = np.ndarray[Any, Any]


def same_bits(one: Array, other: Array) -> bool:
    """Return whether two 1-D arrays have the same dtype, length and raw bits."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = np.dtype(f"u{one.dtype.itemsize}") if one.dtype.name in DTYPES else one.dtype
    return bool(np.array_equal(one.view(raw), other.view(raw)))


def _id_range(start: int, rows: int) -> Array:
    # np.arange with dtype uint64 rejects bounds above 2**63; the sum does not.
    return np.arange(rows, dtype=np.uint64) + np.uint64(start)


class _Ids:
    """Descriptor of a checkpoint's `ids`: the stored ones, or default ones made at each access."""

    def __get__(self, checkpoint: DeviceSoaCheckpoint | None, owner: type | None = None) -> Array:
        if checkpoint is None:
            # So that dataclass() sees a field without a default.
            raise AttributeError("ids belong to a checkpoint")
        stored: Array | None = checkpoint.__dict__.get("ids")
        return _id_range(checkpoint.row_offset, checkpoint.rows) if stored is None else stored

    def __set__(self, checkpoint: DeviceSoaCheckpoint, value: Any) -> None:
        checkpoint.__dict__["ids"] = value


@dataclass(frozen=True, eq=False, init=False, repr=False)
class DeviceSoaCheckpoint:
    """The values of a range of rows at one moment.

    Columns may also be lists, converted to the schema's dtypes (without a schema, NumPy chooses). Arrays are
    neither copied nor checked before `DeviceSoaStore.from_checkpoint`. Two checkpoints are equal if names,
    schemas, dtypes, ids and all values agree bit by bit: a NaN equals the same NaN, -0.0 is not 0.0.

    Args:
        ids: uint64 (rows,); None for the default ids row_offset, row_offset + 1, ..., which take no memory.
        columns: 1-D arrays (rows,), in column order.
        column_names: their names.
        schema: their schema; None to build one from the names and dtypes.
        row_offset: global row of the first row.
        rows: number of rows, required if there are neither ids nor columns.

    Raises:
        DeviceSoaRestoreError: a list that cannot be converted, or columns that no schema can describe.
    """

    columns: tuple[Array, ...]
    column_names: tuple[str, ...]
    schema: Schema
    row_offset: int
    rows: int
    ids: _Ids = _Ids()

    def __init__(
        self,
        ids: Any,
        columns: Sequence[Any],
        column_names: Sequence[str],
        schema: Schema | None = None,
        *,
        row_offset: int = 0,
        rows: int | None = None,
    ) -> None:
        if schema is None and len(columns) != len(column_names):
            raise DeviceSoaRestoreError(
                f"checkpoint has {len(columns)} columns but {len(column_names)} column names"
            )
        fits = schema is not None and len(schema) == len(columns)
        wanted = schema.dtypes if schema is not None and fits else (None,) * len(columns)
        try:
            arrays = tuple(as_array(column, dtype) for column, dtype in zip(columns, wanted, strict=True))
            if ids is not None and not isinstance(ids, np.ndarray):
                ids = as_ids(ids)
            if schema is None:
                schema = Schema.plain(column_names, [array.dtype for array in arrays])
        except (ValueError, TypeError, OverflowError) as error:
            raise DeviceSoaRestoreError(str(error)) from error
        first = next((array for array in (ids, *arrays) if array is not None), None)
        if rows is None or ids is not None:
            rows = 0 if first is None or first.ndim == 0 else len(first)
        facts = {"columns": arrays, "column_names": tuple(column_names), "schema": schema}
        self.__dict__.update(facts, row_offset=row_offset, rows=rows)
        if ids is not None:
            self.__dict__["ids"] = ids

    @property
    def default_ids(self) -> bool:
        """Whether the ids are the default ones, which are not stored."""
        return "ids" not in self.__dict__

    @property
    def agent_count(self) -> int:
        """Number of rows."""
        return self.rows

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return len(self.columns)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the stored ids and columns."""
        return sum(column.nbytes for column in self.columns) + (0 if self.default_ids else 8 * self.rows)

    def column(self, index: int) -> Array:
        """Return one column by position."""
        return self.columns[index]

    def slice_rows(self, start: int, stop: int) -> DeviceSoaCheckpoint:
        """Return a copy of rows [start, stop).

        Raises:
            PartitionCheckpointError: the range is not within the checkpoint's rows.
        """
        if not 0 <= start <= stop <= self.rows:
            raise PartitionCheckpointError(f"invalid checkpoint slice {start}..{stop} for {self.rows} rows")
        return DeviceSoaCheckpoint(
            None if self.default_ids else self.ids[start:stop].copy(),
            [column[start:stop].copy() for column in self.columns],
            self.column_names,
            self.schema,
            row_offset=self.row_offset + start,
            rows=stop - start,
        )

    def same_ids(self, other: DeviceSoaCheckpoint) -> bool:
        """Return whether two checkpoints have the same ids, stored or default."""
        if self.default_ids and other.default_ids:
            return self.rows == other.rows and (self.rows == 0 or self.row_offset == other.row_offset)
        return same_bits(self.ids, other.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeviceSoaCheckpoint):
            return NotImplemented
        return (
            self.column_names == other.column_names
            and self.schema == other.schema
            and self.rows == other.rows
            and len(self.columns) == len(other.columns)
            and self.same_ids(other)
            and all(same_bits(one, two) for one, two in zip(self.columns, other.columns, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DeviceSoaCheckpoint({self.rows} rows, columns {', '.join(self.column_names) or 'none'})"


class DeviceSoaStore:
    """The current columns of one rank, in a `ColumnMemory`.

    Args:
        memory: holds the columns, and the ids if they are stored.
        row_offset: global row of local row 0; default ids start there.
        total_rows: rows of the whole population; by default row_offset plus the rows of this store.
    """

    def __init__(self, memory: ColumnMemory, *, row_offset: int = 0, total_rows: int | None = None) -> None:
        self.memory = memory
        self.row_offset = row_offset
        self.total_rows = row_offset + memory.rows if total_rows is None else total_rows
        row_end = row_offset + memory.rows
        if row_offset < 0 or self.total_rows < row_end:
            raise InvalidConfig(f"rows {row_offset}..{row_end} are not in a population of {self.total_rows}")

    @classmethod
    def from_columns(
        cls,
        ids: Any = None,
        columns: Mapping[str, Any] | None = None,
        *,
        schema: Schema | None = None,
        kind: Kind = "heap",
        row_offset: int = 0,
        total_rows: int | None = None,
    ) -> DeviceSoaStore:
        """Build a store of copies of columns.

        Args:
            ids: uint64 (rows,) or integers that fit; None for row_offset, row_offset + 1, ...
            columns: name to 1-D array (rows,) of a dtype in `DTYPES`; the order is kept.
            schema: adds units and meanings; its names and dtypes must match the columns.
            kind: where the memory comes from, see `ColumnMemory`.
            row_offset: global row of row 0.
            total_rows: rows of the whole population.

        Raises:
            InvalidConfig: invalid ids, columns or schema, or rows outside the population.
            ColumnMemoryError: the memory cannot be allocated.
        """
        try:
            named = dict(columns or {})
        except (TypeError, ValueError):
            raise InvalidConfig(f"columns must be arrays by name, got {type(columns).__name__}") from None
        if schema is not None and tuple(named) != schema.names:
            raise InvalidConfig(f"columns are {tuple(named)}, the schema's are {schema.names}")
        wanted = schema.dtypes if schema is not None else (None,) * len(named)
        try:
            arrays = [as_array(column, dtype) for column, dtype in zip(named.values(), wanted, strict=True)]
            schema = Schema.plain(named, [array.dtype for array in arrays]) if schema is None else schema
            ids = None if ids is None else as_ids(ids)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidConfig(str(error)) from error
        labels = [f'column "{name}"' for name in named]
        first = next((array for array in (ids, *arrays) if array is not None and array.ndim), np.zeros(0))
        if problem := misfit(labels, arrays, schema, len(first)):
            raise InvalidConfig(problem)
        memory = _filled_memory(schema, len(first), kind, ids, arrays)
        return cls(memory, row_offset=row_offset, total_rows=total_rows)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: DeviceSoaCheckpoint, *, kind: Kind = "heap", total_rows: int | None = None
    ) -> DeviceSoaStore:
        """Build a store of copies of a checkpoint's columns.

        Raises:
            DeviceSoaRestoreError: names, schema, dtypes, lengths or ids are inconsistent.
            ColumnMemoryError: the memory cannot be allocated.
        """
        if not isinstance(checkpoint, DeviceSoaCheckpoint):
            raise DeviceSoaRestoreError(f"expected a DeviceSoaCheckpoint, got {type(checkpoint).__name__}")
        schema, names, arrays = checkpoint.schema, checkpoint.column_names, checkpoint.columns
        if len(names) != len(arrays):
            raise DeviceSoaRestoreError(f"checkpoint has {len(arrays)} columns but {len(names)} column names")
        if names != schema.names:
            raise DeviceSoaRestoreError(f"column names {names} are not those of the schema, {schema.names}")
        try:
            ids = None if checkpoint.default_ids else as_ids(checkpoint.ids)
        except (ValueError, TypeError, OverflowError) as error:
            raise DeviceSoaRestoreError(str(error)) from error
        labels = [f"column {index}" for index in range(len(names))]
        if problem := misfit(labels, arrays, schema, checkpoint.agent_count):
            raise DeviceSoaRestoreError(problem)
        memory = _filled_memory(schema, checkpoint.rows, kind, ids, arrays)
        try:
            return cls(memory, row_offset=checkpoint.row_offset, total_rows=total_rows)
        except InvalidConfig as error:
            raise DeviceSoaRestoreError(error.message) from error

    @property
    def schema(self) -> Schema:
        """The columns' names, dtypes, units and meanings."""
        return self.memory.schema

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns' names."""
        return self.memory.schema.names

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return len(self.memory.schema)

    @property
    def agent_count(self) -> int:
        """Number of rows of this rank."""
        return self.memory.rows

    @property
    def default_ids(self) -> bool:
        """Whether the ids are row_offset, row_offset + 1, ..., which are not stored."""
        return not self.memory.with_ids

    @property
    def ids(self) -> Array:
        """The ids, uint64 (rows,), read-only; default ids are made at each call."""
        stored = self.memory.ids
        view = _id_range(self.row_offset, self.memory.rows) if stored is None else stored.view()
        view.flags.writeable = False
        return view

    @property
    def columns(self) -> tuple[Array, ...]:
        """The current columns, 1-D arrays (rows,); valid until the next step swaps them."""
        return tuple(self.memory.current(index) for index in range(self.num_columns))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the stored ids and columns, second buffers not counted."""
        return self.memory.rows * (self.schema.row_bytes + (8 if self.memory.with_ids else 0))

    def column(self, index: int | str) -> Array:
        """Return one current column by position or name.

        Raises:
            IndexError, KeyError: there is no such column.
        """
        names = self.column_names
        if isinstance(index, str):
            if index not in names:
                raise NoSuchName(f'no column "{index}"{nearest(index, names)}: there are {", ".join(names)}')
            index = names.index(index)
        if not -len(names) <= index < len(names):
            raise IndexError(f"no column {index}: the columns are {', '.join(names) or 'none'}")
        return self.memory.current(range(len(names))[index])

    def checkpoint(self, start: int = 0, stop: int | None = None) -> DeviceSoaCheckpoint:
        """Return an independent copy of this rank's local rows [start, stop), all by default."""
        stored, rows = self.memory.ids, slice(start, self.memory.rows if stop is None else stop)
        return DeviceSoaCheckpoint(
            None if stored is None else stored[rows].copy(),
            [column[rows].copy() for column in self.columns],
            self.column_names,
            self.schema,
            row_offset=self.row_offset + start,
            rows=rows.stop - start,
        )

    def move_to(self, kind: Kind) -> None:
        """Move the columns to memory of another kind; arrays returned earlier no longer show the state.

        Raises:
            ColumnMemoryError: the memory cannot be allocated; nothing has changed.
        """
        old = self.memory
        if old.kind != kind:
            self.memory = _filled_memory(old.schema, old.rows, kind, old.ids, self.columns)
            old.close()

    def close(self) -> None:
        """Release the memory."""
        self.memory.close()

    def __repr__(self) -> str:
        return f"DeviceSoaStore({self.memory.rows} rows, columns {', '.join(self.column_names) or 'none'})"


def _filled_memory(
    schema: Schema, rows: int, kind: Kind, ids: Array | None, arrays: Sequence[Array]
) -> ColumnMemory:
    memory = ColumnMemory(schema, rows, kind, with_ids=ids is not None)
    for index, array in enumerate(arrays):
        np.copyto(memory.current(index), array)
    if ids is not None and memory.ids is not None:
        np.copyto(memory.ids, ids)
    return memory
