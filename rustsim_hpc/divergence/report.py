"""What is known of a difference between two runs, for readers and as JSON (`divergence.json`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.divergence.causes import Cause
from rustsim_hpc.divergence.row_search import RowDifference, hex_bits
from rustsim_hpc.divergence.side import Known, RunSide
from rustsim_hpc.errors import OutputError
from rustsim_hpc.files import write_atomic
from rustsim_hpc.proof.fingerprint import hex64

FORMAT: Final = "rustsim-hpc divergence"
VERSION: Final = 1
_RANGES_SHOWN: Final = 8
_ROWS_SHOWN: Final = 10


@dataclass(frozen=True)
class TableRow:
    """One row and column in which two states differ, both values, and their names in a column of codes."""

    row: int
    id: int
    column: str
    left: Any
    right: Any
    left_name: str | None = None
    right_name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON's types; each value as exact text, as its raw bits, and by its name."""
        names = {} if self.left_name is None else {"left_name": self.left_name}
        names |= {} if self.right_name is None else {"right_name": self.right_name}
        return {
            "row": self.row,
            "id": self.id,
            "column": self.column,
            "left": str(self.left),
            "right": str(self.right),
            "left_bits": hex_bits(self.left),
            "right_bits": hex_bits(self.right),
            **names,
        }


@dataclass(frozen=True)
class ValueDifference:
    """A reduction or derived value that differs, both as text, or where in it for an array."""

    name: str
    left: str
    right: str


@dataclass
class DivergenceReport:
    """Where two runs differ, as far as could be determined.

    Attributes:
        left, right: the sides.
        equal_at: the last step after which they are known to be equal, None if there is none.
        compared_to: the last step that was looked at.
        step: the first step after which they differ, None if they are equal.
        columns: what differs after that step, as far as known.
        phase, phase_index, phase_count: the first phase of the step whose result differs.
        values: reductions and derived values that differ after that phase.
        rows_from: where the rows were found: a phase, or a later checkpoint.
        rows: for each column where it differs.
        table: the first rows.
        causes: likely ones, the most certain first.
        notes: what else a reader should know.
        path: where the report was written, None if it was not.
    """

    left: RunSide
    right: RunSide
    equal_at: int | None = None
    compared_to: int = 0
    step: int | None = None
    columns: tuple[str, ...] = ()
    phase: str | None = None
    phase_index: int | None = None
    phase_count: int = 0
    values: tuple[ValueDifference, ...] = ()
    rows_from: str = ""
    rows: tuple[RowDifference, ...] = ()
    table: tuple[TableRow, ...] = ()
    causes: list[Cause] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    path: Path | None = None

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return self.step is None

    def to_dict(self) -> dict[str, Any]:
        """Return the report in JSON's types."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "equal": self.equal,
            "left": _side(self.left, self.step),
            "right": _side(self.right, self.step),
            "equal_at": self.equal_at,
            "compared_to": self.compared_to,
            "step": self.step,
            "columns": list(self.columns),
            "phase": self.phase,
            "phase_index": self.phase_index,
            "values": [vars(value) for value in self.values],
            "rows_from": self.rows_from,
            "rows": [
                {
                    "column": found.column,
                    "ranges": [list(pair) for pair in found.ranges],
                    "rows": found.rows,
                    "exact": found.exact,
                }
                for found in self.rows
            ],
            "table": [row.to_dict() for row in self.table],
            "causes": [vars(cause) for cause in self.causes],
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            write_atomic(path, json.dumps(self.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def text(self) -> str:
        """Return the report for a reader; it ends with the table of rows."""
        if self.step is None:
            head = [f"{self.left.name} and {self.right.name} are equal up to step {self.compared_to:,}"]
            return "\n".join(head + [f"note: {note}" for note in self.notes])
        lines = [self._headline(), *self._sides()]
        if self.columns:
            lines.append(f"columns that differ after step {self.step:,}: {', '.join(self.columns)}")
        if self.phase is not None:
            lines.append(self._phase_line())
        lines += [f"  {value.name}: {value.left} against {value.right}" for value in self.values]
        if self.rows:
            lines.append(f"rows that differ in {self.rows_from}:")
            lines += [f"  {found.column}: {_ranges(found)}" for found in self.rows]
        if self.causes:
            lines += ["likely causes:", *(f"  {cause.text}" for cause in self.causes)]
        lines += [f"note: {note}" for note in self.notes]
        lines += [] if self.path is None else [f"report: {self.path}"]
        return "\n".join(lines + self._table())

    def _headline(self) -> str:
        before = f"equal up to step {self.equal_at:,}" if self.equal_at is not None else "never equal"
        if self.step == self.left.origin == self.right.origin and self.equal_at is None:
            return f"the runs differ from their first state on (step {self.step:,})"
        return f"the runs differ after step {self.step:,} ({before})"

    def _sides(self) -> list[str]:
        lines = []
        for label, side in (("left ", self.left), ("right", self.right)):
            known = side.known.get(self.step or 0)
            value = f": {hex64(known.value)} ({known.scheme})" if known is not None else ""
            lines.append(f"  {label}  {side.name}{value}")
        return lines

    def _phase_line(self) -> str:
        if self.phase_index is None:
            return f"first in {self.phase}"
        return (
            f"first in phase {self.phase} ({self.phase_index + 1} of {self.phase_count} "
            f"in the step from {(self.step or 0) - 1:,} to {self.step:,})"
        )

    def _table(self) -> list[str]:
        shown = self.table[:_ROWS_SHOWN]
        if not shown:
            return []
        cells = [("row", "id", "column", "left", "right", "left bits", "right bits")]
        for row in shown:
            facts = row.to_dict()
            cells.append(
                (
                    f"{row.row}", f"{row.id}", row.column,
                    _with_name(facts["left"], row.left_name), _with_name(facts["right"], row.right_name),
                    facts["left_bits"], facts["right_bits"],
                )
            )  # fmt: skip
        widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]


def _with_name(value: str, name: str | None) -> str:
    return value if name is None else f"{value} ({name})"


def _side(side: RunSide, step: int | None) -> dict[str, Any]:
    known: Known | None = side.known.get(step) if step is not None else None
    return {
        "name": side.name,
        "folder": None if side.folder is None else str(side.folder),
        "seed": side.seed,
        "agents": side.agents,
        "params": side.params,
        "model": side.model,
        "partitions": side.record.get("partitions"),
        "reached": side.reached,
        "value": None if known is None else hex64(known.value),
        "scheme": None if known is None else known.scheme,
        "reproduces": side.strayed is None,
    }


def _ranges(found: RowDifference) -> str:
    shown = [
        f"{start:,}" if stop == start + 1 else f"{start:,}-{stop - 1:,}"
        for start, stop in found.ranges[:_RANGES_SHOWN]
    ]
    more = len(found.ranges) - _RANGES_SHOWN
    tail = f" and {more:,} more ranges" if more > 0 else ""
    count = f"{found.rows:,} row{'' if found.rows == 1 else 's'}"
    count = count if found.exact else f"at most {count}"
    return f"{count}: {', '.join(shown)}{tail}"


def value_difference(name: str, left: Any, right: Any) -> ValueDifference:
    """Return a short description of how two results differ."""
    import numpy as np

    one, other = np.asarray(left), np.asarray(right)
    if left is None or right is None or one.shape != other.shape or one.dtype != other.dtype:
        return ValueDifference(name, _kind(left), _kind(right))
    if one.ndim == 0:
        return ValueDifference(f"{name}", str(one[()]), str(other[()]))
    raw = [np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}") for array in (one, other)]
    places: Sequence[int] = np.flatnonzero(raw[0] != raw[1]).tolist()
    index = np.unravel_index(places[0], one.shape)
    where = ", ".join(str(int(part)) for part in index)
    more = f" ({len(places):,} of {one.size:,} differ)" if len(places) > 1 else ""
    return ValueDifference(f"{name}[{where}]{more}", str(one[index]), str(other[index]))


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", ())
    return "nothing" if value is None else f"{getattr(value, 'dtype', type(value).__name__)} {shape}"
