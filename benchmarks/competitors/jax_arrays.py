"""JAX on the CPU: one compiled function a step, which may reuse the memory of what it is given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from workloads import BETA, DT, GAMMA, KEEP, REACH, WIDTH, I, S


class Jax:
    def __init__(self, *columns, cores):  # XLA takes as many threads as this process may use cores
        self.state = tuple(map(jnp.asarray, columns))
        self.key = jax.random.key(1)
        self.made = 0

    def step(self, steps):
        for _ in range(steps):
            self.made += 1
            self.state = self.advance(self.state, jax.random.fold_in(self.key, self.made))
        jax.block_until_ready(self.state)

    def columns(self):
        return tuple(map(np.asarray, self.state))


class Integrate(Jax):
    @staticmethod
    @partial(jax.jit, donate_argnums=0)
    def advance(state, key):
        x, y, vx, vy = state
        return x + vx * DT, y + vy * DT, vx * KEEP, vy * KEEP


class Walk(Jax):
    @staticmethod
    @partial(jax.jit, donate_argnums=0)
    def advance(state, key):
        def move(z, u):
            z = jnp.abs(z + u)
            return jnp.minimum(z, 2 * WIDTH - z)

        u = jax.random.uniform(key, (2, *state[0].shape), minval=-REACH, maxval=REACH)
        return move(state[0], u[0]), move(state[1], u[1])


class Sir(Jax):
    @staticmethod
    @partial(jax.jit, donate_argnums=0)
    def advance(state, key):
        [state] = state
        infectious = jnp.count_nonzero(state == I)
        p = 1 - jnp.exp(-BETA * infectious / state.size)
        u = jax.random.uniform(key, state.shape)
        moves = ((state == S) & (u < p)) | ((state == I) & (u < GAMMA))
        return (state + moves.astype(state.dtype),)
