"""Dask: chunked arrays on the threads of one process, computed at the end of each step."""

import dask
import dask.array as da
import numpy as np
from workloads import BETA, DT, GAMMA, KEEP, REACH, WIDTH, I, S


class Dask:
    def __init__(self, *columns, cores):
        dask.config.set(scheduler="threads", num_workers=cores)
        # Two chunks a core: of 10 million rows on 2 cores, that was faster than more chunks or fewer.
        self.chunk = -(-len(columns[0]) // (2 * cores))
        self.state = dask.persist(*(da.from_array(c, chunks=self.chunk) for c in columns))
        self.random = da.random.default_rng(1)

    def draw(self):
        return self.random.random(self.state[0].shape, dtype=np.float32, chunks=self.chunk)

    def step(self, steps):
        for _ in range(steps):
            self.state = dask.persist(*self.advance(*self.state))

    def columns(self):
        return dask.compute(*self.state)


class Integrate(Dask):
    def advance(self, x, y, vx, vy):
        return x + vx * DT, y + vy * DT, vx * KEEP, vy * KEEP


class Walk(Dask):
    def move(self, z):
        z = da.absolute(z + REACH * (2 * self.draw() - 1))
        return da.minimum(z, 2 * WIDTH - z)

    def advance(self, x, y):
        return self.move(x), self.move(y)


class Sir(Dask):
    def advance(self, state):
        p = 1 - da.exp(-BETA * (state == I).sum() / state.size)
        u = self.draw()
        moves = ((state == S) & (u < p)) | ((state == I) & (u < GAMMA))
        return (state + moves.astype(np.uint8),)
