"""Partitions on worker processes of this machine, over columns in shared memory; they share no GIL.

Each worker is a new interpreter that maps the columns, loads the model by its reference, and owns a fixed
range of the partitions. A step sends it a few bytes. The shared memory is unnamed, so the system frees it
in whatever order and way the processes end.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.errors import ExecutorError, InvalidConfig, Worker, message_of, whole_number
from rustsim_hpc.executors.base import (
    PartitionTask,
    PartitionTaskResult,
    collect_results,
    execute_partition_task,
    require_local,
    require_local_tasks,
)
from rustsim_hpc.executors.threads import usable_cores
from rustsim_hpc.executors.wire import ORDER, encode_values, value_names
from rustsim_hpc.executors.work import Frame, PhaseFailure, Work
from rustsim_hpc.executors.worker_handle import START_SECONDS, WorkerHandle, end_all
from rustsim_hpc.executors.worker_start import COMPILE_NS, IDLE, RUNNING, SHOW_STACKS, worker_starts
from rustsim_hpc.modeling.reductions import new_board
from rustsim_hpc.state.shared_arrays import SharedArrays

_PRINT_SECONDS = 0.3  # for all workers to print some lines
_WORDS = 8  # int64 words of each worker: a cache line


class ProcessSession:
    """A rank's partitions on worker processes, each with a fixed range of them.

    Args:
        work: the bound program; its columns lie in shared memory.
        workers: maximum number of processes.
        pin: pin each process to its own core.
        inherit_fds: descriptors that the workers hold open.

    Raises:
        ExecutorError: workers cannot load a phase, or cannot start.
        ColumnMemoryError: the columns are not in shared memory, or there is no memory left.
    """

    def __init__(self, work: Work, workers: int, *, pin: bool, inherit_fds: Sequence[int]) -> None:
        self.work = work
        self.board = new_board(work)
        count, tasks = min(workers, len(work.tasks)), len(work.tasks)
        shares = [range(tasks * k // count, tasks * (k + 1) // count) for k in range(count)]
        self._workers = [WorkerHandle(number, places) for number, places in enumerate(shares)]
        # A control plane that is collected without being closed must not leave its workers running.
        self._end = weakref.finalize(self, end_all, self._workers, os.getpid())
        self._shared = _shared_arrays(work, self.board.nbytes, count)
        self.board.move_to(self._shared.arrays[0])
        self._words = self._shared.arrays[1]
        self._words[:, RUNNING] = IDLE
        self._compiled = np.zeros(count, np.int64)
        starts = worker_starts(work, shares, self._shared.layout, pin=pin, inherited=inherit_fds)
        self._starts = [pickle.dumps(start) for start in starts]
        self._fds = (self._shared.layout.fd, *work.memory.handles().fds, *inherit_fds)
        self._names = value_names(work.program)
        self._values: dict[str, Any] | None = None
        self._sent: dict[str, Any] = {}
        self._order = bytearray(ORDER.size)
        self._whole = False
        if problems := self._start():
            self.close()
            raise ExecutorError(Worker(problems[0].partition, problems[0].message))

    @property
    def compile_seconds(self) -> float:
        """Seconds that this process and the slowest worker spent on compiling or loading kernels so far."""
        return (
            CLOCK.seconds
            + float((self._compiled + self._words[: len(self._compiled), COMPILE_NS]).max(initial=0)) / 1e9
        )

    # -- a segment -----------------------------------------------------------------------------------

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on every partition; returns when all workers have answered or are dead.

        Dead workers are replaced first. A death is a failure of the step that detects it.
        """
        items = self.work.program.segment(segment, frame.step_index)
        if items is None or not items.items:
            return []
        try:
            if not self._whole and (problems := self._start()):
                return problems
            message = self._message(segment, frame)
            workers = self._workers
            sent = [worker.order(message) for worker in workers]
            failures: list[PhaseFailure] = []
            for worker, reached in zip(workers, sent, strict=True):
                answer = worker.answer() if reached else None
                if answer is None:
                    failures.append(self._death(worker))
                elif answer:
                    failures += answer
        except BaseException:
            # For example Ctrl-C. Workers that still run must not write into a later step, nor answer to it.
            for worker in self._workers:
                if worker.busy:
                    worker.kill()
            self._whole = False
            raise
        return failures

    def _message(self, segment: int, frame: Frame) -> bytes | bytearray:
        """Return an order: the segment, the step, and the values that workers do not have yet."""
        values = frame.values
        afresh = values is not self._values
        if afresh:
            self._values, self._sent = values, {}
        data, sent = b"", self._sent
        if values and (
            news := {name: value for name, value in values.items() if sent.get(name) is not value}
        ):
            data = encode_values(news, self._names)
            self._sent = dict(values)
        step = (frame.repeat, frame.step_index)
        ORDER.pack_into(self._order, 0, segment, frame.want_digest, afresh, *step, len(data))
        return self._order + data if data else self._order

    # -- starting and ending workers -----------------------------------------------------------------

    def _start(self) -> list[PhaseFailure]:
        """Start the missing workers in parallel; return a failure for each that does not become ready."""
        if not self._end.alive:
            raise InvalidConfig("the worker processes of this session were ended")
        workers = [worker for worker in self._workers if not worker.alive]
        self._values = None  # a new worker has none
        problems: dict[int, str] = {}
        for worker in workers:
            number = worker.number
            self._compiled[number] += self._words[number, COMPILE_NS]
            self._words[number] = 0
            self._words[number, RUNNING] = IDLE
            try:
                worker.start(self._starts[number], self._fds)
            except (OSError, ValueError) as error:  # ValueError: a descriptor that was closed
                problems[number] = message_of(error)
        deadline = time.monotonic() + START_SECONDS
        for worker in workers:
            if worker.number not in problems and (problem := worker.ready(deadline)):
                problems[worker.number] = problem
        self._whole = not problems
        return [
            self._failure(self._workers[number], f"worker process {number} cannot start: {problem}")
            for number, problem in sorted(problems.items())
        ]

    def _death(self, worker: WorkerHandle) -> PhaseFailure:
        """Return how a worker that does not answer has ended, as a failure of what it was running."""
        end = worker.reap()
        self._whole = False
        place = int(self._words[worker.number, RUNNING])
        what = f"worker process {worker.number} (pid {worker.pid}) {end}"
        if place not in worker.places:
            return self._failure(worker, what)
        phase = int(self.board.status[place, 1])
        return self._failure(worker, what, place, phase)

    def _failure(
        self, worker: WorkerHandle, message: str, place: int | None = None, phase: int | None = None
    ) -> PhaseFailure:
        names = self.work.program.phase_names
        assignment = self.work.tasks[worker.places[0] if place is None else place].assignment
        return PhaseFailure(
            partition=assignment.partition_id,
            worker=assignment.worker,
            phase_index=phase,
            phase="" if phase is None else names[phase],
            message=message,
            kind="worker",
            host=socket.gethostname(),
            pid=worker.pid,
        )

    def show_stacks(self) -> None:
        """Make busy workers print their stacks to standard error."""
        for worker in self._workers:
            if worker.busy:
                worker.signal(SHOW_STACKS)
        time.sleep(_PRINT_SECONDS)

    def close(self) -> None:
        """End the workers, by force if they do not end themselves; calling it again does nothing."""
        self._end()
        self._shared.close()
        self._whole = False


def _shared_arrays(work: Work, board_bytes: int, workers: int) -> SharedArrays:
    """Return shared memory for the board, a row of words for each worker, and a copy of each table."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("<i8", (board_bytes // 8,)), ("<i8", (workers, _WORDS))]
    shapes += [(table.dtype.str, table.shape) for table in work.tables.values()]
    shared = SharedArrays(shapes)
    for array, table in zip(shared.arrays[2:], work.tables.values(), strict=True):
        np.copyto(array, table)
    return shared


class ProcessPartitionExecutor:
    """Runs partitions on worker processes of this machine.

    Args:
        workers: number of processes; by default one for each core that the process may use. Each takes a
            fixed, contiguous range of the partitions.
        pin: pin each worker to its own core.
        inherit_fds: descriptors that the workers hold open while they live, such as that of a lock.

    Phases must be entries of a model that was loaded by its reference (see
    :func:`~rustsim_hpc.modeling.model_source.load_model`). A control plane moves its state into shared
    memory, once, when it is first stepped this way. The death of a worker (killed, out of memory, a crash in
    compiled code) is a typed error of the step that detects it; the next step starts a replacement.
    """

    name = "processes"
    needs_shared_memory = True

    def __init__(
        self, workers: int | None = None, *, pin: bool = False, inherit_fds: Sequence[int] = ()
    ) -> None:
        if workers is not None and whole_number("workers", workers, signed=True) < 1:
            raise InvalidConfig(f"workers must be at least 1, got {workers}")
        self.workers = workers
        self.pin = pin
        self.inherit_fds = tuple(inherit_fds)

    def attach(self, work: Work) -> ProcessSession:
        """Bind to a rank's work (see :class:`~rustsim_hpc.executors.base.ResidentExecutor`), start workers.

        Raises:
            ExecutorError: a partition's backend is not the local CPU, or see :class:`ProcessSession`.
        """
        require_local(work, self.name)
        workers = self.workers or usable_cores()
        return ProcessSession(work, workers, pin=self.pin, inherit_fds=self.inherit_fds)

    def execute(self, tasks: Sequence[PartitionTask]) -> list[PartitionTaskResult]:
        """Run self-contained tasks without phases; a plain function cannot be sent to another process.

        Raises:
            PartitionExecutorError: ``Worker`` for a task with a phase (names the first) or another backend.
        """
        require_local_tasks(tasks, self.name)
        return collect_results(partial(_execute, task) for task in tasks)


def _execute(task: PartitionTask) -> PartitionTaskResult:
    for phase in task.phases():
        raise Worker(
            task.context().partition_id,
            f'phase "{phase.name()}" is a plain function, which does not travel to a worker process',
            phase=phase.name(),
            hint="make it a phase of a model",
        )
    return execute_partition_task(task)
