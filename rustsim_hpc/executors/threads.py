"""Partitions on a pool of threads. Kernels run without the GIL over views of the resident columns."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

from rustsim_hpc.errors import ExecutorError, InvalidConfig, Worker, message_of, whole_number
from rustsim_hpc.executors.base import (
    PartitionTask,
    PartitionTaskResult,
    collect_results,
    execute_partition_task,
    require_local,
    require_local_tasks,
)
from rustsim_hpc.executors.inline import LocalSession
from rustsim_hpc.executors.work import Frame, PhaseFailure, Work
from rustsim_hpc.modeling.program import KernelStage

_HAND_OVER_NS = 50_000
"""What it takes to wake a thread on a core that went idle, and to be woken by it."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


class _Worker:
    """One thread of a session and what it is asked to do; orders are numbered."""

    def __init__(self, number: int, wake: SimpleQueue[None]) -> None:
        self.orders: SimpleQueue[Callable[[], list[PhaseFailure]] | None] = SimpleQueue()
        self.asked = 0
        self.answered = 0
        self.outcome: list[PhaseFailure] | BaseException = []
        self._wake = wake
        self.thread = threading.Thread(target=self._serve, name=f"rustsim-partitions-{number}", daemon=True)

    def ask(self, order: Callable[[], list[PhaseFailure]]) -> None:
        """Hand over an order; the count follows it, so that Ctrl-C in between lets nobody wait in vain."""
        self.orders.put(order)
        self.asked += 1

    def _serve(self) -> None:
        """Do orders until there is None; whatever goes wrong is an answer, since somebody waits for one."""
        while (order := self.orders.get()) is not None:
            try:
                self.outcome = order()
            except BaseException as error:  # noqa: BLE001
                self.outcome = error
            # An order holds the session: kept here, it would never be collected, and this thread never end.
            del order
            self.answered += 1
            self._wake.put(None)


class ThreadedSession(LocalSession):
    """A rank's partitions, each thread with a fixed run of them; the calling thread takes the first.

    Row kernels that take less time than waking the threads would are run by the calling thread alone, as
    their last run tells; which thread runs a partition makes no difference to its rows.

    Raises:
        ExecutorError: the system gives no more threads.
    """

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work)
        count = max(1, min(threads, len(work.tasks)))
        bounds = [len(work.tasks) * k // count for k in range(count + 1)]
        self._shares = [range(a, b) for a, b in pairwise(bounds)]
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._workers: list[_Worker] = []
        self._brief: set[int] = set()
        # A plane that is dropped without being closed must not leave its threads waiting for ever.
        self._end = weakref.finalize(self, _end, self._workers)
        try:
            for number in range(1, count):
                worker = _Worker(number, self._wake)
                worker.thread.start()
                self._workers.append(worker)
        except RuntimeError as error:
            self.close()
            partition = work.tasks[0].assignment.partition_id
            message = f"cannot start {count} threads: {message_of(error)}"
            raise ExecutorError(Worker(partition, message, hint="take fewer threads")) from error

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on every partition; returns when all threads have done their share."""
        self._wait()  # for threads of a step that Ctrl-C broke off: they must not write into this one
        begun = time.perf_counter_ns()
        if segment in self._brief:
            failures = self.run_places(segment, frame, self._all)
            if time.perf_counter_ns() - begun > 2 * _HAND_OVER_NS:
                self._brief.discard(segment)
            return failures
        workers = self._workers  # a phase that adds phases closes this session while it runs
        for worker, places in zip(workers, self._shares[1:], strict=True):
            worker.ask(partial(self.run_places, segment, frame, places))
        failures = self.run_places(segment, frame, self._shares[0])
        if (time.perf_counter_ns() - begun) * len(self._shares) < _HAND_OVER_NS and self._compiled(segment):
            self._brief.add(segment)
        self._wait()
        for worker in workers:
            if isinstance(worker.outcome, BaseException):
                raise worker.outcome
            failures = failures + worker.outcome
        return sorted(failures, key=lambda failure: failure.partition)

    def _compiled(self, segment: int) -> bool:
        """Return whether a segment runs no Python of the user's, which might look for its thread."""
        found = self.segment(segment)
        return found is None or all(isinstance(item, KernelStage) for item in found.items)

    def _wait(self) -> None:
        """Return when all threads have answered all orders."""
        for worker in self._workers:
            while worker.answered < worker.asked:
                self._wake.get()
        while not self._wake.empty():  # of those that were done before anybody waited
            self._wake.get()

    def close(self) -> None:
        """End the threads."""
        self._end()
        for worker in self._workers:
            if worker.thread is not threading.current_thread():
                worker.thread.join()
        self._workers, self._shares = [], self._shares[:1]
        super().close()


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.orders.put(None)


class LocalThreadedPartitionExecutor:
    """Runs partitions on threads of this process.

    Args:
        threads: how many; by default one for each core that the process may use. Each takes a fixed,
            contiguous run of the partitions.
    """

    name = "threads"

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and whole_number("threads", threads, signed=True) < 1:
            raise InvalidConfig(f"threads must be at least 1, got {threads}")
        self.threads = threads

    @classmethod
    def new(cls) -> LocalThreadedPartitionExecutor:
        """Build one with a thread for each core."""
        return cls()

    def attach(self, work: Work) -> LocalSession:
        """Bind to a rank's work (see :class:`~rustsim_hpc.executors.base.ResidentExecutor`)."""
        require_local(work, self.name)
        return ThreadedSession(work, self.threads or usable_cores())

    def execute(self, tasks: Sequence[PartitionTask]) -> list[PartitionTaskResult]:
        """Run self-contained tasks; the first failure in partition order is raised, the others attached.

        Raises:
            PartitionExecutorError: a phase or its thread failed, or a task asks for another backend.
        """
        require_local_tasks(tasks, self.name)
        with ThreadPoolExecutor(self.threads or usable_cores()) as pool:
            futures = [pool.submit(execute_partition_task, task) for task in tasks]
            return collect_results(future.result for future in futures)
