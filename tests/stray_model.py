"""A model without kernels whose phases go astray when they are told to. Nothing to compile, so it is quick.

jitter: a phase that is not deterministic. spread: a phase that promises row_local and reads its partition.
start: the first state; from 9 on it is what STRAY_START says. The environment variable STRAY_FAULT
("STEP ROW") is a fault of the machine: nothing in the model knows of it.
"""

import os
from typing import Any

import numpy as np

import rustsim_hpc as rs


@rs.column_phase(writes="x", row_local=True)
def move(context: Any, columns: Any, rows: int) -> None:
    columns["x"] += columns["v"] * context.params.dt


@rs.column_phase(writes="x", row_local=True)
def jitter(context: Any, columns: Any, rows: int) -> None:
    if context.params.jitter >= 0 and context.step_index >= context.params.jitter:
        columns["x"] += np.random.default_rng().random()


@rs.column_phase(writes="n", row_local=True)
def spread(context: Any, columns: Any, rows: int) -> None:
    columns["n"] += np.int32(columns["n"][0] if context.params.spread else 1)


@rs.column_phase(writes="v", row_local=True)
def kick(context: Any, columns: Any, rows: int) -> None:
    columns["v"] = columns["v"] + context.random.normal(0)
    step, row = map(int, os.environ.get("STRAY_FAULT", "-1 -1").split())
    here = row - context.row_start
    if context.step_index == step and 0 <= here < rows:
        columns["v"].view(np.uint64)[here] ^= np.uint64(1 << 51)


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    numbers = np.arange(rows.start, rows.stop)
    return {
        "x": np.cos(numbers + (params.start if params.start < 9 else int(os.environ["STRAY_START"]))),
        "v": np.zeros(len(numbers)),
        "n": (numbers % 1000).astype(np.int32),
    }


def model() -> Any:
    return rs.Model(
        params={"dt": 0.1, "start": 0.0, "jitter": -1, "spread": False},
        columns=[rs.Column("x", "float64"), rs.Column("v", "float64"), rs.Column("n", "int32")],
        initialise=initialise,
        phases=[move, jitter, spread, kick],
    )
