"""mesa-frames: Mesa's agents as a Polars data frame.

Its shorthand `agents["x"] = …` joins the frame with itself at each assignment and takes many times as long as
replacing the frame, which is what these do.
"""

import numpy as np
import polars as pl
from mesa_frames import AgentSetPolars, ModelDF
from workloads import DT, GAMMA, KEEP, REACH, WIDTH, I, S, chances

REACH, WIDTH = float(REACH), float(WIDTH)


class Agents(AgentSetPolars):
    def __init__(self, model, **columns):
        super().__init__(model)
        rows = len(next(iter(columns.values())))
        self += pl.DataFrame({"unique_id": np.arange(rows), **columns})

    def draw(self):
        """Return a uniform number for each agent, of the model's own NumPy generator."""
        return pl.Series(self.random.random(len(self), dtype=np.float32))


class Particles(Agents):
    def step(self):
        self.agents = self.agents.with_columns(
            pl.col("x") + pl.col("vx") * DT,
            pl.col("y") + pl.col("vy") * DT,
            pl.col("vx") * KEEP,
            pl.col("vy") * KEEP,
        )


class Walkers(Agents):
    def step(self):
        moved = {}
        for name in ("x", "y"):
            z = (pl.col(name) + REACH * (2 * self.draw() - 1)).abs()
            moved[name] = pl.min_horizontal(z, 2 * WIDTH - z)
        self.agents = self.agents.with_columns(**moved)


class People(Agents):
    def step(self):
        state = pl.col("state")
        p, _ = chances(self.agents.select((state == I).sum()).item(), len(self))
        u = self.draw()
        moves = ((state == S) & (u < p)) | ((state == I) & (u < GAMMA))
        self.agents = self.agents.with_columns(state + moves.cast(pl.UInt8))


class Population:
    kind, names = Agents, ()

    def __init__(self, *columns, cores):
        self.model = ModelDF(seed=1)
        self.model.agents += self.kind(self.model, **dict(zip(self.names, columns, strict=True)))

    def step(self, steps):
        for _ in range(steps):
            self.model.agents.step()

    def columns(self):
        frame = self.model.get_agents_of_type(self.kind).agents
        return tuple(frame[name].to_numpy() for name in self.names)


class Integrate(Population):
    kind, names = Particles, ("x", "y", "vx", "vy")


class Walk(Population):
    kind, names = Walkers, ("x", "y")


class Sir(Population):
    kind, names = People, ("state",)
