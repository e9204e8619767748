"""What the project has set itself, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from rustsim_hpc.bench.measure import Row, Section, figure

_TIMES, _RATE, _SECONDS = attrgetter("times"), attrgetter("rate"), attrgetter("seconds")


def _inverse(row: Row) -> float | None:
    return None if not row.times else 1 / row.times


def _micro(row: Row) -> float | None:
    return None if row.seconds is None else row.seconds * 1e6


@dataclass(frozen=True)
class Goal:
    """One promise: a row's figure (its multiple by default) and a bound; ``least`` where more is better."""

    text: str
    section: str
    row: str
    bound: float
    read: Callable[[Row], float | None] = _TIMES
    unit: str = "x"
    least: bool = False


def _speed(text: str, section: str, row: str, bound: float) -> Goal:
    """Return a goal for how many times as fast as its baseline a row is."""
    return Goal(text, section, row, bound, _inverse, least=True)


GOALS: Final = (
    Goal("integrate, one core, torn: time vs. the loop by hand", "integrate.one", "torn", 1.1),
    Goal("integrate, one core, rollback: time vs. the loop by hand", "integrate.one", "rollback", 1.2),
    Goal("integrate, threads, torn: time vs. the loop by hand", "integrate.all", "threads.torn", 1.1),
    Goal("integrate, threads, rollback: time vs. the loop by hand", "integrate.all", "threads.rollback", 1.2),
    Goal("integrate, processes, torn: time vs. the loop by hand", "integrate.all", "processes.torn", 1.2),
    Goal(
        "integrate, processes, rollback: time vs. the loop by hand",
        "integrate.all",
        "processes.rollback",
        1.2,
    ),
    Goal("integrate, ranks, torn: time vs. mpi4py and Numba", "integrate.ranks", "torn", 1.1),
    Goal("integrate, ranks, rollback: time vs. mpi4py and Numba", "integrate.ranks", "rollback", 1.2),
    _speed("eight kernels, torn: speed vs. separate prange loops", "orbit", "torn", 2.5),
    _speed("eight kernels, rollback: speed vs. separate prange loops", "orbit", "rollback", 2.5),
    _speed("fused steps: speed vs. single steps", "integrate.one", "fused.gain", 1.8),
    Goal(
        "a digest of each step, one core: added, vs. the loop by hand", "integrate.one", "digest.added", 0.35
    ),
    Goal(
        "a digest of each step, threads: added, vs. the loop by hand", "integrate.all", "digest.added", 0.35
    ),
    Goal("fnv1a of each step: added, vs. the hash alone", "integrate.one", "fnv1a.added", 1.05),
    Goal("a digest of each step, us_flights: added, vs. a step without", "flights", "digest.added", 0.05),
    _speed("digest of float64: speed vs. np.sum", "digests", "float64.digest", 0.8),
    _speed("digest of int64: speed vs. np.sum", "digests", "int64.digest", 0.8),
    Goal("us_flights, million agent-steps/s", "flights", "all", 50.0, _RATE, unit="", least=True),
    _speed("us_flights on all cores: speed vs. one core", "flights", "all", 1.8),
    Goal(
        "us_flights, weak scaling efficiency of ranks", "flights", "weak", 0.93, _inverse, unit="", least=True
    ),
    _speed("random numbers: speed vs. splitmix64", "parts", "walk", 0.5),
    _speed("histogram: speed vs. the loop by hand", "parts", "tally", 0.7),
    Goal("an empty step, inline", "empty", "inline", 12.0, _micro, unit="µs"),
    Goal("an empty step, threads", "empty", "threads", 30.0, _micro, unit="µs"),
    Goal("an empty step, processes", "empty", "processes", 40.0, _micro, unit="µs"),
    Goal("an empty step, ranks", "empty", "ranks", 40.0, _micro, unit="µs"),
    Goal("pause for a checkpoint: time vs. np.copyto", "checkpoint", "pause", 1.3),
    _speed("writing a checkpoint: speed vs. one plain file", "checkpoint", "write", 0.85),
    Goal("import rustsim_hpc, beyond numpy", "start", "import.added", 0.2, _SECONDS, unit="s"),
    Goal("rustsim-hpc --help", "start", "help", 0.5, _SECONDS, unit="s"),
    Goal("us_flights with compiled kernels, to its first step", "start", "first", 2.0, _SECONDS, unit="s"),
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
