"""An epidemic in a population that is mixed: susceptible (0), infectious (1), recovered (2)."""

import numpy as np
import workloads

import rustsim_hpc as rs


@rs.reduction("count")
def infectious(state):
    return state == 1


@rs.derive
def p(infectious, beta, agents):
    return 1.0 - np.exp(-beta * infectious / agents)


@rs.row_kernel(writes="state")
def progress(state, p, gamma, rng):
    u = rs.random.uniform32(rng, 0)
    if state == 0:
        return 1 if u < p else 0
    if state == 1:
        return 2 if u < gamma else 1
    return state


def initialise(rows, params, tables, seed):
    return {"state": workloads.start_sir(rows.start, rows.stop)[0]}


def model():
    return rs.Model(
        params={
            "agents": rs.Param(default=1, min=1, doc="number of all rows"),
            "beta": rs.Param(default=workloads.BETA, min=0, doc="infectious contacts of an agent in a step"),
            "gamma": rs.Param(default=workloads.GAMMA, min=0, max=1, doc="chance to recover in a step"),
        },
        columns=[rs.Column("state", "uint8", doc="course of the infection", codes={0: "S", 1: "I", 2: "R"})],
        initialise=initialise,
        phases=[infectious, p, progress],
    )
