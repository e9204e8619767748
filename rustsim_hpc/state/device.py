"""The device interface of the CUDA executor, implemented by :mod:`rustsim_hpc.state.cupy_device`.

A device has its own address space: a :class:`Buffer` is not an array. Its bytes are transferred by `upload`
and `download`, or, for small transfers that must not block, by `give` and `take` through pinned memory. Work
is queued on one of three streams and runs in order within a stream; only `order` orders work of two streams.
Work is known to be complete only after `wait` or `synchronise`.
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
"""The stream of downloads that run concurrently with steps; another thread may use it."""


class Buffer(Protocol):
    """A piece of a device's memory."""

    nbytes: int

    @property
    def address(self) -> int:
        """The address in the device's address space."""
        ...


class Device(Protocol):
    """One device.

    Every method may raise DeviceError: the driver refused, or work queued earlier has failed.
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    resident_threads: int

    def free_bytes(self) -> int:
        """Return how many bytes of memory are free."""
        ...

    def allocate(self, nbytes: int) -> Buffer:
        """Allocate memory, uninitialised.

        Raises:
            DeviceMemoryError: not enough memory is free.
        """
        ...

    def release(self, buffer: Buffer) -> None:
        """Free memory, after the queued work that uses it."""
        ...

    def upload(self, buffer: Buffer, data: Array) -> None:
        """Queue a copy from the host (contiguous); the data may be changed as soon as this returns.

        Large copies wait for earlier ones, to bound the host memory that they are staged in.
        """
        ...

    def pinned(self, words: int) -> Array:
        """Return pinned host memory, int64 (words,), for `give` and `take`."""
        ...

    def give(self, data: Array, buffer: Buffer) -> None:
        """Queue a copy from pinned memory, which is read when the copy runs; never waits."""
        ...

    def take(self, buffer: Buffer, out: Array) -> None:
        """Queue a copy to pinned memory, after all earlier launches; never waits."""
        ...

    def download(self, buffer: Buffer, out: Array, stream: int = TRANSFER) -> None:
        """Queue a copy to the host (contiguous, writable); complete after `synchronise`."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Queue a copy of a whole buffer to another."""
        ...

    def array(self, data: Array) -> Any:
        """Return a copy of an array on the device, for device phases."""
        ...

    def views(
        self, schema: Schema, parts: Sequence[tuple[Buffer, Any]], rows: int, writable: Sequence[bool]
    ) -> AbstractContextManager[Any]:
        """Return a context of columns, by position and name, that a device phase uses within the block."""
        ...

    def load(self, image: bytes, name: str) -> Any:
        """Load compiled code (PTX) and return the kernel of this name."""
        ...

    def raw_kernel(self, code: str, name: str, *, fma: bool) -> Any:
        """Compile CUDA C; return the kernel, to be called with grid, block and arguments within `views`."""
        ...

    def launch(self, kernel: Any, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """Queue a kernel; arguments are NumPy scalars."""
        ...

    def capture(self, queue: Callable[[], None]) -> Any:
        """Record the `give`, `take`, `copy` and `launch` calls of ``queue`` as a graph, without running them.

        Arguments are fixed when recorded; pinned memory and buffers are read when the graph runs.
        """
        ...

    def replay(self, graph: Any) -> None:
        """Queue all work of a graph."""
        ...

    def order(self, first: int, then: int) -> None:
        """Make later work on stream `then` wait for the work queued on `first` so far."""
        ...

    def mark(self) -> Any:
        """Return a mark after all work queued on the stream of launches so far."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait until all work before a mark is complete."""
        ...

    def nanoseconds(self, first: Any, then: Any) -> int:
        """Return the device time between two marks, both of which have been waited for."""
        ...

    def synchronise(self, *streams: int) -> None:
        """Wait until all work queued on these streams is complete; by default, on the first two."""
        ...
