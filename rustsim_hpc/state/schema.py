"""The schema of a state: each column's name, dtype, unit and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rustsim_hpc.errors import ModelError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DTYPES = (
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)


def dtype_name(dtype: Any) -> str:
    """Return the name of a column dtype, given in any form that NumPy accepts.

    Raises:
        ModelError: not one of `DTYPES`, or not in native byte order.
    """
    try:
        parsed: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        close = nearest(str(dtype), DTYPES)
        raise ModelError(f"dtype {dtype!r} is unknown{close}; columns may be {', '.join(DTYPES)}") from None
    if parsed.name not in DTYPES:
        raise ModelError(f"dtype {parsed.name} is not supported; columns may be {', '.join(DTYPES)}")
    if not parsed.isnative:
        raise ModelError(f"dtype {parsed.str} is not in this machine's byte order")
    return str(parsed.name)


@dataclass(frozen=True)
class Column:
    """One column of the state.

    Attributes:
        name: text that UTF-8 can encode; in a model a Python identifier, since kernels bind by it.
        dtype: one of `DTYPES` (any form that NumPy accepts is converted to the name).
        unit: unit of the values, "1" for none.
        doc: meaning.
        codes: names of the values of a column of codes, e.g. {0: "S", 1: "I"}.

    Raises:
        ModelError: an invalid field.
    """

    name: str
    dtype: str
    unit: str = "1"
    doc: str = ""
    codes: Mapping[int, str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for label in ("name", "unit", "doc"):
            if not isinstance(getattr(self, label), str):
                raise ModelError(f"{label} of a column must be text, got {getattr(self, label)!r}")
        try:
            self.name.encode("utf-8")
        except UnicodeEncodeError:
            raise ModelError(f"column name {self.name!r} cannot be written as UTF-8") from None
        try:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        except ModelError as error:
            raise ModelError(f'column "{self.name}": {error}') from None
        if self.codes is not None:
            object.__setattr__(self, "codes", self._checked_codes(self.codes))

    def _checked_codes(self, codes: Mapping[Any, Any]) -> dict[int, str]:
        limits = np.iinfo(self.dtype) if np.dtype(self.dtype).kind in "iu" else None
        if limits is None:
            raise ModelError(f'column "{self.name}" is {self.dtype}: only integer columns have codes')
        for code, name in codes.items():
            if not isinstance(code, int) or isinstance(code, bool) or not limits.min <= code <= limits.max:
                raise ModelError(f'column "{self.name}": code {code!r} is not a {self.dtype}')
            if not isinstance(name, str):
                raise ModelError(f'column "{self.name}": the name of code {code} must be text')
        return dict(codes)


@dataclass(frozen=True)
class Schema:
    """The columns of a state, in order.

    Raises:
        ModelError: two columns have the same name, or an item is not a Column.
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        seen: set[str] = set()
        columns: tuple[Any, ...] = self.columns
        for column in columns:
            if not isinstance(column, Column):
                raise ModelError(f"{column!r} is not a Column")
            if column.name in seen:
                raise ModelError(f'two columns are called "{column.name}"')
            seen.add(column.name)

    @classmethod
    def plain(cls, names: Iterable[str], dtypes: Iterable[Any]) -> Schema:
        """Build a schema from names and dtypes only (unit "1", no meaning)."""
        return cls(tuple(Column(name, dtype) for name, dtype in zip(names, dtypes, strict=True)))

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' names."""
        return tuple(column.name for column in self.columns)

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The columns' NumPy dtypes."""
        return tuple(np.dtype(column.dtype) for column in self.columns)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all columns, ids not counted."""
        return sum(dtype.itemsize for dtype in self.dtypes)

    def index(self, name: str) -> int:
        """Return the position of a column.

        Raises:
            ModelError: no column has that name.
        """
        for position, column in enumerate(self.columns):
            if column.name == name:
                return position
        raise ModelError(f'no column "{name}"{nearest(str(name), self.names)}')
