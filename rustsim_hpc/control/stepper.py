"""One step of a program on one rank, together with the team: run segments, meet, agree; no commit.

The new state is in the columns' other side until the caller commits it, so a failure has nothing to undo.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np

from rustsim_hpc.errors import ColumnarRuntimeError, message_of
from rustsim_hpc.executors.base import ResidentSession
from rustsim_hpc.executors.work import Frame, Work
from rustsim_hpc.modeling.program import OBSERVE, Segment
from rustsim_hpc.modeling.reductions import reset_states
from rustsim_hpc.modeling.signatures import raised_at
from rustsim_hpc.ranks.agreement import agree as agree_on
from rustsim_hpc.ranks.meeting import Meeting
from rustsim_hpc.ranks.team import Team

Array = np.ndarray[Any, Any]


@dataclass
class StepReport:
    """The results of a step, the same on every rank, and this rank's times.

    Attributes:
        values: results of reductions and derived values.
        digests: uint64 (columns,): digests of the written columns over the whole population, or None.
        times: int64 (partitions of this rank, phases + 1): nanoseconds, the last of digests made in stages.
        executor_ns, meeting_ns, checks_ns, proof_ns: nanoseconds spent waiting for the executor, on meetings
            (reductions and derived values included), on checks and on proof.
    """

    values: dict[str, Any] = field(default_factory=dict)
    digests: Array | None = None
    times: Array = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    executor_ns: int = 0
    meeting_ns: int = 0
    checks_ns: int = 0
    proof_ns: int = 0


class Stepper:
    """Steps one bound program.

    Args:
        work: the program and this rank's state.
        session: runs this rank's partitions.
        team: the ranks.

    Attributes:
        meeting: where the ranks meet; its vote travels in the same collective, so that agreeing on stopping,
            for example, takes no additional one.
        apart_every: one in so many proved steps computes its digests in a separate pass; 0: none.
        apart: whether the last step with digests computed them in a separate pass.
    """

    def __init__(self, work: Work, session: ResidentSession, team: Team) -> None:
        self.work = work
        self.session = session
        self.team = team
        self.meeting = Meeting(work, session.board, team)
        self.apart_every = 0
        self.apart = False
        self._proved = 0

    def choose_apart(self, repeat: int) -> bool:
        """Decide whether the next step's digests are computed in a separate pass.

        Never for several steps made as one, whose digests are not computed in a phase's loop.
        """
        self._proved += 1
        self.apart = repeat == 1 and self.apart_every > 0 and self._proved % self.apart_every == 0
        return self.apart

    def advance(self, step_index: int, *, want_digest: bool = False, repeat: int = 1) -> StepReport:
        """Compute the state after step ``step_index`` (or ``repeat`` steps) beside the current one.

        ::

            for each segment:
                the executor runs its stages on each of this rank's partitions   # columns change here
                the team agrees that all went well and adds up the reductions    # one small collective
                derived values are computed, the same on every rank

        Raises:
            StepFailed: a phase failed somewhere; the same on every rank.
            ColumnarRuntimeError: a reduction's result or a derived value could not be computed.
        """
        self.work.memory.take_back(self.session)
        frame = Frame(step_index, want_digest, repeat)
        board = self.session.board
        board.clear()
        last = len(self.work.program.segments) - 1
        digests = None
        executor_ns = meeting_ns = 0
        for index, segment in enumerate(self.work.program.segments):
            reset_states(self.work, board, segment.reductions)
            begun = perf_counter_ns()
            failures = self.session.run(index, frame)
            ran = perf_counter_ns()
            last_one = want_digest and index == last
            digests = self.meeting.hold(segment, failures, frame, with_digests=last_one)
            if segment.derives:
                self._derive(segment, frame, agree=index == last)
            executor_ns += ran - begun
            meeting_ns += perf_counter_ns() - ran
        return StepReport(frame.values, digests, board.times.copy(), executor_ns, meeting_ns)

    def observe(self, step_index: int, values: dict[str, Any], *, committed: bool) -> None:
        """Compute the reductions of checks and outputs due after ``step_index`` steps, into ``values``.

        From the new state, or from the committed one (``committed``: the first observation of a run).
        """
        segment = self.work.program.segment(OBSERVE, step_index)
        if segment is None:
            return
        memory = self.work.memory
        memory.take_back(self.session)
        if committed:  # the observing segment reads the final sides, so swap the current state to them
            memory.swap(self.work.program.swapped)
        try:
            frame = Frame(step_index, values=values)
            reset_states(self.work, self.session.board, segment.reductions)
            self.meeting.hold(segment, self.session.run(OBSERVE, frame), frame, with_digests=False)
        finally:
            if committed:
                memory.swap(self.work.program.swapped)

    def _derive(self, segment: Segment, frame: Frame, *, agree: bool) -> None:
        """Compute a segment's derived values; a failure on one rank is raised on all ranks."""
        failure: Exception | None = None
        try:
            for index, derive in segment.derives:
                self._derive_one(index, derive, frame)
        except ColumnarRuntimeError as error:
            failure = error
        if agree or failure is not None or self.team.size > 1:
            agree_on(self.team, failure)

    def _derive_one(self, index: int, derive: Any, frame: Frame) -> None:
        work = self.work
        known = {**work.scalars, **work.tables, **frame.values, "step": frame.step_index}
        try:
            made = derive.fn(*(known[name] for name in derive.arguments))
            results = made if derive.is_mapping else {derive.name: made}
            if set(results) != set(derive.names):
                raise ValueError(f"returned {sorted(results)}, declared {sorted(derive.names)}")
            frame.values.update({name: _as_value(name, results[name]) for name in derive.names})
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            message = message_of(error)
            at = raised_at(error, derive.fn)
            raise ColumnarRuntimeError(index, derive.name, message, step=frame.step_index, hint=at) from error


def _as_value(name: str, value: Any) -> Any:
    """Return a derived value as a read-only array or a NumPy scalar, so that kernels see one type."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f'derived value "{name}" is {array.dtype}, not numbers')
    if array.ndim == 0:
        return array[()]
    array = np.array(array, order="C")
    array.flags.writeable = False
    return array
