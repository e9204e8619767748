"""A clock of the time spent compiling kernels or loading compiled ones, which speed figures exclude."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class CompileClock:
    """Adds up seconds; nested intervals of a thread count once.

    Attributes:
        seconds: the sum so far, over all threads of the process.
        running: number of threads that are compiling or loading now.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.running = 0
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the seconds of the block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Begin an interval in this thread; each call needs a matching :meth:`end`."""
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        if depth == 0:
            self._thread.begun = time.perf_counter()
            with self._lock:
                self.running += 1

    def end(self) -> None:
        """End the interval of the matching :meth:`begin`."""
        self._thread.depth -= 1
        if self._thread.depth == 0:
            with self._lock:
                self.seconds += time.perf_counter() - self._thread.begun
                self.running -= 1


CLOCK = CompileClock()
"""The clock of this process. Numba's compiler reports to it once :mod:`rustsim_hpc.kernels` is imported."""
