"""Partitions on a pool of threads. Kernels run without the GIL over views of the resident columns."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from rustsim_hpc.errors import InvalidConfig, PartitionExecutorError
from rustsim_hpc.executors.base import (
    PartitionTask,
    PartitionTaskResult,
    execute_partition_task,
    require_local,
)
from rustsim_hpc.executors.inline import LocalSession
from rustsim_hpc.work import Frame, PhaseFailure, Work


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


class ThreadedSession(LocalSession):
    """A rank's partitions, each thread with a fixed run of them; the calling thread takes the first."""

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work)
        count = max(1, min(threads, len(work.tasks)))
        bounds = [len(work.tasks) * k // count for k in range(count + 1)]
        self._shares = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        self._done: SimpleQueue[list[PhaseFailure]] = SimpleQueue()
        self._queues: list[SimpleQueue[Callable[[], None] | None]] = []
        self._threads: list[threading.Thread] = []
        for number in range(1, count):
            queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            thread = threading.Thread(
                target=_serve, args=(queue,), name=f"rustsim-partitions-{number}", daemon=True
            )
            thread.start()
            self._queues.append(queue)
            self._threads.append(thread)

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on every partition; returns when all threads have done their share."""
        for queue, places in zip(self._queues, self._shares[1:], strict=True):
            queue.put(lambda places=places: self._done.put(self.run_places(segment, frame, places)))  # type: ignore[misc]
        failures = self.run_places(segment, frame, self._shares[0])
        for _ in self._queues:
            failures = failures + self._done.get()
        return sorted(failures, key=lambda failure: failure.partition)

    def close(self) -> None:
        """End the threads."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self._queues, self._threads = [], []
        super().close()


def _serve(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := queue.get()) is not None:
        job()


class LocalThreadedPartitionExecutor:
    """Runs partitions on threads of this process.

    Args:
        threads: how many; by default one for each core that the process may use. Each takes a fixed,
            contiguous run of the partitions.
    """

    name = "threads"

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise InvalidConfig(f"threads must be at least 1, got {threads}")
        self.threads = threads

    def attach(self, work: Work) -> LocalSession:
        """Bind to a rank's work (see :class:`~rustsim_hpc.executors.base.ResidentExecutor`)."""
        require_local(work, self.name)
        return ThreadedSession(work, self.threads or usable_cores())

    def execute(self, tasks: Sequence[PartitionTask]) -> list[PartitionTaskResult]:
        """Run self-contained tasks; the first failure in partition order is raised, the others attached.

        Raises:
            PartitionExecutorError: a phase or its thread failed.
        """
        results: list[PartitionTaskResult] = []
        failures: list[PartitionExecutorError] = []
        with ThreadPoolExecutor(self.threads or usable_cores()) as pool:
            for future in [pool.submit(execute_partition_task, task) for task in tasks]:
                try:
                    results.append(future.result())
                except PartitionExecutorError as error:
                    failures.append(error)
        if failures:
            raise failures[0].add_facts(others=tuple(failures[1:]))
        return results
