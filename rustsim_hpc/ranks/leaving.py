"""End all ranks of a job together, with one exit code, when one of them cannot go on.

A rank that is stuck or fails alone cannot tell the others by MPI: they wait in a collective. It therefore
writes a mark to a file. The watchdogs of the other ranks poll the file and mark their ranks; once all are
marked, all exit. If one rank exited first, the launcher would kill the others and return their exit code.

The file has two bytes for each rank. The first is its exit code. The rank writes the second after it has
seen the first of all ranks: a rank that is stopped after writing its first would keep the launcher waiting
forever if the others had exited in good order. The file is in this machine's temporary folder and, as soon
as there is a run folder, also there, where ranks on other machines see it.
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
"""Seconds that a rank which has to exit waits for the marks of the others."""

_LATER = 1.0
_PAUSE = 0.02
_FIRST, _SECOND = 0, 1


class Leaving:
    """One rank's part in ending all ranks together.

    Args:
        rank, size: this rank and the number of ranks.
        key: identifies this job's marks; the same on all ranks.
        grace: seconds to wait, see `GRACE`.
    """

    def __init__(self, rank: int, size: int, key: str, grace: float = GRACE) -> None:
        self._rank, self._size, self._grace = rank, size, grace
        self._name = f".leaving-{key}{TEMPORARY_SUFFIX}"
        self._places = [Path(tempfile.gettempdir()) / self._name]
        self._descriptors: list[int] = []

    def move(self, folder: Path) -> None:
        """Also use a folder that all ranks can see."""
        self._places.append(folder / self._name)

    def heard(self) -> int | None:
        """Return the exit code of the first rank that has marked itself, or None if there is none."""
        return next((code for code in self._marks() if code), None)

    def together(self, code: int) -> bool:
        """Mark this rank, twice; return whether all ranks are marked within the grace period.

        If False, the launcher has to end the other ranks. The caller must exit at once in either case, after
        `goodbye` if True.
        """
        self._mark(code)
        stage = _FIRST
        everybody = self._wait_for_all(stage)
        if everybody:
            stage = _SECOND
            self._mark_again(code)
            everybody = self._wait_for_all(stage)
        if not everybody and self._first_marked(stage) == self._rank:
            # The last rank to exit is the one that makes the launcher kill the rest.
            time.sleep(_LATER)
        elif not everybody:
            goodbye()
        for place in self._places:
            with suppress(OSError):
                place.unlink()
        return everybody

    def leave(self, code: int) -> NoReturn:
        """Exit with a code, together with all other ranks if they mark themselves in time."""
        if self.together(code):
            goodbye()
        os._exit(code)

    def _mark(self, code: int) -> None:
        for place in self._places:
            with suppress(OSError):
                descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                # Kept open: another rank may remove the name before this one has seen all marks.
                os.pwrite(descriptor, bytes([code]), self._rank)
                self._descriptors.append(descriptor)

    def _mark_again(self, code: int) -> None:
        # Only through the open descriptors: a file that was removed must not be created again.
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
        """Return each rank's exit code, 0 for ranks without a mark of this stage."""
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
    """Tell MPICH's mpirun that this rank ends in good order, as MPI_Finalize does at its end.

    Otherwise mpirun kills all ranks as soon as one exits, and combines their codes to 9. Only the main thread
    may call MPI, and it is stuck; but this is one PMI-1 request and its reply, on a pipe that is not in use.
    Slurm uses another version of PMI on ``PMI_FD``, and does not set ``MPI_LOCALRANKID``.
    """
    environ = os.environ if environ is None else environ
    with suppress(KeyError, ValueError, OSError):
        pipe = int(environ["PMI_FD"]) if "MPI_LOCALRANKID" in environ else -1
        if pipe >= 0:
            os.write(pipe, b"cmd=finalize\n")
            if select.select([pipe], [], [], 1.0)[0]:
                os.read(pipe, 256)
