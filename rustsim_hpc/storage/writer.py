"""`CheckpointWriter`: writes one checkpoint at a time, beside the running steps or while they wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rustsim_hpc.errors import CheckpointFileError, RustsimError
from rustsim_hpc.proof.fingerprint import StateView
from rustsim_hpc.ranks.agreement import agree, on_all
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.storage.collective import check_supported, writes_together
from rustsim_hpc.storage.header import CheckpointHeader, StorageOptions
from rustsim_hpc.storage.sinks import Abandoned
from rustsim_hpc.storage.writing import Attempt, Phases

T = TypeVar("T")


def write_checkpoint(
    folder: Path, header: CheckpointHeader, view: StateView, team: Team, options: StorageOptions | None = None
) -> Path:
    """Write one checkpoint, all ranks together, and return its path. Collective.

    view: this rank's rows; read during the call, not copied.

    Raises:
        CheckpointFileError: it cannot be written: the same error on all ranks, and nothing is left of it.
    """
    writer = CheckpointWriter(folder, team, options, asynchronous=False)
    writer.submit(header, view)
    return writer.paths[-1]


class CheckpointWriter:
    """Writes checkpoints of a run into `folder`; at most one is under way.

    If asynchronous, the step loop waits only for a copy of the columns; a thread of each rank writes them,
    and `poll`, which all ranks call after the same steps, advances the attempt and publishes it. A failure
    is raised by the next `poll`, `finish` or `submit`, on all ranks at once; that checkpoint is then
    discarded, and the writer stays usable. A single file that parallel HDF5 writes is always written
    synchronously, since no thread may call MPI.

        writer.submit(header, view)      # when a checkpoint is due
        writer.poll()                    # after every step
        writer.finish()                  # before the end, or to be sure

    paths: the published checkpoints, in order.

    Raises:
        JobError: these ranks cannot write with `options`.
    """

    def __init__(
        self, folder: Path, team: Team, options: StorageOptions | None = None, *, asynchronous: bool = True
    ) -> None:
        self.folder, self.team, self.asynchronous = folder, team, asynchronous
        self.options = StorageOptions() if options is None else options
        check_supported(self.options, team)
        self.paths: list[Path] = []
        self._buffers: list[NDArray[Any]] = []
        self._attempt: Attempt | None = None
        self._phases: Phases | None = None
        self._task: _Task | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is under way: the same on all ranks."""
        return self._attempt is not None

    @property
    def done_here(self) -> bool:
        """Whether this rank has done its part of the current phase, for a caller that sums this up itself."""
        return self._task is None or not self._task.is_alive()

    @property
    def failed_here(self) -> bool:
        """Whether this rank failed to do its part of the current phase."""
        return self._task is not None and self.done_here and self._task.error is not None

    def reserve(self, view: StateView) -> None:
        """Allocate the copy of the columns of `view` now, so that the first checkpoint need not.

        Does nothing if checkpoints are written without a copy. Collective.

        Raises:
            CheckpointFileError: there is not enough memory: on all ranks.
        """
        if not self.asynchronous or writes_together(self.team, self.options):
            return

        def touch() -> None:
            self._room_for(view)
            for buffer in self._buffers:
                buffer.fill(0)

        on_all(self.team, lambda: _with_memory(touch))

    def submit(self, header: CheckpointHeader, view: StateView, memory: ColumnMemory | None = None) -> None:
        """Start a checkpoint of this rank's rows, `view`, after the previous one has finished. Collective.

        memory: the memory of the columns of `view`, if a keeper may have their current values.

        Raises:
            CheckpointFileError: the previous one failed, so this one is not started; or it cannot be started.
            ExecutorError: the values are lost.
        """
        self.finish()
        attempt = Attempt(self.folder, header, view, self.team, self.options)
        wait = attempt.collective or not self.asynchronous
        arrived: Callable[[], None] | None = None
        if not wait:
            attempt.view, arrived = self._snapshot(view, attempt, memory)
        elif memory is not None:
            self._all_well(attempt, memory.refresh)
        self._attempt = attempt
        # A single rank has nobody to agree with between the phases, so they run as one.
        self._phases = attempt.phases() if self.team.size > 1 else _in_one(attempt)
        first = next(self._phases)
        self._start(first if arrived is None else _after(arrived, first), wait=wait)
        if wait:
            self.finish()

    def poll(self, everybody_done: bool | None = None, *, somebody_failed: bool = False) -> Path | None:
        """Advance the current checkpoint without waiting; return its path if this call published it.

        Collective while `busy`. everybody_done: whether `done_here` holds on all ranks, where the caller
        knows. somebody_failed: whether `failed_here` holds on one; the others then stop writing, and the
        error is raised without waiting for the rest of their rows.

        Raises:
            CheckpointFileError: it failed: the same error on all ranks, and nothing is left of it.
        """
        if self._attempt is None:
            return None
        if somebody_failed:
            self._attempt.abandoned.set()
            return self._advance()
        if everybody_done is None:
            mine = np.array([self.done_here], np.int64)
            everybody_done = int(self.team.sum_int64(mine)[0]) == self.team.size
        return self._advance() if everybody_done else None

    def finish(self) -> Path | None:
        """Wait for the current checkpoint; return its path, None if there was none. Collective.

        Raises:
            CheckpointFileError: it failed: the same error on all ranks, and nothing is left of it.
        """
        path = None
        while self._attempt is not None:
            path = self._advance()
        return path

    def _advance(self) -> Path | None:
        """Finish the current phase on all ranks and start the next one; return the path after the last."""
        attempt, phases, task = self._attempt, self._phases, self._task
        assert attempt is not None  # noqa: S101 (the callers have looked)
        assert phases is not None  # noqa: S101
        assert task is not None  # noqa: S101
        task.join()
        error = None if task.error is None else _as_file_error(task.error, attempt)
        try:
            agree(self.team, error)
        except RustsimError:
            self._clear()
            attempt.take_back()
            raise
        results = self.team.gather(task.result) if self.team.size > 1 else [task.result]
        try:
            self._start(phases.send(results), wait=not self.asynchronous or attempt.collective)
        except StopIteration:
            self._clear()
            self.paths.append(attempt.path)
            return attempt.path
        return None

    def _start(self, function: Callable[[], Any], *, wait: bool) -> None:
        self._task = _Task(function)
        if wait:
            self._task.run()
        else:
            self._task.start()

    def _clear(self) -> None:
        self._attempt = self._phases = self._task = None

    def _all_well(self, attempt: Attempt, action: Callable[[], T]) -> T:
        """Return an action's result; if it fails on one rank, undo the attempt on all. Collective."""
        try:
            return on_all(self.team, lambda: _with_memory(action))
        except RustsimError:
            attempt.take_back()
            raise

    def _snapshot(
        self, view: StateView, attempt: Attempt, memory: ColumnMemory | None
    ) -> tuple[StateView, Callable[[], None] | None]:
        """Return a view of a copy of the state, and a function that waits for it if it is incomplete."""

        def copy() -> Callable[[], None] | None:
            self._room_for(view)
            columns = self._buffers[: len(view.columns)]
            if memory is not None:
                return memory.copy_aside(columns)
            for buffer, column in zip(columns, view.columns, strict=True):
                np.copyto(buffer, column)
            return None

        arrived = self._all_well(attempt, copy)
        ids = None
        if view.ids is not None:
            ids = self._buffers[-1]
            np.copyto(ids, view.ids)
        return replace(view, columns=tuple(self._buffers[: len(view.columns)]), ids=ids), arrived

    def _room_for(self, view: StateView) -> None:
        wanted = [*view.columns, *([] if view.ids is None else [view.ids])]
        if [(array.shape, array.dtype) for array in wanted] != [
            (have.shape, have.dtype) for have in self._buffers
        ]:
            # Free the old buffers first: there may not be room for both.
            self._buffers = []
            self._buffers = [np.empty_like(array) for array in wanted]


class _Task(threading.Thread):
    """A thread that runs one phase of one rank, and keeps its result or error. Ends with the process."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="rustsim-checkpoint", daemon=True)
        self.result: Any = None
        self.error: BaseException | None = None
        self._function = function

    def run(self) -> None:
        """Call the function."""
        try:
            self.result = self._function()
        except Abandoned:
            # Caused by another rank's error, which is the one to report.
            self.result = None
        except BaseException as error:  # noqa: BLE001 (kept for the step loop)
            self.error = error

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, if it was started as a thread."""
        if self.ident is not None:
            super().join(timeout)


def _after(arrived: Callable[[], None], phase: Callable[[], Any]) -> Callable[[], Any]:
    """Make a phase wait for the copy of the state that it writes."""

    def run() -> Any:
        arrived()
        return phase()

    return run


def _in_one(attempt: Attempt) -> Phases:
    """Run all phases of a single rank as one."""

    def run() -> None:
        phases = attempt.phases()
        phase = next(phases)
        while True:
            result = phase()
            try:
                phase = phases.send([result])
            except StopIteration:
                return

    yield run


def _as_file_error(error: BaseException, attempt: Attempt) -> RustsimError:
    if isinstance(error, MemoryError):
        error = _no_memory(error)
    if not isinstance(error, RustsimError):
        message = f"{attempt.path}: cannot write it: {type(error).__name__}: {error}"
        found = CheckpointFileError(message=message, damaged=False)
        found.__cause__ = error
        error = found
    return error.add_facts(step=attempt.header.step_index)


def _with_memory(action: Callable[[], T]) -> T:
    """Return ``action()``; raise a typed error where it has not enough memory."""
    try:
        return action()
    except MemoryError as error:
        raise _no_memory(error) from error


def _no_memory(error: MemoryError) -> CheckpointFileError:
    found = CheckpointFileError(message="not enough memory for a checkpoint", damaged=False)
    found.__cause__ = error
    return found
