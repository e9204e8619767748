"""Numba with NumPy's own functions for random numbers, as one writes it first: a Mersenne Twister."""

import numpy as np
from numba import njit
from workloads import REACH, WIDTH, I, chances


@njit(cache=True)
def seed(number):
    np.random.seed(number)  # noqa: NPY002 (Numba's own state)


@njit(inline="always")
def reflect(z):
    z = abs(z)
    return min(z, np.float32(2) * WIDTH - z)


@njit(cache=True, error_model="numpy")
def walk(x, y):
    for i in range(x.size):
        x[i] = reflect(x[i] + REACH * np.float32(2 * np.random.random() - 1))  # noqa: NPY002
        y[i] = reflect(y[i] + REACH * np.float32(2 * np.random.random() - 1))  # noqa: NPY002


@njit(cache=True, error_model="numpy")
def sir(state, p, gamma):
    infectious = 0
    for i in range(state.size):
        u = np.random.random()  # noqa: NPY002
        if (state[i] == 0 and u < p) or (state[i] == 1 and u < gamma):
            state[i] += 1
        infectious += state[i] == I
    return infectious


class Walk:
    def __init__(self, x, y, cores):
        self.x, self.y = x, y
        seed(1)

    def step(self, steps):
        for _ in range(steps):
            walk(self.x, self.y)

    def columns(self):
        return self.x, self.y


class Sir:
    def __init__(self, state, cores):
        self.state = state
        self.infectious = np.count_nonzero(state == I)
        seed(1)

    def step(self, steps):
        for _ in range(steps):
            self.infectious = sir(self.state, *chances(self.infectious, len(self.state)))

    def columns(self):
        return (self.state,)
