"""The seed's task boundary as a session: payloads out as copies, results checked, then copied beside the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rustsim_hpc.checkpoint import PartitionCheckpoint
from rustsim_hpc.columns import DeviceSoaCheckpoint
from rustsim_hpc.errors import (
    ExecutorError,
    PartitionCheckpointError,
    PartitionExecutorError,
    Phase,
    ResultCountMismatch,
    RustsimError,
    Worker,
)
from rustsim_hpc.executors.base import (
    PartitionExecutablePhase,
    PartitionExecutor,
    PartitionTask,
    PartitionTaskResult,
)
from rustsim_hpc.fingerprint import digest_column, fingerprint_checkpoint
from rustsim_hpc.model import ColumnPhase
from rustsim_hpc.partition import PartitionExecutionContext, PartitionId
from rustsim_hpc.program import ColumnCall, KernelStage
from rustsim_hpc.work import Board, Frame, PhaseFailure, Task, Work


class TaskSession:
    """Runs a program of column phases through an executor that has only the public face.

    Args:
        work: the bound program; it must consist of column phases.
        executor: any :class:`~rustsim_hpc.executors.base.PartitionExecutor`.
        phase_base: index of the first phase in the control plane's combined list.
        scheme: fingerprint scheme of the payloads.

    Raises:
        ExecutorError: the program has row kernels, which only resident executors run.
    """

    compile_seconds = 0.0

    def __init__(self, work: Work, executor: PartitionExecutor, phase_base: int, scheme: str) -> None:
        self.work = work
        self.board = Board(len(work.tasks), work.program, [])
        self._executor = executor
        self._phase_base = phase_base
        self._scheme = scheme
        self._calls = [item for segment in work.program.segments for item in segment.items]
        if any(isinstance(item, KernelStage) for item in self._calls) or work.program.reductions:
            first = work.tasks[0].assignment.partition_id
            raise ExecutorError(Worker(first, "row kernels and reductions need an executor of this package"))

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Ship every partition, run all phases there, check what comes back."""
        tasks = [self._task(task, frame) for task in self.work.tasks]
        try:
            results = self._executor.execute(tasks)
            self._check_count(results)
            for place, (task, sent, result) in enumerate(zip(self.work.tasks, tasks, results, strict=True)):
                self._check(task, sent, result, frame)
                self._times(place, result)
            for place, (task, result) in enumerate(zip(self.work.tasks, results, strict=True)):
                self._take(place, task, result, frame)
        except PartitionExecutorError as error:
            return [_failure(error, frame), *(_failure(other, frame) for other in error.others)]
        except RustsimError as error:
            return [_ours(error, self.work.tasks[0].assignment.partition_id)]
        except Exception as error:
            partition = self.work.tasks[0].assignment.partition_id
            return [PhaseFailure(partition, None, 0, "", str(error) or type(error).__name__, "worker")]
        except BaseException:
            partition = self.work.tasks[0].assignment.partition_id
            return [PhaseFailure(partition, None, 0, "", "partition worker thread panicked", "worker")]
        return []

    def close(self) -> None:
        """Nothing is held between steps."""

    # -- out -----------------------------------------------------------------------------------------

    def _task(self, task: Task, frame: Frame) -> PartitionTask:
        memory, assignment = self.work.memory, task.assignment
        rows = slice(task.start, task.stop)
        state = DeviceSoaCheckpoint(
            None if self.work.ids is None else self.work.ids[rows].copy(),
            [memory.current(column)[rows].copy() for column in range(len(memory.schema))],
            memory.schema.names,
            memory.schema,
            row_offset=assignment.row_start,
            rows=task.stop - task.start,
        )
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
        phases = [_executable(item.column_phase) for item in self._calls if isinstance(item, ColumnCall)]
        return PartitionTask(context, checkpoint, self._phase_base, phases)

    # -- back ----------------------------------------------------------------------------------------

    def _check_count(self, results: Sequence[PartitionTaskResult]) -> None:
        expected = len(self.work.tasks)
        if not isinstance(results, Sequence) or len(results) != expected:
            actual = len(results) if isinstance(results, Sequence) else 0
            raise ResultCountMismatch(expected, actual)

    def _check(self, task: Task, sent: PartitionTask, result: PartitionTaskResult, frame: Frame) -> None:
        """Raise PartitionCheckpointError unless a result is what the request asked for."""
        partition = task.assignment.partition_id
        if not isinstance(result, PartitionTaskResult):
            raise Worker(partition, f"executor returned {type(result).__name__}, not a PartitionTaskResult")
        got, want = result.checkpoint, sent.checkpoint()
        state, original = got.state, want.state
        name = repr(partition)
        if got.assignment.row_start != task.assignment.row_start:
            # Results in another order: the one that stands here names itself.
            name = repr(got.assignment.partition_id)
            problem = f"starts at row {got.assignment.row_start}, expected {task.assignment.row_start}"
        elif got.assignment != task.assignment:
            problem = "assignment does not match the request"
        elif got.step_index != frame.step_index + 1:
            problem = f"captured step {got.step_index}, expected {frame.step_index + 1}"
        elif state.column_names != original.column_names or state.schema != original.schema:
            problem = "schema does not match the request"
        elif len(state.columns) != len(original.columns) or state.agent_count != original.agent_count:
            problem = (
                f"has assignment length {len(got.assignment)} but checkpoint contains {state.agent_count} rows"
            )
        elif any(
            a.dtype != b.dtype or a.shape != b.shape for a, b in zip(state.columns, original.columns, strict=True)
        ):
            problem = "columns do not have the dtypes and lengths of the request"
        elif not state.same_ids(self._sent_ids(task)):
            problem = "row ids are not those of the request"
        elif got.fingerprint.step_index != got.step_index or got.fingerprint != fingerprint_checkpoint(
            got.step_index, state, got.fingerprint.scheme
        ):
            problem = "fingerprint mismatch"
        else:
            return
        raise PartitionCheckpointError(f"partition {name} {problem}", partition=partition, step=frame.step_index)

    def _sent_ids(self, task: Task) -> DeviceSoaCheckpoint:
        """Return a payload without columns that carries the true ids, whatever became of the one sent."""
        ids = None if self.work.ids is None else self.work.ids[task.start : task.stop]
        return DeviceSoaCheckpoint(
            ids, [], (), None, row_offset=task.assignment.row_start, rows=task.stop - task.start
        )

    def _times(self, place: int, result: PartitionTaskResult) -> None:
        for report in result.phases:
            position = report.phase_index - self._phase_base
            if 0 <= position < self.board.times.shape[1]:
                self.board.times[place, position] += report.elapsed_us * 1000

    def _take(self, place: int, task: Task, result: PartitionTaskResult, frame: Frame) -> None:
        memory, sides = self.work.memory, self.work.program.final_sides
        for column, (side, values) in enumerate(zip(sides, result.checkpoint.state.columns, strict=True)):
            target = (memory.other(column) if side else memory.current(column))[task.start : task.stop]
            np.copyto(target, values)
            if frame.want_digest:
                first = self.work.first_row + task.start
                self.board.digests[place, column] = digest_column(target, first, column + 1)


def _executable(phase: ColumnPhase) -> PartitionExecutablePhase:
    function: Callable[[Any, Any, int], None] = phase.fn
    return PartitionExecutablePhase(phase.name, function)


def _failure(error: BaseException, frame: Frame) -> PhaseFailure:
    if isinstance(error, Phase):
        return PhaseFailure(_id(error.partition), None, error.phase_index or 0, error.phase, error.message)
    if isinstance(error, Worker):
        return PhaseFailure(_id(error.partition), None, 0, error.phase or "", error.message, "worker")
    if isinstance(error, PartitionExecutorError):
        partition = getattr(error, "partition", None)
        return _ours(ExecutorError(error), _id(partition) if partition is not None else PartitionId(0))
    return PhaseFailure(PartitionId(0), None, 0, "", str(error), "worker")


def _ours(error: RustsimError, partition: PartitionId) -> PhaseFailure:
    return PhaseFailure(partition, None, 0, error.phase or "", str(error), "worker", error=error)


def _id(partition: Any) -> PartitionId:
    return PartitionId(partition.value)
