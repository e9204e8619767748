"""One worker process, seen from its parent: started, spoken to, and ended; no wait is without an end."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import rustsim_hpc
from rustsim_hpc.executors.wire import LENGTH
from rustsim_hpc.signals import SIGNALS
from rustsim_hpc.work import PhaseFailure

START_SECONDS = 300.0
"""How long a worker may take to import the model."""

_POLL_SECONDS = 1
_GRACE_SECONDS = 3.0
_KILL_SECONDS = 5.0
_ONE_THREAD = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# What a launcher tells its ranks. A worker is none, and must not become one where a model imports mpi4py.
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_", "HYDRA_")
_LIKELY = {
    "SIGKILL": " (out of memory?)",
    "SIGSEGV": " (an index out of range in a kernel? --check finds it)",
    "SIGBUS": " (out of memory?)",
}


class WorkerHandle:
    """A worker process and the socket to it.

    Args:
        number: which of its session's workers it is.
        places: its partitions, as places in the list of tasks.

    Attributes:
        pid: of the process that was started last, 0 before.
        busy: it was told something, to start or an order, and has not answered yet.
    """

    def __init__(self, number: int, places: range) -> None:
        self.number = number
        self.places = places
        self.pid = 0
        self.busy = False
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._answer = bytearray(LENGTH.size)
        self._view = memoryview(self._answer)

    @property
    def alive(self) -> bool:
        """Whether there is a process that is not known to be dead."""
        return self._socket is not None

    # -- starting ------------------------------------------------------------------------------------

    def start(self, message: bytes, fds: Sequence[int]) -> None:
        """Start a process that inherits descriptors, and tell it what to be; :meth:`ready` waits for it.

        Raises:
            OSError: the system gives no more processes or descriptors.
        """
        ours, theirs = socket.socketpair()
        try:
            self._process = _spawn(theirs.fileno(), fds)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        # The kernel ends a read that lasts longer: then the process is looked at (a child that it forked may
        # hold the other end open), and the happy path has no system call but the read itself.
        patience = struct.pack("ll", _POLL_SECONDS, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._socket, self.pid, self.busy = ours, self._process.pid, True
        self._send_all(LENGTH.pack(len(message)) + message)

    def ready(self, deadline: float) -> str | None:
        """Wait until the worker can take orders; return why it cannot, or None. It is then ended."""
        problem: str | None = None
        try:
            size = self._receive_length(deadline)
            text = b"" if size is None else self._receive(size, deadline)
            if size is None or text is None:
                problem = f"it {self.reap()} while it was starting"
            elif size:
                problem = text.decode()
        except TimeoutError:
            problem = f"it was not ready within {START_SECONDS:g} s"
        if problem is None:
            self.busy = False
        else:
            self.kill()
        return problem

    # -- orders and answers --------------------------------------------------------------------------

    def order(self, message: bytes | bytearray) -> bool:
        """Send an order; returns whether it could be sent."""
        self.busy = True
        return self._send_all(message)

    def answer(self) -> list[PhaseFailure] | None:
        """Wait for the answer to an order: what failed, or None if the worker died instead."""
        size = self._receive_length()
        if size == 0:
            self.busy = False
            return []
        data = None if size is None else self._receive(size)
        if data is None:
            return None
        self.busy = False
        failures: list[PhaseFailure] = pickle.loads(data)  # noqa: S301 (from our own child)
        return failures

    def _send_all(self, message: bytes | bytearray) -> bool:
        rest = memoryview(message)
        while rest:
            if self._socket is None:
                return False
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:  # it does not read: stopped, or dead
                if self._gone():
                    return False
            except OSError:
                return False
        return True

    def _receive_length(self, deadline: float | None = None) -> int | None:
        if not self._fill(self._view, deadline):
            return None
        size: int = LENGTH.unpack(self._answer)[0]
        return size

    def _receive(self, size: int, deadline: float | None = None) -> bytes | None:
        data = bytearray(size)
        return bytes(data) if self._fill(memoryview(data), deadline) else None

    def _fill(self, buffer: memoryview, deadline: float | None) -> bool:
        """Fill a buffer; returns False if the worker died. Raises TimeoutError after the deadline."""
        while buffer:
            if self._socket is None:
                return False
            try:
                got = self._socket.recv_into(buffer)
            except BlockingIOError:  # _POLL_SECONDS went by
                if self._gone():
                    return False
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError from None
                continue
            except OSError:
                return False
            if not got:
                return False
            buffer = buffer[got:]
        return True

    def _gone(self) -> bool:
        return self._process is None or self._process.poll() is not None

    # -- the end -------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Tell the worker to end, by closing the socket; :meth:`finish` waits for it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def finish(self, grace: float = _GRACE_SECONDS) -> None:
        """Wait for the end of a worker that was told to, and end it by force if it does not come."""
        self.hang_up()
        process, self._process, self.busy = self._process, None, False
        if process is None:
            return
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            # One that the kernel cannot end (waiting for a dead disk) is not waited for any longer.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_SECONDS)

    def kill(self) -> None:
        """End the worker at once."""
        if self._process is not None:
            self._process.kill()
        self.finish()

    def reap(self) -> str:
        """Return how a worker ended that does not answer any more; one that still lives is ended."""
        process = self._process
        self.finish(_POLL_SECONDS)
        code = None if process is None else process.returncode
        if code is None:
            return "was lost"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}{_LIKELY.get(name, '')}"


def end_all(workers: Sequence[WorkerHandle], owner: int) -> None:
    """End workers, all at the same time; in a forked copy of their owner (a process id) do nothing."""
    if os.getpid() != owner:
        return
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.finish()


def _spawn(control: int, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a worker.

    Signals that ask a run to stop may reach all processes of a terminal or a Slurm step, but are for the parent
    to decide on: the new process has them blocked from its first moment until it ignores them.
    """
    module = "rustsim_hpc.executors.worker_process"
    command = [sys.executable, "-P", "-m", module, str(control), str(os.getpid())]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=_environment(), pass_fds=(control, *fds)
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    here = str(Path(rustsim_hpc.__file__).parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | dict.fromkeys(_ONE_THREAD, "1") | {"PYTHONPATH": os.pathsep.join(paths)}
