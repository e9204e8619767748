"""The main module of a worker process: map the columns, load the model, and run segments on order.

It is started by :mod:`rustsim_hpc.executors.worker_handle` and ends when the pipes to its parent close.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import os
import pickle
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.errors import RustsimError, message_of
from rustsim_hpc.executors.inline import LocalSession
from rustsim_hpc.executors.pipes import comes_soon, read_all, write_all
from rustsim_hpc.executors.wire import (
    LENGTH,
    ORDER,
    decode_values,
    value_names,
)
from rustsim_hpc.executors.work import Frame, PhaseFailure
from rustsim_hpc.executors.worker_start import (
    COMPILE_NS,
    IDLE,
    RUNNING,
    SHOW_STACKS,
    WorkerStart,
    rebuild_work,
)
from rustsim_hpc.job.signals import SIGNALS
from rustsim_hpc.state.shared_arrays import SharedArrays

_ORPHAN_SECONDS = 1.0


class _Worker:
    """A worker's share of a session."""

    def __init__(self, start: WorkerStart) -> None:
        board, words, *tables = SharedArrays.attach(start.arrays).arrays
        for table in tables:
            table.flags.writeable = False
        self.work = rebuild_work(start, dict(zip(start.tables, tables, strict=True)))
        self.session = LocalSession(self.work)
        self.session.board.move_to(board)
        self.names = value_names(self.work.program)
        self._places = [(place, range(place, place + 1)) for place in start.places]
        self._words = memoryview(words[start.number])  # several times as fast as the array for single items
        self._words[RUNNING], self._words[COMPILE_NS] = IDLE, 0
        self._compiled = 0.0

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on this worker's partitions."""
        failures: list[PhaseFailure] = []
        words = self._words
        for place, alone in self._places:
            words[RUNNING] = place
            failures += self.session.run_places(segment, frame, alone)
        words[RUNNING] = IDLE
        if CLOCK.seconds != self._compiled:
            self._compiled = CLOCK.seconds
            words[COMPILE_NS] = int(self._compiled * 1e9)
        return failures


def main(arguments: Sequence[str]) -> NoReturn:
    """Serve the parent over two pipes until it closes them, then exit at once.

    Args:
        arguments: descriptors of the pipes for orders and for answers, process id of the parent.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    faulthandler.enable()
    faulthandler.register(SHOW_STACKS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # show what a phase prints at once
    orders, answers, parent = (int(argument) for argument in arguments)
    _keep_to_this_process((orders, answers))
    threading.Thread(target=_leave_with_parent, args=(orders, parent), daemon=True).start()
    with contextlib.suppress(OSError):  # the parent or the pipes are gone: there is nothing left to do
        worker = _begin_or_tell(orders, answers)
        if worker is not None:
            _serve(orders, answers, worker)
    _leave()


def _keep_to_this_process(fds: tuple[int, ...]) -> None:
    """Keep processes that a phase starts from inheriting descriptors and holding them open."""

    def close_all() -> None:
        for fd in fds:
            with contextlib.suppress(OSError):  # the model may have closed it
                os.close(fd)

    for fd in fds:
        os.set_inheritable(fd, False)
    os.register_at_fork(after_in_child=close_all)


def _begin_or_tell(orders: int, answers: int) -> _Worker | None:
    """Return the worker that the parent asks for, or send it the error and return None."""
    head = bytearray(LENGTH.size)
    if not read_all(orders, memoryview(head)):
        return None
    message = bytearray(LENGTH.unpack(head)[0])
    if not read_all(orders, memoryview(message)):
        return None
    try:
        worker = _begin(pickle.loads(message))  # noqa: S301 (from our own parent)
    except BaseException as error:  # noqa: BLE001 (the model is foreign code)
        kind = "" if isinstance(error, RustsimError) else f"{type(error).__name__}: "
        text = f"{kind}{message_of(error)}".encode()
        write_all(answers, LENGTH.pack(len(text)) + text)
        return None
    write_all(answers, LENGTH.pack(0))
    return worker


def _begin(start: WorkerStart) -> _Worker:
    # Not the descriptor of the arrays: it is closed once they are mapped, and its number may be reused.
    _keep_to_this_process((*start.columns.fds, *start.inherited))
    if start.core is not None:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(0, {start.core})
    sys.path[:] = start.module_paths
    worker = _Worker(start)
    gc.freeze()
    return worker


def _serve(orders: int, answers: int, worker: _Worker) -> None:
    order, well = bytearray(ORDER.size), LENGTH.pack(0)
    view, frame, waiting = memoryview(order), Frame(0), select.poll()
    waiting.register(orders, select.POLLIN)
    while True:
        comes_soon(waiting.poll)
        if not read_all(orders, view):
            return
        segment, frame.want_digest, afresh, frame.repeat, frame.step_index, size = ORDER.unpack(order)
        if afresh:
            frame.values = {}
        if size:
            data = bytearray(size)
            if not read_all(orders, memoryview(data)):
                return
            frame.values.update(decode_values(data, worker.names))
        failures = worker.run(segment, frame)
        write_all(answers, well if not failures else _pickled(failures))


def _pickled(failures: list[PhaseFailure]) -> bytes:
    try:
        data = pickle.dumps(failures)
    except Exception:  # noqa: BLE001 (an error that cannot be pickled must still be reported)
        data = pickle.dumps([replace(failure, error=None) for failure in failures])
    return LENGTH.pack(len(data)) + data


def _leave_with_parent(orders: int, parent: int) -> None:
    """End this process soon after its parent dies or closes the pipes, whatever it is doing."""
    poller = select.poll()
    poller.register(orders, 0)  # report only that the other end was closed
    while os.getppid() == parent and not poller.poll(1000 * _ORPHAN_SECONDS):
        pass
    time.sleep(_ORPHAN_SECONDS)  # the main thread sees it too, if it is idle
    _leave()


def _leave() -> NoReturn:
    # os._exit, because the interpreter's own shutdown is slow once a compiler is loaded.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a model may have replaced it
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
