"""Run partitions in order, in the calling thread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.executors.base import (
    PartitionTask,
    PartitionTaskResult,
    collect_results,
    execute_partition_task,
    require_local,
    require_local_tasks,
)
from rustsim_hpc.executors.partition_run import PartitionRun, StageCache
from rustsim_hpc.executors.work import Frame, PhaseFailure, Work
from rustsim_hpc.modeling.reductions import new_board


class LocalSession:
    """A rank's partitions in this process; :meth:`run_places` is also what a pool's threads call."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.board = new_board(work)
        stages = StageCache(work)
        self.runs = [
            PartitionRun(work, task, self.board, place, stages) for place, task in enumerate(work.tasks)
        ]
        self._all = range(len(self.runs))

    @property
    def compile_seconds(self) -> float:
        """Seconds that this process has spent on compiling or loading kernels so far."""
        return CLOCK.seconds

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on every partition, in order."""
        return self.run_places(segment, frame, self._all)

    def run_places(self, segment: int, frame: Frame, places: range) -> list[PhaseFailure]:
        """Run one segment on some of the partitions; return failures in partition order."""
        items = self.work.program.segment(segment, frame.step_index)
        if items is None:
            return []
        runs = self.runs  # a phase that adds phases drops this session while it runs
        failures = []
        for place in places:
            failure = runs[place].run(items, frame)
            if failure is not None:
                failures.append(failure)
        return failures

    def close(self) -> None:
        """Drop the views of the columns."""
        self.runs = []


class InlinePartitionExecutor:
    """Runs partitions in order in the calling thread."""

    name = "inline"

    def attach(self, work: Work) -> LocalSession:
        """Bind to a rank's work (see :class:`~rustsim_hpc.executors.base.ResidentExecutor`)."""
        require_local(work, self.name)
        return LocalSession(work)

    def execute(self, tasks: Sequence[PartitionTask]) -> list[PartitionTaskResult]:
        """Run all self-contained tasks in order; raise the first failure, with the others attached.

        Raises:
            PartitionExecutorError: a phase failed, or a task asks for another backend.
        """
        require_local_tasks(tasks, self.name)
        return collect_results(partial(execute_partition_task, task) for task in tasks)
