"""The model of the executor suite: column phases only, so that every executor can run it.

Phases fail on demand: the parameter `trip` is the path of a file; while it exists, its line says which phase
fails on which partitions and how, as in `last 0,2 raise`. Worker processes read it as well.
"""

import os
import signal
from pathlib import Path

import numpy as np

import rustsim_hpc as rs


def trip(context, phase):
    """Fail if the trip file asks for it."""
    path = context.params.trip
    if not path or not Path(path).exists():
        return
    wanted, partitions, how = Path(path).read_text("utf-8").split()
    if wanted != phase or str(context.partition_id.value) not in partitions.split(","):
        return
    if how == "exit":
        raise SystemExit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(f"tripped in {phase}")


@rs.column_phase(writes="x", row_local=True, device=True)
def first(context, columns, rows):
    columns["x"] += columns["vx"] * context.params.dt
    trip(context, "first")


@rs.column_phase(writes=("vx", "kicks"), row_local=True, device=True)
def kick(context, columns, rows):
    draw = context.random.uniform(0)
    hit = draw < context.params.chance
    columns["vx"][hit] += (context.random.uniform32(1)[hit] - np.float32(0.5)).astype(np.float32)
    columns["kicks"] += hit.astype(np.int32)
    trip(context, "kick")


@rs.column_phase(writes=("even", "energy"), row_local=True, device=True)
def last(context, columns, rows):
    columns["even"] = columns["kicks"] % 2 == 0
    columns["energy"] = 0.5 * columns["vx"].astype(np.float64) ** 2
    trip(context, "last")


def initialise(rows, params, tables, seed):
    index = np.arange(rows.start, rows.stop)
    return {
        "x": (index % 97).astype(np.float32),
        "vx": ((index * 37 % 101) / 101 - 0.5).astype(np.float32),
        "kicks": np.zeros(len(index), np.int32),
        "even": np.ones(len(index), np.bool_),
        "energy": np.zeros(len(index)),
    }


def model():
    return rs.Model(
        params={
            "dt": rs.Param("float32", default=0.1, unit="s", doc="time step"),
            "chance": rs.Param("float64", default=0.5, min=0, max=1, doc="of a kick in a step"),
            "trip": rs.Param(default="", doc="file that makes phases fail"),
        },
        columns=[
            rs.Column("x", "float32", unit="m", doc="place"),
            rs.Column("vx", "float32", unit="m/s", doc="speed"),
            rs.Column("kicks", "int32", doc="kicks so far"),
            rs.Column("even", "bool", doc="whether their number is even"),
            rs.Column("energy", "float64", unit="J/kg", doc="kinetic energy of a unit mass"),
        ],
        initialise=initialise,
        phases=[first, kick, last],
    )
