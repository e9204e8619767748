"""What the stages of one partition on a device share: the step's values, and read-only arrays."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from rustsim_hpc.executors.device_columns import DeviceColumns
from rustsim_hpc.executors.work import Board, Frame, Task, Work
from rustsim_hpc.kernels.cuda_stage import DeviceArray
from rustsim_hpc.modeling.program import Program
from rustsim_hpc.state.device import Buffer, Device

_CLOCK_WORDS = 3


class Partition:
    """What the stages of one partition on a device share.

    Numbers that change from step to step (the clock, results of reductions, derived values) lie in one block
    of device memory, a word each: kernels read them there, so the arguments of a launch stay the same.

    Attributes:
        device, columns, work, task: the partition and its device.
        rows: number of its rows.
        moved: number of times that a kept array was reallocated.
        board, place: it reports to row ``place`` of the board.
        fma: let kernels use fused multiply-add.
        graphs: record what is queued identically each time as CUDA graphs.
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
        self._words = {name: _CLOCK_WORDS + k for k, name in enumerate(_made_by(work.program))}
        self._step_values = device.pinned(_CLOCK_WORDS + len(self._words))

    def set_step_values(self, frame: Frame) -> None:
        """Set the clock and the numbers made so far; the previous copy to the device must be complete."""
        self._step_values[:_CLOCK_WORDS] = frame.step_index, frame.repeat, frame.want_digest
        for name, value in frame.values.items():
            number = np.asarray(value)
            if number.ndim == 0 and number.itemsize <= 8:  # a wider one is refused by what would read it
                word = self._words[name]
                self._step_values[word : word + 1].view(number.dtype)[0] = number

    def send_step_values(self) -> None:
        """Queue a copy of the step values to the device."""
        self.device.give(self._step_values, self._step_values_there)

    @cached_property
    def _step_values_there(self) -> Buffer:
        return self.columns.hold(self._step_values.nbytes)

    @property
    def clock(self) -> DeviceArray:
        """The array from which kernels read the step index, the number of steps and whether to digest."""
        return DeviceArray(
            self._step_values_there.address, (_CLOCK_WORDS,), np.dtype(np.int64), writable=False
        )

    def number(self, name: str, dtype: Any) -> DeviceArray:
        """Return the device array (1,) of a number made by the step, as last sent."""
        return DeviceArray(
            self._step_values_there.address + 8 * self._words[name], (1,), np.dtype(dtype), writable=False
        )

    def kept(self, name: Any, value: Any, frame: Frame | None = None) -> DeviceArray:
        """Return a read-only array on the device, uploaded once, or once for each frame."""
        array = np.asarray(value)
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


def _made_by(program: Program) -> list[str]:
    """Return the names of all results of a step: reductions and derived values."""
    derives = (derive for segment in program.segments for _, derive in segment.derives)
    names = [reduction.name for reduction in program.reductions]
    return [*names, *(name for derive in derives for name in derive.names)]
