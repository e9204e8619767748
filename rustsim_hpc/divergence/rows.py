"""The rows in which two runs differ: in repeated states, or in checkpoints that they left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rustsim_hpc.divergence.replica import Bench, checkpoint_rows
from rustsim_hpc.divergence.report import DivergenceReport, TableRow
from rustsim_hpc.divergence.row_search import Codes, Rows, RowsNow, differing_rows, ids_of
from rustsim_hpc.divergence.side import RunSide
from rustsim_hpc.errors import RustsimError, TeamError
from rustsim_hpc.ranks.team import Team

RowsOf = Callable[[RunSide], Rows]
"""Makes the rows of a side present; what it returned for the other side need not be valid any more."""


def find_rows(
    report: DivergenceReport, where: str, rows_of: RowsOf, columns: tuple[str, ...], team: Team
) -> bool:
    """Bisect the rows of columns, and add the differing ones to the report. Collective.

    where: how the report names the states. Returns whether any row differs.
    """
    left, right = report.left, report.right

    codes: dict[int, Codes] = {}

    def of(side: RunSide) -> RowsNow:
        def now() -> Rows:
            rows = rows_of(side)
            codes[id(side)] = rows.codes
            return rows

        return now

    def line(row: int, column: str, values: tuple[Any, Any]) -> TableRow:
        names = (
            _name(codes[id(side)], column, value) for side, value in zip((left, right), values, strict=True)
        )
        return TableRow(row, ids[row], column, *values, *names)

    found = [differing_rows(name, left.agents, of(left), of(right), team) for name in columns]
    report.rows = tuple(one for one in found if one is not None)
    if not report.rows:
        return False
    report.rows_from = where
    numbers = sorted({row for one in report.rows for row, _, _ in one.first})
    ids = dict(zip(numbers, ids_of(rows_of(left), numbers, team), strict=True))
    lines = [line(row, one.column, (a, b)) for one in report.rows for row, a, b in one.first]
    order = {name: place for place, name in enumerate(columns)}
    report.table = tuple(sorted(lines, key=lambda line: (line.row, order[line.column])))
    return True


def _name(codes: Codes, column: str, value: Any) -> str | None:
    return codes[column].get(int(value)) if column in codes else None


def rows_from_checkpoints(
    report: DivergenceReport, step: int, bench: Bench, team: Team, *, can_run: bool
) -> None:
    """Find rows in the nearest checkpoint at or after a step. Collective.

    The other side is its own checkpoint of that step or, if ``can_run``, its repetition, unless that does not
    reproduce its own record, since then the state that it was in is lost.
    """
    sides = (report.left, report.right)
    for at in sorted({at for side in sides for at, _ in side.checkpoints if at >= step}):
        stored = [dict(side.checkpoints).get(at) for side in sides]
        missing = [side for side, path in zip(sides, stored, strict=True) if path is None]
        if missing and not (can_run and all(_repeats(side, at) for side in missing)):
            continue
        try:
            made = [_rows(side, at, path, bench, team) for side, path in zip(sides, stored, strict=True)]
            names = _common(made[0].columns, made[1].columns)
            by_side = {id(side): rows for side, rows in zip(sides, made, strict=True)}
            where = f"the state of step {at:,}"
            if not find_rows(report, where, _given(by_side), names, team):
                report.notes.append(f"the states of step {at:,} do not differ any more")
        except TeamError:
            raise
        except RustsimError as error:
            report.notes.append(f"rows of step {at:,}: {error}")
            continue
        return
    report.notes.append("there is no later checkpoint in which to find the rows")


def _repeats(side: RunSide, step: int) -> bool:
    """Return whether a side's repetition has, as far as is known, the state that the side had at a step."""
    return side.strayed is None or step < side.strayed[0]


def _given(by_side: Mapping[int, Rows]) -> RowsOf:
    return lambda side: by_side[id(side)]


def _rows(side: RunSide, step: int, path: Path | None, bench: Bench, team: Team) -> Rows:
    return bench.rows(side, step) if path is None else checkpoint_rows(path, team)


def _common(left: Mapping[str, object], right: Mapping[str, object]) -> tuple[str, ...]:
    kinds = [{name: getattr(column, "dtype", None) for name, column in one.items()} for one in (left, right)]
    return tuple(name for name, dtype in kinds[0].items() if kinds[1].get(name) == dtype)
