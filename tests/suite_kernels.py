"""The second model of the executor suite: row kernels, reductions, a derived value, a column phase."""

import numpy as np

import rustsim_hpc as rs


@rs.row_kernel(writes="x")
def drift(x, vx, dt):
    return x + vx * dt


@rs.reduction("sum")
def mass(x):
    return x


@rs.reduction("histogram", bins=4)
def crowd(id, kicks):  # noqa: A002 (the name that the engine binds)
    return (id + kicks) % 4


@rs.derive
def mean(mass, crowd):
    return mass / max(int(crowd.sum()), 1)


@rs.row_kernel(writes=("vx", "kicks"))
def pull(x, vx, kicks, mean, crowd, rng, row):
    if rs.random.uniform(rng, 0) < 0.25:
        kicks += 1
    return vx - 0.01 * (x - mean) / (1 + crowd[row % 4]), kicks


@rs.column_phase(writes="vx", row_local=True, device=True)
def damp(context, columns, rows):
    columns["vx"] *= np.float32(0.99)


def initialise(rows, params, tables, seed):
    index = np.arange(rows.start, rows.stop)
    return [
        (index % 97).astype(np.float32),
        ((index * 37 % 101) / 101 - 0.5).astype(np.float32),
        np.zeros(len(index), np.int64),
    ]


def model():
    return rs.Model(
        params={"dt": rs.Param("float32", default=0.1)},
        columns=[rs.Column("x", "float32"), rs.Column("vx", "float32"), rs.Column("kicks", "int64")],
        initialise=initialise,
        phases=[drift, mass, crowd, mean, pull, damp],
    )
