"""What the tables of the standard set share: their size, and columns and threads for loops by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rustsim_hpc.modeling.model import Model
from rustsim_hpc.modeling.params import bind_params
from rustsim_hpc.state.memory import ColumnMemory

Array = np.ndarray[Any, Any]

MODELS = "rustsim_hpc.bench.models."
FUSED = 16
BYTES = {"integrate": 32, "walk": 16, "tally": 4, "orbit": 48}
"""Bytes that a row's loop reads and writes, each column once: the least there is to move."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    rows: of each loop. rounds: of each case. agents, days: of us_flights, and how many days a call makes.
    steps: of an empty step's call. workers: threads, worker processes or ranks where there are several.
    """

    rows: int = 10_000_000
    rounds: int = 9
    agents: int = 1_000_000
    days: int = 20
    steps: int = 2000
    workers: int = 2


STANDARD = Size()
QUICK = Size(rows=1_000_000, rounds=3, agents=100_000, days=20, steps=500)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second that one core and all workers' cores move, the best of copy, triad and update."""

    one: float
    all: float


def columns_of(model: Model, rows: int) -> list[Array]:
    """Return a model's first state, placed in memory as the engine places its own."""
    memory = ColumnMemory(model.schema(), rows)
    made = model.initialise(range(rows), bind_params(model.parameters(), {}), {}, 1)
    for index, name in enumerate(model.schema().names):
        memory.current(index)[:] = made[name]
    return [memory.current(index) for index in range(len(model.columns))]


@contextmanager
def shared_out(workers: int) -> Iterator[Callable[..., None]]:
    """Yield ``run(function, columns, *rest)``: threads call a function on equal shares of the rows."""
    with ThreadPoolExecutor(workers) as pool:

        def run(function: Callable[..., object], columns: Sequence[Array], *rest: Any) -> None:
            rows = len(columns[0])
            cuts = [rows * k // workers for k in range(workers + 1)]
            shares = [[c[a:b] for c in columns] for a, b in pairwise(cuts)]
            list(pool.map(lambda share: function(*share, *rest), shares))

        yield run


def flights_module() -> Path | None:
    """Return the main job's model: in the checkout that this package is of, or the working directory."""
    for folder in (Path(__file__).parents[2], Path.cwd()):
        path = folder / "jobs" / "us_flights.py"
        if path.is_file():
            return path
    return None


def flights_params(agents: int) -> dict[str, Any]:
    """Return the main job's parameters for a number of agents: as many infectious in proportion."""
    return {"initial_infectious": max(1, agents // 10_000)}
