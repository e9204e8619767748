"""One table of many runs: the results of an ensemble or a parameter sweep, as CSV.

::

    run, status, step, steps, agents, seed, fingerprint     from the record
    params.NAME                                             a column a parameter
    SERIES.COLUMN                                           the last value of each column of each series

A field is empty where the run lacks the value.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.errors import OutputError, RunFolderError
from rustsim_hpc.files import write_atomic
from rustsim_hpc.run_folder.folder import JOB
from rustsim_hpc.run_folder.reader import Run, open_run

_ROUNDS: Final = 10


@dataclass(frozen=True)
class RunTable:
    """Runs as rows; `columns` are in the order of the CSV text, a row has those that its run has."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def statuses(self) -> list[tuple[str, str]]:
        """The run and its status, row by row."""
        return [(row["run"], row["status"]) for row in self.rows]

    def to_csv(self) -> str:
        """Return the table as CSV text with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def collect_runs(folder: Path) -> RunTable:
    """Read every run right below `folder`, in the order of their names (2 before 10).

    A run whose record or series is damaged has the status "unreadable".

    Raises:
        RunFolderError: there is no run.
    """
    try:
        runs = sorted((path.parent for path in folder.glob(f"*/{JOB}")), key=_natural)
    except OSError as error:
        raise RunFolderError(f"cannot read {folder}: {error.strerror}") from error
    if not runs:
        raise RunFolderError(f"there is no run's folder right below {folder}")
    rows = tuple(_row(path) for path in runs)
    return RunTable(tuple(dict.fromkeys(name for row in rows for name in row)), rows)


def write_table(folder: Path, file: Path) -> RunTable:
    """Write the table of the runs below `folder` to the CSV file `file`, and return it.

    Runs that end together may all call this: the file is replaced atomically, and a caller that finds that
    another run has ended meanwhile writes again, so that the last table has all of them, without a lock.

    Raises:
        RunFolderError: there is no run.
        OutputError: the file cannot be written.
    """
    table = collect_runs(folder)
    for _ in range(_ROUNDS):
        try:
            write_atomic(file, table.to_csv())
        except OSError as error:
            raise OutputError(f"cannot write {file}: {error.strerror}") from error
        written, table = table, collect_runs(folder)
        if table.statuses == written.statuses:
            break
    return table


def _row(path: Path) -> dict[str, Any]:
    try:
        run = open_run(path)
        return {
            "run": path.name,
            "status": run.status,
            "step": run.step_index,
            "steps": run.steps,
            "agents": run.agents,
            "seed": run.seed,
            "fingerprint": run.record.get("fingerprint"),
            **{f"params.{name}": value for name, value in run.params.items()},
            **dict(_last_values(run)),
        }
    except RunFolderError:
        return {"run": path.name, "status": "unreadable"}


def _last_values(run: Run) -> Iterator[tuple[str, Any]]:
    for file, kind in run.outputs().items():
        if kind != "series" or not (run.path / file).exists():
            continue
        for name, values in run.series(file).items():
            if len(values):
                yield f"{Path(file).stem}.{name}", values[-1].item()


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that puts run-2 before run-10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
