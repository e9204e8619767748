"""Run a segment on one partition, in the calling thread, a pool thread or a worker process.

The only module that calls the user code of a phase. It raises nothing: a failure is returned as data, so that
every executor reports it in the same way.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.errors import KernelError, message_of, named
from rustsim_hpc.executors.work import PANICKED, Board, Frame, PhaseFailure, Task, Work
from rustsim_hpc.modeling.program import ColumnCall, KernelStage, Segment
from rustsim_hpc.modeling.signatures import raised_at
from rustsim_hpc.proof.fingerprint import BLOCK, digest_column, digest_keys
from rustsim_hpc.random import MAX_STEP, RowRandom
from rustsim_hpc.state.backing import staggered_empty
from rustsim_hpc.state.partition import PartitionExecutionContext
from rustsim_hpc.state.phase_columns import PhaseColumns
from rustsim_hpc.state.schema import DTYPES
from rustsim_hpc.texts import trace_of

if TYPE_CHECKING:
    from rustsim_hpc.kernels.stage import StageFunction
    from rustsim_hpc.kernels.stage_source import Argument, Variant

_NO_IDS = np.zeros(0, np.uint64)
_WHOLE_ROWS = 1 << 20
"""Rows of a tile of a stage that is a single loop, which gains nothing from small tiles."""

_PHASE_ROWS = 131072
"""Rows per call of a row-local column phase: few enough for the cache, enough to amortise a Python call."""


class StageCache:
    """The compiled stages of a program, shared by the partitions of one process."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._stages: dict[tuple[int, Variant], StageFunction] = {}
        self._lock = threading.Lock()

    def get(self, stage: KernelStage, *, proved: bool, several: bool, around: bool) -> StageFunction:
        """Return a stage's function, generated at the first call (see ``Variant`` for the arguments)."""
        with self.loading():
            from rustsim_hpc.kernels.stage_source import Variant

            variant = Variant(proved, several, around)
            if (id(stage), variant) not in self._stages:
                from rustsim_hpc.kernels.stage import build_stage

                schema, default_ids = self._work.memory.schema, self._work.ids is None
                self._stages[id(stage), variant] = build_stage(
                    stage, variant, schema, default_ids=default_ids, checked=self._work.checked
                )
            return self._stages[id(stage), variant]

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Serialise compiling and loading of what partitions share, and count the time on the clock."""
        with self._lock, CLOCK.counting():
            yield


class _Call:
    """A stage's function and its arguments, for one combination of column sides."""

    __slots__ = ("call", "changing", "compiled", "function", "values")

    def __init__(self, function: StageFunction, values: list[Any], changing: list[tuple[int, str]]) -> None:
        self.function = function
        self.call = function.function
        self.values = values
        self.changing = changing
        self.compiled: set[tuple[Any, ...]] = set()


class PartitionRun:
    """Runs segments of a program on one partition.

    Args:
        work: the bound program.
        task: the partition.
        board, place: it reports to row ``place`` of the board.
        stages: compiled stages of this process.
    """

    def __init__(self, work: Work, task: Task, board: Board, place: int, stages: StageCache) -> None:
        self.work = work
        self.task = task
        self._board = board
        self._place = place
        self._stages = stages
        self._calls: dict[tuple[int, bytes, bool, bool], _Call] = {}
        self._groups: dict[int, list[KernelStage | list[ColumnCall]]] = {}
        self._seen: dict[tuple[int, bytes], list[Any]] = {}
        self._phase = 0
        self._reported: Any = None
        self._status = memoryview(b"")
        self._streams = work.streams(task)

    def run(self, segment: Segment, frame: Frame) -> PhaseFailure | None:
        """Run one segment's items in order; return what failed, or None."""
        if self._board.status is not self._reported:  # the board has moved since
            self._reported = self._board.status
            self._status = self._reported[self._place].data  # faster than the array for single items
        status = self._status
        status[0] = 0
        try:
            for item in self._groups.get(id(segment)) or self._grouped(segment):
                if isinstance(item, KernelStage):
                    self._phase = item.ops[0].phase
                    self._run_stage(item, frame, status)
                else:
                    self._run_column_phases(item, frame, status)
        except Exception as error:  # noqa: BLE001 (whatever a phase raises becomes a typed failure)
            return self._failure(error, "phase")
        except BaseException as error:  # noqa: BLE001 (SystemExit: it would have ended a worker)
            return self._failure(error, "worker")
        return None

    # -- column phases -------------------------------------------------------------------------------

    def _grouped(self, segment: Segment) -> list[KernelStage | list[ColumnCall]]:
        """Return a segment's items; consecutive row-local column phases are grouped, to share chunks."""
        if id(segment) not in self._groups:
            groups: list[KernelStage | list[ColumnCall]] = []
            for item in segment.items:
                last = groups[-1] if groups else None
                if isinstance(item, KernelStage):
                    groups.append(item)
                elif isinstance(last, list) and _row_local(last[-1]) and _row_local(item):
                    last.append(item)
                else:
                    groups.append([item])
            self._groups[id(segment)] = groups
        return self._groups[id(segment)]

    def _run_column_phases(self, calls: list[ColumnCall], frame: Frame, status: Any) -> None:
        """Run column phases on all rows of the partition, or row-local ones chunk by chunk."""
        start, stop = self.task.start, self.task.stop
        at_once = (self.work.tile_rows or _PHASE_ROWS) if _row_local(calls[0]) else max(stop - start, 1)
        for first in range(start, max(stop, start + 1), at_once):
            last = min(first + at_once, stop)
            for call in calls:
                self._phase = status[1] = call.phase
                self._run_column_phase(call, frame, first, last)

    def _run_column_phase(self, call: ColumnCall, frame: Frame, start: int, stop: int) -> None:
        began = time.perf_counter_ns()
        memory, rows = self.work.memory, slice(start, stop)
        for column in call.fill:
            np.copyto(memory.other(column)[rows], memory.current(column)[rows])
        arrays = [array[rows] for array in self._columns(call)]
        columns = PhaseColumns(memory.schema, arrays, call.writable)
        try:
            call.column_phase.fn(self._context(call, frame, start, stop), columns, stop - start)
            columns.verify_unchanged_shape(stop - start)
        finally:
            columns.seal()
        times, ended = self._board.times[self._place], time.perf_counter_ns()
        times[call.phase] += ended - began
        if frame.want_digest and call.digests:
            digests = self._board.digests[self._place]
            for column, _ in call.digests:
                value = digest_column(arrays[column], self.work.first_row + start, column + 1)
                digests[column : column + 1] += np.uint64(value)
            times[-1] += time.perf_counter_ns() - ended

    def _columns(self, call: ColumnCall) -> list[Any]:
        """Return the columns that a phase sees, with all rows of the rank."""
        memory = self.work.memory
        key = call.phase, memory.sides()
        if key not in self._seen:
            self._seen[key] = [
                memory.other(column) if side else memory.current(column)
                for column, side in enumerate(call.sides)
            ]
        return self._seen[key]

    def _context(self, call: ColumnCall, frame: Frame, start: int, stop: int) -> PartitionExecutionContext:
        work, assignment = self.work, self.task.assignment
        row_start = work.first_row + start
        ids = row_start if work.ids is None else work.ids[start:stop]
        key = work.stream_key(call.column_phase.stream)
        in_reach = frame.step_index <= MAX_STEP
        return PartitionExecutionContext(
            partition_id=assignment.partition_id,
            row_start=row_start,
            row_end=row_start + stop - start,
            worker=assignment.worker,
            backend=self.task.backend,
            step_index=frame.step_index,
            params=work.params,
            reductions=MappingProxyType(frame.values),
            random=RowRandom(key, ids, stop - start, frame.step_index) if in_reach else None,
        )

    # -- stages --------------------------------------------------------------------------------------

    def _run_stage(self, stage: KernelStage, frame: Frame, status: Any) -> None:
        again = frame.repeat
        key = (id(stage), self.work.memory.sides(), frame.want_digest, again > 1)
        found = self._calls.get(key)
        if found is None:
            function = self._stages.get(
                stage, proved=frame.want_digest, several=again > 1, around=self._streams
            )
            found = self._calls[key] = _Call(function, *self._arguments(function, again > 1))
        values = found.values
        values[7] = frame.step_index
        values[9] = again
        kinds: tuple[Any, ...] = ()
        for position, name in found.changing:
            value = values[position] = frame.values[name]
            kinds = (*kinds, value.dtype, value.ndim)  # a derived value may change its type
        if kinds not in found.compiled:
            self._compile(found, kinds)
        if frame.step_index + again - 1 > MAX_STEP and found.function.draws:
            raise ValueError(f"step {frame.step_index}: random numbers reach up to step {MAX_STEP}")
        status[1] = stage.ops[0].phase
        try:
            found.call(*values)
        finally:
            self._phase = status[1]
        if status[0]:
            self._phase = status[2]
            raise ValueError(status_text(self.work, frame.step_index, status))

    def _compile(self, found: _Call, kinds: tuple[Any, ...]) -> None:
        with self._stages.loading():
            dtypes = found.function.compile_for(found.values)
        for slot, dtype in dtypes.items():
            self._board.codes[self._place, slot] = DTYPES.index(dtype)
        found.compiled.add(kinds)

    def _arguments(self, function: StageFunction, several: bool) -> tuple[list[Any], list[tuple[int, str]]]:
        """Return a stage's arguments, and position and name of those that change from step to step."""
        work, board, place = self.work, self._board, self._place
        status = board.status[place]
        ids = _NO_IDS if work.ids is None else work.ids
        values: list[Any] = [
            self.task.start, self.task.stop, work.first_row, self._tile(function, several), status,
            board.times[place], board.digests[place], 0, ids, 1,
        ]  # fmt: skip
        dynamic = []
        for argument in function.arguments:
            if argument.source == "value":
                dynamic.append((len(values), argument.key))
                values.append(None)
            else:
                values.append(self._fixed_argument(argument))
        return values, dynamic

    def _tile(self, function: StageFunction, several: bool) -> int:
        """Return the number of rows of a tile."""
        if function.by_blocks:
            return BLOCK
        whole = function.one_loop and not several and not self.work.tile_rows
        return _WHOLE_ROWS if whole else self.work.tile

    def _fixed_argument(self, argument: Argument) -> Any:
        work, key = self.work, argument.key
        match argument.source:
            case "column":
                column, side = key
                return work.memory.other(column) if side else work.memory.current(column)
            case "param":
                return work.scalars[key]
            case "table":
                return work.tables[key]
            case "key":
                return np.uint64(work.stream_key(key))
            case "state":
                return self._board.states[key][self._place]
            case "bins":
                return work.bins[key]
            case "bits":
                return np.empty(work.tile, np.uint64)
            case "scratch":
                from rustsim_hpc.kernels.streaming import TOGETHER

                dtype = np.dtype(work.memory.schema.columns[key].dtype)
                return staggered_empty(TOGETHER * dtype.itemsize, key).view(dtype)
            case "fill_bits":
                from rustsim_hpc.kernels.philox_tile import fill_bits_address

                with self._stages.loading():
                    return np.uint64(fill_bits_address(key))
            case "digest":
                from rustsim_hpc.kernels.digest_call import digest_address

                with self._stages.loading():
                    return np.uint64(digest_address(key))
            case "digest_keys":
                return digest_keys(key + 1, np.dtype(work.memory.schema.columns[key].dtype).itemsize)
        raise AssertionError(argument.source)

    # -- failures ------------------------------------------------------------------------------------

    def _failure(self, error: BaseException, kind: str) -> PhaseFailure:
        assignment = self.task.assignment
        message = PANICKED if kind == "worker" else message_of(error)
        return PhaseFailure(
            partition=assignment.partition_id,
            worker=assignment.worker,
            phase_index=self._phase,
            phase=self.work.program.phase_names[self._phase],
            message=message,
            kind=kind,
            trace=trace_of(error),
            host=socket.gethostname(),
            pid=os.getpid(),
            error=error if isinstance(error, KernelError) else None,
            hint=self._hint(error),
        )

    def _hint(self, error: BaseException) -> str | None:
        """Return where a column phase raised an error, and what is known about some mistakes."""
        if not isinstance(error, Exception):
            return f"the phase raised {named(error)}"
        items = (item for segment in self.work.program.segments for item in segment.items)
        calls = [item for item in items if isinstance(item, ColumnCall) and item.phase == self._phase]
        if not calls and isinstance(error, IndexError):
            return "the phase indexes a table or a result outside its bounds, in some row"
        at = raised_at(error, calls[0].column_phase.fn) if calls else None
        if at is None or "read-only" not in message_of(error):
            return at
        return f"name every column that the phase changes in its writes=; {at}"


def _row_local(call: ColumnCall) -> bool:
    return call.column_phase.row_local


def status_text(work: Work, step: int, status: Any) -> str:
    """Return the error message for a stage's status; ``step`` is the frame's step index."""
    from rustsim_hpc.kernels.stage_source import KEY_FROM_2_63, NOT_REPRESENTABLE

    phase, row, value = int(status[2]), int(status[3]), int(status[4])
    name = work.program.phase_names[phase]
    if int(status[0]) != NOT_REPRESENTABLE:
        slot = next(i for i, r in enumerate(work.program.reductions) if r.name == name)
        key = value % 2**64 if status[0] == KEY_FROM_2_63 else value
        # Reductions of checks and outputs read the state after a step, and the message gives its index.
        when = "in step" if phase < work.program.phase_count else "in the state at step"
        return f"key {key} of row {row} is outside [0, {work.bins[slot]}) {when} {step}"
    column = work.program.schema.columns[value]
    return f'the value of row {row} for column "{column.name}" does not fit {column.dtype} in step {step}'
