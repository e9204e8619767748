"""Run one partition's share of a segment on a CUDA device: each stage and each device phase in turn."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from rustsim_hpc.errors import DeviceError, DeviceMemoryError, message_of
from rustsim_hpc.executors.device_columns import DeviceColumns
from rustsim_hpc.executors.device_stage import DeviceStages, Partition
from rustsim_hpc.executors.partition_run import PartitionRun, StageCache, status_text
from rustsim_hpc.executors.work import Board, Frame, PhaseFailure, Task, Work
from rustsim_hpc.modeling.program import ColumnCall, KernelStage
from rustsim_hpc.random import MAX_STEP, RowRandom
from rustsim_hpc.state.device import Device
from rustsim_hpc.state.schema import DTYPES


class DeviceRun(PartitionRun):
    """Runs segments of a program on one partition of a device.

    Args:
        device: the device.
        fma: let kernels fuse products and sums.
        work, task, board, place, stages: as for :class:`~rustsim_hpc.executors.partition_run.PartitionRun`.

    Raises:
        DeviceMemoryError: the device has not enough memory; nothing is held then.
    """

    def __init__(
        self,
        device: Device,
        work: Work,
        task: Task,
        board: Board,
        place: int,
        stages: StageCache,
        *,
        fma: bool = False,
    ) -> None:
        super().__init__(work, task, board, place, stages)
        self.device = device
        self.columns = DeviceColumns(device, work, task)
        partition = Partition(device, self.columns, work, task, board, place, fma=fma)
        self._device_stages = DeviceStages(partition)
        self._digest_only: dict[int, KernelStage] = {}

    def _run_stage(self, stage: KernelStage, frame: Frame, status: Any) -> None:
        start = time.perf_counter_ns()
        staged = self._device_stages.get(stage, frame)
        if staged.made.draws and frame.step_index + frame.repeat - 1 > MAX_STEP:
            raise ValueError(f"step {frame.step_index}: random numbers reach up to step {MAX_STEP}")
        for slot, dtype in staged.made.dtypes.items():
            self._board.codes[self._place, slot] = DTYPES.index(dtype)
        status[1] = stage.ops[0].phase
        if self.task.start < self.task.stop:
            staged.launch(frame)
        spent = (time.perf_counter_ns() - start) // len(stage.ops)
        for op in stage.ops:  # one launch for all of them: nobody can say which took how long
            self._board.times[self._place, op.phase] += spent
        if status[0]:
            self._phase = status[2]
            raise ValueError(status_text(self.work, frame.step_index, status))

    # -- device phases -------------------------------------------------------------------------------

    def _run_column_phases(self, calls: list[ColumnCall], frame: Frame, status: Any) -> None:
        for call in calls:  # all rows at once: a launch costs more than the cache gives
            self._phase = status[1] = call.phase
            self._run_column_phase(call, frame, self.task.start, self.task.stop)

    def _run_column_phase(self, call: ColumnCall, frame: Frame, start: int, stop: int) -> None:
        began = time.perf_counter_ns()
        twin = call.column_phase.device
        if twin is None:
            raise DeviceError(f'phase "{call.column_phase.name}" cannot run on a CUDA device')
        self._bring(call)
        schema = self.work.memory.schema
        parts = [
            (self.columns.of(column, side), schema.dtypes[column]) for column, side in enumerate(call.sides)
        ]
        context = self._context(call, frame, start, stop)
        if isinstance(context.random, RowRandom):
            context = replace(context, random=_DeviceRandom(context.random, self.device))
        with self.device.views(schema, parts, stop - start, call.writable) as columns:
            twin(context, columns, stop - start)
        if frame.want_digest and call.digests and start < stop:
            stage = self._digest_only.setdefault(call.phase, KernelStage((), digests=call.digests))
            digest = Frame(frame.step_index, want_digest=True)
            self._device_stages.get(stage, digest).launch(digest)
        self.device.synchronise()
        self._board.times[self._place, call.phase] += time.perf_counter_ns() - began

    def _bring(self, call: ColumnCall) -> None:
        """See to it that a phase finds on the device what it sees, and note what it writes."""
        held = self.columns
        for column in call.fill:
            held.bring(column, 0)
            self.device.copy(held.of(column, 0), held.of(column, 1))
            held.wrote(column, 1)
        for column, side in enumerate(call.sides):
            if column not in call.fill:
                held.bring(column, side)
            if call.writable[column]:
                held.wrote(column, side)

    # -- failures ------------------------------------------------------------------------------------

    def _failure(self, error: BaseException, kind: str) -> PhaseFailure:
        if isinstance(error, DeviceError | DeviceMemoryError):
            return replace(super()._failure(error, "worker"), message=message_of(error))
        return super()._failure(error, kind)

    def close(self) -> None:
        """Give the device's memory back."""
        self._device_stages.clear()
        self.columns.close()


class _DeviceRandom(RowRandom):
    """Random numbers of rows for a device phase: the same bits, made here and copied there."""

    __slots__ = ("_device",)

    def __init__(self, plain: RowRandom, device: Device) -> None:
        super().__init__(plain.key, plain.ids, plain.rows, plain.step)
        self._device = device

    def _fill(self, kind: str, draw: Any, out: Any, *more: Any) -> Any:
        return self._device.array(super()._fill(kind, draw, out, *more))
