"""A model under the engine, set up in one of the ways of a run, and stepped without a run around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rustsim_hpc.control.config import ControlPlaneConfig, StepGuard
from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.control.runtime import ColumnarRuntime
from rustsim_hpc.executors.base import Executor
from rustsim_hpc.executors.inline import InlinePartitionExecutor
from rustsim_hpc.executors.processes import ProcessPartitionExecutor
from rustsim_hpc.executors.threads import LocalThreadedPartitionExecutor
from rustsim_hpc.job.plan import rank_part
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.proof.replay import ReplayMode
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.state.backing import Kind
from rustsim_hpc.state.partition import PartitionPlan


@dataclass(frozen=True)
class Setup:
    """How the engine is set up.

    module: the model. rows: of all ranks. executor and workers: of a rank. guard: rollback or torn. replay:
    off, digest or fnv1a. params: values that are not the model's defaults.
    """

    module: str
    rows: int
    executor: str = "inline"
    workers: int = 1
    guard: str = "rollback"
    replay: str = "off"
    params: Mapping[str, Any] = field(default_factory=dict)


class Engine:
    """A plane on a model of its own state; a context manager that lets go of threads and processes."""

    def __init__(self, setup: Setup, team: Team | None = None) -> None:
        team = team or SoloTeam()
        model, reference = load_model(setup.module)
        bound = BoundModel(model, setup.params, seed=1, agents=setup.rows, reference=reference)
        bound.share_tables(team)
        partitions = setup.workers * team.size
        part = rank_part(setup.rows, partitions, team.size, team.rank)
        kind: Kind = "shared" if setup.executor == "processes" or team.size > 1 else "heap"
        store = bound.new_store(part.row_start, part.row_stop, kind)
        recording = setup.replay != "off"
        config = ControlPlaneConfig(
            replay_mode=ReplayMode.record() if recording else ReplayMode.off(),
            partition_plan=PartitionPlan.row_ranges(setup.rows, partitions),
            guard=StepGuard(setup.guard),
            fingerprint=setup.replay if recording else "digest",
            max_retained_checkpoints=1,
        )
        self.plane = EngineControlPlane(ColumnarRuntime(store, team=team), config)
        self.plane.add_model(bound)
        self.executor = _executor(setup)

    def step(self, steps: int) -> None:
        """Make steps, one by one."""
        for _ in range(steps):
            self.plane.step_partitions_with_executor(self.executor)
        self.plane.forget_recorded()

    def step_fused(self, steps: int) -> None:
        """Make steps together, a tile of rows at a time."""
        self.plane.step_fused(self.executor, steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.plane.close()
        self.plane.runtime.device_store().memory.close()


def _executor(setup: Setup) -> Executor:
    if setup.executor == "threads":
        return LocalThreadedPartitionExecutor(setup.workers)
    if setup.executor == "processes":
        return ProcessPartitionExecutor(setup.workers)
    return InlinePartitionExecutor()
