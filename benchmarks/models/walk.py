"""A random walk between walls that reflect."""

import numpy as np
import workloads

import rustsim_hpc as rs


@rs.function
def reflect(z, width):
    z = abs(z)
    return min(z, np.float32(2) * width - z)


@rs.row_kernel(writes=("x", "y"))
def wander(x, y, reach, width, rng):
    dx = reach * (np.float32(2) * rs.random.uniform32(rng, 0) - np.float32(1))
    dy = reach * (np.float32(2) * rs.random.uniform32(rng, 1) - np.float32(1))
    return reflect(x + dx, width), reflect(y + dy, width)


def initialise(rows, params, tables, seed):
    return dict(zip(("x", "y"), workloads.start_walk(rows.start, rows.stop), strict=True))


def model():
    return rs.Model(
        params={
            "reach": rs.Param("float32", default=float(workloads.REACH), unit="m", doc="longest move"),
            "width": rs.Param("float32", default=float(workloads.WIDTH), unit="m", doc="side of the box"),
        },
        columns=[
            rs.Column("x", "float32", unit="m", doc="position east"),
            rs.Column("y", "float32", unit="m", doc="position north"),
        ],
        initialise=initialise,
        phases=[wander],
    )
