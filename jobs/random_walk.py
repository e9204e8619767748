"""A random walk in a box with reflecting walls: two random numbers a row and step, and mixed dtypes."""

from math import sqrt
from typing import Any

import numpy as np

import rustsim_hpc as rs


@rs.function
def reflect(z: float, width: float) -> float:
    if z < 0.0:
        return -z
    return 2.0 * width - z if z > width else z


@rs.row_kernel(writes=("x", "y", "path"))
def wander(x: float, y: float, path: float, reach: float, width: float, rng: Any) -> Any:
    dx = reach * (2.0 * rs.random.uniform(rng, 0) - 1.0)  # draw 0 and draw 1 of this row in this step
    dy = reach * (2.0 * rs.random.uniform(rng, 1) - 1.0)
    return reflect(x + dx, width), reflect(y + dy, width), path + sqrt(dx * dx + dy * dy)


@rs.reduction("sum")
def squares(x: float, y: float, width: float) -> float:
    return (x - width / 2) ** 2 + (y - width / 2) ** 2


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    middle = np.full(rows.stop - rows.start, params.width / 2)
    return {"x": middle, "y": middle.copy(), "path": np.zeros(len(middle), np.float32)}


def spread(context: Any) -> tuple[int, float]:
    return context.step_index, context.reductions["squares"] / context.agent_count


def model() -> Any:
    return rs.Model(
        params={
            "reach": rs.Param(default=0.25, min=0, max=1, unit="m", doc="largest move along x or y"),
            "width": rs.Param(default=10.0, min=1, unit="m", doc="side of the box"),
        },
        columns=[
            rs.Column("x", "float64", unit="m", doc="position east"),
            rs.Column("y", "float64", unit="m", doc="position north"),
            rs.Column("path", "float32", unit="m", doc="length of the way so far"),
        ],
        initialise=initialise,
        phases=[wander],
        outputs=[rs.Series("spread.csv", spread, ("step", "mean_square"), reductions=(squares,))],
    )
