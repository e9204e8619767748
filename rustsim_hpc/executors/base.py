"""The two interfaces of an executor: public tasks, and the resident interface that works in place.

The public interface is the protocol :class:`PartitionExecutor`: self-contained tasks whose payloads are
copies, for executors that ship state. The executors of this package that run where the rows are also
implement :class:`ResidentExecutor`; a control plane prefers it, because nothing is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from rustsim_hpc.control.checkpoint import PartitionCheckpoint
from rustsim_hpc.errors import ExecutorError, PartitionExecutorError, Phase, Worker, message_of
from rustsim_hpc.executors.work import PANICKED, Board, Frame, PhaseFailure, Work
from rustsim_hpc.proof.fingerprint import fingerprint_checkpoint
from rustsim_hpc.random import MAX_STEP, RowRandom
from rustsim_hpc.state.columns import DeviceSoaCheckpoint
from rustsim_hpc.state.partition import (
    PartitionExecutionBackend,
    PartitionExecutionContext,
    PartitionId,
    PartitionPhaseReport,
)
from rustsim_hpc.state.phase_columns import PhaseColumns
from rustsim_hpc.state.schema import Schema

PhaseFunction = Callable[[PartitionExecutionContext, PhaseColumns, int], None]


class PartitionExecutablePhase:
    """A phase that can be shipped to an executor: a name and ``fn(context, columns, rows)``.

    Args:
        name: its name.
        function: what it does.
        schema: names of the columns, used if `run` is given bare arrays.
        stream_key: Philox key of ``context.random``; None without random numbers.
        ids: uint64 (rows,), the ids of the partition's rows; None for default ids.
    """

    def __init__(
        self,
        name: str,
        function: PhaseFunction,
        *,
        schema: Schema | None = None,
        stream_key: int | None = None,
        ids: Any = None,
    ) -> None:
        self._name = name
        self._function = function
        self._schema = schema
        self._stream_key = stream_key
        self._ids = ids

    def name(self) -> str:
        """Return the phase's name."""
        return self._name

    @property
    def function(self) -> PhaseFunction:
        """The phase's function; an executor that cannot send it compares it with the worker's."""
        return self._function

    @property
    def stream_key(self) -> int | None:
        """Philox key of its random numbers, None if there are none."""
        return self._stream_key

    def run(self, context: PartitionExecutionContext, columns: Any, rows: int) -> None:
        """Run the phase in place on one partition's columns.

        ``columns`` may be the bare arrays of a checkpoint; the phase still finds them by name.

        Raises:
            BaseException: what the phase raises, with partition and phase attached for executors that do not
                catch it (`where_it_failed`); ValueError if the phase changed a column's dtype or length.
        """
        if self._schema is not None and not isinstance(columns, PhaseColumns):
            columns = PhaseColumns(self._schema, columns, [array.flags.writeable for array in columns])
        if self._stream_key is not None and context.random is None and context.step_index <= MAX_STEP:
            ids = context.row_start if self._ids is None else self._ids
            context = replace(context, random=RowRandom(self._stream_key, ids, rows, context.step_index))
        try:
            self._function(context, columns, rows)
            if isinstance(columns, PhaseColumns):
                columns.verify_unchanged_shape(rows)
        except BaseException as error:
            vars(error)[_WHERE] = (context.partition_id, self._name)
            raise


_WHERE = "_rustsim_where"


def where_it_failed(error: BaseException) -> tuple[PartitionId, str] | None:
    """Return the partition and phase whose `PartitionExecutablePhase.run` raised an exception, if any."""
    found: tuple[PartitionId, str] | None = vars(error).get(_WHERE)
    return found


class PartitionTask:
    """A self-contained unit of partition work: routing, payload (a copy) and the phases to run."""

    def __init__(
        self,
        context: PartitionExecutionContext,
        checkpoint: PartitionCheckpoint,
        phase_base: int,
        phases: Sequence[PartitionExecutablePhase],
    ) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._phase_base = phase_base
        self._phases = tuple(phases)

    def context(self) -> PartitionExecutionContext:
        """Return where and when the task runs."""
        return self._context

    def checkpoint(self) -> PartitionCheckpoint:
        """Return the payload, which the task owns."""
        return self._checkpoint

    def phase_base(self) -> int:
        """Return the index of the task's first phase in the control plane's combined phase list."""
        return self._phase_base

    def phases(self) -> tuple[PartitionExecutablePhase, ...]:
        """Return the phases to run, in order."""
        return self._phases

    def into_parts(
        self,
    ) -> tuple[PartitionExecutionContext, PartitionCheckpoint, int, tuple[PartitionExecutablePhase, ...]]:
        """Return context, checkpoint, phase base and phases."""
        return self._context, self._checkpoint, self._phase_base, self._phases


@dataclass(frozen=True)
class PartitionTaskResult:
    """A completed partition: its new payload and one report for each phase."""

    checkpoint: PartitionCheckpoint
    phases: tuple[PartitionPhaseReport, ...]

    @classmethod
    def completed(
        cls,
        context: PartitionExecutionContext,
        checkpoint: PartitionCheckpoint,
        phases: Sequence[PartitionPhaseReport],
    ) -> PartitionTaskResult:
        """Build a result with updated step index, fingerprint and resident bytes."""
        step = context.step_index + 1
        state = checkpoint.state
        fresh = replace(
            checkpoint,
            step_index=step,
            fingerprint=fingerprint_checkpoint(step, state, checkpoint.fingerprint.scheme),
            resident_bytes=state.resident_bytes,
        )
        return cls(fresh, tuple(phases))


@runtime_checkable
class PartitionExecutor(Protocol):
    """Runs partition tasks: one result for each task, in the same order."""

    def execute(self, tasks: Sequence[PartitionTask]) -> Sequence[PartitionTaskResult]:
        """Run all tasks.

        Raises:
            PartitionExecutorError: a variant that names the partition (and phase) that failed.
        """
        ...


class ResidentSession(Protocol):
    """An executor bound to one rank's work; runs segments on the resident columns."""

    board: Board

    @property
    def compile_seconds(self) -> float:
        """Seconds spent on compiling or loading kernels so far."""
        ...

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run ``program.segment(segment, frame.step_index)`` on every partition, None as nothing to do.

        Returns:
            Failures in partition order.
        """
        ...

    def close(self) -> None:
        """Release threads, processes and memory; calling it again does nothing."""
        ...


@runtime_checkable
class ResidentExecutor(Protocol):
    """An executor that can work in place on the columns where they live."""

    name: str

    def attach(self, work: Work) -> ResidentSession:
        """Bind to a rank's work.

        Raises:
            ExecutorError: a partition's backend is not one that this executor serves.
        """
        ...


Executor = PartitionExecutor | ResidentExecutor
"""What a control plane steps its partitions with."""


def require_local(work: Work, executor: str) -> None:
    """Raise ExecutorError if a partition's backend is not the local CPU."""
    for task in work.tasks:
        if refusal := refused_backend(task.assignment.partition_id, task.backend, executor):
            raise ExecutorError(refusal)


def refused_backend(
    partition: PartitionId, backend: PartitionExecutionBackend, executor: str
) -> Worker | None:
    """Return the error of an executor that serves only the local CPU, or None for that backend."""
    if isinstance(backend, PartitionExecutionBackend.LocalCpu):
        return None
    return Worker(
        partition,
        f"the {executor} executor runs on the local CPU only, not on {describe(backend)}",
        hint="give the partition a local_cpu worker, or use an executor that serves its backend",
    )


def describe(backend: PartitionExecutionBackend) -> str:
    """Return a description of a backend."""
    if isinstance(backend, PartitionExecutionBackend.CudaDevice):
        return f"CUDA device {backend.device_ordinal}"
    if isinstance(backend, PartitionExecutionBackend.External):
        return f"the external endpoint {backend.endpoint}"
    return "the local CPU"


def require_local_tasks(tasks: Sequence[PartitionTask], executor: str) -> None:
    """Raise Worker if a task's backend is not the local CPU."""
    for task in tasks:
        if refusal := refused_backend(task.context().partition_id, task.context().backend, executor):
            raise refusal


def collect_results(calls: Iterable[Callable[[], PartitionTaskResult]]) -> list[PartitionTaskResult]:
    """Make all calls, one for each task in order, and return their results.

    Raises:
        PartitionExecutorError: the first failure in the order of tasks, the others attached.
    """
    results: list[PartitionTaskResult] = []
    failures: list[PartitionExecutorError] = []
    for call in calls:
        try:
            results.append(call())
        except PartitionExecutorError as error:
            failures.append(error)
    if failures:
        raise failures[0].add_facts(others=tuple(failures[1:]))
    return results


def execute_partition_task(task: PartitionTask) -> PartitionTaskResult:
    """Run one task's phases on a copy of its payload.

    Raises:
        PartitionExecutorError: ``Phase`` with the text of what a phase raised, ``Worker`` if that was not
            an ``Exception``, or if no phase was running.
    """
    context, checkpoint, base, phases = task.into_parts()
    try:
        columns: Any = tuple(column.copy() for column in checkpoint.state.columns)
        state = replace(checkpoint.state, columns=columns)
        reports = _run_phases(context, state, base, phases)
        return PartitionTaskResult.completed(context, replace(checkpoint, state=state), reports)
    except PartitionExecutorError:
        raise
    except Exception as error:
        raise Worker(context.partition_id, message_of(error)) from error


def _run_phases(
    context: PartitionExecutionContext,
    state: DeviceSoaCheckpoint,
    base: int,
    phases: Sequence[PartitionExecutablePhase],
) -> list[PartitionPhaseReport]:
    rows = state.agent_count
    columns = PhaseColumns(state.schema, state.columns, [True] * state.num_columns)
    reports = []
    for offset, phase in enumerate(phases):
        start = time.perf_counter_ns()
        try:
            phase.run(context, columns, rows)
            columns.verify_unchanged_shape(rows)
        except Exception as error:
            raise Phase(context.partition_id, phase.name(), message_of(error)) from error
        except BaseException as error:  # such as SystemExit: it would have ended a worker
            raise Worker(context.partition_id, PANICKED, phase=phase.name()) from error
        reports.append(
            PartitionPhaseReport(
                partition_id=context.partition_id,
                worker=context.worker,
                phase_index=base + offset,
                name=phase.name(),
                backend=context.backend,
                rows=rows,
                elapsed_us=(time.perf_counter_ns() - start) // 1000,
            )
        )
    return reports
