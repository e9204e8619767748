"""A plane on each rank for tests: the drills' model, with every kind of phase, that fails on demand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import rustsim_hpc as rs
from rustsim_hpc.job.plan import rank_part
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.ranks.team import SoloTeam, Team

MODEL = Path(__file__).parents[1] / "drills/drill_model.py"
SEED = 7
AGENTS = 50
STEPS = 4


class RankPlane:
    """This rank's plane, the rows it holds and what runs them."""

    def __init__(
        self,
        team: Team,
        agents: int = AGENTS,
        *,
        partitions: int | None = None,
        executor: Any = None,
        kind: str | None = None,
        replay: rs.ReplayMode | None = None,
        **config: Any,
    ) -> None:
        self.team = team
        loaded, reference = load_model(str(MODEL))
        self.model = BoundModel(loaded, {}, seed=SEED, agents=agents, reference=reference)
        self.model.share_tables(team)
        count = min(partitions or team.size, max(agents, 1))
        part = rank_part(agents, count, team.size, team.rank)
        self.rows = range(part.row_start, part.row_stop)
        memory = kind or ("shared" if team.size > 1 else "heap")
        store = self.model.new_store(part.row_start, part.row_stop, memory)  # type: ignore[arg-type]
        config.setdefault("fingerprint", "digest")
        self.plane = rs.EngineControlPlane(
            rs.ColumnarRuntime(store, team=team),
            rs.ControlPlaneConfig(
                replay_mode=replay or rs.ReplayMode.record(),
                partition_plan=rs.PartitionPlan.row_ranges(agents, count),
                **config,
            ),
        )
        self.plane.add_model(self.model)
        self.executor = executor or rs.InlinePartitionExecutor()

    def run(self, steps: int = STEPS) -> RankPlane:
        self.plane.run_partitions_with_executor(steps, self.executor)
        return self

    @property
    def stream(self) -> list[tuple[int, int]]:
        return [(entry.step_index, entry.value) for entry in self.plane.recorded_replay()]

    @property
    def bits(self) -> bytes:
        store = self.plane.runtime.device_store()
        return b"".join(np.ascontiguousarray(column).tobytes() for column in store.columns)

    def everything(self) -> tuple[Any, ...]:
        """All that a step that fails must leave as it is."""
        metrics = self.plane.metrics()
        return self.bits, self.plane.runtime.step_index, self.stream, metrics, self.plane.fingerprint()


@cache
def alone(agents: int = AGENTS, scheme: str = "digest", steps: int = STEPS) -> RankPlane:
    """The same job in one process: what every cut has to give."""
    return RankPlane(SoloTeam(), agents, fingerprint=scheme).run(steps)
