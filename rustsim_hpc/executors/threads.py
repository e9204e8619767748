"""Run partitions on a pool of threads. Kernels release the GIL and work on views of the resident columns."""

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
from rustsim_hpc.modeling.program import KernelStage, Segment

_HAND_OVER_NS = 50_000
"""Time to wake a thread on an idle core and be woken by it in turn."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


class _Worker:
    """One thread of a session and its queue of orders, which are counted."""

    def __init__(self, number: int, wake: SimpleQueue[None]) -> None:
        self.orders: SimpleQueue[Callable[[], list[PhaseFailure]] | None] = SimpleQueue()
        self.asked = 0
        self.answered = 0
        self.outcome: list[PhaseFailure] | BaseException = []
        self._wake = wake
        self.thread = threading.Thread(target=self._serve, name=f"rustsim-partitions-{number}", daemon=True)

    def ask(self, order: Callable[[], list[PhaseFailure]]) -> None:
        """Queue an order, then count it; Ctrl-C in between must not leave a wait for an order never sent."""
        self.orders.put(order)
        self.asked += 1

    def _serve(self) -> None:
        """Run orders until None arrives; an exception is an answer too, because the caller waits for one."""
        while (order := self.orders.get()) is not None:
            try:
                self.outcome = order()
            except BaseException as error:  # noqa: BLE001
                self.outcome = error
            # An order refers to the session: kept here, it would keep the session, and this thread, alive.
            del order
            self.answered += 1
            self._wake.put(None)


class ThreadedSession(LocalSession):
    """A rank's partitions on threads, each with a fixed range of them; the calling thread runs the first.

    A segment of row kernels that last took less time than waking the threads is run by the calling thread
    alone; the thread that runs a partition does not affect its rows.

    Raises:
        ExecutorError: the system cannot start the threads.
    """

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work)
        count = max(1, min(threads, len(work.tasks)))
        bounds = [len(work.tasks) * k // count for k in range(count + 1)]
        self._shares = [range(a, b) for a, b in pairwise(bounds)]
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._workers: list[_Worker] = []
        self._brief: set[int] = set()
        # A control plane that is collected without being closed must not leave its threads waiting.
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
        """Run one segment on every partition; return when all threads are done."""
        self._wait()  # for threads of a step interrupted by Ctrl-C: they must not write into this one
        found = self.work.program.segment(segment, frame.step_index)
        if found is None:
            return []
        begun = time.perf_counter_ns()
        if id(found) in self._brief:
            failures = self.run_places(segment, frame, self._all)
            if time.perf_counter_ns() - begun > 2 * _HAND_OVER_NS:
                self._brief.discard(id(found))
            return failures
        workers = self._workers  # a phase that adds phases closes this session while it runs
        for worker, places in zip(workers, self._shares[1:], strict=True):
            worker.ask(partial(self.run_places, segment, frame, places))
        failures = self.run_places(segment, frame, self._shares[0])
        if (time.perf_counter_ns() - begun) * len(self._shares) < _HAND_OVER_NS and _is_compiled(found):
            self._brief.add(id(found))
        self._wait()
        for worker in workers:
            if isinstance(worker.outcome, BaseException):
                raise worker.outcome
            failures = failures + worker.outcome
        return sorted(failures, key=lambda failure: failure.partition)

    def _wait(self) -> None:
        """Wait until all threads have answered all orders."""
        for worker in self._workers:
            while worker.answered < worker.asked:
                self._wake.get()
        while not self._wake.empty():  # discard wake-ups of threads that were done before the wait
            self._wake.get()

    def close(self) -> None:
        """End the threads."""
        self._end()
        for worker in self._workers:
            if worker.thread is not threading.current_thread():
                worker.thread.join()
        self._workers, self._shares = [], self._shares[:1]
        super().close()


def _is_compiled(segment: Segment) -> bool:
    """Return whether a segment runs no Python code of the user, which might depend on its thread."""
    return all(isinstance(item, KernelStage) for item in segment.items)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.orders.put(None)


class LocalThreadedPartitionExecutor:
    """Runs partitions on threads of this process.

    Args:
        threads: number of threads; by default one for each core that the process may use. Each takes a
            fixed, contiguous range of the partitions.
    """

    name = "threads"

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and whole_number("threads", threads, signed=True) < 1:
            raise InvalidConfig(f"threads must be at least 1, got {threads}")
        self.threads = threads

    @classmethod
    def new(cls) -> LocalThreadedPartitionExecutor:
        """Return an executor with one thread for each core that the process may use."""
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
