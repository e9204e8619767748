"""Integrate: particles that drift and slow down."""

import workloads

import rustsim_hpc as rs


@rs.row_kernel(writes=("x", "y"))
def move(x, y, vx, vy, dt):
    return x + vx * dt, y + vy * dt


@rs.row_kernel(writes=("vx", "vy"))
def slow(vx, vy, keep):
    return vx * keep, vy * keep


def initialise(rows, params, tables, seed):
    return dict(zip(("x", "y", "vx", "vy"), workloads.start_integrate(rows.start, rows.stop), strict=True))


def model():
    return rs.Model(
        params={
            "dt": rs.Param("float32", default=float(workloads.DT), unit="s", doc="time step"),
            "keep": rs.Param("float32", default=float(workloads.KEEP), doc="velocity kept each step"),
        },
        columns=[
            rs.Column("x", "float32", unit="m", doc="position east"),
            rs.Column("y", "float32", unit="m", doc="position north"),
            rs.Column("vx", "float32", unit="m/s", doc="velocity east"),
            rs.Column("vy", "float32", unit="m/s", doc="velocity north"),
        ],
        initialise=initialise,
        phases=[move, slow],
    )
