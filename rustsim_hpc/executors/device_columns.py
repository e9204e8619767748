"""One partition's columns on a CUDA device, and which copies, on device and host, are current.

A column has two sides, both on the host and on the device; a step writes one of them on the device. The host
copy is then stale until it is asked for, and only stale copies are downloaded; what changes on the host is
stale on the device until a kernel reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from rustsim_hpc.errors import RustsimError
from rustsim_hpc.executors.work import Task, Work
from rustsim_hpc.state.device import ASIDE, COMPUTE, TRANSFER, Buffer, Device
from rustsim_hpc.state.memory import ColumnMemory

Array = np.ndarray[Any, Any]
Place = tuple[int, int]
"""A column and the number of one of its two buffers; the column's parity says which one is current."""


class CopyAside:
    """Copies on a device that the first caller to wait for them downloads.

    Args:
        device: where they are.
        parts: each copy, and the array that it is downloaded to.
    """

    def __init__(self, device: Device, parts: list[tuple[Buffer, Array]]) -> None:
        self._device, self._parts = device, parts
        self._lock = threading.Lock()
        self._error: RustsimError | None = None

    def finish(self) -> None:
        """Wait until they are downloaded. Any thread may call this, more than once.

        Raises:
            DeviceError: the device has failed; every caller gets this error.
        """
        with self._lock:
            parts, self._parts = self._parts, []
            try:
                for buffer, out in parts:
                    self._device.download(buffer, out, ASIDE)
                if parts:
                    self._device.synchronise(ASIDE)
            except RustsimError as error:
                self._error = error
            if self._error is not None:
                raise self._error

    def settle(self) -> None:
        """Wait until no download is in progress; ignore failures."""
        with suppress(RustsimError):
            self.finish()


def needed_bytes(work: Work, task: Task) -> int:
    """Return the bytes of device memory that a partition's columns (and explicit ids) need."""
    rows, program = task.stop - task.start, work.program
    sizes = [dtype.itemsize for dtype in work.memory.schema.dtypes]
    total = sum(sizes) + sum(sizes[column] for column in program.swapped)
    return rows * (total + (0 if work.ids is None else 8))


class DeviceColumns:
    """The device buffers of one partition.

    Args:
        device: where they are.
        work, task: the partition.

    Attributes:
        moved: bytes uploaded and downloaded so far.

    Raises:
        DeviceMemoryError: the device has not enough memory; all buffers are released.
    """

    def __init__(self, device: Device, work: Work, task: Task) -> None:
        self.device = device
        self.moved = [0, 0]
        self._memory: ColumnMemory = work.memory
        self._rows = slice(task.start, task.stop)
        self._buffers: dict[Place, Buffer] = {}
        self._good_there: set[Place] = set()
        self._behind_here: set[Place] = set()
        self._held: list[Buffer] = []
        self._spare: dict[int, Buffer] = {}
        self._aside: CopyAside | None = None
        rows = task.stop - task.start
        sizes = [rows * dtype.itemsize for dtype in self._memory.schema.dtypes]
        try:
            for column, size in enumerate(sizes):
                now = int(self._memory.parity[column])
                sides = (now, 1 - now) if column in work.program.swapped else (now,)
                for side in sides:
                    self._buffers[column, side] = self.hold(size)
            self.ids = self.hold(0 if work.ids is None else 8 * rows)
            if work.ids is not None:
                self.device.upload(self.ids, np.ascontiguousarray(work.ids[self._rows]))
        except RustsimError:
            self.close()
            raise

    def hold(self, nbytes: int) -> Buffer:
        """Allocate device memory that is released with these columns."""
        self._held.append(self.device.allocate(nbytes))
        return self._held[-1]

    def let_go(self, buffer: Buffer) -> None:
        """Release memory allocated by `hold`."""
        self._held.remove(buffer)
        self.device.release(buffer)

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory allocated by `hold`."""
        return sum(buffer.nbytes for buffer in self._held)

    def place(self, column: int, side: int) -> Place:
        """Return the place of a column's current side (0) or other side (1)."""
        return column, int(self._memory.parity[column]) ^ side

    def of(self, column: int, side: int) -> Buffer:
        """Return the buffer of a side; its content is not necessarily current."""
        return self._buffers[self.place(column, side)]

    def bring(self, column: int, side: int) -> None:
        """Upload a side's values unless the device has them."""
        place = self.place(column, side)
        if place not in self._good_there:
            data = self._here(place)
            self.device.upload(self._buffers[place], data)
            self.moved[0] += data.nbytes
            self._good_there.add(place)

    def wrote(self, column: int, side: int) -> None:
        """Record that the device writes a side: its host copy becomes stale."""
        place = self.place(column, side)
        self._good_there.add(place)
        self._behind_here.add(place)

    def forget(self) -> None:
        """Invalidate all device copies: the host has the state."""
        self._good_there.clear()
        self._behind_here.clear()

    def fetch(self, places: Iterable[Place]) -> None:
        """Download the places whose host copy is stale.

        Raises:
            DeviceError: the device has failed.
        """
        behind = [place for place in places if place in self._behind_here]
        if not behind:
            return
        self.device.order(COMPUTE, TRANSFER)
        for place in behind:
            out = self._here(place)
            self.device.download(self._buffers[place], out)
            self.moved[1] += out.nbytes
        self.device.synchronise()
        self._behind_here.difference_update(behind)

    def copy_aside(self, out: Sequence[Array]) -> CopyAside:
        """Copy the current sides within the device, to be downloaded to arrays beside the following steps.

        Columns whose host copy is current are copied at once. The copies' device memory is kept for reuse.

        Args:
            out: for each column the rows of this partition, contiguous.

        Raises:
            DeviceMemoryError: there is no room for the copies; no memory is taken.
            DeviceError: the device has failed.
        """
        if self._aside is not None:
            self._aside.settle()  # its copies are overwritten below
        places = [self.place(column, 0) for column in range(len(out))]
        behind = [place for place in places if place in self._behind_here]
        self._make_spare([column for column, _ in behind])
        parts = []
        for place, values in zip(places, out, strict=True):
            if place not in behind:
                np.copyto(values, self._here(place))
                continue
            spare = self._spare[place[0]]
            self.device.copy(self._buffers[place], spare)
            self.moved[1] += values.nbytes
            parts.append((spare, values))
        if parts:
            self.device.order(COMPUTE, ASIDE)
        self._aside = CopyAside(self.device, parts)
        return self._aside

    def _make_spare(self, columns: Sequence[int]) -> None:
        made: list[int] = []
        try:
            for column in columns:
                if column not in self._spare:
                    self._spare[column] = self.hold(self.of(column, 0).nbytes)
                    made.append(column)
        except RustsimError:
            for column in made:
                self.let_go(self._spare.pop(column))
            raise

    def copy_now(self, out: Sequence[Array]) -> None:
        """Download the current sides and copy them to ``out``.

        Raises:
            DeviceError: the device has failed.
        """
        places = [self.place(column, 0) for column in range(len(out))]
        self.fetch(places)
        for place, values in zip(places, out, strict=True):
            np.copyto(values, self._here(place))

    def _here(self, place: Place) -> Array:
        return self._memory.array(*place)[self._rows]

    def close(self) -> None:
        """Release the device memory, after pending downloads; errors of a failed device are ignored."""
        if self._aside is not None:
            self._aside.settle()
            self._aside = None
        self._spare.clear()
        for buffer in self._held:
            with suppress(RustsimError):
                self.device.release(buffer)
        self._held.clear()
        self._buffers.clear()
