"""Recompute a lost worker's rows, from the state that it started from and the values of the steps since.

A worker's share of a step depends on its own rows and on results of reductions and derived values, which the
client knows: it can repeat the steps by itself, with the same bits, when the worker that made them is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rustsim_hpc.errors import ExecutorError, Worker
from rustsim_hpc.executors.inline import LocalSession
from rustsim_hpc.executors.work import Frame, Work
from rustsim_hpc.modeling.reductions import reset_states
from rustsim_hpc.remote.requests import values_of


@dataclass(frozen=True)
class StepMade:
    """A step (or several at once) that workers have made.

    Attributes:
        step: index before it.
        repeat: steps made at once.
        side: parity of the written columns before it.
        values: all results of reductions and derived values of the step.
    """

    step: int
    repeat: int
    side: int
    values: dict[str, Any]

    @property
    def after(self) -> int:
        """Step index after it."""
        return self.step + self.repeat

    @property
    def nbytes(self) -> int:
        """Bytes of the values, about."""
        return 64 + sum(getattr(value, "nbytes", 8) for value in self.values.values())


class Journal:
    """The committed steps since the state was last here."""

    def __init__(self) -> None:
        self._steps: list[StepMade] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, made: StepMade) -> None:
        """Add a step, which follows those before."""
        self._steps.append(made)
        self.nbytes += made.nbytes

    def clear(self) -> None:
        """Forget all steps: the current state is here."""
        self._steps, self.nbytes = [], 0

    def since(self, step: int) -> list[StepMade]:
        """Return the steps from step ``step`` on."""
        return [made for made in self._steps if made.step >= step]


def make_again(work: Work, places: range, steps: Sequence[StepMade]) -> None:
    """Repeat steps of some partitions here; their rows of the state before must be on the current sides.

    Afterwards their rows of the state after the steps are on the sides that are current then.

    Raises:
        ExecutorError: a phase fails that did not fail before.
    """
    session = LocalSession(work)
    try:
        for made in steps:
            _make_one(session, places, made)
            work.memory.swap(work.program.swapped)
    finally:
        session.close()


def _make_one(session: LocalSession, places: range, made: StepMade) -> None:
    work, known = session.work, dict[str, Any]()
    for number, segment in enumerate(work.program.segments):
        reset_states(work, session.board, segment.reductions)
        frame = Frame(made.step, repeat=made.repeat, values=dict(known))
        failures = session.run_places(number, frame, places)
        if failures:
            first = failures[0]
            message = f"its rows are lost: step {made.step} cannot be made again: {first.message}"
            error = Worker(first.partition, message, phase=first.phase or None, hint="restore a checkpoint")
            raise ExecutorError(error)
        known |= {name: made.values[name] for name in values_of(work.program, segment)}
