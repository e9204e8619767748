"""Phase reports of a step, made from a fixed array of nanoseconds when somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from rustsim_hpc.partition import PartitionPhaseReport
from rustsim_hpc.work import Task


class PhaseReports(Sequence[PartitionPhaseReport]):
    """One report for each partition and phase: partitions in order, phases in order within each.

    Args:
        tasks: the partitions.
        names: the phases.
        phase_base: index of the first phase in the combined list.
        times: int64 (partitions, phases), nanoseconds.
    """

    __slots__ = ("_base", "_names", "_tasks", "_times")

    def __init__(
        self, tasks: Sequence[Task], names: Sequence[str], phase_base: int, times: np.ndarray[Any, Any]
    ) -> None:
        self._tasks = tasks
        self._names = names
        self._base = phase_base
        self._times = times

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
