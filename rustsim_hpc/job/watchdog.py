"""A thread that ends a process which is stuck in a phase or a collective.

A compiled loop or a waiting MPI call cannot be interrupted from Python, so there is no way back: the stacks
of all threads go to standard error, a crash bundle into the run's folder, and the process leaves with exit
code 3. A step has to follow the other in time. Outside of them, where a model makes its first state or
gigabytes are read and written, a piece of a file that is done is a sign of life too, and a process that
computes, or waits for others, may do so for longer: nobody can tell a long computation from an endless one,
but most of what is stuck for ever does nothing.

The thread also hears when another rank has to leave (`ranks/leaving.py`), so that all do so with one
code; those that hear nothing are ended by their launcher.

The thread needs Python's global lock. Code that loops in C and never gives it back stops the watchdog too;
for that case Python's own C-level watchdog is armed behind it, with a longer limit. It prints the stacks as
well, but writes no bundle, can only leave with exit code 1, and does not know how long a process was stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.pieces import PIECES
from rustsim_hpc.ranks.leaving import Leaving
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.run_folder.crash import write_crash_bundle

EXIT_CODE = 3
PATIENCE = 5.0
"""Seconds (at most the limit) that a rank which waits for others leaves to the one that is stuck."""

COMPILING = 60.0
"""Seconds that a limit is at least while this process compiles, or waits in its first step for ranks or
workers that may: that is slow, but not stuck."""

FIRST_STEP = "first step"

LONGER = 6
"""How many times the limit a process may compute outside of steps, or wait there for ranks that may."""

OUTSIDE = ("start-up", "checkpoint", "end")
"""Phases outside of steps."""

_BUSY = 0.01
"""Share of a core's time from which on a process computes; the watchdog itself takes a hundredth of it."""
_STDERR = 2


class Quiet:
    """How long a process has shown no sign of life, between two looks at it at a time.

    Attributes:
        seconds: in which it was not stopped since the last sign of life.
        counted: the same, of seconds in which it computes outside of steps only a share.
    """

    def __init__(self) -> None:
        self.seconds = self.counted = 0.0
        self._seen: object = None
        self._pieces = -1

    def look(self, beat: tuple[str, int], gap: float, cpu: float, pieces: int, *, waiting: bool) -> None:
        """Take in what a look has found.

        Args:
            beat: the last beat; a new one is known by its identity.
            gap: seconds since the last look in which the process ran or could have run.
            cpu: seconds of processor time that it took meanwhile.
            pieces: of files that it has done so far.
            waiting: it waits for other ranks, or for workers that may be starting.
        """
        outside = beat[0] in OUTSIDE
        if beat is not self._seen or (outside and pieces != self._pieces):
            self.seconds = self.counted = 0.0
        else:
            self.seconds += gap
            self.counted += gap / LONGER if outside and (waiting or cpu >= _BUSY * gap) else gap
        self._seen, self._pieces = beat, pieces


class Watchdog:
    """Watches one rank while its ``with`` block lasts; the step loop calls `beat`.

    Time in which the process was stopped (SIGSTOP, a suspended machine) does not count.

    Attributes:
        waiting: says whether the rank waits for others. It then holds still a little longer, so that the one
            that is stuck is heard: the first to leave ends them all.
        has_workers: other processes run this rank's partitions.
        phase: says which phase runs, where that is known better than by the last beat.
        show_more: prints the stacks of other processes of this rank, its workers, to standard error.
    """

    def __init__(
        self,
        limit: float | None,
        *,
        rank: int = 0,
        host: str | None = None,
        folder: Path | None = None,
        backstop: bool = True,
        leaving: Leaving | None = None,
    ) -> None:
        """Prepare; without a ``limit`` (None or 0; seconds between two beats) nothing is watched.

        ``folder``: the run's folder, for the crash bundle. ``backstop``: arm Python's C-level watchdog, too;
        a process has only one. ``leaving``: how the ranks leave together, if there are several.
        """
        self.limit = limit or 0.0
        self.rank = rank
        self.host = host
        self.folder = folder
        self.waiting: Callable[[], bool] = lambda: False
        self.has_workers = False
        self.phase: Callable[[], str] = lambda: ""
        self.show_more: Callable[[], None] = lambda: None
        self._backstop = backstop
        self._leaving = leaving
        self._beat: tuple[str, int] = ("start-up", 0)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.limit > 0 or self._leaving is not None:
            self._done.clear()
            self._thread = threading.Thread(target=self._watch, name="rustsim-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def beat(self, phase: str, step: int) -> None:
        """Say that the process moves: it now begins ``phase`` of ``step``. Costs well under a microsecond."""
        # A new tuple each time, so that the thread sees a beat of equal content by its identity.
        self._beat = (phase, step)

    def _watch(self) -> None:
        poll, patience = min(1.0, (self.limit or 10) / 10), min(PATIENCE, self.limit)
        quiet, before, spent = Quiet(), time.monotonic(), time.process_time()
        try:
            while not self._done.wait(poll):
                now, cpu, beat = time.monotonic(), time.process_time(), self._beat
                # A longer gap than a poll is time in which this thread, and so the process, did not run.
                gap = min(now - before, 2 * poll)
                waiting = self.waiting()
                quiet.look(beat, gap, cpu - spent, PIECES.done, waiting=waiting or self.has_workers)
                before, spent = now, cpu
                if not quiet.seconds:
                    continue
                if self._leaving is not None and (code := self._leaving.heard()) is not None:
                    self._leaving.leave(code)
                if not self.limit:
                    continue
                compiles = CLOCK.running or (beat[0] == FIRST_STEP and (waiting or self.has_workers))
                limit = max(self.limit, COMPILING) if compiles else self.limit
                if quiet.counted >= limit + (patience if waiting else 0.0):
                    self._expire(*beat)
                if self._backstop:
                    longest = self.limit * (LONGER if beat[0] in OUTSIDE else 1)
                    faulthandler.dump_traceback_later(2 * longest + 30, exit=True, file=_STDERR)
        finally:
            if self._backstop:
                faulthandler.cancel_dump_traceback_later()

    def _expire(self, phase: str, step: int) -> None:
        where = f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        if self.waiting():
            phase = "waiting for other ranks"
        else:
            with contextlib.suppress(Exception):  # asked from another thread, at any moment
                phase = self.phase() or phase
        line = (
            f"watchdog: {where} has not moved for {self.limit:g} s: phase {phase}, step {step}; ending it\n"
        )
        os.write(_STDERR, line.encode())
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        with contextlib.suppress(Exception):
            self.show_more()
        try:
            if self.folder is not None:
                write_crash_bundle(
                    self.folder,
                    rank=self.rank,
                    host=self.host,
                    phase=phase,
                    step=step,
                    stacks=_stacks(),
                    more={"reason": line.strip()},
                )
        finally:
            if self._leaving is not None:
                self._leaving.leave(EXIT_CODE)
            os._exit(EXIT_CODE)


def watching(limit: float | None, team: Team) -> Watchdog:
    """Return the watchdog of this rank of a team, for a ``with`` block; ``limit`` as of `Watchdog`."""
    watchdog = Watchdog(limit, rank=team.rank, host=team.host, leaving=team.leaving)
    watchdog.waiting = lambda: team.waiting
    return watchdog


def _stacks() -> str:
    with contextlib.suppress(OSError), tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
    return ""
