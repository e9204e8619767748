"""Mesa: an object an agent, with its own method."""

import mesa
import numpy as np
from workloads import DT, GAMMA, KEEP, REACH, WIDTH, I, S, chances

REACH, WIDTH, DT, KEEP = float(REACH), float(WIDTH), float(DT), float(KEEP)


class Particle(mesa.Agent):
    def __init__(self, model, x, y, vx, vy):
        super().__init__(model)
        self.x, self.y, self.vx, self.vy = x, y, vx, vy

    def step(self):
        self.x += self.vx * DT
        self.y += self.vy * DT
        self.vx *= KEEP
        self.vy *= KEEP


def reflect(z):
    z = abs(z)
    return 2 * WIDTH - z if z > WIDTH else z


class Walker(mesa.Agent):
    def __init__(self, model, x, y):
        super().__init__(model)
        self.x, self.y = x, y

    def step(self):
        self.x = reflect(self.x + REACH * self.random.uniform(-1, 1))
        self.y = reflect(self.y + REACH * self.random.uniform(-1, 1))


class Person(mesa.Agent):
    def __init__(self, model, state):
        super().__init__(model)
        self.state = state

    def step(self):
        u = self.random.random()
        if self.state == S:
            if u < self.model.p:
                self.state = I
        elif self.state == I and u < GAMMA:
            self.state += 1


class Population:
    kind, names = mesa.Agent, ()

    def __init__(self, *columns, cores):
        self.model = mesa.Model(seed=1)
        for values in zip(*(c.tolist() for c in columns), strict=True):
            self.kind(self.model, *values)

    def step(self, steps):
        for _ in range(steps):
            self.model.agents.do("step")

    def columns(self):
        return tuple(np.array(self.model.agents.get(name)) for name in self.names)


class Integrate(Population):
    kind, names = Particle, ("x", "y", "vx", "vy")


class Walk(Population):
    kind, names = Walker, ("x", "y")


class Sir(Population):
    kind, names = Person, ("state",)

    def step(self, steps):
        for _ in range(steps):
            infectious = self.model.agents.get("state").count(I)
            self.model.p, _ = chances(infectious, len(self.model.agents))
            self.model.agents.do("step")

    def columns(self):
        return (np.array(self.model.agents.get("state"), np.uint8),)
