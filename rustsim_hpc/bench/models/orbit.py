"""Eight kernels over six float32 columns: particles on springs, with drag, in a box."""

from __future__ import annotations

from typing import Any

import numpy as np

from rustsim_hpc.modeling.model import Model, row_kernel
from rustsim_hpc.modeling.params import Param
from rustsim_hpc.state.schema import Column

DT, K, KEEP, WIDTH = np.float32(0.1), np.float32(0.01), np.float32(0.99), np.float32(40.0)


@row_kernel(writes="vx")
def pull_x(x: float, vx: float, k: float) -> Any:
    """Accelerate towards 0."""
    return vx - k * x


@row_kernel(writes="vy")
def pull_y(y: float, vy: float, k: float) -> Any:
    """Accelerate towards 0."""
    return vy - k * y


@row_kernel(writes="vz")
def pull_z(z: float, vz: float, k: float) -> Any:
    """Accelerate towards 0."""
    return vz - k * z


@row_kernel(writes=("vx", "vy", "vz"))
def drag(vx: float, vy: float, vz: float, keep: float) -> Any:
    """Slow down."""
    return vx * keep, vy * keep, vz * keep


@row_kernel(writes="x")
def move_x(x: float, vx: float, dt: float) -> Any:
    """Move."""
    return x + vx * dt


@row_kernel(writes="y")
def move_y(y: float, vy: float, dt: float) -> Any:
    """Move."""
    return y + vy * dt


@row_kernel(writes="z")
def move_z(z: float, vz: float, dt: float) -> Any:
    """Move."""
    return z + vz * dt


@row_kernel(writes=("x", "y", "z"))
def clamp(x: float, y: float, z: float, width: float) -> Any:
    """Stay in the box."""
    return min(max(x, -width), width), min(max(y, -width), width), min(max(z, -width), width)


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:  # noqa: ARG001
    """Spread the particles over a grid, at rest."""
    row = np.arange(rows.start, rows.stop)
    places = {"x": row % 50, "y": row // 50 % 50, "z": row // 2500 % 50}
    made = {name: place.astype(np.float32) for name, place in places.items()}
    return made | {name: np.zeros(len(row), np.float32) for name in ("vx", "vy", "vz")}


def model() -> Model:
    """Return the model."""
    values = {"dt": DT, "k": K, "keep": KEEP, "width": WIDTH}
    return Model(
        params={name: Param("float32", default=float(value)) for name, value in values.items()},
        columns=[Column(name, "float32") for name in ("x", "y", "z", "vx", "vy", "vz")],
        initialise=initialise,
        phases=[pull_x, pull_y, pull_z, drag, move_x, move_y, move_z, clamp],
    )
