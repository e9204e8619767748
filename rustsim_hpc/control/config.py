"""Configuration of a control plane: replay, checkpoints, partitions, workers, guard, fingerprint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rustsim_hpc.control.checkpoint import CheckpointPolicy
from rustsim_hpc.errors import InvalidConfig, PlanError, whole_number
from rustsim_hpc.errors import PartitionPlanError as BarePlanError
from rustsim_hpc.proof.fingerprint import check_scheme
from rustsim_hpc.proof.replay import ReplayMode
from rustsim_hpc.state.partition import PartitionPlan, PartitionWorker, validate_workers


@dataclass(frozen=True)
class StepGuard:
    """What a failed step leaves: the state before it (rollback), or one that must be restored (torn)."""

    kind: str

    @classmethod
    def rollback(cls) -> StepGuard:
        """Write each column to a second buffer and swap on commit: a failed step has changed nothing."""
        return cls("rollback")

    @classmethod
    def torn(cls) -> StepGuard:
        """Work in place, without second buffers: after a failed step only a restore is accepted."""
        return cls("torn")

    @property
    def two_sided(self) -> bool:
        """Whether steps write to the columns' other side."""
        return self.kind == "rollback"


@dataclass(frozen=True)
class ControlPlaneConfig:
    """Configuration of a control plane.

    Attributes:
        replay_mode: record fingerprints, verify against recorded ones, or neither.
        checkpoint_policy: when checkpoints are made automatically.
        max_retained_checkpoints: how many stay in memory; the oldest is dropped first.
        partition_plan: which rows form which partition.
        partition_workers: the workers that the plan's labels refer to.
        guard: what a failed step leaves.
        fingerprint: "fnv1a" (the reference's value, serial) or "digest" (a sum, at memory speed).
    """

    replay_mode: ReplayMode = field(default_factory=ReplayMode.off)
    checkpoint_policy: CheckpointPolicy = field(default_factory=CheckpointPolicy.disabled)
    max_retained_checkpoints: int = 4
    partition_plan: PartitionPlan = field(default_factory=PartitionPlan.single_process)
    partition_workers: tuple[PartitionWorker, ...] = ()
    guard: StepGuard = field(default_factory=StepGuard.rollback)
    fingerprint: str = "fnv1a"

    def __post_init__(self) -> None:
        workers: Any = self.partition_workers
        if not isinstance(workers, Iterable):
            raise InvalidConfig(f"partition_workers must be PartitionWorkers, got {workers!r}")
        object.__setattr__(self, "partition_workers", tuple(workers))


def validate_config(config: ControlPlaneConfig, agent_count: int) -> None:
    """Check a configuration against a population.

    Raises:
        InvalidConfig: fields of wrong types, numbers out of range, duplicate worker labels, an unknown
            scheme or guard.
        PlanError: the plan does not fit the population.
        MissingPartitionWorker: the plan names a worker that is not registered.
    """
    if not isinstance(config, ControlPlaneConfig):
        raise InvalidConfig(f"expected a ControlPlaneConfig, got {type(config).__name__}")
    _check_types(config)
    if whole_number("max_retained_checkpoints", config.max_retained_checkpoints, signed=True) < 1:
        raise InvalidConfig("max_retained_checkpoints must be greater than zero")
    interval = config.checkpoint_policy.interval_steps
    if interval is not None and whole_number("checkpoint interval_steps", interval, signed=True) < 1:
        raise InvalidConfig("checkpoint interval_steps must be greater than zero")
    if config.guard.kind not in ("rollback", "torn"):
        raise InvalidConfig(f'unknown step guard "{config.guard.kind}"', hint="use rollback or torn")
    check_scheme(config.fingerprint)
    validate_plan(config.partition_plan, agent_count)
    validate_workers(config.partition_plan, config.partition_workers)


def _check_types(config: ControlPlaneConfig) -> None:
    wanted: dict[str, type] = {
        "replay_mode": ReplayMode,
        "checkpoint_policy": CheckpointPolicy,
        "partition_plan": PartitionPlan,
        "guard": StepGuard,
        "fingerprint": str,
    }
    for name, kind in wanted.items():
        value = getattr(config, name)
        if not isinstance(value, kind):
            raise InvalidConfig(f"{name} must be a {kind.__name__}, got {value!r}")
    for worker in config.partition_workers:
        if not isinstance(worker, PartitionWorker):
            raise InvalidConfig(f"partition_workers must be PartitionWorkers, got {worker!r}")


def validate_plan(plan: PartitionPlan, agent_count: int) -> None:
    """Raise PlanError unless a plan covers a population exactly."""
    try:
        plan.validate(agent_count)
    except BarePlanError as error:
        raise PlanError(error) from error
