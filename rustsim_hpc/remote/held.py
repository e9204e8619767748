"""Partitions that a worker holds for a client: loaded, stepped, hashed and fetched on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rustsim_hpc.errors import KernelError
from rustsim_hpc.executors.inline import LocalSession
from rustsim_hpc.executors.threads import ThreadedSession
from rustsim_hpc.executors.wire import value_names
from rustsim_hpc.executors.work import Frame as StepFrame
from rustsim_hpc.executors.work import PhaseFailure, Work
from rustsim_hpc.modeling.program import OBSERVE, Segment
from rustsim_hpc.modeling.reductions import reset_states
from rustsim_hpc.proof.fingerprint import digest_column, fnv1a_bytes
from rustsim_hpc.remote.installed import NotHere
from rustsim_hpc.remote.messages import (
    Frame,
    Malformed,
    arrays_of,
    clipped_failure_text,
    clipped_failures,
    clipped_trace,
    packed,
)

Array = np.ndarray[Any, Any]
Reply = tuple[str, dict[str, Any], list[Frame]]
"""Kind of the answer, its fields, its raw frames."""

_IDS = -1


class HeldPartitions:
    """One session's partitions.

    A worker is not told of commits. Each request says which side of the columns that a step writes is the
    current one, and which step's state the client expects there; the worker compares. So a step that was
    undone, wherever, needs no message, and a worker that is out of step is detected.

    Args:
        work: the bound program; its memory is empty.
        threads: how many run it.
    """

    def __init__(self, work: Work, threads: int) -> None:
        self.work = work
        self._session = LocalSession(work) if threads == 1 else ThreadedSession(work, threads)
        self._compile_ns = 0
        self._names = value_names(work.program)
        # Compiled code does not check whether an index is within the arrays that a client has sent.
        self._shapes = {
            reduction.name: [bins] if bins else []
            for reduction, bins in zip(work.program.reductions, work.bins, strict=True)
        }
        self._values: dict[str, Any] = {}
        self._active = [place for place, segment in enumerate(work.program.segments) if segment.items]
        self._side = 0
        # Which step's state is on each side of the written columns; None for no complete state.
        self._steps: list[int | None] = [None, None]
        self._under_way: tuple[int, int, int] | None = None
        for column in work.program.swapped:
            work.memory.other(column)  # so that a lack of memory is detected now

    @property
    def nbytes(self) -> int:
        """Bytes that the session takes."""
        return self.work.memory.allocated_bytes + self._session.board.nbytes

    def close(self) -> None:
        """Release threads and memory."""
        self._session.close()
        self.work.memory.close()

    # -- the state comes -----------------------------------------------------------------------------

    def load(self, fields: Mapping[str, Any], data: Sequence[Frame]) -> Reply:
        """Take a range of rows of a column (or of the ids)."""
        column, rows = fields["column"], self._rows(fields)
        if column == _IDS:
            target = self.work.memory.ids
            if target is None:
                raise NotHere("limits", "the session has no ids of its own")
        else:
            self._require_column(column)
            target = self.work.memory.array(column, 0)
        target = target[rows]
        [target[:]] = arrays_of(data, [(target.dtype, target.shape)])
        self._steps = [None, None]
        return "loaded", {}, []

    def begin(self, fields: Mapping[str, Any], data: Sequence[Frame]) -> Reply:
        """Take what was loaded as the state of a step; answer with its digests, ids first."""
        arrays_of(data, [])
        work = self.work
        self._side = 0
        work.memory.parity[:] = 0
        self._steps, self._under_way, self._values = [fields["step"], None], None, {}
        first = work.first_row
        sums = [0 if work.ids is None else digest_column(work.ids, first, 0)]
        sums += [
            digest_column(work.memory.current(column), first, column + 1)
            for column in range(len(work.memory.schema))
        ]
        return "begun", {}, [packed(np.array(sums, np.uint64))]

    # -- a segment -----------------------------------------------------------------------------------

    def run(self, fields: Mapping[str, Any], data: Sequence[Frame]) -> Reply:
        """Run one segment on all partitions; answer with what they report."""
        number, step = fields["segment"], fields["step"]
        program = self.work.program
        segment = program.segment(number, step) if number < len(program.segments) else None
        if segment is None or not segment.items:
            raise NotHere("state", f"there is no segment {number} to be run")
        self._take_side(fields["side"])
        self._take_values(fields, data)
        if number == OBSERVE:
            self._require_state(1 - self._side if program.swapped else 0, step)
        else:
            self._order(number, step, fields["attempt"])
        reset_states(self.work, self._session.board, segment.reductions)
        if number == self._active[0]:
            self._session.board.clear()
        frame = StepFrame(step, fields["want_digest"], fields["repeat"], self._values)
        compiled = self._session.compile_seconds  # of the whole process, whoever's kernels they were
        failures = self._session.run(number, frame)
        self._compile_ns += int((self._session.compile_seconds - compiled) * 1e9)
        if not failures and number == self._active[-1] and number != OBSERVE:
            self._steps[1 - self._side if program.swapped else 0] = step + fields["repeat"]
        told = clipped_failures(map(self._told, failures))
        return "ran", {"failures": told, "compile_ns": self._compile_ns}, self._reports(segment)

    def _order(self, number: int, step: int, attempt: int) -> None:
        """Check that a segment is the first of a step, or follows the one before it in the same attempt."""
        if number != self._active[0]:
            before = self._active[self._active.index(number) - 1]
            if self._under_way != (step, attempt, before):
                raise NotHere("state", f"segment {number} of step {step} does not follow what was run last")
        else:
            self._require_state(self._side, step)
            self._steps[1 - self._side if self.work.program.swapped else 0] = None
        self._under_way = (step, attempt, number)

    def _take_side(self, side: int) -> None:
        if side != self._side:
            self.work.memory.swap(self.work.program.swapped)
            self._side = side

    def _require_state(self, side: int, step: int) -> None:
        # Where a program writes nothing, what was loaded is the state of every step.
        if self.work.program.written and self._steps[side] != step:
            have = "no whole state" if self._steps[side] is None else f"the state of step {self._steps[side]}"
            raise NotHere("state", f"there is {have} here, not that of step {step}")

    def _take_values(self, fields: Mapping[str, Any], data: Sequence[Frame]) -> None:
        if fields["afresh"]:
            self._values = {}
        for name, _, shape in fields["values"]:
            if name not in self._names:
                raise Malformed(f"{name[:40]!r} is not a value of the model")
            if self._shapes.get(name, shape) != shape:
                raise Malformed(f"the reduction {name[:40]!r} has another shape")
        arrays = arrays_of(data, [(dtype, shape) for _, dtype, shape in fields["values"]])
        for (name, _, shape), raw in zip(fields["values"], arrays, strict=True):
            # A copy: compiled code takes aligned arrays.
            array = np.array(raw, order="C")
            array.flags.writeable = False
            self._values[name] = array if shape else array[()]

    def _reports(self, segment: Segment) -> list[Frame]:
        board = self._session.board
        arrays = [board.times, board.digests, board.codes, *(board.states[s] for s in segment.reductions)]
        return [packed(array) for array in arrays]

    def _told(self, failure: PhaseFailure) -> list[Any]:
        places = [task.assignment.partition_id for task in self.work.tasks]
        error, known = failure.error, None
        if isinstance(error, KernelError):
            known = [error.message, error.kernel, error.argument, error.file, error.line]
        return [
            places.index(failure.partition),
            failure.phase_index,
            failure.kind,
            clipped_failure_text(failure.message),
            clipped_trace(failure.trace),
            failure.host[:255],
            failure.pid,
            known,
        ]

    # -- the state goes ------------------------------------------------------------------------------

    def fetch(self, fields: Mapping[str, Any], data: Sequence[Frame]) -> Reply:
        """Answer with a range of rows of a column's current state."""
        arrays_of(data, [])
        column, rows = fields["column"], self._rows(fields)
        self._require_column(column)
        self._take_side(fields["side"])
        if column in self.work.program.written:
            self._require_state(self._side, fields["step"])
        array = self.work.memory.current(column)[rows]
        digest = digest_column(array, self.work.first_row + rows.start, column + 1)
        return "fetched", {"digest": digest}, [packed(array)]

    def hash(self, fields: Mapping[str, Any], data: Sequence[Frame]) -> Reply:
        """Continue a FNV-1a chain over a column of the current state, or of the one that a step has made."""
        arrays_of(data, [])
        column = fields["column"]
        self._require_column(column)
        self._take_side(fields["side"])
        other = fields["other"] and column in self.work.program.swapped
        if column in self.work.program.written:
            self._require_state(self._side ^ other, fields["step"])
        memory = self.work.memory
        array = memory.other(column) if other else memory.current(column)
        return "hashed", {"state": fnv1a_bytes(fields["state"], array)}, []

    # -- what a request may name ---------------------------------------------------------------------

    def _rows(self, fields: Mapping[str, Any]) -> slice:
        start, stop = fields["start"], fields["stop"]
        if not 0 <= start <= stop <= self.work.memory.rows:
            raise NotHere("limits", f"rows {start}..{stop} are not among {self.work.memory.rows}")
        return slice(start, stop)

    def _require_column(self, column: int) -> None:
        if not 0 <= column < len(self.work.memory.schema):
            raise NotHere("limits", f"there is no column {column}")
