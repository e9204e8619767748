"""Four float32 columns that every step writes: what a checkpoint of many rows is measured with."""

from typing import Any

import numpy as np

import rustsim_hpc as rs


@rs.row_kernel(writes=("x", "y", "vx", "vy"))
def integrate(x: Any, y: Any, vx: Any, vy: Any, dt: Any) -> Any:
    return x + vx * dt, y + vy * dt, vx * (1 - 0.01 * dt), vy * (1 - 0.01 * dt)


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    numbers = np.arange(rows.start, rows.stop, dtype=np.float32)
    return {"x": numbers, "y": numbers, "vx": np.ones_like(numbers), "vy": np.ones_like(numbers)}


def model() -> Any:
    return rs.Model(
        params={"dt": rs.Param("float32", default=0.01)},
        columns=[rs.Column(name, "float32") for name in ("x", "y", "vx", "vy")],
        initialise=initialise,
        phases=[integrate],
    )
