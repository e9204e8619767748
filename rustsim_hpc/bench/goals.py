"""What the project has set itself, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rustsim_hpc.bench.measure import Row, Section, figure


@dataclass(frozen=True)
class Goal:
    """One promise: the figure of a row, and its bound; ``least`` where more is better."""

    text: str
    section: str
    row: str
    bound: float
    read: Callable[[Row], float | None]
    unit: str = "x"
    least: bool = False


def _times(row: Row) -> float | None:
    return row.times


def _rate(row: Row) -> float | None:
    return row.rate


def _inverse(row: Row) -> float | None:
    return None if not row.times else 1 / row.times


def _micro(row: Row) -> float | None:
    return None if row.seconds is None else row.seconds * 1e6


def _seconds(row: Row) -> float | None:
    return row.seconds


GOALS: Final = (
    Goal("integrate, one core, torn, of the hand-written loop", "integrate.one", "torn", 1.1, _times),
    Goal("the same, rollback", "integrate.one", "rollback", 1.2, _times),
    Goal("integrate, threads, torn, of the hand-written loop", "integrate.all", "threads.torn", 1.1, _times),
    Goal("the same, rollback", "integrate.all", "threads.rollback", 1.2, _times),
    Goal("integrate, processes, torn", "integrate.all", "processes.torn", 1.2, _times),
    Goal("the same, rollback", "integrate.all", "processes.rollback", 1.2, _times),
    Goal("integrate, ranks, torn, of mpi4py and Numba", "integrate.ranks", "torn", 1.1, _times),
    Goal("the same, rollback", "integrate.ranks", "rollback", 1.2, _times),
    Goal(
        "eight kernels, faster than separate prange loops, torn", "orbit", "torn", 2.5, _inverse, least=True
    ),
    Goal("the same, rollback", "orbit", "rollback", 2.5, _inverse, least=True),
    Goal("steps fused, faster than one by one", "integrate.one", "fused.gain", 1.8, _inverse, least=True),
    Goal(
        "a digest of each step adds, of the hand-written loop", "integrate.one", "digest.added", 0.35, _times
    ),
    Goal("the same, threads", "integrate.all", "digest.added", 0.35, _times),
    Goal("fnv1a of each step adds, of the bare hash", "integrate.one", "fnv1a.added", 1.05, _times),
    Goal("a digest of each step adds, of a step of us_flights", "flights", "digest.added", 0.05, _times),
    Goal("digest of float64, of np.sum's rate", "digests", "float64.digest", 0.8, _inverse, least=True),
    Goal("the same, int64", "digests", "int64.digest", 0.8, _inverse, least=True),
    Goal("us_flights, million agent-steps/s", "flights", "all", 50.0, _rate, unit="", least=True),
    Goal("us_flights, faster than on one core", "flights", "all", 1.8, _inverse, least=True),
    Goal("us_flights, weak efficiency of ranks", "flights", "weak", 0.93, _inverse, unit="", least=True),
    Goal("random numbers, of splitmix64's rate", "parts", "walk", 0.5, _inverse, least=True),
    Goal("histogram, of the hand-written rate", "parts", "tally", 0.7, _inverse, least=True),
    Goal("an empty step, inline", "empty", "inline", 12.0, _micro, unit="µs"),
    Goal("an empty step, threads", "empty", "threads", 30.0, _micro, unit="µs"),
    Goal("an empty step, processes", "empty", "processes", 40.0, _micro, unit="µs"),
    Goal("an empty step, ranks", "empty", "ranks", 40.0, _micro, unit="µs"),
    Goal("a checkpoint's pause, of np.copyto", "checkpoint", "pause", 1.3, _times),
    Goal("bytes behind it, of one plain file's rate", "checkpoint", "write", 0.85, _inverse, least=True),
    Goal("import rustsim_hpc, over numpy", "start", "import.added", 0.2, _seconds, unit="s"),
    Goal("rustsim-hpc --help", "start", "help", 0.5, _seconds, unit="s"),
    Goal("us_flights, warm, to its first step", "start", "first", 2.0, _seconds, unit="s"),
)


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured; ``found`` None where it was not."""

    goal: Goal
    found: float | None

    @property
    def met(self) -> bool:
        """Whether the figure is within its bound."""
        if self.found is None:
            return False
        return self.found >= self.goal.bound if self.goal.least else self.found <= self.goal.bound

    def cells(self) -> tuple[str, str, str, str]:
        """Return the verdict as text: what, bound, found, whether it is met."""
        goal = self.goal
        bound = f"{'≥' if goal.least else '≤'} {goal.bound:g} {goal.unit}".rstrip()
        if self.found is None:
            return goal.text, bound, "", "not measured"
        return goal.text, bound, f"{self.found:.3g} {goal.unit}".rstrip(), "met" if self.met else "missed"


def verdicts(sections: Sequence[Section]) -> list[Verdict]:
    """Hold every goal whose section was measured against it."""
    measured = {section.key for section in sections}
    made = []
    for goal in GOALS:
        if goal.section in measured:
            row = figure(sections, goal.section, goal.row)
            made.append(Verdict(goal, None if row is None else goal.read(row)))
    return made
