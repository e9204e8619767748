"""The meeting of the ranks at the end of a segment: agree on success, add up reductions and digests.

One small collective, of integers only, so the order does not matter. A rank without rows takes part with
empty states.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from rustsim_hpc.errors import ColumnarRuntimeError
from rustsim_hpc.executors.work import Board, Frame, PhaseFailure, Work
from rustsim_hpc.modeling.program import Segment
from rustsim_hpc.modeling.reductions import (
    empty_state,
    finish_reduction,
    full_state,
    is_additive,
    merge_states,
)
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.schema import DTYPES

Array = np.ndarray[Any, Any]


class StepFailed(Exception):
    """Phases failed, on this rank or another; ``failures`` in partition order, the same on every rank."""

    def __init__(self, failures: tuple[PhaseFailure, ...]) -> None:
        super().__init__(failures[0].message)
        self.failures = failures


class Meeting:
    """Meets the other ranks for one program.

    Args:
        work: the program and this rank's state.
        board: where this rank's partitions report.
        team: the ranks.

    Attributes:
        vote: called at each meeting for this rank's number; None for 0.
        votes: the sum of these numbers over ranks at the last meeting.
    """

    def __init__(self, work: Work, board: Board, team: Team) -> None:
        self._work = work
        self._board = board
        self._team = team
        self._dtypes: dict[int, str] = {}
        self.vote: Callable[[], int] | None = None
        self.votes = 0
        self._numbers = np.zeros(2, np.int64)
        self._said = self._numbers.data

    def hold(
        self, segment: Segment, failures: list[PhaseFailure], frame: Frame, *, with_digests: bool
    ) -> Array | None:
        """Agree on success and finish the segment's reductions into ``frame.values``.

        Returns:
            The columns' digests over the whole population, uint64 (columns,), or None without
            ``with_digests``.

        Raises:
            StepFailed: a phase failed on some rank; the same on every rank.
            ColumnarRuntimeError: a reduction has no result (an integer sum that overflows).
        """
        if self._team.size == 1:
            return self._alone(segment, failures, frame, with_digests=with_digests)
        slots = segment.reductions
        if not slots and not with_digests:
            self._agree(failures)
            return None
        states = {slot: self._rank_state(slot) for slot in slots}
        additive = [slot for slot in slots if is_additive(self._work.program.reductions[slot])]
        parts = [np.array([len(failures), self._vote()], np.int64), self._codes(slots)]
        parts += [states[slot].reshape(-1) for slot in additive]
        if with_digests:
            parts.append(self._board.digests.sum(axis=0, dtype=np.uint64).view(np.int64))
        total = self._team.sum_int64(np.concatenate(parts))
        if total[0]:
            self._raise(failures)
        self.votes = int(total[1])
        place = 2 + self._learn(slots, total[2:])
        for slot in additive:
            size = states[slot].size
            states[slot] = total[place : place + size].reshape(states[slot].shape)
            place += size
        self._gather(slots, states)
        self._finish(slots, states, frame)
        return total[place:].view(np.uint64) if with_digests else None

    def _agree(self, failures: list[PhaseFailure]) -> None:
        """Exchange only the number of failures and the vote."""
        said = self._said
        said[0], said[1] = len(failures), self._vote()
        self._team.sum_int64(self._numbers)
        if said[0]:
            self._raise(failures)
        self.votes = said[1]

    def _vote(self) -> int:
        return 0 if self.vote is None else self.vote()

    def _alone(
        self, segment: Segment, failures: list[PhaseFailure], frame: Frame, *, with_digests: bool
    ) -> Array | None:
        if failures:
            self._raise(failures)
        self.votes = self._vote()
        if segment.reductions:
            self._learn(segment.reductions, self._codes(segment.reductions))
            states = {slot: self._rank_state(slot) for slot in segment.reductions}
            self._finish(segment.reductions, states, frame)
        return self._board.digests.sum(axis=0, dtype=np.uint64) if with_digests else None

    # -- dtypes of reduced values, known once a stage is compiled somewhere --------------------------

    def _codes(self, slots: tuple[int, ...]) -> Array:
        """Return (code, 1) for each slot whose dtype is not known yet, (0, 0) without partitions."""
        new = [slot for slot in slots if slot not in self._dtypes]
        here = 1 if self._work.tasks else 0
        pairs = [(int(self._board.codes[0, slot]), 1) if here else (0, 0) for slot in new]
        return np.array(pairs, np.int64).reshape(-1)

    def _learn(self, slots: tuple[int, ...], totals: Array) -> int:
        """Set the new slots' dtypes from the summed pairs; return how many numbers were read."""
        new = [slot for slot in slots if slot not in self._dtypes]
        for k, slot in enumerate(new):
            # Every rank that has partitions compiled the same source, so all sent the same code.
            self._dtypes[slot] = DTYPES[int(totals[2 * k]) // int(totals[2 * k + 1])]
        return 2 * len(new)

    # -- states --------------------------------------------------------------------------------------

    def _rank_state(self, slot: int) -> Array:
        """Return the merged state of this rank's partitions, of full width until the dtype is known."""
        reduction, bins = self._work.program.reductions[slot], self._work.bins[slot]
        dtype = self._dtypes.get(slot)
        if not self._work.tasks:
            return empty_state(reduction, bins, dtype)
        code = DTYPES[int(self._board.codes[0, slot])]
        merged = merge_states(reduction, code, self._board.states[slot])
        return merged if dtype is not None else full_state(reduction, merged)

    def _gather(self, slots: tuple[int, ...], states: dict[int, Array]) -> None:
        """Merge the states that do not simply add up (min and max) over the ranks."""
        others = [s for s in slots if not is_additive(self._work.program.reductions[s])]
        if not others:
            return
        gathered = self._team.allgather([states[slot] for slot in others])
        for place, slot in enumerate(others):
            stacked = np.stack([rank_states[place] for rank_states in gathered])
            states[slot] = merge_states(self._work.program.reductions[slot], self._dtypes[slot], stacked)

    def _finish(self, slots: tuple[int, ...], states: dict[int, Array], frame: Frame) -> None:
        for slot in slots:
            reduction = self._work.program.reductions[slot]
            try:
                value = finish_reduction(reduction, self._dtypes[slot], states[slot])
            except ArithmeticError as error:
                index = self._work.program.phase_names.index(reduction.name)
                step = frame.step_index
                raise ColumnarRuntimeError(index, reduction.name, str(error), step=step) from error
            frame.values[reduction.name] = value

    def _raise(self, failures: list[PhaseFailure]) -> None:
        # In the order of the plan, which is also that of the ranks; partition ids may have another order.
        places = {task.assignment.partition_id: place for place, task in enumerate(self._work.tasks)}
        failures = sorted(failures, key=lambda failure: places.get(failure.partition, len(places)))
        mine = [replace(f, rank=self._team.rank, host=f.host or socket.gethostname()) for f in failures]
        raise StepFailed(tuple(failure for rank in self._team.allgather(mine) for failure in rank))
