"""Writes a run's outputs, on rank 0.

Rows and samples are with the operating system when `OutputSet.record` returns, so a killed process loses
none. Call `OutputSet.flush` before a checkpoint is published: what a resume from it expects is then durable.
A resume cuts every file back to the restored step, so that nothing is doubled, torn or left out.
``outputs.json`` says which outputs the folder has and from which step on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rustsim_hpc.errors import OutputError, message_of, named
from rustsim_hpc.files import sweep_temporary, write_atomic
from rustsim_hpc.modeling.outputs import MANIFEST, Arrays, Output, Picture, Recorded, Sample, Series
from rustsim_hpc.run_folder.array_file import ArrayFile
from rustsim_hpc.run_folder.manifest import FORMAT, VERSION, read_manifest
from rustsim_hpc.run_folder.pictures import draw_pictures
from rustsim_hpc.run_folder.sample_journal import checked_array
from rustsim_hpc.run_folder.series_file import SeriesFile, csv_line, row_fields

Samples = Mapping[str, Mapping[str, Any]]
"""By a Sample's file and a column's name: the values of its rows, in the order of `Sample.rows_of`."""


@contextmanager
def failing(file: str, step: int | None, doing: str) -> Iterator[None]:
    """Turn what the block raises into an `OutputError` that names the output and the step."""
    try:
        yield
    except (OutputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        hint, text = None, named(error)
        if isinstance(error, OSError):
            hint = "make room or repair the file system, then resume the run"
            text = error.strerror or str(error)
        elif isinstance(error, ValueError):
            text = message_of(error)
        raise OutputError(f'output "{file}": cannot {doing}: {text}', step=step, hint=hint) from error


def describe(declaration: Output) -> dict[str, Any]:
    """Return an output's entry in ``outputs.json``."""
    entry: dict[str, Any] = {"file": declaration.file, "kind": type(declaration).__name__.lower()}
    if not isinstance(declaration, Picture):
        entry["every"] = int(declaration.every)
    if isinstance(declaration, Series | Sample):
        entry["columns"] = list(declaration.columns)
    return entry


class _SeriesRecorder:
    """A `Series` and its CSV file."""

    def __init__(self, declaration: Series, path: Path) -> None:
        self.declaration: Recorded = declaration
        self.file = SeriesFile(path, declaration.columns)
        self.last_step: int | None = None
        self._row, self._columns = declaration.row, declaration.columns

    def resume(self, steps: list[int], step: int) -> list[int]:  # noqa: ARG002 (the other recorder needs it)
        """Cut the file back to its due ``steps`` up to ``step``, and return those that it holds."""
        self.file.resume(len(steps))
        return steps[: self.file.rows]

    def make(self, step: int, time: float, context: Any, samples: Samples) -> Callable[[], None]:  # noqa: ARG002
        """Make the row of the state at ``step``, and return the function that writes it."""
        line = csv_line(row_fields(self._row(context), self._columns))
        return lambda: self.file.append(line)


class _ArrayRecorder:
    """An `Arrays` or a `Sample` and its HDF5 file."""

    def __init__(self, declaration: Arrays | Sample, path: Path, agents: int) -> None:
        self.declaration: Recorded = declaration
        self._rows = declaration.rows_of(agents) if isinstance(declaration, Sample) else None
        self.file = ArrayFile(path, declaration.every, {} if self._rows is None else {"rows": self._rows})
        self.last_step: int | None = None

    def resume(self, steps: list[int], step: int) -> list[int]:  # noqa: ARG002 (the other recorder needs it)
        """Cut the file back to the state at ``step``, and return the steps of the samples that it holds."""
        return [int(kept) for kept in self.file.resume(step)]

    def make(self, step: int, time: float, context: Any, samples: Samples) -> Callable[[], None]:
        """Make the sample of the state at ``step``, and return the function that writes it."""
        arrays = {
            str(name): checked_array(str(name), value) for name, value in self._values(context, samples)
        }
        return lambda: self.file.append(step, time, arrays)

    def _values(self, context: Any, samples: Samples) -> Iterable[tuple[str, Any]]:
        declaration = self.declaration
        if isinstance(declaration, Sample) and self._rows is not None:
            given = samples[declaration.file]
            for name in declaration.columns:
                if np.shape(given[name]) != self._rows.shape:
                    raise ValueError(f"{np.shape(given[name])} values of {name} for {self._rows.shape} rows")
            return [(name, given[name]) for name in declaration.columns]
        if isinstance(declaration, Arrays) and isinstance(declaration.arrays, Mapping):
            return [(name, function(context)) for name, function in declaration.arrays.items()]
        if isinstance(declaration, Arrays) and callable(declaration.arrays):
            values = declaration.arrays(context)
            if not isinstance(values, Mapping):
                raise TypeError(f"expected a dict of arrays, got {type(values).__name__}")
            return values.items()
        raise TypeError(declaration)


_Recorder = _SeriesRecorder | _ArrayRecorder


class OutputSet:
    """All outputs of one run.

    The order of calls: `open`; `record` for the first state (a restored one, too) and after each committed
    step, where `due` names something; `flush` before each checkpoint; `close`; `draw_pictures`.
    """

    def __init__(self, declarations: Sequence[Output], folder: Path, agents: int = 0) -> None:
        """Take the declarations of a model whose global population is ``agents``; nothing is touched yet."""
        self.declarations = tuple(declarations)
        self.folder = folder
        self.agents = agents
        self.first_step = 0
        self._open: list[_Recorder] = []

    def open(self, resume_step: int | None = None, first_step: int = 0) -> None:
        """Start new files at ``first_step`` (``resume_step`` None), or continue after ``resume_step``.

        Raises:
            OutputError: a file cannot be written; on resume also: it is not this output's, or lacks rows from
                before the restored step.
        """
        recorded = [d for d in self.declarations if not isinstance(d, Picture)]
        with failing(MANIFEST, resume_step, "open the outputs"):
            sweep_temporary(self.folder)
            if resume_step is not None and not self._has_begun():
                first_step, resume_step = resume_step, None
            self.first_step = first_step if resume_step is None else self._check_manifest()
        self._open = [self._open_one(declaration, resume_step) for declaration in recorded]
        if resume_step is None:
            with failing(MANIFEST, first_step, "write it"):
                write_atomic(self.folder / MANIFEST, json.dumps(self._manifest(), indent=1) + "\n")

    def due(self, step: int) -> tuple[Recorded, ...]:
        """Return the outputs that are due at ``step`` and do not have that row or sample yet."""
        return tuple(
            o.declaration
            for o in self._open
            if step % o.declaration.every == 0 and (o.last_step is None or step > o.last_step)
        )

    def record(self, step: int, time: float, context: Any, samples: Samples | None = None) -> None:
        """Write what is due for the state at ``step``, after the step was committed.

        All values are made first, then written. ``context`` is what the outputs' functions get; ``samples``
        holds the values of the `Sample` outputs that are due.

        Raises:
            OutputError: a function failed or returned what cannot be written, or the disk failed. The message
                names the output and the error's ``step`` is the one recorded.
        """
        due = self.due(step)
        outputs = [output for output in self._open if output.declaration in due]
        writes = [self._make(output, step, time, context, samples or {}) for output in outputs]
        for output, write in zip(outputs, writes, strict=True):
            with failing(output.declaration.file, step, "write it"):
                write()
            output.last_step = step

    def flush(self) -> None:
        """Make everything recorded durable.

        Raises:
            OutputError: the disk failed.
        """
        for output in self._open:
            with failing(output.declaration.file, output.last_step, "flush it"):
                output.file.flush()

    def close(self) -> None:
        """Make everything durable, finish the HDF5 files and close all; closing twice is allowed.

        Raises:
            OutputError: the disk failed. All files are closed; further failures are attached. What was
                recorded is still there, and a resume finishes it.
        """
        failures: list[OutputError] = []
        for output in self._open:
            try:
                with failing(output.declaration.file, output.last_step, "finish it"):
                    try:
                        output.file.flush()
                    finally:
                        output.file.close()
            except OutputError as error:
                failures.append(error)
        self._open = []
        if failures:
            raise failures[0].add_facts(others=tuple(failures[1:]))

    def draw_pictures(self, run: Any) -> None:
        """Draw the pictures from the run's reader.

        Raises:
            OutputError: a picture failed; without matplotlib they are skipped instead, and reported.
        """
        pictures = [d for d in self.declarations if isinstance(d, Picture)]
        draw_pictures(pictures, self.folder, run)

    def files(self) -> dict[str, Path]:
        """Return the path of every output that exists, by its file's name in the model."""
        paths = {declaration.file: self.folder / declaration.file for declaration in self.declarations}
        return {name: path for name, path in paths.items() if path.exists()}

    def _manifest(self) -> dict[str, Any]:
        entries = [describe(declaration) for declaration in self.declarations]
        return {"format": FORMAT, "version": VERSION, "first_step": self.first_step, "outputs": entries}

    def _has_begun(self) -> bool:
        """Return whether a run's outputs were opened here before: a fork starts with a checkpoint alone."""
        return any((self.folder / file).exists() for file in (MANIFEST, *(d.file for d in self.declarations)))

    def _check_manifest(self) -> int:
        """Check that the folder's outputs are these, and return their first step."""
        try:
            manifest = read_manifest(self.folder)
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"it cannot be read ({text})") from error
        for declaration in self.declarations:
            if manifest.entries.get(declaration.file) != describe(declaration):
                raise OutputError(
                    f'output "{declaration.file}" is not what the run was started with',
                    hint="resume with the model that started it, or fork the run",
                )
        return manifest.first_step

    def _open_one(self, declaration: Recorded, resume_step: int | None) -> _Recorder:
        path = self.folder / declaration.file
        output: _Recorder
        with failing(declaration.file, resume_step, "open it"):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep_temporary(path.parent)
            if isinstance(declaration, Series):
                output = _SeriesRecorder(declaration, path)
            else:
                output = _ArrayRecorder(declaration, path, self.agents)
            if resume_step is None:
                output.file.start()
                return output
            steps = self._steps(declaration.every, resume_step)
            have = output.resume(steps, resume_step)
            # A kill may have come between the commit of resume_step and its row: `record` then adds the row.
            if have != steps and have != [step for step in steps if step < resume_step]:
                raise OutputError(
                    f'output "{declaration.file}" ends at {f"step {have[-1]}" if have else "its start"}, '
                    f"but the run resumes at step {resume_step}",
                    step=resume_step,
                    hint="resume from an earlier checkpoint (--at STEP), or bring the file back",
                )
            output.last_step = have[-1] if have else None
        return output

    def _steps(self, every: int, last: int) -> list[int]:
        """Return the steps up to ``last`` whose state an output records."""
        return list(range(-(-self.first_step // every) * every, last + 1, every))

    def _make(
        self, output: _Recorder, step: int, time: float, context: Any, samples: Samples
    ) -> Callable[[], None]:
        """Make the values of one output, and return the function that writes them."""
        declaration = output.declaration
        start = -(-self.first_step // declaration.every) * declaration.every
        expected = start if output.last_step is None else output.last_step + declaration.every
        if step != expected:
            raise OutputError(
                f'output "{declaration.file}" wants step {expected} next, but got step {step}', step=step
            )
        with failing(declaration.file, step, "make its values"):
            return output.make(step, time, context, samples)
