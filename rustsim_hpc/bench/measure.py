"""Timing: cases side by side, round after round, so that what slows the machine down slows them all down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """Something to time: ``call`` does ``units`` units of work (steps, copies).

    ``settle`` is called before each call, outside the clock.
    """

    call: Callable[[], object]
    units: int = 1
    settle: Callable[[], object] | None = None

    @classmethod
    def steady(cls, call: Callable[[], object], units: int = 1) -> Case:
        """Return a case that is called once before each timed call: as a step in the middle of a long run.

        It then finds in the caches what its own last call has left there, not what the case before it has.
        """
        return cls(call, units, settle=call)


@dataclass(frozen=True)
class Timing:
    """Seconds a unit, one for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile; of a single round, that round."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def times(self, other: Timing) -> float:
        """Return how many times as long as another case's a unit took: the median of each round's ratio."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    cases: Mapping[str, Case], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Run every case once without a clock, then all of them ``rounds`` times, one after the other.

    clock: returns seconds; under ranks, one that first waits for all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case.call()
    for _ in range(rounds):
        for name, case in cases.items():
            if case.settle is not None:
                case.settle()
            start = clock()
            case.call()
            seconds[name].append((clock() - start) / case.units)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@dataclass
class Row:
    """One line of the table.

    Attributes:
        key: what the figure is called by programs, within its section.
        name: what it is called by people.
        seconds: median, of one unit; None where only ``rate`` is a figure, or nothing could be measured.
        low, high: quartiles of ``seconds``.
        times: how many times as long as the section's baseline, median over the rounds.
        rate, unit: the figure in other words: "GB/s", "agent-steps/s".
        share: of the memory bandwidth, if it is bounded by that.
        note: why it was not measured, or what to know.
    """

    key: str
    name: str
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    times: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    note: str = ""

    @classmethod
    def of(cls, key: str, name: str, timing: Timing, base: Timing | None = None, **more: Any) -> Row:
        """Return the row of a timing, as a multiple of ``base`` if there is one."""
        low, high = timing.spread
        times = None if base is None else timing.times(base)
        return cls(key, name, timing.median, low, high, times, **more)


@dataclass
class Section:
    """A table: what was measured, what it means, and its rows."""

    key: str
    title: str
    text: str
    rows: list[Row] = field(default_factory=list)

    def row(self, key: str) -> Row | None:
        """Return a row by its key."""
        return next((row for row in self.rows if row.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the section in JSON's types, what is not known left out."""
        rows = [{k: v for k, v in asdict(row).items() if v not in (None, "")} for row in self.rows]
        return {"key": self.key, "title": self.title, "text": self.text, "rows": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Section:
        """Build a section from what `to_dict` gave."""
        return cls(data["key"], data["title"], data["text"], [Row(**row) for row in data["rows"]])


def figure(sections: Sequence[Section], section: str, row: str) -> Row | None:
    """Return one row of a report by its keys, None where it was not measured."""
    found = next((part for part in sections if part.key == section), None)
    return None if found is None else found.row(row)


def added(key: str, name: str, timings: Mapping[str, Timing], more: str, less: str, base: str) -> Row:
    """Return how many times ``base`` a case takes longer than another, round by round."""
    pairs = zip(timings[more].seconds, timings[less].seconds, strict=True)
    return Row.of(key, name, Timing(tuple(a - b for a, b in pairs)), timings[base])
