"""Requests to stop a run cleanly: signals and time limits.

Signals are handled between steps: `StopRequests` only records them, so a step is never interrupted, and the
ranks can agree on one step before any of them stops. Handlers are installed only within its ``with`` block.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Self

from rustsim_hpc.terminal import leave_lost_terminal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a run to save a checkpoint and stop."""

LONGEST_MARGIN = 60.0
"""Upper bound of the seconds reserved before a time limit for the last step and checkpoint."""

_MARGIN_SHARE = 0.1
_Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


@dataclass(frozen=True)
class StopReason:
    """Why a run is asked to stop.

    Attributes:
        kind: a signal, the run's own time limit, or Slurm's.
        text: the reason for a reader.
    """

    kind: Literal["signal", "time_limit", "slurm"]
    text: str


class StopRequests:
    """Collects requests to stop while its ``with`` block lasts; `stop_requested` says whether there is one.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP are caught, in the main thread only (elsewhere Python does not allow
    it, and only time limits apply). A second SIGINT raises `KeyboardInterrupt` at once. SIGHUP, which says
    that the terminal is gone, stays ignored in a process started by nohup. The previous handlers are
    restored when the block ends. The deadline is the earlier of ``time_limit`` and the end of the Slurm job
    (``SLURM_JOB_END_TIME``); the stop is requested a tenth of the limit before it, at most 60 seconds.

    Attributes:
        margin: seconds to reserve before the deadline; may be set, for example to a checkpoint's duration.
        interrupted: whether a second SIGINT came. What it raised may have become a phase's failure.
    """

    def __init__(
        self,
        time_limit: float | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        debounce: float = 0.1,
    ) -> None:
        """Prepare; the time limit, in seconds, counts from now.

        ``debounce``: a SIGINT within so many seconds of the first counts as the same one: the terminal sends
        one Ctrl-C to all processes of a job, and mpirun forwards its own to the same ranks.
        """
        environ = os.environ if environ is None else environ
        now = time.time()
        limits: list[tuple[float, float, StopReason]] = []
        if time_limit is not None:
            own = StopReason("time_limit", f"the time limit of {time_limit:g} s")
            # On the monotonic clock: a clock that is set back must not prolong the run.
            limits.append((time.monotonic() + time_limit, time_limit, own))
        end = _unix_time(environ, "SLURM_JOB_END_TIME")
        if end is not None and "SLURM_JOB_ID" in environ:
            start = _unix_time(environ, "SLURM_JOB_START_TIME")
            slurm = StopReason("slurm", "the end of the Slurm job's time")
            limits.append((time.monotonic() + end - now, end - (now if start is None else start), slurm))
        deadline, length, reason = min(limits, key=lambda limit: limit[0], default=(None, 0.0, None))
        self._deadline: float | None = deadline
        self._limit: StopReason | None = reason
        self.margin = min(LONGEST_MARGIN, _MARGIN_SHARE * max(0.0, length))
        self.interrupted = False
        self._debounce = debounce
        self._caught: StopReason | None = None
        self._first_interrupt: float | None = None
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    @property
    def installed(self) -> bool:
        """Whether signals are being caught."""
        return bool(self._before)

    def stop_requested(self) -> StopReason | None:
        """Return why the run should stop after this step, or None to go on; cheap enough for every step."""
        if self._caught is not None:
            return self._caught
        if self._deadline is not None and time.monotonic() >= self._deadline - self.margin:
            self._caught = self._limit
        return self._caught

    def request(self, text: str) -> None:
        """Request a stop as a signal would; the first reason is kept."""
        if self._caught is None:
            self._caught = StopReason("signal", text)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature of a handler)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt > self._debounce:
                self.interrupted = True
                raise KeyboardInterrupt
        elif number == signal.SIGHUP:
            leave_lost_terminal()
        self.request(signal.Signals(number).name)


def _unix_time(environ: Mapping[str, str], name: str) -> float | None:
    try:
        return float(environ[name])
    except (KeyError, ValueError):
        return None
