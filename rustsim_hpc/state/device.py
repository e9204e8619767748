"""What the CUDA executor asks of a device; :mod:`rustsim_hpc.state.cupy_device` gives it.

A device has its own address space: a :class:`Buffer` is not an array, and its bytes come and go by `upload`
and `download` alone, or, a few of them and without a wait, by `give` and `take` through pinned memory. Work
is queued on one of three streams, each in order; between two there is no order but what `order` asks for;
nothing is known to have happened before `wait` or `synchronise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import numpy as np

from rustsim_hpc.state.schema import Schema

Array = np.ndarray[Any, Any]

COMPUTE: Final = 0
"""The stream of uploads and launches."""
TRANSFER: Final = 1
"""The stream of downloads."""
ASIDE: Final = 2
"""The stream of downloads that go on beside the steps. A thread of its own may use it."""


class Buffer(Protocol):
    """A piece of a device's memory."""

    nbytes: int

    @property
    def address(self) -> int:
        """Where it lies, in the device's address space."""
        ...


class Device(Protocol):
    """One device.

    Every method may raise DeviceError: the driver refused, or something that was queued before has failed.
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    resident_threads: int

    def free_bytes(self) -> int:
        """Return how much memory could be had now."""
        ...

    def allocate(self, nbytes: int) -> Buffer:
        """Return memory, its content undefined.

        Raises:
            DeviceMemoryError: there is not so much.
        """
        ...

    def release(self, buffer: Buffer) -> None:
        """Give memory back, after what is queued has used it."""
        ...

    def upload(self, buffer: Buffer, data: Array) -> None:
        """Queue a copy from the host (contiguous); the data may change as soon as this returns.

        Large ones wait for the copies before them: no room of the host is needed for all of them.
        """
        ...

    def pinned(self, words: int) -> Array:
        """Return memory of the host, int64 (words,), that `give` and `take` may use."""
        ...

    def give(self, data: Array, buffer: Buffer) -> None:
        """Queue a copy to the device of pinned memory, as it is when the queue comes to it; never waits."""
        ...

    def take(self, buffer: Buffer, out: Array) -> None:
        """Queue a copy to pinned memory, behind what was launched before; never waits."""
        ...

    def download(self, buffer: Buffer, out: Array, stream: int = TRANSFER) -> None:
        """Queue a copy to the host (contiguous, writable); it is there after `synchronise`."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Queue a copy of the whole of one buffer to another."""
        ...

    def array(self, data: Array) -> Any:
        """Return a copy of an array as a device phase can use it."""
        ...

    def views(
        self, schema: Schema, parts: Sequence[tuple[Buffer, Any]], rows: int, writable: Sequence[bool]
    ) -> AbstractContextManager[Any]:
        """Return columns for a device phase (by position and name), which works on them within the block."""
        ...

    def load(self, image: bytes, name: str) -> Any:
        """Load compiled code (PTX) and return the kernel of this name."""
        ...

    def raw_kernel(self, code: str, name: str, *, fma: bool) -> Any:
        """Return a kernel of CUDA C, to be called with grid, block and arguments among `views`."""
        ...

    def launch(self, kernel: Any, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """Queue a kernel; arguments are NumPy scalars."""
        ...

    def capture(self, queue: Callable[[], None]) -> Any:
        """Return a graph of what ``queue`` queues by `give`, `take`, `copy` and `launch`; nothing is queued.

        What it queues keeps its arguments; pinned memory and buffers are looked at when the graph runs.
        """
        ...

    def replay(self, graph: Any) -> None:
        """Queue all that a graph was made of."""
        ...

    def order(self, first: int, then: int) -> None:
        """Let what is queued on stream `then` from now on wait for what is queued on `first` so far."""
        ...

    def mark(self) -> Any:
        """Return a mark behind all that is queued on the stream of launches so far."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait until everything before a mark has happened."""
        ...

    def nanoseconds(self, first: Any, then: Any) -> int:
        """Return how long the device took from one mark to a later one; both have been waited for."""
        ...

    def synchronise(self, *streams: int) -> None:
        """Wait until everything queued on these streams has happened; without any: on the first two."""
        ...
