"""Public tasks as a session: payloads are sent as copies, results are checked before they are applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.control.checkpoint import PartitionCheckpoint
from rustsim_hpc.errors import (
    EngineControlPlaneError,
    ExecutorError,
    PartitionCheckpointError,
    PartitionExecutorError,
    Phase,
    ResultCountMismatch,
    Worker,
    message_of,
)
from rustsim_hpc.executors.base import (
    PartitionExecutablePhase,
    PartitionExecutor,
    PartitionTask,
    PartitionTaskResult,
    where_it_failed,
)
from rustsim_hpc.executors.work import PANICKED, Board, Frame, PhaseFailure, Task, Work
from rustsim_hpc.modeling.program import ColumnCall
from rustsim_hpc.proof.fingerprint import ReplayFingerprint, digest_column, fingerprint_checkpoint
from rustsim_hpc.state.columns import DeviceSoaCheckpoint
from rustsim_hpc.state.partition import PartitionExecutionContext, PartitionId, PartitionPhaseReport

Array = np.ndarray[Any, Any]

_LONGEST_US = 2**53


class TaskSession:
    """Runs a program of column phases through an executor that has only the public interface.

    Args:
        work: the bound program; it must consist of column phases.
        executor: any :class:`~rustsim_hpc.executors.base.PartitionExecutor`.
        phase_base: index of the first phase in the control plane's combined list.
        scheme: fingerprint scheme of the payloads.

    Raises:
        ExecutorError: the program has row kernels, reductions or derived values, which only resident
            executors run.
    """

    def __init__(self, work: Work, executor: PartitionExecutor, phase_base: int, scheme: str) -> None:
        self.work = work
        self.board = Board(len(work.tasks), work.program, [])
        self._executor = executor
        self._phase_base = phase_base
        self._scheme = scheme
        items = [item for segment in work.program.segments for item in segment.items]
        self._calls = [item for item in items if isinstance(item, ColumnCall)]
        if len(self._calls) < len(work.program.phase_names) or len(work.program.segments) > 1:
            first = work.tasks[0].assignment.partition_id
            message = "row kernels, reductions and derived values need an executor of this package"
            raise ExecutorError(Worker(first, message))

    @property
    def compile_seconds(self) -> float:
        """Seconds that this process has spent on compiling so far, without the executor's workers."""
        return CLOCK.seconds

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:  # noqa: ARG002 (there is only one)
        """Ship every partition, run all phases, and apply the results if all of them are valid."""
        tasks = [self._task(task, frame) for task in self.work.tasks]
        results: Any  # a foreign executor may return anything
        try:
            results = self._executor.execute(tasks)
        except PartitionExecutorError as error:
            return [self._failure(one) for one in (error, *error.others)]
        except Exception as error:  # noqa: BLE001 (foreign code: nothing may leave it untyped)
            return [self._failure(error)]
        except BaseException as error:  # noqa: BLE001 (the same)
            return [self._failure(error, PANICKED)]
        expected = len(self.work.tasks)
        if not isinstance(results, Sequence) or len(results) != expected:
            actual = len(results) if isinstance(results, Sequence) else 0
            return [self._failure(ResultCountMismatch(expected, actual))]
        pairs = list(zip(self.work.tasks, results, strict=True))
        failures = [self._check(task, result, frame) for task, result in pairs]
        if not any(failures):
            for place, (task, result) in enumerate(pairs):
                self._take(place, task, result, frame)
        return [failure for failure in failures if failure is not None]

    def close(self) -> None:
        """Do nothing: no resources are held between steps."""

    # -- tasks ---------------------------------------------------------------------------------------

    def _task(self, task: Task, frame: Frame) -> PartitionTask:
        memory, assignment = self.work.memory, task.assignment
        state = self._state(task, [memory.current(column) for column in range(len(memory.schema))])
        checkpoint = PartitionCheckpoint(
            assignment=assignment,
            step_index=frame.step_index,
            fingerprint=fingerprint_checkpoint(frame.step_index, state, self._scheme),
            resident_bytes=state.resident_bytes,
            state=state,
        )
        context = PartitionExecutionContext(
            partition_id=assignment.partition_id,
            row_start=assignment.row_start,
            row_end=assignment.row_end,
            worker=assignment.worker,
            backend=task.backend,
            step_index=frame.step_index,
            params=self.work.params,
        )
        return PartitionTask(context, checkpoint, self._phase_base, self._phases(state))

    def _state(self, task: Task, columns: Sequence[Array]) -> DeviceSoaCheckpoint:
        """Return a copy of a partition's rows of ``columns`` (all of them, or none for only the ids)."""
        rows, schema = slice(task.start, task.stop), self.work.memory.schema
        return DeviceSoaCheckpoint(
            None if self.work.ids is None else self.work.ids[rows].copy(),
            [column[rows].copy() for column in columns],
            schema.names if columns else (),
            schema if columns else None,
            row_offset=task.assignment.row_start,
            rows=task.stop - task.start,
        )

    def _phases(self, state: DeviceSoaCheckpoint) -> list[PartitionExecutablePhase]:
        return [
            PartitionExecutablePhase(
                call.column_phase.name,
                call.column_phase.fn,
                schema=self.work.memory.schema,
                stream_key=self.work.stream_key(call.column_phase.stream),
                ids=None if state.default_ids else state.ids,
            )
            for call in self._calls
        ]

    # -- results -------------------------------------------------------------------------------------

    def _check(self, task: Task, result: Any, frame: Frame) -> PhaseFailure | None:
        """Return what is wrong with one partition's result, or None."""
        partition = task.assignment.partition_id
        error: EngineControlPlaneError
        try:
            if not isinstance(result, PartitionTaskResult):
                message = f"executor returned {type(result).__name__}, not a PartitionTaskResult"
                raise Worker(partition, message)
            problem = self._misfit(task, result.checkpoint, frame)
            if not problem:
                return None
            named = partition
            if problem.startswith("starts at row"):  # another partition's result, which names its own
                named = result.checkpoint.assignment.partition_id
            error = PartitionCheckpointError(f"partition {named!r} {problem}", partition=named)
        except Worker as source:
            error = ExecutorError(source)
        except Exception as source:  # noqa: BLE001 (incomplete or malformed objects)
            message = f"executor returned a broken result: {message_of(source)}"
            error = ExecutorError(Worker(partition, message))
        return PhaseFailure(partition, task.assignment.worker, None, "", str(error), "worker", error=error)

    def _misfit(self, task: Task, got: PartitionCheckpoint, frame: Frame) -> str:
        """Return how a payload differs from what was requested, or ''."""
        state: Any = got.state
        fingerprint: Any = got.fingerprint
        schema, rows = self.work.memory.schema, task.stop - task.start
        if got.assignment.row_start != task.assignment.row_start:
            return f"starts at row {got.assignment.row_start}, expected {task.assignment.row_start}"
        if got.assignment != task.assignment:
            return f"has another assignment than the request: {got.assignment}"
        if got.step_index != frame.step_index + 1:
            return f"captured step {got.step_index}, expected {frame.step_index + 1}"
        if not isinstance(state, DeviceSoaCheckpoint) or not isinstance(fingerprint, ReplayFingerprint):
            return "is not a checkpoint"
        if state.column_names != schema.names or state.schema != schema:
            return "schema does not match the request"
        if len(state.columns) != len(schema):
            return f"has {len(state.columns)} columns, expected {len(schema)}"
        if state.agent_count != rows:
            return f"has assignment length {rows} but checkpoint contains {state.agent_count} rows"
        for column, array in zip(schema.columns, state.columns, strict=True):
            if array.dtype != np.dtype(column.dtype) or array.shape != (rows,):
                found = f"{array.dtype} {array.shape}"
                return f"column {column.name} is {found}, expected {column.dtype} ({rows},)"
        if not state.same_ids(self._state(task, [])):
            return "has other ids than the request"
        actual = fingerprint_checkpoint(frame.step_index + 1, state, fingerprint.scheme)
        return "" if fingerprint == actual else "fingerprint mismatch"

    def _take(self, place: int, task: Task, result: PartitionTaskResult, frame: Frame) -> None:
        memory, sides = self.work.memory, self.work.program.final_sides
        for column, (side, values) in enumerate(zip(sides, result.checkpoint.state.columns, strict=True)):
            target = (memory.other(column) if side else memory.current(column))[task.start : task.stop]
            np.copyto(target, values)
            if frame.want_digest:
                first = self.work.first_row + task.start
                self.board.digests[place, column] = digest_column(target, first, column + 1)
        reports: Any = result.phases
        for report in reports if isinstance(reports, Sequence) else ():
            self._time(place, report)

    def _time(self, place: int, report: Any) -> None:
        """Add a phase's time; a malformed report is ignored, because times do not affect results."""
        if not (isinstance(report, PartitionPhaseReport) and isinstance(report.elapsed_us, int)):
            return
        position = report.phase_index - self._phase_base
        if 0 <= position < len(self._calls) and 0 <= report.elapsed_us < _LONGEST_US:
            self.board.times[place, position] += report.elapsed_us * 1000

    # -- failures ------------------------------------------------------------------------------------

    def _failure(self, error: BaseException, message: str = "") -> PhaseFailure:
        """Return an executor's error as a failure of the partition that it names, or that raised it.

        An error without a partition is reported for the first one; with several partitions a hint says that
        the failing one is not known.
        """
        first = self.work.tasks[0].assignment.partition_id
        if isinstance(error, ExecutorError):
            error = error.source
        if isinstance(error, PartitionExecutorError):
            pass
        elif found := where_it_failed(error):
            text = message or message_of(error)
            error = Worker(found[0], text, phase=found[1]) if message else Phase(*found, text)
        else:
            whole = "the executor failed as a whole: which partition is not known"
            hint = None if len(self.work.tasks) == 1 else whole
            error = Worker(first, message or message_of(error), hint=hint)
        error.others, partition = (), _partition_id(error, first)
        position = self._position(error.phase) if isinstance(error, Phase) else None
        typed = ExecutorError(error)
        return PhaseFailure(partition, None, position, error.phase or "", str(error), "worker", error=typed)

    def _position(self, phase: str) -> int | None:
        names = self.work.program.phase_names
        return names.index(phase) if phase in names else None


def _partition_id(error: PartitionExecutorError, default: PartitionId) -> PartitionId:
    """Return the partition that an executor's error names, or ``default`` if it is not a partition id."""
    named = error.partition
    return named if isinstance(named, PartitionId) else default
