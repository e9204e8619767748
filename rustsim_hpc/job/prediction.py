"""How long a step takes on how many ranks: a small model, fed with what was measured on one machine.

A step's time is the sum of three: the rows of the fullest rank at what a row costs on one core, stretched
where cores share the memory bus; what a step costs that has no rows; and the collectives. An allreduce goes
through the ranks of a node at the measured pace, once per doubling, and between nodes takes the better of
recursive doubling and of reduce-scatter and allgather (Thakur, Rabenseifner, Gropp, "Optimization of
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
    """What `rustsim-hpc bench` found here.

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
    """Between nodes: seconds from sending to receiving, bytes a second of a node, ranks that a node has."""

    latency: float = 2e-6
    bandwidth: float = 12.5e9
    ranks_per_node: int = 2


@dataclass(frozen=True)
class Load:
    """What a job's step asks for.

    Attributes:
        row: seconds of a row on one core that has the machine for itself.
        row_bytes: that it moves to and from memory.
        meetings: collectives of a step.
        meeting_bytes: that a rank brings to each.
    """

    row: float
    row_bytes: float
    meetings: int
    meeting_bytes: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step on a number of ranks, and what they go into.

    Attributes:
        ranks: how many.
        rows: of the fullest rank.
        rows_seconds, step_seconds, meeting_seconds: of its rows, of a step as such, of collectives.
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
        """All of a step."""
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
    """Return how many times as long a row takes where ``busy`` cores share a machine's memory."""
    if machine.cores < 2:
        return 1.0
    among = min(busy, machine.cores)
    shared = machine.all / machine.cores
    each = machine.one + (shared - machine.one) * (among - 1) / (machine.cores - 1)
    # A sample whose rows cost nothing that could be measured waits for memory as much as a core can.
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
