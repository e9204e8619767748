"""What the stages of one partition on a device share: the step's clock, and arrays that they read."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from rustsim_hpc.executors.device_columns import DeviceColumns
from rustsim_hpc.executors.work import Board, Frame, Task, Work
from rustsim_hpc.kernels.cuda_stage import DeviceArray
from rustsim_hpc.state.device import Buffer, Device

_CLOCK_WORDS = 3


class Partition:
    """What the stages of one partition on a device share.

    Attributes:
        device, columns, work, task: the partition and where it is.
        rows: how many it has.
        moved: how often a kept array got another place.
        board, place: where it reports.
        fma: let kernels fuse products and sums.
        graphs: make launches whose arguments stay the same graphs.
    """

    def __init__(
        self,
        device: Device,
        columns: DeviceColumns,
        work: Work,
        task: Task,
        board: Board,
        place: int,
        *,
        fma: bool,
        graphs: bool,
    ) -> None:
        self.device, self.columns, self.work, self.task = device, columns, work, task
        self.board, self.place, self.fma, self.graphs = board, place, fma, graphs
        self.rows = task.stop - task.start
        self.moved = 0
        self._kept: dict[Any, tuple[Buffer, DeviceArray, Frame | None]] = {}
        self._clock = device.pinned(_CLOCK_WORDS)

    def set_clock(self, frame: Frame) -> None:
        """Say what `give_clock` shall tell; what it told before has been waited for."""
        self._clock[:] = frame.step_index, frame.repeat, frame.want_digest

    def give_clock(self) -> None:
        """Queue that the device learns which step it is."""
        self.device.give(self._clock, self._clock_there)

    @cached_property
    def _clock_there(self) -> Buffer:
        return self.columns.hold(8 * _CLOCK_WORDS)

    @property
    def clock(self) -> DeviceArray:
        """What kernels read the step's index, the steps to make and whether to digest from."""
        return DeviceArray(self._clock_there.address, (_CLOCK_WORDS,), np.dtype(np.int64), writable=False)

    def kept(self, name: Any, value: Any, frame: Frame | None = None) -> Any:
        """Return a read-only array on the device, uploaded once, or once for each frame; or a scalar."""
        array = np.asarray(value)
        if array.ndim == 0:
            return array[()]
        known = self._kept.get(name)
        if known is not None and (known[1].shape, known[1].dtype) == (array.shape, array.dtype):
            buffer, there, seen = known
            if seen is not frame:
                self.device.upload(buffer, np.ascontiguousarray(array))
                self._kept[name] = buffer, there, frame
            return there
        if known is not None:
            self.columns.let_go(known[0])
            del self._kept[name]
            self.moved += 1
        buffer = self.columns.hold(array.nbytes)
        self.device.upload(buffer, np.ascontiguousarray(array))
        there = DeviceArray(buffer.address, array.shape, array.dtype, writable=False)
        self._kept[name] = buffer, there, frame
        return there
