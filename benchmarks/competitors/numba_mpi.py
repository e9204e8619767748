"""mpi4py and Numba: each rank the loop over its rows; SIR's ranks add up their infectious once a step."""

from competitors import numba_loops
from mpi4py import MPI

WORLD = MPI.COMM_WORLD


class Integrate(numba_loops.Integrate):
    def __init__(self, x, y, vx, vy, cores):
        super().__init__(x, y, vx, vy, cores=1)


class Walk(numba_loops.Walk):
    def __init__(self, x, y, cores):
        super().__init__(x, y, cores=1, first=WORLD.exscan(len(x)) or 0)


class Sir(numba_loops.Sir):
    def __init__(self, state, cores):
        super().__init__(state, cores=1, first=WORLD.exscan(len(state)) or 0, total=WORLD.allreduce)
