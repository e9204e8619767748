"""Launch a stage for one partition on a device: its kernel, grid, accumulators and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.executors.device_partition import Partition
from rustsim_hpc.executors.device_queue import Piece
from rustsim_hpc.executors.work import Frame, Work
from rustsim_hpc.kernels.cuda_stage import (
    BLOCK,
    FIXED,
    NEVER,
    Argument,
    CudaStage,
    DeviceArray,
    flat_arguments,
    kind_of,
)
from rustsim_hpc.kernels.stage_source import KEY_FROM_2_63, KEY_OUT_OF_RANGE, NOT_REPRESENTABLE
from rustsim_hpc.modeling.program import KernelOp, KernelStage, ReduceOp
from rustsim_hpc.modeling.reductions import state_shapes
from rustsim_hpc.proof.fingerprint import digest_keys
from rustsim_hpc.state.device import COMPUTE, TRANSFER

Array = np.ndarray[Any, Any]

_MOST_REPLICAS = 32
_ACCUMULATOR_WORDS = 2**17


class _Launch:
    """The arguments of a launch for one combination of column sides; compared by identity."""

    def __init__(self, arguments: list[Any]) -> None:
        self.arguments = arguments


class DeviceStage:
    """A stage of a program for one partition and given argument types.

    Its accumulators are one int64 array: the first failure, then digests and reductions, each repeated for
    every replica. Blocks of threads are spread over the replicas, to reduce contention of atomic operations.

    Args:
        partition: the partition.
        stage: the stage.
        frame: a step whose values give the argument types.

    Attributes:
        made: the kernel's source and arguments.

    Raises:
        KernelError: it does not compile.
        DeviceMemoryError: the device has no room for the accumulators.
    """

    def __init__(self, partition: Partition, stage: KernelStage, frame: Frame) -> None:
        self._own = partition
        self.stage = stage
        work = partition.work

        def kind(argument: Argument) -> Any:
            return kind_of(self._value(argument, frame, typing=True))

        self.made = CudaStage(
            stage, work.memory.schema, kind, default_ids=work.ids is None, checked=work.checked
        )
        self._arrange(work)
        self._accumulators = partition.columns.hold(8 * self._words)
        self._at_first = partition.columns.hold(8 * self._words)
        partition.device.upload(self._at_first, self._empty)
        self._found = partition.device.pinned(self._words)
        self._values = partition.columns.hold(8 * self._threads if self.made.can_fail else 0)
        capability = partition.device.compute_capability
        image = self.made.image(self._arguments(frame), capability, fma=partition.fma)
        self._kernel = partition.device.load(image.ptx, image.entry)
        self._reads, self._writes = reads_and_writes(stage)
        self._launches: dict[bytes, _Launch] = {}
        self._arrays = [
            a for a in self.made.arguments if a.source == "value" and a.name not in self.made.numbers
        ]
        self._moved = 0

    def _arrange(self, work: Work) -> None:
        """Choose the grid and the layout of the accumulators."""
        resident = self._own.device.resident_threads
        blocks = max(1, min(-(-self._own.rows // BLOCK), resident // BLOCK))
        self._threads = blocks * BLOCK
        shapes = state_shapes(work.program, work.bins)
        slots = [argument.key for argument in self.made.arguments if argument.source == "state"]
        columns = len(work.memory.schema) if self.stage.digests else 0
        each = sum(int(np.prod(shapes[slot])) for slot in slots) + columns
        self._replicas = max(1, min(_MOST_REPLICAS, blocks, _ACCUMULATOR_WORDS // max(each, 1)))
        at = int(self.made.can_fail)
        self._digests = slice(at, at + self._replicas * columns)
        at = self._digests.stop
        self._states: dict[int, slice] = {}
        for slot in slots:
            self._states[slot] = slice(at, at + self._replicas * int(np.prod(shapes[slot])))
            at = self._states[slot].stop
        self._words = at
        self._empty = np.zeros(at, np.int64)
        self._empty[: int(self.made.can_fail)] = NEVER
        for slot, part in self._states.items():
            kind = work.program.reductions[slot].kind
            if kind in ("min", "max"):
                self._empty[part].reshape(-1, 2)[:, 0] = NEVER if kind == "min" else np.iinfo(np.int64).min

    # -- one launch ----------------------------------------------------------------------------------

    def prepare(self, frame: Frame) -> Piece:
        """Upload what a launch reads, record what it writes, and return its piece.

        The piece queues the launch and the download of its accumulators.

        Raises:
            DeviceError: the device has failed.
            DeviceMemoryError: the device has no room for a value.
        """
        own = self._own
        for column, side in self._reads:
            own.columns.bring(column, side)
        launch = self._launch(frame)
        for column, side in self._writes:
            own.columns.wrote(column, side)
        phases = tuple(op.phase for op in self.stage.ops)
        return Piece(phases, partial(self._queue, launch), launch, (self,), bool(self._arrays))

    def _queue(self, launch: _Launch) -> None:
        device = self._own.device
        if self._words:
            device.copy(self._at_first, self._accumulators)
        device.launch(self._kernel, self._threads // BLOCK, BLOCK, launch.arguments)
        if self._words:
            device.take(self._accumulators, self._found)

    def settle(self, frame: Frame) -> None:
        """Write the stage's results to the board, after its flight has been waited for.

        A failure is written to the board's status, as stages on the CPU do.

        Raises:
            DeviceError: the device has failed.
        """
        if self.made.can_fail and self._found[0] != NEVER:
            self._tell(int(self._found[0]), frame)
        else:
            self._take(self._found, frame)

    def _take(self, found: Array, frame: Frame) -> None:
        """Merge the replicas of the accumulators into the board."""
        own = self._own
        if frame.want_digest and self.stage.digests:
            sums = found[self._digests].view(np.uint64).reshape(self._replicas, -1).sum(axis=0)
            for column, _ in self.stage.digests:
                own.board.digests[own.place, column] = sums[column]
        for slot, part in self._states.items():
            state = own.board.states[slot][own.place]
            parts = found[part].reshape(self._replicas, *state.shape)
            kind = own.work.program.reductions[slot].kind
            state[...] = {"min": np.min, "max": np.max}.get(kind, np.sum)(parts, axis=0)

    def _tell(self, failed: int, frame: Frame) -> None:
        own = self._own
        trouble = self.made.trouble(failed, own.work.tile, frame.repeat)
        values = np.empty(self._threads, np.int64)
        own.device.order(COMPUTE, TRANSFER)
        own.device.download(self._values, values)
        own.device.synchronise()
        value = int(values[(trouble.row - own.work.first_row - own.task.start) % self._threads])
        op = self.stage.ops[trouble.place]
        code = KEY_OUT_OF_RANGE if isinstance(op, ReduceOp) else NOT_REPRESENTABLE
        if isinstance(op, ReduceOp) and op.reduction.kind == "histogram" and value < 0:
            # What a histogram reduces is the key.
            code = KEY_FROM_2_63 if self.made.dtypes[op.slot] == "uint64" else code
        own.board.status[own.place] = (code, op.phase, op.phase, trouble.row, value)

    # -- arguments -----------------------------------------------------------------------------------

    def _launch(self, frame: Frame) -> _Launch:
        """Return the arguments of a launch, cached for each combination of column sides.

        Arrays made by the step are uploaded first; its numbers are among the partition's step values.
        """
        own = self._own
        for argument in self._arrays:
            own.kept(("value", argument.key), frame.values[argument.key], frame)
        if self._arrays and self._moved != own.moved:
            self._launches.clear()
            self._moved = own.moved
        key = own.work.memory.sides()
        if key not in self._launches:
            self._launches[key] = _Launch(flat_arguments(self._arguments(frame)))
        return self._launches[key]

    def _arguments(self, frame: Frame) -> list[Any]:
        own, work = self._own, self._own.work
        ids = 0 if work.ids is None else own.rows
        fixed = {
            "rows": np.int64(own.rows),
            "first_row": np.int64(work.first_row + own.task.start),
            "clock": own.clock,
            "replicas": np.int64(self._replicas),
            "tile": np.int64(work.tile),
            "failed": self._part(slice(0, 1), np.int64),
            "values": DeviceArray(self._values.address, (self._threads,), np.dtype(np.int64)),
            "digests": self._part(self._digests, np.uint64),
            "ids": DeviceArray(own.columns.ids.address, (ids,), np.dtype(np.uint64), writable=False),
        }
        values = [self._value(argument, frame) for argument in self.made.arguments]
        return [fixed[name] for name in FIXED] + values

    def _part(self, part: slice, dtype: Any) -> DeviceArray:
        address = self._accumulators.address + 8 * part.start
        return DeviceArray(address, (part.stop - part.start,), np.dtype(dtype))

    def _value(self, argument: Argument, frame: Frame, *, typing: bool = False) -> Any:
        """Return the value of an argument; ``typing``: of its type only, before accumulators exist."""
        own, work, key = self._own, self._own.work, argument.key
        match argument.source:
            case "column":
                dtype = work.memory.schema.dtypes[key[0]]
                return DeviceArray(own.columns.of(*key).address, (own.rows,), dtype)
            case "param":
                return work.scalars[key]
            case "table":
                table = np.asarray(work.tables[key])
                return own.kept(("table", key), table) if table.ndim else table[()]
            case "value":
                value = np.asarray(frame.values[key])
                if value.ndim:
                    return own.kept(("value", key), value, frame)
                return value[()] if typing else own.number(key, value.dtype)
            case "key":
                return np.uint64(work.stream_key(key))
            case "state":
                none = DeviceArray(0, (1,), np.dtype(np.int64))
                return none if typing else self._part(self._states[key], np.int64)
            case "room":
                return np.int64(own.board.states[key][own.place].size)
            case "bins":
                return np.int64(work.bins[key])
            case "digest_keys":
                keys = digest_keys(key + 1, work.memory.schema.dtypes[key].itemsize)
                return own.kept(("digest", key), keys.reshape(-1))
        raise AssertionError(argument.source)


class DeviceStages:
    """The stages of one partition, each created at its first launch."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._made: dict[tuple[Any, ...], DeviceStage] = {}

    def get(self, stage: KernelStage, frame: Frame) -> DeviceStage:
        """Return a stage for the types of a step's values (a derived value may change its type).

        Raises:
            KernelError: it does not compile.
            DeviceMemoryError: the device has no room for its accumulators.
        """
        taken = {
            (read.argument, frame.values[read.argument].dtype, np.ndim(frame.values[read.argument]))
            for op in stage.ops
            for read in (*op.reads, *getattr(op, "key_reads", ()))
            if read.source == "value"
        }
        key = id(stage), frozenset(taken)
        if key not in self._made:
            with CLOCK.counting():
                self._made[key] = DeviceStage(self._partition, stage, frame)
        return self._made[key]

    def clear(self) -> None:
        """Discard all stages."""
        self._made.clear()


def reads_and_writes(stage: KernelStage) -> tuple[list[tuple[int, int]], Sequence[tuple[int, int]]]:
    """Return the (column, side) pairs that a stage reads before writing them, and those that it writes."""
    reads: list[tuple[int, int]] = []
    writes: list[tuple[int, int]] = []
    for op in stage.ops:
        for read in (*op.reads, *getattr(op, "key_reads", ())):
            place = read.index, read.side
            if read.source == "column" and place not in reads and place not in writes:
                reads.append(place)
        if isinstance(op, KernelOp):
            writes += [place for place in op.writes if place not in writes]
    reads += [place for place in stage.digests if place not in reads and place not in writes]
    return reads, writes
