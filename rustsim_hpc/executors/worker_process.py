"""The main of a worker process: map the columns, find the model again, and run segments when told to.

It is started by :mod:`rustsim_hpc.executors.worker_handle` and ends with the socket to its parent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from rustsim_hpc.errors import RustsimError, message_of
from rustsim_hpc.executors.inline import LocalSession
from rustsim_hpc.executors.wire import (
    LENGTH,
    ORDER,
    decode_values,
    receive_all,
    receive_message,
    value_names,
)
from rustsim_hpc.executors.worker_start import COMPILE_NS, IDLE, RUNNING, WorkerStart, rebuild_work
from rustsim_hpc.shared_arrays import SharedArrays
from rustsim_hpc.signals import SIGNALS
from rustsim_hpc.work import Frame, PhaseFailure

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
        self.values: dict[str, Any] = {}
        self._places = start.places
        self._words = words[start.number]
        self._words[RUNNING], self._words[COMPILE_NS] = IDLE, 0

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on this worker's partitions."""
        failures: list[PhaseFailure] = []
        words = self._words
        for place in self._places:
            words[RUNNING] = place
            failures += self.session.run_places(segment, frame, range(place, place + 1))
        words[RUNNING] = IDLE
        words[COMPILE_NS] = int(self.session.compile_seconds * 1e9)
        return failures


def main(arguments: Sequence[str]) -> NoReturn:
    """Serve the parent at the other end of a socket until it hangs up; then leave at once.

    Args:
        arguments: descriptor of the socket, process id of the parent.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    faulthandler.enable()
    control, parent = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    control.set_inheritable(False)
    threading.Thread(target=_leave_with_parent, args=(control.fileno(), parent), daemon=True).start()
    with contextlib.suppress(ConnectionError):  # the parent is gone: so is the work
        message = receive_message(control)
        worker = None if message is None else _begin_or_tell(message, control)
        if worker is not None:
            _serve(control, worker)
    _leave()


def _begin_or_tell(message: bytes, control: socket.socket) -> _Worker | None:
    """Return the worker that the parent wants, or tell it why there is none."""
    try:
        worker = _begin(pickle.loads(message))  # noqa: S301 (from our own parent)
    except BaseException as error:  # noqa: BLE001 (the model is somebody else's code)
        kind = "" if isinstance(error, RustsimError) else f"{type(error).__name__}: "
        text = f"{kind}{message_of(error)}".encode()
        control.sendall(LENGTH.pack(len(text)) + text)
        return None
    control.sendall(LENGTH.pack(0))
    return worker


def _begin(start: WorkerStart) -> _Worker:
    for fd in (start.arrays.fd, *start.columns.fds, *start.inherited):
        os.set_inheritable(fd, False)
    if start.core is not None:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(0, {start.core})
    sys.path[:] = start.module_paths
    worker = _Worker(start)
    gc.freeze()
    return worker


def _serve(control: socket.socket, worker: _Worker) -> None:
    order = bytearray(ORDER.size)
    view, well = memoryview(order), LENGTH.pack(0)
    while receive_all(control, view):
        segment, want_digest, afresh, step, size = ORDER.unpack(order)
        if afresh:
            worker.values = {}
        if size:
            data = bytearray(size)
            if not receive_all(control, memoryview(data)):
                return
            worker.values.update(decode_values(data, worker.names))
        failures = worker.run(segment, Frame(step, want_digest, worker.values))
        sys.stdout.flush()
        control.sendall(well if not failures else _pickled(failures))


def _pickled(failures: list[PhaseFailure]) -> bytes:
    try:
        data = pickle.dumps(failures)
    except Exception:  # noqa: BLE001 (an error that carries what cannot travel must still be told)
        data = pickle.dumps([replace(failure, error=None) for failure in failures])
    return LENGTH.pack(len(data)) + data


def _leave_with_parent(control: int, parent: int) -> None:
    """End this process soon after its parent: also out of a loop that no socket could end."""
    poller = select.poll()
    poller.register(control, 0)  # nothing but the other end being closed
    while os.getppid() == parent and not poller.poll(1000 * _ORPHAN_SECONDS):
        pass
    time.sleep(_ORPHAN_SECONDS)  # the main thread sees it too, if it is idle
    _leave()


def _leave() -> NoReturn:
    # Not through the interpreter's own end: taking down a compiler takes longer than anybody wants to wait.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
