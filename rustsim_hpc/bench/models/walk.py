"""A random walk between reflecting walls: two float32 columns, two random numbers a row and step."""

from __future__ import annotations

from typing import Any

import numpy as np

from rustsim_hpc import random
from rustsim_hpc.modeling.model import Model, function, row_kernel
from rustsim_hpc.modeling.params import Param
from rustsim_hpc.state.schema import Column

REACH, WIDTH = np.float32(0.25), np.float32(10.0)


@function
def reflect(position: float, width: float) -> Any:
    """Fold a position back into [0, width]."""
    if position < np.float32(0.0):
        return -position
    return np.float32(2.0) * width - position if position > width else position


@row_kernel(writes=("x", "y"))
def wander(x: float, y: float, reach: float, width: float, rng: Any) -> Any:
    """Make one move along each axis."""
    dx = reach * np.float32(2.0 * random.uniform(rng, 0) - 1.0)
    dy = reach * np.float32(2.0 * random.uniform(rng, 1) - 1.0)
    return reflect(x + dx, width), reflect(y + dy, width)


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:  # noqa: ARG001
    """Put everyone in the middle."""
    middle = np.full(rows.stop - rows.start, params.width / 2, np.float32)
    return {"x": middle, "y": middle.copy()}


def model() -> Model:
    """Return the model."""
    return Model(
        params={"reach": Param("float32", default=0.25), "width": Param("float32", default=10.0)},
        columns=[Column("x", "float32", unit="m"), Column("y", "float32", unit="m")],
        initialise=initialise,
        phases=[wander],
    )
