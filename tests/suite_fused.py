"""The third model of the executor suite: row kernels alone, whose steps can be made several at a time."""

import numpy as np

import rustsim_hpc as rs


@rs.row_kernel(writes="x")
def drift(x, vx, dt):
    return x + vx * dt


@rs.row_kernel(writes=("vx", "heat"))
def shake(vx, heat, step, row, rng, bad_step, bad_row):
    if step == bad_step and row == bad_row:
        return vx, np.nan
    return vx + 0.01 * (rs.random.uniform(rng, 0) - 0.5), (heat + step + row) % 1000


def initialise(rows, params, tables, seed):
    index = np.arange(rows.start, rows.stop)
    return [
        (index % 97).astype(np.float32),
        ((index * 37 % 101) / 101 - 0.5).astype(np.float32),
        np.zeros(len(index), np.int32),
    ]


def model():
    return rs.Model(
        params={
            "dt": rs.Param("float32", default=0.1),
            "bad_step": rs.Param("int64", default=-1),
            "bad_row": rs.Param("int64", default=-1),
        },
        columns=[rs.Column("x", "float32"), rs.Column("vx", "float32"), rs.Column("heat", "int32")],
        initialise=initialise,
        phases=[drift, shake],
    )
