"""The engine's counters over a run, as ``metrics.jsonl``: one JSON object a line, readable while it grows.

Each line has ``step``, ``unix_time`` (seconds), what the caller adds, and the counters of `EngineMetrics`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rustsim_hpc.control.metrics import EngineMetrics
from rustsim_hpc.errors import OutputError
from rustsim_hpc.files import AppendFile, keep_lines, parse_json, whole_lines

FILE = "metrics.jsonl"


class MetricsLog:
    """The writer; rank 0 has one."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        """Begin a log (None), or go on with one whose entries after ``resume_step`` are cut off.

        Raises:
            OutputError: the file cannot be written.
        """
        self.path = folder / FILE
        try:
            if resume_step is None:
                self.path.unlink(missing_ok=True)
            elif self.path.exists():
                keep_lines(self.path, _entries_up_to(self.path, resume_step))
            self._file = AppendFile(self.path)
        except OSError as error:
            raise OutputError(f"cannot open {self.path}: {error.strerror}", step=resume_step) from error

    def append(self, metrics: EngineMetrics, **more: Any) -> None:
        """Add the counters as they are after step ``metrics.current_step``.

        Raises:
            OutputError: no room, or the disk fails; the log is as before.
        """
        entry = {
            "step": metrics.current_step,
            "unix_time": round(time.time(), 3),
            **more,
            **metrics.to_dict(),
        }
        try:
            self._file.append(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            step = metrics.current_step
            raise OutputError(f"cannot write {self.path}: {error.strerror}", step=step) from error

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log, also while it is being written; without a log there are none.

    Raises:
        ValueError: a line is not an entry; names the line.
    """
    path = folder / FILE
    return [_entry(number, line) for number, line in enumerate(whole_lines(path), 1)] if path.exists() else []


def _entry(number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError(f"line {number} is not an object with a step")
    return entry


def _entries_up_to(path: Path, step: int) -> int:
    """Return the number of leading lines that are whole entries of steps up to ``step``."""
    count = 0
    for number, line in enumerate(whole_lines(path), 1):
        try:
            made = _entry(number, line)["step"]
        except ValueError:
            break
        if made > step:
            break
        count += 1
    return count
