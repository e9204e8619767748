"""One step of a model phase by phase: the results of each phase, and the columns after any of them.

The step is computed beside the current state and never committed, so it can be repeated from the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.control.failures import StepKind, plane_error
from rustsim_hpc.control.stepper import Stepper
from rustsim_hpc.divergence.row_search import Rows, codes_of, column_sums
from rustsim_hpc.executors.base import ResidentExecutor, ResidentSession
from rustsim_hpc.executors.work import Board, Frame, PhaseFailure, Task, Work
from rustsim_hpc.modeling.model import Derive, Phase, Reduction
from rustsim_hpc.modeling.program import ColumnCall, Item, KernelStage, Program, ReduceOp, Segment
from rustsim_hpc.ranks.agreement import on_all
from rustsim_hpc.ranks.meeting import StepFailed
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.partition import PartitionAssignment, PartitionExecutionBackend, PartitionId

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PhaseResult:
    """The state after a phase: each column's digest sum, and the phase's reduction or derived values."""

    name: str
    columns: Mapping[str, int]
    values: Mapping[str, Any]

    def differing_columns(self, other: PhaseResult) -> tuple[str, ...]:
        """Return the columns whose sums differ, of those that both have."""
        return tuple(name for name, value in self.columns.items() if other.columns.get(name, value) != value)

    def differing_values(self, other: PhaseResult) -> tuple[str, ...]:
        """Return the names of results that are not the same, bit by bit."""
        names = dict.fromkeys((*self.values, *other.values))
        return tuple(name for name in names if not same_value(self.values.get(name), other.values.get(name)))

    def same(self, other: PhaseResult) -> bool:
        """Return whether nothing differs."""
        return not self.differing_columns(other) and not self.differing_values(other)


class PhaseTrace:
    """Computes the next step of a plane's state, one phase after the other.

    Args:
        plane: the state, and the model's phases.
        executor: runs this rank's partitions; works in place.
        phases: the model's phases.
        team: the ranks.
    """

    def __init__(
        self, plane: EngineControlPlane, executor: ResidentExecutor, phases: Sequence[Phase], team: Team
    ) -> None:
        self._plane = plane
        self._executor = executor
        self._phases = phases
        self._team = team
        self._held: tuple[int, int, Rows] | None = None

    def run(self, keys: Mapping[str, int], cut: int | None = None) -> list[PhaseResult]:
        """Return the result of each phase, in order. Collective.

        keys: key index of each column to compare. cut: the number of partitions that each rank's rows are
        cut into for this call; None for the plan's.

        Raises:
            RustsimError: a phase failed; the same on every rank.
        """
        self._held = None
        work = self._work(len(self._phases), cut)
        sums = dict(column_sums(self._rows(work, ()), keys, self._team))
        results: list[PhaseResult] = []

        def after(index: int, frame: Frame) -> None:
            phase = self._phases[index]
            wrote = written_by(phase, work.program)
            rows = self._rows(work, self._phases[: index + 1])
            wanted = {name: key for name, key in keys.items() if name in wrote}
            sums.update(column_sums(rows, wanted, self._team) if wanted else {})
            names = _made_by(phase)
            results.append(PhaseResult(phase.name, dict(sums), {name: frame.values[name] for name in names}))

        self._advance(work, after)
        return results

    def hold(self, count: int) -> Rows:
        """Run the first ``count`` phases and return the columns after them. Collective.

        They are views, valid until the next call or step.

        Raises:
            RustsimError: a phase failed; the same on every rank.
        """
        step = self._plane.runtime.step_index
        if self._held is None or self._held[:2] != (step, count):
            work = self._work(count, None)
            if count:
                self._advance(work, lambda _index, _frame: None)
            self._held = step, count, self._rows(work, self._phases[:count])
        return self._held[2]

    # -- inside --------------------------------------------------------------------------------------

    def _work(self, count: int, cut: int | None) -> Work:
        bound = self._plane.stepper(self._executor).work
        program = one_by_one(bound.program)
        program = replace(program, segments=program.segments[:count])
        tasks = bound.tasks if cut is None else _cut(bound, cut)
        return replace(bound, program=program, tasks=tasks)

    def _advance(self, work: Work, after: Callable[[int, Frame], None]) -> None:
        session = on_all(self._team, lambda: self._executor.attach(work))
        watched = _Watched(session, after)
        step = self._plane.runtime.step_index
        try:
            Stepper(work, watched, self._team).advance(step)
            watched.finish()
        except StepFailed as failed:
            raise plane_error(StepKind.EXECUTOR, failed, step, 0) from failed
        finally:
            session.close()

    def _rows(self, work: Work, made: Sequence[Phase]) -> Rows:
        written = {name for phase in made for name in written_by(phase, work.program)}
        memory = work.memory
        columns = {
            name: memory.other(index) if name in written else memory.current(index)
            for index, name in enumerate(memory.schema.names)
        }
        return Rows(columns, work.first_row, work.ids, codes_of(memory.schema))


def one_by_one(program: Program) -> Program:
    """Return a program that computes the same, with a separate segment for each phase.

    A row kernel depends on its row alone, so each kernel of a stage may make its own pass over the tiles.
    """
    segments: list[Segment] = []
    for segment in program.segments:
        for item in segment.items:
            segments += [_alone(one) for one in _single(item)]
        segments += [Segment((), (), (derive,)) for derive in segment.derives]
    return replace(program, segments=tuple(segments), observations=())


def _single(item: Item) -> list[Item]:
    if isinstance(item, ColumnCall):
        return [replace(item, digests=())]
    return [KernelStage((op,)) for op in item.ops]


def _alone(item: Item) -> Segment:
    slots = [op.slot for op in item.ops if isinstance(op, ReduceOp)] if isinstance(item, KernelStage) else []
    return Segment((item,), tuple(slots))


def written_by(phase: Phase, program: Program) -> tuple[str, ...]:
    """Return the columns that a phase of a program may change."""
    if isinstance(phase, Reduction | Derive):
        return ()
    return program.schema.names if phase.writes is None else phase.writes


def _made_by(phase: Phase) -> tuple[str, ...]:
    if isinstance(phase, Derive):
        return phase.names
    return (phase.name,) if isinstance(phase, Reduction) else ()


def same_value(one: Any, other: Any) -> bool:
    """Return whether two results are the same, bit by bit."""
    left, right = np.asarray(one), np.asarray(other)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _cut(work: Work, pieces: int) -> tuple[Task, ...]:
    """Return this rank's rows cut into another number of partitions."""
    rows = work.memory.rows
    pieces = max(1, min(pieces, rows))
    tasks = []
    for piece in range(pieces):
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        assignment = PartitionAssignment(PartitionId(piece), work.first_row + start, work.first_row + stop)
        tasks.append(Task(assignment, PartitionExecutionBackend.local_cpu(), start, stop))
    return tuple(tasks)


class _Watched:
    """A session that reports when a segment is complete: rows written, reductions combined and finished."""

    def __init__(self, session: ResidentSession, after: Callable[[int, Frame], None]) -> None:
        self._session = session
        self._after = after
        self._last: tuple[int, Frame] | None = None

    @property
    def board(self) -> Board:
        """The session's board."""
        return self._session.board

    @board.setter
    def board(self, board: Board) -> None:
        self._session.board = board

    @property
    def compile_seconds(self) -> float:
        """Seconds of the session."""
        return self._session.compile_seconds

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Report the previous segment, then run one."""
        self.finish()
        self._last = segment, frame
        return self._session.run(segment, frame)

    def finish(self) -> None:
        """Report the last segment that was run."""
        if self._last is not None:
            last, self._last = self._last, None
            self._after(*last)

    def close(self) -> None:
        """Close the session."""
        self._session.close()
