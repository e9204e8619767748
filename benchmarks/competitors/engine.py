"""This engine: models of models/, with the rollback guard, inline or on threads, or inline on ranks."""

from pathlib import Path

import numpy as np

from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.ranks.team import open_team

MODELS = Path(__file__).parents[1] / "models"


class Model:
    name, replay = "", "off"

    def __init__(self, *columns, cores):
        team = open_team()
        rows = int(team.sum_int64(np.array([len(columns[0])]))[0])
        workers = cores // team.size
        setup = Setup(
            str(MODELS / f"{self.name}.py"),
            rows,  # of all ranks; each makes its own first columns, the same as those given
            "threads" if workers > 1 else "inline",
            workers,
            replay=self.replay,
            params={"agents": rows} if self.name == "sir" else {},
        )
        self.engine = Engine(setup, team)

    def step(self, steps):
        self.engine.step(steps)

    def columns(self):
        return tuple(self.engine.plane.runtime.device_store().columns)


class Integrate(Model):
    name = "integrate"


class Walk(Model):
    name = "walk"


class Sir(Model):
    name = "sir"
