"""Results of a step; phase reports are created from an array of nanoseconds when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np

from rustsim_hpc.control.checkpoint import EngineCheckpoint
from rustsim_hpc.control.runtime import ColumnarStepTiming
from rustsim_hpc.executors.work import Task
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.state.partition import PartitionPhaseReport


class StepSpent(NamedTuple):
    """The time of a step on this rank by consecutive part, in nanoseconds.

    executor: waiting for the executor to run the phases. meeting: agreeing with the other ranks, reductions,
    derived values. checks: checks, and reductions for outputs. proof: the fingerprint and its verification.
    """

    executor: int
    meeting: int
    checks: int
    proof: int


class PhaseReports(Sequence[PartitionPhaseReport]):
    """One report for each partition and phase: partitions in order, phases in order within each.

    Args:
        tasks: the partitions.
        names: the phases.
        phase_base: index of the first phase in the combined list.
        times: int64 (partitions, at least as many as phases), nanoseconds.
    """

    __slots__ = ("_base", "_names", "_tasks", "_times")

    def __init__(
        self, tasks: Sequence[Task], names: Sequence[str], phase_base: int, times: np.ndarray[Any, Any]
    ) -> None:
        self._tasks = tasks
        self._names = names
        self._base = phase_base
        self._times = times

    def total_ns(self) -> np.ndarray[Any, Any]:
        """Return the nanoseconds of each phase, then of digests made in stages, summed over partitions."""
        total: np.ndarray[Any, Any] = self._times.sum(axis=0)
        return total

    def __len__(self) -> int:
        return len(self._tasks) * len(self._names)

    @overload
    def __getitem__(self, index: int) -> PartitionPhaseReport: ...
    @overload
    def __getitem__(self, index: slice) -> list[PartitionPhaseReport]: ...
    def __getitem__(self, index: int | slice) -> PartitionPhaseReport | list[PartitionPhaseReport]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place, position = divmod(range(len(self))[index], max(len(self._names), 1))
        task = self._tasks[place]
        return PartitionPhaseReport(
            partition_id=task.assignment.partition_id,
            worker=task.assignment.worker,
            phase_index=self._base + position,
            name=self._names[position],
            backend=task.backend,
            rows=task.stop - task.start,
            elapsed_us=int(self._times[place, position]) // 1000,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True)
class ControlledStep:
    """A committed step: timing, fingerprint if replay is on, checkpoint if one was due."""

    timing: ColumnarStepTiming
    fingerprint: ReplayFingerprint | None
    checkpoint: EngineCheckpoint | None


@dataclass(frozen=True, init=False)
class PartitionedStep:
    """A committed partition step.

    Attributes:
        step_index: index before the step (its fingerprint carries the one after).
        agent_count: rows of the whole population.
        phases: one report for each of this rank's partitions and each phase, partitions in order.
        fingerprint: the new state's, if replay is on and one was due; else None.
        checkpoint: the automatic checkpoint, if one was due; else None.
        total_us: wall-clock time in microseconds.
        spent: the step's time by part.
    """

    step_index: int
    agent_count: int
    phases: PhaseReports
    fingerprint: ReplayFingerprint | None
    checkpoint: EngineCheckpoint | None
    total_us: int
    spent: StepSpent

    def __init__(
        self,
        step_index: int,
        agent_count: int,
        phases: PhaseReports,
        fingerprint: ReplayFingerprint | None,
        checkpoint: EngineCheckpoint | None,
        total_us: int,
        spent: StepSpent,
    ) -> None:
        # In one update: an instance is made every step, and a frozen dataclass's own __init__ takes three
        # times as long.
        self.__dict__.update(
            step_index=step_index,
            agent_count=agent_count,
            phases=phases,
            fingerprint=fingerprint,
            checkpoint=checkpoint,
            total_us=total_us,
            spent=spent,
        )
