"""Run one partition's share of a segment on a CUDA device: each stage and each device phase in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rustsim_hpc.errors import DeviceError, DeviceMemoryError, message_of
from rustsim_hpc.executors.device_columns import DeviceColumns
from rustsim_hpc.executors.device_kernels import DeviceKernels
from rustsim_hpc.executors.device_partition import Partition
from rustsim_hpc.executors.device_stage import DeviceStage, DeviceStages
from rustsim_hpc.executors.partition_run import PartitionRun, StageCache, status_text
from rustsim_hpc.executors.work import Board, Frame, PhaseFailure, Task, Work
from rustsim_hpc.modeling.device_kernel import DeviceKernel
from rustsim_hpc.modeling.program import ColumnCall, KernelStage, Segment
from rustsim_hpc.random import MAX_STEP, RowRandom
from rustsim_hpc.state.device import Device
from rustsim_hpc.state.schema import DTYPES


@dataclass(frozen=True)
class _Flight:
    """What was queued up to a mark: phases in order, and stages that count something."""

    phases: tuple[int, ...]
    stages: tuple[DeviceStage, ...]
    mark: Any


class DeviceRun(PartitionRun):
    """Runs segments of a program on one partition of a device.

    A segment is queued as a whole (`begin`) and then waited for (`end`), so that devices work at once.

    Args:
        device: the device.
        fma: let kernels fuse products and sums.
        graphs: make launches whose arguments stay the same CUDA graphs.
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
        graphs: bool = True,
    ) -> None:
        super().__init__(work, task, board, place, stages)
        self.device = device
        self.columns = DeviceColumns(device, work, task)
        self._partition = Partition(device, self.columns, work, task, board, place, fma=fma, graphs=graphs)
        self._device_stages = DeviceStages(self._partition)
        self._kernels = DeviceKernels(device, work, fma=fma)
        self._digest_only: dict[int, KernelStage] = {}
        self._flying: list[_Flight] = []
        self._unsettled: list[int] = []
        self._begun: Any = None  # mark behind what has been waited for
        self._refused: PhaseFailure | None = None

    # -- a segment: all of it is queued, and then waited for -----------------------------------------

    def begin(self, segment: Segment, frame: Frame) -> None:
        """Queue a segment's items in order; what fails is told by `end`."""
        self._flying, self._unsettled, self._begun = [], [], None
        self._partition.set_clock(frame)
        self._refused = self.run(segment, frame)

    def end(self, frame: Frame) -> PhaseFailure | None:
        """Wait for what was queued, item by item, and take what it counted; return what failed first."""
        times, status = self._board.times[self._place], self._status
        try:
            while self._flying:
                flight = self._flying[0]
                self._phase = status[1] = flight.phases[0]
                self.device.wait(flight.mark)
                spent = self.device.nanoseconds(self._begun, flight.mark) // len(flight.phases)
                for phase in flight.phases:  # one launch for all of them: nobody can say which took how long
                    times[phase] += spent
                self._begun = flight.mark
                for staged in flight.stages:
                    staged.settle(frame)
                if status[0]:
                    self._phase = status[2]
                    raise ValueError(status_text(self.work, frame.step_index, status))
                del self._unsettled[: len(flight.phases)], self._flying[0]
        except Exception as error:  # noqa: BLE001 (becomes a typed failure, as in `run`)
            return self._failure(error, "phase")
        return self._refused

    def _start(self, phases: Sequence[int]) -> None:
        """Note what is going to be queued; the first time set the mark from which time counts."""
        self._unsettled += phases
        if self._begun is None:
            self._begun = self.device.mark()

    def _queue(self, phases: Sequence[int], staged: DeviceStage | None) -> None:
        """Queue a stage that was prepared, if there is one, and a mark behind it and what came before."""
        if staged is not None:
            staged.queue()
        stages = () if staged is None else (staged,)
        self._flying.append(_Flight(tuple(phases), stages, self.device.mark()))

    def _run_stage(self, stage: KernelStage, frame: Frame, status: Any) -> None:
        staged = self._device_stages.get(stage, frame)
        if staged.made.draws and frame.step_index + frame.repeat - 1 > MAX_STEP:
            raise ValueError(f"step {frame.step_index}: random numbers reach up to step {MAX_STEP}")
        for slot, dtype in staged.made.dtypes.items():
            self._board.codes[self._place, slot] = DTYPES.index(dtype)
        status[1] = stage.ops[0].phase
        if self.task.start < self.task.stop:
            phases = [op.phase for op in stage.ops]
            self._start(phases)
            staged.prepare(frame)
            self._queue(phases, staged)

    # -- device phases -------------------------------------------------------------------------------

    def _run_column_phases(self, calls: list[ColumnCall], frame: Frame, status: Any) -> None:
        for call in calls:  # all rows at once: a launch costs more than the cache gives
            self._phase = status[1] = call.phase
            self._run_column_phase(call, frame, self.task.start, self.task.stop)

    def _run_column_phase(self, call: ColumnCall, frame: Frame, start: int, stop: int) -> None:
        twin = call.column_phase.device
        if twin is None:
            raise DeviceError(f'phase "{call.column_phase.name}" cannot run on a CUDA device')
        self._start([call.phase])
        self._bring(call)
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
        staged = None
        if frame.want_digest and call.digests and start < stop:
            stage = self._digest_only.setdefault(call.phase, KernelStage((), digests=call.digests))
            staged = self._device_stages.get(stage, frame)
            staged.prepare(frame)
        self._queue([call.phase], staged)

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
        if not isinstance(error, DeviceError | DeviceMemoryError):
            return super()._failure(error, kind)
        text, names = message_of(error), self.work.program.phase_names
        # A device tells of a failure when somebody waits or asks for more: it may be of all that is queued.
        suspects = [names[phase] for phase in self._unsettled]
        if isinstance(error, DeviceError) and len(suspects) > 1:
            text += f" (in one of the phases {', '.join(suspects)})"
        return replace(super()._failure(error, "worker"), message=text)

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
