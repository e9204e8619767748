"""repast4py: an object an agent, shared among the ranks of MPI; SIR's ranks add up their infectious."""

import numpy as np
from mpi4py import MPI
from repast4py import context, core, random
from workloads import DT, GAMMA, KEEP, REACH, WIDTH, I, S, chances

WORLD = MPI.COMM_WORLD
REACH, WIDTH, DT, KEEP = float(REACH), float(WIDTH), float(DT), float(KEEP)


class Particle(core.Agent):
    def __init__(self, number, x, y, vx, vy):
        super().__init__(id=number, type=0, rank=WORLD.rank)
        self.x, self.y, self.vx, self.vy = x, y, vx, vy

    def step(self):
        self.x += self.vx * DT
        self.y += self.vy * DT
        self.vx *= KEEP
        self.vy *= KEEP


def reflect(z):
    z = abs(z)
    return 2 * WIDTH - z if z > WIDTH else z


class Walker(core.Agent):
    def __init__(self, number, x, y):
        super().__init__(id=number, type=0, rank=WORLD.rank)
        self.x, self.y = x, y

    def step(self):
        self.x = reflect(self.x + random.default_rng.uniform(-REACH, REACH))
        self.y = reflect(self.y + random.default_rng.uniform(-REACH, REACH))


class Person(core.Agent):
    def __init__(self, number, state):
        super().__init__(id=number, type=0, rank=WORLD.rank)
        self.state = state

    def step(self, p):
        u = random.default_rng.random()
        if self.state == S:
            if u < p:
                self.state = I
        elif self.state == I and u < GAMMA:
            self.state += 1


class Population:
    kind, names = core.Agent, ()

    def __init__(self, *columns, cores):
        random.init(1 + WORLD.rank)
        self.context = context.SharedContext(WORLD)
        for number, values in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            self.context.add(self.kind(number, *values))

    def step(self, steps):
        for _ in range(steps):
            for agent in self.context.agents():
                agent.step()

    def columns(self):
        agents = list(self.context.agents())
        return tuple(np.array([getattr(agent, name) for agent in agents]) for name in self.names)


class Integrate(Population):
    kind, names = Particle, ("x", "y", "vx", "vy")


class Walk(Population):
    kind, names = Walker, ("x", "y")


class Sir(Population):
    kind, names = Person, ("state",)

    def __init__(self, state, cores):
        super().__init__(state, cores=cores)
        self.rows = WORLD.allreduce(len(state))

    def step(self, steps):
        for _ in range(steps):
            infectious = WORLD.allreduce(sum(agent.state == I for agent in self.context.agents()))
            p, _ = chances(infectious, self.rows)
            for agent in self.context.agents():
                agent.step(p)

    def columns(self):
        return (super().columns()[0].astype(np.uint8),)
