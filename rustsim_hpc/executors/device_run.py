"""Run a segment on one partition of a CUDA device: each stage and each device phase in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from rustsim_hpc.errors import DeviceError, DeviceMemoryError, message_of
from rustsim_hpc.executors.device_columns import DeviceColumns
from rustsim_hpc.executors.device_kernels import DeviceKernels
from rustsim_hpc.executors.device_partition import Partition
from rustsim_hpc.executors.device_queue import DeviceQueue, Piece
from rustsim_hpc.executors.device_stage import DeviceStages
from rustsim_hpc.executors.partition_run import PartitionRun, StageCache, status_text
from rustsim_hpc.executors.work import Board, Frame, PhaseFailure, Task, Work
from rustsim_hpc.modeling.device_kernel import DeviceKernel
from rustsim_hpc.modeling.program import ColumnCall, KernelStage, Segment
from rustsim_hpc.random import MAX_STEP, RowRandom
from rustsim_hpc.state.device import COMPUTE, Device
from rustsim_hpc.state.schema import DTYPES


class DeviceRun(PartitionRun):
    """Runs segments of a program on one partition of a device.

    A segment is queued as a whole (`begin`) and then waited for (`end`), so that devices work concurrently.

    Args:
        device: the device.
        fma: let kernels use fused multiply-add.
        graphs: record what is queued identically each time as CUDA graphs.
        work, task, board, place, stages: as for :class:`~rustsim_hpc.executors.partition_run.PartitionRun`.

    Raises:
        DeviceMemoryError: the device has not enough memory; all device memory is released.
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
        graphs: bool = True,
    ) -> None:
        super().__init__(work, task, board, place, stages)
        self.device = device
        self.columns = DeviceColumns(device, work, task)
        self._partition = Partition(device, self.columns, work, task, board, place, fma=fma, graphs=graphs)
        self._device_stages = DeviceStages(self._partition)
        self._kernels = DeviceKernels(self._partition)
        self._queue = DeviceQueue(self._partition)
        self._digest_only: dict[int, KernelStage] = {}
        self._refused: PhaseFailure | None = None

    # -- a segment: all of it is queued, and then waited for -----------------------------------------

    def begin(self, segment: Segment, frame: Frame) -> None:
        """Queue a segment's items in order; `end` returns a failure."""
        self._queue.begin()
        self._partition.set_step_values(frame)
        self._refused = self.run(segment, frame)
        try:
            self._queue.flush()  # even if a phase was refused: what precedes it may fail first
        except Exception as error:  # noqa: BLE001 (becomes a typed failure, as in `run`)
            self._refused = self._queueing_failed(error)

    def _queueing_failed(self, error: Exception) -> PhaseFailure:
        if self._queue.at is not None:
            self._phase = self._queue.at
        return self._failure(error, "phase")

    def end(self, frame: Frame) -> PhaseFailure | None:
        """Wait for what was queued, flight by flight, and settle it; return the first failure, or None."""
        try:
            while self._queue.flights:
                self._settle(frame)
        except Exception as error:  # noqa: BLE001 (becomes a typed failure, as in `run`)
            with suppress(DeviceError):  # no work of a failed step may run beside later work
                self.device.synchronise(COMPUTE)
            return self._failure(error, "phase")
        return self._refused

    def _settle(self, frame: Frame) -> None:
        """Wait for the first flight and settle it; raise its first failure."""
        queue, status, times = self._queue, self._status, self._board.times[self._place]
        flight = queue.flights[0]
        self._phase = status[1] = flight.phases[0]
        self.device.wait(flight.mark)
        for phase, spent in flight.share(self.device.nanoseconds(queue.begun, flight.mark)):
            times[phase] += spent
        queue.begun = flight.mark
        for phase, staged in flight.stages:
            self._phase = status[1] = phase
            staged.settle(frame)
            if status[0]:
                self._phase = status[2]
                raise ValueError(status_text(self.work, frame.step_index, status))
        del queue.unsettled[: len(flight.phases)], queue.flights[0]

    def _run_stage(self, stage: KernelStage, frame: Frame, status: Any) -> None:
        staged = self._device_stages.get(stage, frame)
        if staged.made.draws and frame.step_index + frame.repeat - 1 > MAX_STEP:
            raise ValueError(f"step {frame.step_index}: random numbers reach up to step {MAX_STEP}")
        for slot, dtype in staged.made.dtypes.items():
            self._board.codes[self._place, slot] = DTYPES.index(dtype)
        status[1] = stage.ops[0].phase
        if self.task.start < self.task.stop:
            self._queue.start([op.phase for op in stage.ops])
            self._queue.add(staged.prepare(frame))

    # -- device phases -------------------------------------------------------------------------------

    def _run_column_phases(self, calls: list[ColumnCall], frame: Frame, status: Any) -> None:
        for call in calls:  # all rows at once: launches cost more than the cache saves
            self._phase = status[1] = call.phase
            self._run_column_phase(call, frame, self.task.start, self.task.stop)

    def _run_column_phase(self, call: ColumnCall, frame: Frame, start: int, stop: int) -> None:
        twin = call.column_phase.device
        if twin is None:
            raise DeviceError(f'phase "{call.column_phase.name}" cannot run on a CUDA device')
        if isinstance(twin, DeviceKernel) and not twin.elementwise:
            if start < stop:
                self._queue.start([call.phase])
                copies = self._bring(call)
                launch = self._kernels.prepare(twin, call, frame)
                self._queue.add(self._together(launch, copies, self._digest(call, frame)))
            return
        self._flush()  # CuPy may do what a graph cannot record: allocations, waits, host functions
        self._queue.start([call.phase])
        for copy in self._bring(call):
            copy()
        self._call(twin, call, frame, start, stop)
        digest = self._digest(call, frame)
        if digest is None:
            self._queue.called(call.phase)
        else:
            self._queue.add(replace(digest, phases=(call.phase,)))

    def _flush(self) -> None:
        phase = self._phase
        try:
            self._queue.flush()
        except Exception:
            self._phase = phase if self._queue.at is None else self._queue.at
            raise

    def _call(self, twin: Any, call: ColumnCall, frame: Frame, start: int, stop: int) -> None:
        """Let CuPy queue a phase by itself."""
        schema = self.work.memory.schema
        parts = [
            (self.columns.of(column, side), schema.dtypes[column]) for column, side in enumerate(call.sides)
        ]
        context = self._context(call, frame, start, stop)
        if isinstance(context.random, RowRandom):
            context = replace(context, random=_DeviceRandom(context.random, self.device))
        with self.device.views(schema, parts, stop - start, call.writable) as columns:
            if isinstance(twin, DeviceKernel):
                self._kernels.call(twin, context, columns)
            else:
                twin(context, columns, stop - start)

    def _digest(self, call: ColumnCall, frame: Frame) -> Piece | None:
        """Return the digest of what a phase has written, if one is wanted."""
        if not (frame.want_digest and call.digests and self.task.start < self.task.stop):
            return None
        stage = self._digest_only.setdefault(call.phase, KernelStage((), digests=call.digests))
        return self._device_stages.get(stage, frame).prepare(frame)

    def _together(self, launch: Piece, copies: list[Callable[[], None]], digest: Piece | None) -> Piece:
        """Return the piece of a phase: copies, then its launch, then its digest."""
        then = [] if digest is None else [digest.queue]
        key = None if launch.key is None else (launch.key, self.work.memory.sides(), digest and digest.key)
        stages = () if digest is None else digest.stages
        return replace(launch, queue=partial(_each, (*copies, launch.queue, *then)), key=key, stages=stages)

    def _bring(self, call: ColumnCall) -> list[Callable[[], None]]:
        """Upload what a phase sees, and return the copies to the other side that are still to be queued."""
        held = self.columns
        copies: list[Callable[[], None]] = []
        for column in call.fill:
            held.bring(column, 0)
            copies.append(partial(self.device.copy, held.of(column, 0), held.of(column, 1)))
            held.wrote(column, 1)
        for column, side in enumerate(call.sides):
            if column not in call.fill:
                held.bring(column, side)
            if call.writable[column]:
                held.wrote(column, side)
        return copies

    # -- failures ------------------------------------------------------------------------------------

    def _failure(self, error: BaseException, kind: str) -> PhaseFailure:
        if not isinstance(error, DeviceError | DeviceMemoryError):
            return super()._failure(error, kind)
        text, names = message_of(error), self.work.program.phase_names
        # A device reports a failure at a later call or wait: any queued phase may have caused it.
        suspects = [names[phase] for phase in self._queue.unsettled]
        if isinstance(error, DeviceError) and len(suspects) > 1:
            text += f" (in one of the phases {', '.join(suspects)})"
        return replace(super()._failure(error, "worker"), message=text)

    def close(self) -> None:
        """Release the device's memory."""
        self._queue.clear()
        self._device_stages.clear()
        self.columns.close()


def _each(parts: tuple[Callable[[], None], ...]) -> None:
    for part in parts:
        part()


class _DeviceRandom(RowRandom):
    """Random numbers of rows for a device phase: the same bits, made on the host and uploaded."""

    __slots__ = ("_device",)

    def __init__(self, plain: RowRandom, device: Device) -> None:
        super().__init__(plain.key, plain.ids, plain.rows, plain.step)
        self._device = device

    def _fill(self, kind: str, draw: Any, out: Any, *more: Any) -> Any:
        return self._device.array(super()._fill(kind, draw, out, *more))
