"""Predict the time of a step on a number of ranks: a small model with one machine's measurements.

A step's time is the sum of three terms: the rows of the fullest rank at the cost of a row on one core, scaled
where cores share the memory bus; the cost of a step without rows; and the collectives. An allreduce takes the
measured time for each doubling of the ranks within a node, and between nodes the shorter of recursive
doubling and of reduce-scatter and allgather (Thakur, Rabenseifner, Gropp, "Optimization of
collective communication operations in MPICH", IJHPCA 19 (2005), doi:10.1177/1094342005051521).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

ASSUMPTIONS = (
    "every node is like this machine, and its memory bandwidth grows with the cores as measured here",
    "a row costs the same on all ranks and in all steps, and nothing else uses the cores",
    "no other messages compete for the network",
    "checkpoints and outputs are written in the background and do not slow the steps down",
)
"""What a prediction assumes."""


@dataclass(frozen=True)
class Machine:
    """What `rustsim-hpc bench` measured on this machine.

    Attributes:
        step: seconds of a step that has next to no rows, without its collective.
        allreduce: seconds of a small allreduce of two ranks of one machine.
        one, all: bytes a second that one core and ``cores`` cores together move to and from memory.
        cores: how many were measured together.
    """

    step: float
    allreduce: float
    one: float
    all: float
    cores: int


@dataclass(frozen=True)
class Network:
    """The network: latency between nodes (seconds), bandwidth of a node (bytes a second), ranks per node."""

    latency: float = 2e-6
    bandwidth: float = 12.5e9
    ranks_per_node: int = 2


@dataclass(frozen=True)
class Load:
    """The cost of a job's step.

    Attributes:
        row: seconds of a row on one core of an otherwise idle machine.
        row_bytes: bytes that a row moves to and from memory.
        meetings: number of collectives of a step.
        meeting_bytes: bytes that a rank contributes to each.
    """

    row: float
    row_bytes: float
    meetings: int
    meeting_bytes: float


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step on a number of ranks, by term.

    Attributes:
        ranks: number of ranks.
        rows: rows of the fullest rank.
        rows_seconds, step_seconds, meeting_seconds: for its rows, a step without rows, the collectives.
        strong: efficiency against one rank with all the rows.
        weak: efficiency against one rank with as many rows as this one's.
    """

    ranks: int
    rows: int
    rows_seconds: float
    step_seconds: float
    meeting_seconds: float
    strong: float
    weak: float

    @property
    def seconds(self) -> float:
        """Total seconds of a step."""
        return self.rows_seconds + self.step_seconds + self.meeting_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON's types."""
        return {**asdict(self), "seconds": self.seconds}


def predict(load: Load, machine: Machine, network: Network, rows: int, ranks: int) -> Prediction:
    """Return the prediction for a job of ``rows`` rows in all, cut evenly."""
    mine = -(-rows // ranks)
    parts = _parts(load, machine, network, mine, ranks)
    alone = sum(_parts(load, machine, network, rows, 1))
    as_much = sum(_parts(load, machine, network, mine, 1))
    whole = sum(parts)
    return Prediction(ranks, mine, *parts, alone / (ranks * whole), as_much / whole)


def curve(
    load: Load, machine: Machine, network: Network, rows: int, ranks: Iterable[int]
) -> list[Prediction]:
    """Return the predictions for several numbers of ranks."""
    return [predict(load, machine, network, rows, count) for count in ranks]


def _parts(
    load: Load, machine: Machine, network: Network, rows: int, ranks: int
) -> tuple[float, float, float]:
    rows_seconds = rows * load.row * slowdown(load, machine, min(ranks, network.ranks_per_node))
    meetings = load.meetings * allreduce_seconds(machine, network, load.meeting_bytes, ranks)
    return rows_seconds, machine.step, meetings


def slowdown(load: Load, machine: Machine, busy: int) -> float:
    """Return the factor by which a row takes longer when ``busy`` cores share a machine's memory."""
    if machine.cores < 2:
        return 1.0
    among = min(busy, machine.cores)
    shared = machine.all / machine.cores
    each = machine.one + (shared - machine.one) * (among - 1) / (machine.cores - 1)
    # Rows whose cost is too small to be measured are taken to use all the bandwidth of a core.
    waits = load.row_bytes >= load.row * machine.one
    wanted = machine.one if waits else load.row_bytes / load.row
    return max(1.0, wanted / each)


def allreduce_seconds(machine: Machine, network: Network, size: float, ranks: int) -> float:
    """Return the seconds of an allreduce of ``size`` bytes a rank."""
    inside = min(ranks, network.ranks_per_node)
    nodes = -(-ranks // network.ranks_per_node)
    on_node = _doublings(inside) * (machine.allreduce + size / machine.one)
    rounds, wire = _doublings(nodes), size / network.bandwidth
    doubling = rounds * (network.latency + wire)
    halving = 2 * rounds * network.latency + 2 * wire * (nodes - 1) / nodes
    return on_node + min(doubling, halving)


def _doublings(count: int) -> int:
    return math.ceil(math.log2(count)) if count > 1 else 0


def table(predictions: Iterable[Prediction]) -> str:
    """Return predictions as a table for a reader."""
    head = ("ranks", "rows a rank", "step", "of it rows", "step itself", "collectives", "strong", "weak")
    lines = [
        (
            f"{p.ranks:,}",
            f"{p.rows:,}",
            *(_time(s) for s in (p.seconds, p.rows_seconds, p.step_seconds, p.meeting_seconds)),
            f"{p.strong:.2f}",
            f"{p.weak:.2f}",
        )
        for p in predictions
    ]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *lines)
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
