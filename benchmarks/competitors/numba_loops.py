"""Numba: one loop a workload, as fast as we can write it; on several cores the same loop with prange.

Random numbers are splitmix64's, of the row and the step: nothing cheaper that is good is known to us. One
number of 64 bits gives the two draws of a walk, and a draw of 24 bits (what float32 holds) is enough here.
"""

import numpy as np
from numba import njit, prange, set_num_threads
from workloads import DT, KEEP, REACH, WIDTH, I, chances

U = np.uint64
GOLDEN = U(0x9E3779B97F4A7C15)
UNIT = np.float32(2.0**-24)


@njit(inline="always")
def mix(z):
    z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
    return z ^ (z >> U(31))


@njit(inline="always")
def reflect(z):
    z = abs(z)
    return min(z, np.float32(2) * WIDTH - z)


def integrate(x, y, vx, vy):
    for i in prange(x.size):
        x[i] += vx[i] * DT
        y[i] += vy[i] * DT
        vx[i] *= KEEP
        vy[i] *= KEEP


def walk(x, y, key, first):
    for i in prange(x.size):
        bits = mix(key + (U(first) + U(i)) * GOLDEN)
        u = np.float32(np.uint32(bits >> U(40))) * UNIT
        v = np.float32(np.uint32(bits) >> np.uint32(8)) * UNIT
        x[i] = reflect(x[i] + REACH * (np.float32(2) * u - np.float32(1)))
        y[i] = reflect(y[i] + REACH * (np.float32(2) * v - np.float32(1)))


def sir(state, key, first, p, gamma):
    """Make the transitions of one step and return how many are infectious then: the next step needs it."""
    infectious = 0
    for i in prange(state.size):
        u = np.float32(np.uint32(mix(key + (U(first) + U(i)) * GOLDEN) >> U(40))) * UNIT
        old = state[i]
        chance = p if old == 0 else gamma if old == 1 else np.float32(0)
        new = old + np.uint8(u < chance)
        state[i] = new
        infectious += new == I
    return infectious


def compiled(loop, cores):
    if cores > 1:
        set_num_threads(cores)
    return njit(loop, cache=True, parallel=cores > 1, error_model="numpy")


def key_of(step):
    return U((step * 0xD1B54A32D192ED03) % 2**64)


class Integrate:
    def __init__(self, x, y, vx, vy, cores):
        self.state = x, y, vx, vy
        self.loop = compiled(integrate, cores)

    def step(self, steps):
        for _ in range(steps):
            self.loop(*self.state)

    def columns(self):
        return self.state


class Walk:
    def __init__(self, x, y, cores, first=0):
        self.x, self.y, self.first = x, y, first
        self.loop = compiled(walk, cores)
        self.made = 0

    def step(self, steps):
        for _ in range(steps):
            self.made += 1
            self.loop(self.x, self.y, key_of(self.made), self.first)

    def columns(self):
        return self.x, self.y


class Sir:
    def __init__(self, state, cores, first=0, total=lambda count: count):
        self.state, self.first, self.total = state, first, total
        self.loop = compiled(sir, cores)
        self.made = 0
        self.rows = total(len(state))
        self.infectious = np.count_nonzero(state == I)

    def step(self, steps):
        for _ in range(steps):
            self.made += 1
            p, gamma = chances(self.total(self.infectious), self.rows)
            key = key_of(self.made)
            self.infectious = self.loop(self.state, key, self.first, np.float32(p), np.float32(gamma))

    def columns(self):
        return (self.state,)
