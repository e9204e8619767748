"""How the ranks of a job leave it together, with one exit code, when one of them cannot go on.

A rank that gets stuck, or meets what the others know nothing of, cannot tell them by MPI: they wait in a
collective. So it leaves a mark in a file; the watchdogs of the others look there, mark themselves, and when
all have, all leave. A launcher that saw one rank go first would kill the others, and end with their code.

The file has a byte for each rank, its exit code, and a second one that says that this rank has seen all the
others' first: one that is stopped after its own would be waited for by the launcher for ever, once the others
have left in good order. The file lies in this machine's temporary folder, and from the moment that there is
one in the run's folder too, where ranks of other machines see it.
"""

from __future__ import annotations

import os
import select
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rustsim_hpc.files import TEMPORARY_SUFFIX

GRACE = 6.0
"""Seconds that a rank which has to leave waits for the others to have heard of it."""

_LATER = 1.0
_PAUSE = 0.02
_FIRST, _SECOND = 0, 1


class Leaving:
    """One rank's part in leaving together.

    Args:
        rank, size: of the ranks.
        key: what tells this job's marks from those of others; the same on all ranks.
        grace: as `GRACE`.
    """

    def __init__(self, rank: int, size: int, key: str, grace: float = GRACE) -> None:
        self._rank, self._size, self._grace = rank, size, grace
        self._name = f".leaving-{key}{TEMPORARY_SUFFIX}"
        self._places = [Path(tempfile.gettempdir()) / self._name]
        self._descriptors: list[int] = []

    def move(self, folder: Path) -> None:
        """Use a folder that all ranks see, too."""
        self._places.append(folder / self._name)

    def heard(self) -> int | None:
        """Return the exit code of a rank that wants to leave, None if there is none."""
        return next((code for code in self._marks() if code), None)

    def together(self, code: int) -> bool:
        """Mark this rank, twice; return whether all are marked within the time of grace.

        What it returns False for, others have to be ended by the launcher. The caller then leaves the
        process at once in any case, by way of `goodbye` where all are marked.
        """
        self._mark(code)
        stage = _FIRST
        everybody = self._wait_for_all(stage)
        if everybody:
            stage = _SECOND
            self._mark_again(code)
            everybody = self._wait_for_all(stage)
        if not everybody and self._first_marked(stage) == self._rank:
            # The last of those that leave is the one that makes the launcher kill the rest.
            time.sleep(_LATER)
        elif not everybody:
            goodbye()
        for place in self._places:
            with suppress(OSError):
                place.unlink()
        return everybody

    def leave(self, code: int) -> NoReturn:
        """Leave the process with an exit code, together with all other ranks where they hear of it."""
        if self.together(code):
            goodbye()
        os._exit(code)

    def _mark(self, code: int) -> None:
        for place in self._places:
            with suppress(OSError):
                descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                # Left open: another rank may take the name away before this one has seen everybody.
                os.pwrite(descriptor, bytes([code]), self._rank)
                self._descriptors.append(descriptor)

    def _mark_again(self, code: int) -> None:
        # By the descriptors only: a name that is gone must not come back.
        for descriptor in self._descriptors:
            with suppress(OSError):
                os.pwrite(descriptor, bytes([code]), _SECOND * self._size + self._rank)

    def _wait_for_all(self, stage: int) -> bool:
        end = time.monotonic() + self._grace
        while not (everybody := all(self._marks(stage))) and time.monotonic() < end:
            time.sleep(_PAUSE)
        return everybody

    def _first_marked(self, stage: int) -> int:
        return next((rank for rank, code in enumerate(self._marks(stage)) if code), self._rank)

    def _marks(self, stage: int = _FIRST) -> list[int]:
        """Return each rank's exit code, 0 of those that have not marked themselves in a stage."""
        marks, start = [0] * self._size, stage * self._size
        for text in [*map(self._at, self._descriptors), *map(_content, self._places)]:
            for rank, code in enumerate(text[start : start + self._size]):
                marks[rank] = marks[rank] or code
        return marks

    def _at(self, descriptor: int) -> bytes:
        with suppress(OSError):
            return os.pread(descriptor, 2 * self._size, 0)
        return b""


def _content(place: Path) -> bytes:
    with suppress(OSError):
        return place.read_bytes()
    return b""


def last_words(message: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(" ".join(message.split()) + "\n")
    sys.stderr.flush()


def goodbye(environ: Mapping[str, str] | None = None) -> None:
    """Tell MPICH's mpirun that this rank ends in good order, as MPI_Finalize would in its last words.

    It kills all ranks as soon as one is gone without that, and adds up their codes to 9. Only the main thread
    may call MPI, and it is stuck; but these are two lines of PMI-1 on a pipe that nobody else uses now.
    Slurm, which speaks another version there, does not set ``MPI_LOCALRANKID``.
    """
    environ = os.environ if environ is None else environ
    with suppress(KeyError, ValueError, OSError):
        pipe = int(environ["PMI_FD"]) if "MPI_LOCALRANKID" in environ else -1
        if pipe >= 0:
            os.write(pipe, b"cmd=finalize\n")
            if select.select([pipe], [], [], 1.0)[0]:
                os.read(pipe, 256)
