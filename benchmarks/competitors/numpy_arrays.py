"""NumPy: whole columns at a time, in place where NumPy can."""

import numpy as np
from workloads import DT, KEEP, REACH, WIDTH, I, S, chances


class Integrate:
    def __init__(self, x, y, vx, vy, cores):
        self.x, self.y, self.vx, self.vy = x, y, vx, vy

    def step(self, steps):
        for _ in range(steps):
            self.x += self.vx * DT
            self.y += self.vy * DT
            self.vx *= KEEP
            self.vy *= KEEP

    def columns(self):
        return self.x, self.y, self.vx, self.vy


class Walk:
    def __init__(self, x, y, cores):
        self.x, self.y = x, y
        self.random = np.random.default_rng(1)

    def step(self, steps):
        for _ in range(steps):
            for z in (self.x, self.y):
                u = self.random.random(len(z), dtype=np.float32)
                u *= 2 * REACH
                u -= REACH
                np.add(z, u, out=z)
                np.abs(z, out=z)  # the wall at 0
                np.minimum(z, 2 * WIDTH - z, out=z)  # the wall at WIDTH

    def columns(self):
        return self.x, self.y


class Sir:
    def __init__(self, state, cores):
        self.state = state
        self.random = np.random.default_rng(1)

    def step(self, steps):
        rows = len(self.state)
        for _ in range(steps):
            p, gamma = chances(np.count_nonzero(self.state == I), rows)
            u = self.random.random(rows, dtype=np.float32)
            self.state += ((self.state == S) & (u < p)) | ((self.state == I) & (u < gamma))

    def columns(self):
        return (self.state,)
