"""A series as a CSV file: exact values, whole rows, readable while the run goes on.

The first line names the columns; then comes one line a due step, in order, so that a row's step follows from
its place. Integers are written in full; a float is its shortest text that reads back as the same float64
(of which every float32 is one); truth values are True and False; None is an empty field.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rustsim_hpc.errors import nearest
from rustsim_hpc.files import AppendFile, keep_lines, whole_lines, write_atomic


def field_text(value: object) -> str:
    """Return one value as a CSV field's text.

    Raises:
        TypeError: a value that is not a number, a truth value, a string or None.
        ValueError: a string of more than one line.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        # Through the base type: a subclass (an IntEnum, say) may print itself otherwise.
        return repr(int(value) if isinstance(value, int) else float(value))
    if isinstance(value, str):
        if "\n" in value or "\r" in value:
            raise ValueError(f"{value!r} has more than one line")
        return value
    raise TypeError(f"{value!r} is not a number, a truth value, a string or None")


def row_fields(row: object, columns: Sequence[str]) -> list[str]:
    """Return what a row function gave as the texts of its fields, in the order of ``columns``.

    Raises:
        TypeError, ValueError: not a dict of exactly these columns or a sequence of that many values.
    """
    if isinstance(row, Mapping):
        for name in row:
            if name not in columns:
                raise ValueError(f'there is no column "{name}"{nearest(str(name), columns)}')
        missing = [name for name in columns if name not in row]
        if missing:
            raise ValueError(f"no value for column {', '.join(missing)}")
        values: list[Any] = [row[name] for name in columns]
    elif isinstance(row, Sequence | np.ndarray) and not isinstance(row, str | bytes):
        values = list(row)
        if len(values) != len(columns):
            raise ValueError(f"{len(values)} values for {len(columns)} columns")
    else:
        raise TypeError(f"a row is a dict or a sequence of values, got {type(row).__name__}")
    fields = []
    for name, value in zip(columns, values, strict=True):
        try:
            fields.append(field_text(value))
        except (TypeError, ValueError) as error:
            raise type(error)(f"column {name}: {error}") from None
    return fields


def csv_line(fields: Sequence[str]) -> bytes:
    """Return one line of CSV with its newline."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode()


class SeriesFile:
    """The writer of one CSV file; ``rows`` counts the data rows that it holds."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.rows = 0
        self._header = csv_line(columns)
        self._columns = len(columns)
        self._file: AppendFile | None = None

    def start(self) -> None:
        """Create an empty series, in place of any old one.

        Raises:
            OSError: it cannot be written.
        """
        write_atomic(self.path, self._header)
        self._file = AppendFile(self.path)
        self.rows = 0

    def resume(self, rows: int) -> None:
        """Continue after at most ``rows`` data rows; what follows them, a torn line too, is cut off.

        Raises:
            OSError: it cannot be read or written.
            ValueError: it is not this series.
        """
        lines = whole_lines(self.path)
        if next(lines, b"") + b"\n" != self._header:
            raise ValueError("its first line does not name this series' columns")
        self.rows = min(rows, sum(1 for _ in _rows(lines, self._columns)))
        keep_lines(self.path, self.rows + 1)
        self._file = AppendFile(self.path)

    def append(self, line: bytes) -> None:
        """Add one row.

        Raises:
            OSError: it cannot be written; the file is as before.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is not open")
        self._file.append(line)
        self.rows += 1

    def flush(self) -> None:
        """Make all rows durable.

        Raises:
            OSError: the disk fails.
        """
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_series(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a CSV file as one array a column, also while it is being written.

    A column of integers is int64 (uint64 where needed), one of numbers float64 with empty fields as NaN, one
    of True and False bool, and any other is text. A torn last line is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: a line has too many or too few fields, or there is no header.
    """
    lines = whole_lines(path)
    first = next(lines, None)
    if first is None:
        raise ValueError("it has no header yet")
    header = _fields(1, first)
    body = list(_rows(lines, len(header)))
    return {name: _column([row[k] for row in body]) for k, name in enumerate(header)}


def _rows(lines: Iterable[bytes], columns: int) -> Iterator[list[str]]:
    """Yield the fields of the lines after the header.

    Raises:
        ValueError: a line has too many or too few fields, or is not text.
    """
    for number, line in enumerate(lines, start=2):
        row = _fields(number, line)
        if len(row) != columns:
            raise ValueError(f"line {number} has {len(row)} fields, expected {columns}")
        yield row


def _fields(number: int, line: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode()]), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"line {number}: {error}") from error


def _column(texts: list[str]) -> npt.NDArray[Any]:
    if any("_" in text for text in texts):
        # Python would read 1_0 as ten.
        return np.array(texts, dtype=np.str_)
    for convert in (_integers, _floats, _truths):
        try:
            return convert(texts)
        except (ValueError, OverflowError):
            continue
    return np.array(texts, dtype=np.str_)


def _integers(texts: list[str]) -> npt.NDArray[Any]:
    values = [int(text) for text in texts]
    return np.array(values, np.uint64 if values and max(values) > np.iinfo(np.int64).max else np.int64)


def _floats(texts: list[str]) -> npt.NDArray[Any]:
    if not any(texts):
        raise ValueError("only empty fields")
    return np.array([float(text) if text else np.nan for text in texts], np.float64)


def _truths(texts: list[str]) -> npt.NDArray[Any]:
    if not set(texts) <= {"True", "False"}:
        raise ValueError("not truth values")
    return np.array([text == "True" for text in texts], np.bool_)
