"""The writer of replay logs: appends entries, and truncates a log for a restore or a resumed run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rustsim_hpc.errors import OutputError, ReplayLogError
from rustsim_hpc.files import AppendFile, keep_lines, write_atomic
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.proof.replay import columns_of
from rustsim_hpc.proof.replay_log import ReplayHeader, ReplayLog, header_differences, read_replay_log

_NO_COLUMNS: Mapping[str, int] = {}


class ReplayLogWriter:
    """Appends the entries of a run to its log; one process of a run has a writer."""

    def __init__(
        self, path: Path, header: ReplayHeader, *, resume_step: int | None = None, sync: bool = False
    ) -> None:
        """Create a log, or continue an existing one, truncated after `resume_step`.

        sync: make each entry durable at once (slow), not only when `sync` is called.

        Raises:
            ReplayLogError: the existing log cannot be read, or is of another run; it is unchanged.
            OutputError: the file cannot be written, or lacks entries from before `resume_step`.
        """
        self.path = path
        self.header = header
        self._sync_each = sync
        self._last_step = -1
        self._file: AppendFile | None = None
        # Formatted without json.dumps, which would be a considerable part of a short step.
        self._keys = [(name, json.dumps(name, ensure_ascii=False)) for name in header.value_names]
        if resume_step is not None and path.exists():
            found = read_replay_log(path)
            self._require_same_run(found.header)
            self._require_no_gap(found, resume_step)
            self.truncate_after(resume_step)
            return
        try:
            write_atomic(path, header.line())
            self._file = AppendFile(path)
        except OSError as error:
            raise self._failure("write", error) from error

    def append(self, fingerprint: ReplayFingerprint, columns: Mapping[str, int] = _NO_COLUMNS) -> None:
        """Append one entry and hand it to the operating system.

        columns: the digest's value per column, "ids" among them; not needed for a `ReplayEntry`.

        Raises:
            ReplayLogError: the entry is of another scheme, out of order, or of other columns.
            OutputError: it cannot be written; the log is unchanged.
        """
        if self._file is None:
            raise OutputError(f"replay log {self.path} is closed", step=fingerprint.step_index)
        line = self._line(fingerprint, columns or columns_of(fingerprint))
        try:
            self._file.append(line)
            if self._sync_each:
                self._file.sync()
        except OSError as error:
            raise self._failure("write", error, fingerprint.step_index) from error
        self._last_step = fingerprint.step_index

    def truncate_after(self, step_index: int) -> None:
        """Drop the entries after a step, and an incomplete last line, atomically.

        Raises:
            ReplayLogError: the log cannot be read.
            OutputError: it cannot be written; the log is unchanged.
        """
        kept = [e.step_index for e in read_replay_log(self.path).entries if e.step_index <= step_index]
        self.close()
        try:
            keep_lines(self.path, 1 + len(kept))
            self._file = AppendFile(self.path)
        except OSError as error:
            raise self._failure("cut back", error, step_index) from error
        self._last_step = kept[-1] if kept else -1

    def sync(self) -> None:
        """Make all entries durable; called before a checkpoint is published, so that no log is behind it.

        Raises:
            OutputError: the disk fails.
        """
        if self._file is not None:
            try:
                self._file.sync()
            except OSError as error:
                raise self._failure("sync", error) from error

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, fingerprint: ReplayFingerprint, columns: Mapping[str, int]) -> bytes:
        step = fingerprint.step_index
        problem = None
        if fingerprint.scheme != self.header.scheme:
            problem = f"has scheme {fingerprint.scheme}, the log has {self.header.scheme}"
        elif step <= self._last_step:
            problem = f"does not come after step {self._last_step}"
        elif step % self.header.interval:
            problem = f"is not in the interval of {self.header.interval} steps"
        elif columns and (self.header.scheme != "digest" or columns.keys() != set(self.header.value_names)):
            problem = f"has values of {', '.join(columns)}, expected {', '.join(self.header.value_names)}"
        if problem is not None:
            raise ReplayLogError(f"replay log {self.path}: the entry of step {step} {problem}", step=step)
        values = ", ".join(f'{key}: "{columns[name]:#018x}"' for name, key in self._keys) if columns else ""
        tail = f', "columns": {{{values}}}}}\n' if columns else "}\n"
        return f'{{"step": {step}, "value": "{fingerprint.value:#018x}"{tail}'.encode()

    def _require_no_gap(self, found: ReplayLog, resume_step: int) -> None:
        """Raise OutputError if entries up to `resume_step` are missing: no checkpoint is ahead of its log."""
        missing = found.missing_step(resume_step)
        if missing is not None:
            raise OutputError(
                f"replay log {self.path} lacks step {missing}, but the run resumes at step {resume_step}",
                step=resume_step,
                hint="resume from an earlier checkpoint (--at STEP), or bring the file back",
            )

    def _require_same_run(self, found: ReplayHeader) -> None:
        if differences := header_differences(found, self.header):
            raise ReplayLogError(
                f"replay log {self.path} is of another run: {'; '.join(differences)}",
                hint="resume with what the run was started with, or choose another folder",
            )

    def _failure(self, verb: str, error: OSError, step: int | None = None) -> OutputError:
        return OutputError(f"cannot {verb} replay log {self.path}: {error.strerror or error}", step=step)
