"""How long this process has compiled kernels, or loaded compiled ones: what figures of speed leave out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class CompileClock:
    """Adds up seconds; what is begun inside of what is being counted counts once.

    Attributes:
        seconds: the sum so far, over all threads of the process.
        running: threads that are compiling or loading at this moment.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.running = 0
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the seconds inside."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Begin to count in this thread; each call needs one of :meth:`end`."""
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        if depth == 0:
            self._thread.begun = time.perf_counter()
            with self._lock:
                self.running += 1

    def end(self) -> None:
        """End what :meth:`begin` began."""
        self._thread.depth -= 1
        if self._thread.depth == 0:
            with self._lock:
                self.seconds += time.perf_counter() - self._thread.begun
                self.running -= 1


CLOCK = CompileClock()
"""Of this process. Numba's compiler tells it once :mod:`rustsim_hpc.kernels` is in use."""
