"""Find the rows in which two states differ, by partial digests: sums travel between ranks, columns never do.

A digest's sum over a range of rows is the sum over its parts, so that all ranks together get one number for
each range. Ranges whose sums are equal are dropped, the others are split, until they are short enough to
compare their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from rustsim_hpc.proof.fingerprint import digest_column
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.schema import Schema

Array = np.ndarray[Any, Any]
Range = tuple[int, int]

Codes = Mapping[str, Mapping[int, str]]

_FIRST_PARTS = 4096
_PARTS = 64
_LEAF_ROWS = 256
_MOST_RANGES = 64
_MOST_FIRST = 20


def codes_of(schema: Schema) -> Codes:
    """Return the names of values by column, for columns of codes."""
    return {column.name: column.codes for column in schema.columns if column.codes}


@dataclass(frozen=True)
class Rows:
    """The rows of a state that this rank holds.

    columns: name to 1-D array (local rows,). row_offset: global row of local row 0. ids: uint64
    (local rows,), or None for the default ones. codes: of columns of codes, the names of their values.
    """

    columns: Mapping[str, Array]
    row_offset: int
    ids: Array | None = None
    codes: Codes = field(default_factory=dict)

    def id_of(self, row: int) -> int | None:
        """Return the id of a global row, or None where another rank holds it."""
        if self.ids is None:
            return row
        local = row - self.row_offset
        return int(self.ids[local]) if 0 <= local < len(self.ids) else None


RowsNow = Callable[[], Rows]
"""Makes a state's rows present: a search may have room for one of two states at a time."""


@dataclass(frozen=True)
class RowDifference:
    """Where a column differs.

    ranges: of global rows, [start, stop), in order. exact: whether every row of them differs; else there are
    too many to compare each, and each of the later ranges has at least one row that differs.
    first: the first rows that differ, with the two values.
    """

    column: str
    ranges: tuple[Range, ...]
    exact: bool
    first: tuple[tuple[int, Any, Any], ...]

    @property
    def rows(self) -> int:
        """Number of rows in the ranges."""
        return sum(stop - start for start, stop in self.ranges)


def column_sums(rows: Rows, keys: Mapping[str, int], team: Team) -> dict[str, int]:
    """Return the digest's sum of columns over all ranks' rows. Collective.

    keys: column name to key index; equal columns have equal sums under one key index.
    """
    mine = [digest_column(rows.columns[name], rows.row_offset, key) for name, key in keys.items()]
    total = team.sum_int64(np.array(mine, np.uint64).view(np.int64)).view(np.uint64)
    return dict(zip(keys, map(int, total), strict=True))


def range_sums(rows: Rows, name: str, ranges: Sequence[Range], team: Team) -> list[int]:
    """Return the digest's sum of a column over each range of global rows, all ranks together. Collective."""
    column, offset = rows.columns[name], rows.row_offset
    sums = np.zeros(len(ranges), np.uint64)
    for place, (start, stop) in enumerate(ranges):
        first, last = max(start - offset, 0), min(stop - offset, len(column))
        if first < last:
            sums[place] = digest_column(column[first:last], offset + first, 1)
    return [int(value) for value in team.sum_int64(sums.view(np.int64)).view(np.uint64)]


def range_values(rows: Rows, name: str, ranges: Sequence[Range], team: Team) -> Array:
    """Return a column's values in ranges of global rows, one after the other, on all ranks. Collective.

    For short ranges: at most a few thousand rows in all.
    """
    column, offset = rows.columns[name], rows.row_offset
    mine = []
    for place, (start, stop) in enumerate(ranges):
        first, last = max(start - offset, 0), min(stop - offset, len(column))
        if first < last:
            mine.append((place, offset + first, column[first:last].copy()))
    pieces = [piece for rank in team.allgather(mine) for piece in rank]
    pieces.sort(key=lambda piece: piece[:2])
    return np.concatenate([column[:0], *(values for _, _, values in pieces)])


def differing_rows(name: str, total: int, left: RowsNow, right: RowsNow, team: Team) -> RowDifference | None:
    """Return where a column of two states of ``total`` rows differs, or None if nowhere. Collective.

    left, right: called before each use; what they returned earlier may be invalid by then.
    """
    ranges: list[Range] = [(0, total)] if total else []
    coarse: list[Range] = []
    parts = _FIRST_PARTS
    while any(stop - start > _LEAF_ROWS for start, stop in ranges):
        pieces = [piece for one in ranges for piece in _split(one, parts)]
        sums = [range_sums(now(), name, pieces, team) for now in (left, right)]
        differing = [piece for piece, one, other in zip(pieces, *sums, strict=True) if one != other]
        ranges, later = differing[:_MOST_RANGES], differing[_MOST_RANGES:]
        coarse += later
        parts = _PARTS
    one, other = (range_values(now(), name, ranges, team) for now in (left, right))
    numbers = np.concatenate([np.zeros(0, np.int64), *(np.arange(start, stop) for start, stop in ranges)])
    places = np.flatnonzero(_bits(one) != _bits(other))
    rows = [int(row) for row in numbers[places]]
    found = _joined([(row, row + 1) for row in rows] + sorted(coarse))
    if not found:
        return None
    first = tuple((int(numbers[at]), one[at], other[at]) for at in places[:_MOST_FIRST])
    return RowDifference(name, tuple(found), exact=not coarse, first=first)


def ids_of(rows: Rows, wanted: Sequence[int], team: Team) -> list[int]:
    """Return the ids of global rows, on all ranks. Collective."""
    mine = {row: rows.id_of(row) for row in wanted}
    everyone = team.allgather(mine)
    known = {row: number for ids in everyone for row, number in ids.items() if number is not None}
    return [known[row] for row in wanted]


def hex_bits(value: Any) -> str:
    """Return the raw bits of a NumPy scalar as hexadecimal digits, all of them."""
    scalar = np.asarray(value)
    return f"0x{int(_bits(scalar.reshape(1))[0]):0{2 * scalar.dtype.itemsize}x}"


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _split(whole: Range, parts: int) -> list[Range]:
    """Return a range cut into equal pieces: at most as many as requested, and none needlessly short."""
    start, stop = whole
    count = max(1, min(parts, -(-(stop - start) // _LEAF_ROWS)))
    bounds = [start + (stop - start) * k // count for k in range(count + 1)]
    return list(pairwise(bounds))


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Join ranges in order that touch."""
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
