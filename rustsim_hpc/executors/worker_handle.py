"""One worker process, seen from its parent: starting it, orders and answers, and ending it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import rustsim_hpc
from rustsim_hpc.executors.pipes import POLL_SECONDS, PipeEnds
from rustsim_hpc.executors.wire import LENGTH
from rustsim_hpc.executors.work import PhaseFailure
from rustsim_hpc.job.signals import SIGNALS

START_SECONDS = 300.0
"""How long a worker may take to import the model."""

_GRACE_SECONDS = 3.0
_KILL_SECONDS = 5.0
_ONE_THREAD = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Variables that launchers set for ranks. A worker is not a rank, and must not look like one to mpi4py.
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_", "HYDRA_")
_LIKELY = {
    "SIGKILL": " (out of memory?)",
    "SIGSEGV": " (an index out of range in a kernel? --check finds it)",
    "SIGBUS": " (out of memory?)",
}


_NOTHING = LENGTH.pack(0)


class WorkerHandle:
    """A worker process and the pipes to it.

    Args:
        number: its index among the session's workers.
        places: its partitions, as indices of the list of tasks.

    Attributes:
        pid: process id of the last process started, 0 before the first.
        busy: it has not answered yet to its start message or an order.
    """

    def __init__(self, number: int, places: range) -> None:
        self.number = number
        self.places = places
        self.pid = 0
        self.busy = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: PipeEnds | None = None
        self._head = bytearray(LENGTH.size)
        self._head_view = memoryview(self._head)

    @property
    def alive(self) -> bool:
        """Whether there is a process that is not known to be dead."""
        return self._pipes is not None

    # -- starting ------------------------------------------------------------------------------------

    def start(self, message: bytes, fds: Sequence[int]) -> None:
        """Start a process that inherits descriptors, and send its start message; :meth:`ready` waits for it.

        Raises:
            OSError: the system is out of processes or descriptors.
        """
        opened: list[int] = []
        try:
            opened += os.pipe()
            opened += os.pipe()
            their_orders, our_orders, our_answers, their_answers = opened
            self._process = _spawn(their_orders, their_answers, fds)
            self._pipes = PipeEnds(our_answers, our_orders, self._is_gone)
            opened = [their_orders, their_answers]
        finally:
            for fd in opened:
                os.close(fd)
        self.pid, self.busy = self._process.pid, True
        self._pipes.send(LENGTH.pack(len(message)) + message)

    def ready(self, deadline: float) -> str | None:
        """Wait until the worker can take orders; if it cannot, end it and return why, else None."""
        problem: str | None = None
        try:
            text = self._message(deadline)
            if text is None:
                problem = f"it {self.reap()} while it was starting"
            elif text:
                problem = text.decode()
        except TimeoutError:
            problem = f"it was not ready within {START_SECONDS:g} s"
        if problem is not None:
            self.kill()
        return problem

    # -- orders and answers --------------------------------------------------------------------------

    def order(self, message: bytes | bytearray) -> bool:
        """Send an order; return whether it could be sent."""
        self.busy = True
        return self._pipes is not None and self._pipes.send(message)

    def answer(self) -> list[PhaseFailure] | None:
        """Wait for the answer to an order; return the failures, or None if the worker died."""
        data = self._message()
        if not data:
            return None if data is None else []
        failures: list[PhaseFailure] = pickle.loads(data)  # noqa: S301 (from our own child)
        return failures

    def _message(self, deadline: float = float("inf")) -> bytes | None:
        """Return the next message, or None if the worker died."""
        pipes, head = self._pipes, self._head
        if pipes is None or not pipes.receive(self._head_view, deadline):
            return None
        if head == _NOTHING:
            self.busy = False
            return b""
        data = bytearray(LENGTH.unpack(head)[0])
        if not pipes.receive(memoryview(data), deadline):
            return None
        self.busy = False
        return bytes(data)

    def _is_gone(self) -> bool:
        return self._process is None or self._process.poll() is not None

    # -- ending --------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Tell the worker to end, by closing its pipes; :meth:`finish` waits for it."""
        pipes, self._pipes = self._pipes, None
        if pipes is not None:
            pipes.close()

    def finish(self, grace: float = _GRACE_SECONDS) -> None:
        """Tell the worker to end and wait for it; kill it if it has not ended after ``grace`` seconds."""
        self.hang_up()
        process, self._process, self.busy = self._process, None, False
        if process is None:
            return
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            # Do not wait for a process that the system cannot kill (blocked on a dead disk).
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_SECONDS)

    def signal(self, number: int) -> None:
        """Send the worker a signal, if it has a process."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the worker at once."""
        if self._process is not None:
            self._process.kill()
        self.finish()

    def reap(self) -> str:
        """Return how a worker that no longer answers has ended; end it if it still runs."""
        process = self._process
        self.finish(POLL_SECONDS)
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
    """End workers in parallel; do nothing in a process other than ``owner`` (a process id)."""
    if os.getpid() != owner:
        return
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.finish()


def _spawn(orders: int, answers: int, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a worker.

    Signals that ask a run to stop may reach all processes of a terminal or a Slurm step, but only the parent
    handles them: the new process starts with them blocked, until it ignores them.
    """
    module = "rustsim_hpc.executors.worker_process"
    command = [sys.executable, "-P", "-m", module, str(orders), str(answers), str(os.getpid())]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=_environment(), pass_fds=(orders, answers, *fds)
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    here = str(Path(rustsim_hpc.__file__).parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | dict.fromkeys(_ONE_THREAD, "1") | {"PYTHONPATH": os.pathsep.join(paths)}
