"""Partitions on CUDA devices: columns stay in device memory, a stage of row kernels is one launch.

A partition whose worker is a CUDA device runs only there; partitions of the local CPU in the same plan run in
the calling thread. The rank's host memory is a mirror that is updated on demand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.errors import DeviceError, DeviceMemoryError, ExecutorError, RustsimError, Worker
from rustsim_hpc.executors.base import PartitionTask, PartitionTaskResult, describe
from rustsim_hpc.executors.device_columns import CopyAside, Place, needed_bytes
from rustsim_hpc.executors.partition_run import PartitionRun, StageCache
from rustsim_hpc.executors.work import Frame, PhaseFailure, Task, Work
from rustsim_hpc.modeling.device_kernel import DeviceKernel
from rustsim_hpc.modeling.program import ColumnCall, Segment
from rustsim_hpc.modeling.reductions import new_board
from rustsim_hpc.proof.fingerprint import fnv1a_bytes
from rustsim_hpc.state import cupy_device
from rustsim_hpc.state.device import Device
from rustsim_hpc.state.partition import PartitionExecutionBackend, PartitionId

if TYPE_CHECKING:
    from rustsim_hpc.executors.device_run import DeviceRun

Array = np.ndarray[Any, Any]
CudaDevice = PartitionExecutionBackend.CudaDevice


class CudaSession:
    """A rank's partitions, on devices and on the local CPU.

    While devices hold the state, this session is its :class:`~rustsim_hpc.state.memory.Keeper`.

    Attributes:
        board: what partitions report.
        runs: the partitions' runs, in order.

    Raises:
        ExecutorError: a device has not enough memory; all memory is released.
    """

    def __init__(self, work: Work, devices: dict[int, Device], *, fma: bool, graphs: bool) -> None:
        from rustsim_hpc.executors.device_run import DeviceRun

        self.work = work
        self.board = new_board(work)
        self.runs: list[PartitionRun] = []
        self._on_devices: list[DeviceRun] = []
        self._here: list[PartitionRun] = []
        self._stages = StageCache(work)
        self._lost: RustsimError | None = None
        self._warned = False
        self._require_room(devices)
        for place, task in enumerate(work.tasks):
            if not isinstance(task.backend, CudaDevice):
                self._here.append(PartitionRun(work, task, self.board, place, self._stages))
                self.runs.append(self._here[-1])
                continue
            try:
                device = devices[task.backend.device_ordinal]
                run = DeviceRun(device, work, task, self.board, place, self._stages, fma=fma, graphs=graphs)
            except (DeviceError, DeviceMemoryError) as error:
                self.close()
                raise _of_worker(task, error) from error
            self._on_devices.append(run)
            self.runs.append(run)

    def _require_room(self, devices: dict[int, Device]) -> None:
        """Raise ExecutorError if the partitions of a device together need more memory than it has free."""
        for ordinal, device in devices.items():
            mine = [task for task in self.work.tasks if task.backend == CudaDevice(ordinal)]
            asked, free = sum(needed_bytes(self.work, task) for task in mine), device.free_bytes()
            if asked > free:
                raise _of_worker(mine[0], DeviceMemoryError(ordinal, asked, free))

    @property
    def compile_seconds(self) -> float:
        """Seconds that this process has spent on compiling or loading kernels so far."""
        return CLOCK.seconds

    @property
    def resident_bytes(self) -> int:
        """Bytes of device memory held by columns, ids and stages."""
        return sum(run.columns.held_bytes for run in self._on_devices)

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes of columns uploaded and downloaded so far."""
        moved = [run.columns.moved for run in self._on_devices]
        return sum(up for up, _ in moved), sum(down for _, down in moved)

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on every partition.

        The segment is queued on all devices before the first wait; partitions of the CPU run meanwhile.
        """
        memory = self.work.memory
        items = self.work.program.segment(segment, frame.step_index)
        if items is None:  # nothing is due
            return []
        if memory.keeper is not self:
            for run in self._on_devices:
                run.columns.forget()
        memory.keeper = self
        for run in self._on_devices:
            run.begin(items, frame)
        found = {id(run): self._run_here(run, items, frame) for run in self._here}
        found |= {id(run): run.end(frame) for run in self._on_devices}
        return [failure for run in self.runs if (failure := found[id(run)]) is not None]

    def _run_here(self, run: PartitionRun, items: Segment, frame: Frame) -> PhaseFailure | None:
        memory = self.work.memory
        memory.keeper = None  # a CPU partition works on its rows in host memory, which no device holds
        try:
            return run.run(items, frame)
        finally:
            memory.keeper = self

    # -- who keeps the state -------------------------------------------------------------------------

    def refresh(self) -> None:
        """Download the current columns that are newer on a device than in host memory.

        Raises:
            ExecutorError: a device has failed.
        """
        if self._lost is not None:
            raise self._lost
        columns = range(len(self.work.memory.schema))
        self._fetch([(column, 0) for column in columns])

    def fnv1a(self, state: int, column: int, *, other: bool) -> int:
        """Continue an FNV-1a chain over a column, which is downloaded because the chain is sequential.

        Raises:
            ExecutorError: a device has failed.
        """
        memory = self.work.memory
        self._fetch([(column, int(other))])
        side = int(memory.parity[column]) ^ int(other)
        return fnv1a_bytes(state, memory.array(column, side))

    def copy_aside(self, out: Sequence[Array]) -> Callable[[], None]:
        """Copy the current values within the devices; return a function that downloads them beside the steps.

        If a device has no room for the copies, its values are downloaded at once, with a warning.

        Raises:
            ExecutorError: a device has failed.
        """
        if self._lost is not None:
            raise self._lost
        memory = self.work.memory
        under_way: list[tuple[DeviceRun, CopyAside]] = []
        for run in self._here:
            rows = slice(run.task.start, run.task.stop)
            for values, place in zip(out, memory.places(), strict=True):
                np.copyto(values[rows], place[rows])
        for run in self._on_devices:
            own = [values[run.task.start : run.task.stop] for values in out]
            try:
                under_way.append((run, run.columns.copy_aside(own)))
            except DeviceMemoryError as error:
                self._warn_of_waiting(error)
                self._asked(run, partial(run.columns.copy_now, own))
            except DeviceError as error:
                raise _of_worker(run.task, error) from error

        def finish() -> None:
            for run, copy in under_way:
                self._asked(run, copy.finish)

        return finish

    def _warn_of_waiting(self, error: DeviceMemoryError) -> None:
        if not self._warned:
            self._warned = True
            text = f"{error}; steps wait while checkpoints are brought to the host"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _asked(self, run: DeviceRun, action: Callable[[], None]) -> None:
        try:
            action()
        except DeviceError as error:
            raise _of_worker(run.task, error) from error

    def _fetch(self, sides: Iterable[tuple[int, int]]) -> None:
        memory = self.work.memory
        places: list[Place] = [(column, int(memory.parity[column]) ^ side) for column, side in sides]
        for run in self._on_devices:
            self._asked(run, partial(run.columns.fetch, places))

    def close(self) -> None:
        """Download the state and release the devices' memory; calling it again does nothing.

        A state that cannot be downloaded is lost: later requests for it raise, and a restore replaces it.
        """
        memory = self.work.memory
        try:
            if memory.keeper is self and self._lost is None:
                memory.take_back()
        except ExecutorError as error:
            self._lost = error
        runs, self.runs, self._on_devices = self._on_devices, [], []
        for run in runs:
            run.close()


def _of_worker(task: Task, error: RustsimError) -> ExecutorError:
    partition, hint = task.assignment.partition_id, error.hint
    if isinstance(error, DeviceMemoryError):
        hint = "take fewer agents, more devices, or the torn guard, which needs no second buffers"
    made = ExecutorError(Worker(partition, str(error), hint=hint))
    made.__cause__ = error
    return made


class CudaPartitionExecutor:
    """Runs partitions on CUDA devices, and those of the local CPU in the calling thread.

    Args:
        open_device: returns the device of an ordinal; CuPy's by default.
        fma: let kernels use fused multiply-add: faster, but the bits differ from the CPU's.
        graphs: record what is queued identically in each step as CUDA graphs: fewer driver calls.
    """

    name = "cuda"

    def __init__(
        self, open_device: Callable[[int], Device] | None = None, *, fma: bool = False, graphs: bool = True
    ) -> None:
        self._open_device = open_device or cupy_device.CupyDevice
        self._devices: dict[int, Device] = {}
        self._fma, self._graphs = fma, graphs

    def attach(self, work: Work) -> CudaSession:
        """Bind to a rank's work (see :class:`~rustsim_hpc.executors.base.ResidentExecutor`).

        Raises:
            ExecutorError: a partition is on neither a device nor the local CPU, there is no such device, it
                has not enough memory, or a phase cannot run on a device.
        """
        used: dict[int, Device] = {}
        for task in work.tasks:
            if isinstance(task.backend, PartitionExecutionBackend.External):
                partition = task.assignment.partition_id
                raise ExecutorError(_refusal(partition, describe(task.backend)))
            if isinstance(task.backend, CudaDevice):
                self._require_device_phases(work, task)
                used[task.backend.device_ordinal] = self._device(task, task.backend.device_ordinal)
        return CudaSession(work, used, fma=self._fma, graphs=self._graphs)

    def _device(self, task: Task, ordinal: int) -> Device:
        if ordinal not in self._devices:
            try:
                self._devices[ordinal] = self._open_device(ordinal)
            except DeviceError as error:
                raise _of_worker(task, error) from error
        return self._devices[ordinal]

    def _require_device_phases(self, work: Work, task: Task) -> None:
        for item in (item for segment in work.program.segments for item in segment.items):
            if isinstance(item, ColumnCall) and item.column_phase.device is None:
                partition, name = task.assignment.partition_id, item.column_phase.name
                text = f'phase "{name}" is a column phase for the CPU, and this is {describe(task.backend)}'
                hint = "make it a row kernel, or say device= what does the same over CuPy arrays"
                raise ExecutorError(Worker(partition, text, phase=name, hint=hint))
            if isinstance(item, ColumnCall) and isinstance(item.column_phase.device, DeviceKernel):
                kernel, phase = item.column_phase.device, item.column_phase
                text = kernel.problem(work.memory.schema, phase.writes, work.params, work.tables)
                if text:
                    partition = task.assignment.partition_id
                    raise ExecutorError(Worker(partition, f'phase "{phase.name}": {text}', phase=phase.name))

    def execute(self, tasks: Sequence[PartitionTask]) -> Sequence[PartitionTaskResult]:
        """Refuse self-contained tasks, whose phases are functions for the CPU.

        Raises:
            PartitionExecutorError: if there is a task.
        """
        for task in tasks:
            raise _refusal(task.context().partition_id, "self-contained tasks")
        return []


def _refusal(partition: PartitionId, what: str) -> Worker:
    return Worker(
        partition,
        f"the cuda executor runs on CUDA devices and the local CPU, not on {what}",
        hint="use an executor that serves the partition's backend",
    )
