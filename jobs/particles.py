"""Particles that drift and slow down: the smallest model that does something, all in float32."""

from typing import Any

import numpy as np

import rustsim_hpc as rs


@rs.row_kernel(writes=("x", "y"))
def move(x: float, y: float, vx: float, vy: float, dt: float) -> Any:
    return x + vx * dt, y + vy * dt


@rs.row_kernel(writes=("vx", "vy"))
def slow(vx: float, vy: float, keep: float) -> Any:
    return vx * keep, vy * keep


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    """Put the particles on a grid, 1 m apart, with velocities of -1 to 1 m/s made from the row number."""
    row = np.arange(rows.start, rows.stop)
    values = {"x": row % 1000, "y": row // 1000 % 1000}
    values |= {"vx": (row * 7919 % 2001 - 1000) / 1000, "vy": (row * 104729 % 2001 - 1000) / 1000}
    return {name: value.astype(np.float32) for name, value in values.items()}


def model() -> Any:
    return rs.Model(
        params={
            "dt": rs.Param("float32", default=0.1, min=0, unit="s", doc="time step"),
            "keep": rs.Param("float32", default=0.99, min=0, max=1, doc="velocity kept each step"),
        },
        columns=[rs.Column(name, "float32", unit="m", doc=f"position {name}") for name in ("x", "y")]
        + [rs.Column(name, "float32", unit="m/s", doc=f"velocity along {name[1]}") for name in ("vx", "vy")],
        initialise=initialise,
        phases=[move, slow],
        outputs=[rs.Sample("paths.h5", columns=("x", "y"), rows=100)],
    )
