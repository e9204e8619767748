"""Particles that drift and slow down: x += vx dt, y += vy dt, vx *= keep, vy *= keep, all float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from rustsim_hpc.modeling.model import Model, row_kernel
from rustsim_hpc.modeling.params import Param
from rustsim_hpc.state.schema import Column

DT, KEEP = np.float32(0.1), np.float32(0.99)


@row_kernel(writes=("x", "y"))
def move(x: float, y: float, vx: float, vy: float, dt: float) -> Any:
    """Move by one step of time."""
    return x + vx * dt, y + vy * dt


@row_kernel(writes=("vx", "vy"))
def slow(vx: float, vy: float, keep: float) -> Any:
    """Lose a share of the velocity."""
    return vx * keep, vy * keep


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:  # noqa: ARG001
    """Put the particles on a grid, 1 m apart, with velocities of -1 to 1 m/s made from the row number."""
    row = np.arange(rows.start, rows.stop)
    values = {"x": row % 1000, "y": row // 1000 % 1000}
    values |= {"vx": (row * 7919 % 2001 - 1000) / 1000, "vy": (row * 104729 % 2001 - 1000) / 1000}
    return {name: value.astype(np.float32) for name, value in values.items()}


def model() -> Model:
    """Return the model."""
    return Model(
        params={
            "dt": Param("float32", default=float(DT), min=0, unit="s", doc="time step"),
            "keep": Param("float32", default=float(KEEP), min=0, max=1, doc="velocity kept each step"),
        },
        columns=[Column(name, "float32", unit="m", doc=f"position {name}") for name in ("x", "y")]
        + [Column(name, "float32", unit="m/s", doc=f"velocity along {name[1]}") for name in ("vx", "vy")],
        initialise=initialise,
        phases=[move, slow],
    )
