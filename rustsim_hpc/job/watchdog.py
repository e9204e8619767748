"""A thread that ends a process which is stuck in a phase or a collective.

A compiled loop or a blocking MPI call cannot be interrupted from Python, so the process cannot recover: the
watchdog writes the stacks of all threads to standard error and a crash bundle to the run's folder, and exits
with code 3. Each step must follow the previous one within the limit. Outside of steps, where a model makes
its first state or gigabytes are read and written, each finished piece of a file counts as progress too, and a
process that computes, or waits for others, gets `LONGER` times the limit: a long computation cannot be
told from an endless one, but most stuck processes use no processor time.

The thread also checks whether another rank has to exit (`ranks/leaving.py`), so that all ranks exit with the
same code; ranks that do not notice are ended by their launcher.

The thread needs the GIL. C code that loops without releasing it stops the watchdog too; for that case
Python's own C-level watchdog is armed as well, with a longer limit. It prints the stacks, but writes no
bundle, can only exit with code 1, and cannot tell how long a process was stopped.
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
from typing import Self

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.errors import EXIT_FAILED
from rustsim_hpc.pieces import PIECES
from rustsim_hpc.ranks.leaving import Leaving
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.run_folder.crash import write_crash_bundle

PATIENCE = 5.0
"""Extra seconds (at most the limit) for a rank that waits for others, so that the stuck one reports first."""

COMPILING = 60.0
"""Lower bound of the limit, in seconds, while this process compiles or, in its first step, waits for ranks
or workers that may be compiling."""

FIRST_STEP = "first step"

LONGER = 6
"""Factor on the limit for a process that computes outside of steps, or waits there for others."""

OUTSIDE = ("start-up", "checkpoint", "end")
"""Phases outside of steps."""

_BUSY = 0.01
"""Share of a core's time above which a process counts as computing; the watchdog takes a hundredth of it."""
_STDERR = 2


class Quiet:
    """Time since a process last showed progress, updated at each poll.

    Attributes:
        seconds: since the last progress, without time in which the process was stopped.
        counted: the same, with time spent computing or waiting outside of steps divided by `LONGER`.
    """

    def __init__(self) -> None:
        self.seconds = self.counted = 0.0
        self._seen: object = None
        self._pieces = -1

    def look(self, beat: tuple[str, int], gap: float, cpu: float, pieces: int, *, waiting: bool) -> None:
        """Update the times from one poll.

        Args:
            beat: the last beat; a new one is recognised by its identity.
            gap: seconds since the last poll in which the process ran or could have run.
            cpu: seconds of processor time used since the last poll.
            pieces: number of pieces of files finished so far.
            waiting: whether it waits for other ranks, or for workers that may be starting.
        """
        outside = beat[0] in OUTSIDE
        if beat is not self._seen or (outside and pieces != self._pieces):
            self.seconds = self.counted = 0.0
        else:
            self.seconds += gap
            self.counted += gap / LONGER if outside and (waiting or cpu >= _BUSY * gap) else gap
        self._seen, self._pieces = beat, pieces

    def told(self, limit: float) -> str:
        """Return how long the process has been quiet, and the limit in force."""
        longer = f", {LONGER} times that while it computes or waits" if self.counted < self.seconds else ""
        return f"{self.seconds:.{0 if self.seconds >= 10 else 1}f} s (limit {limit:g} s{longer})"


class Watchdog:
    """Watches one rank while its ``with`` block lasts; the step loop calls `beat`.

    Time in which the process was stopped (SIGSTOP, a suspended machine) does not count.

    Attributes:
        waiting: returns whether the rank waits for others. Its limit is then a little longer, so that the
            stuck rank reports first: the first to exit ends all ranks.
        has_workers: whether other processes run this rank's partitions.
        phase: returns the running phase where that is more precise than the last beat, else "".
        show_more: prints the stacks of this rank's worker processes to standard error.
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

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def beat(self, phase: str, step: int) -> None:
        """Report progress: the process now begins ``phase`` of ``step``. Costs well under a microsecond."""
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
                limit += patience if waiting else 0.0
                if quiet.counted >= limit:
                    self._expire(*beat, quiet.told(limit))
                if self._backstop:
                    longest = self.limit * (LONGER if beat[0] in OUTSIDE else 1)
                    faulthandler.dump_traceback_later(2 * longest + 30, exit=True, file=_STDERR)
        finally:
            if self._backstop:
                faulthandler.cancel_dump_traceback_later()

    def _expire(self, phase: str, step: int, how_long: str) -> None:
        where = f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        if self.waiting():
            phase = "waiting for other ranks"
        else:
            with contextlib.suppress(Exception):  # asked from another thread, at any moment
                phase = self.phase() or phase
        line = f"watchdog: {where} has not moved for {how_long}: phase {phase}, step {step}; ending it\n"
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
                self._leaving.leave(EXIT_FAILED)
            os._exit(EXIT_FAILED)


def watching(limit: float | None, team: Team) -> Watchdog:
    """Return the watchdog of this rank of a team, for a ``with`` block; ``limit`` as for `Watchdog`."""
    watchdog = Watchdog(limit, rank=team.rank, host=team.host, leaving=team.leaving)
    watchdog.waiting = lambda: team.waiting
    return watchdog


def _stacks() -> str:
    with contextlib.suppress(OSError), tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
    return ""
